"""What a recipe takes on a cluster, before it is started: memory, FLOPs, time, and better layouts.

    python tools/plan.py examples/pretrain_slm_7b.sh
    python tools/plan.py examples/pretrain_slm_7b.sh NODES=16 --gpu-memory 141

Memory and FLOPs are by formula (megatron_slm/planning/formulas.py), times from them, the GPU's peak
and --efficiency.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields, replace
from pathlib import Path

import torch

from megatron_slm.errors import UserError, exit_on_user_error

GIB = 2**30


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", type=Path, help="A script that prints its command under DRY_RUN=1.")
    add("settings", nargs="*", metavar="NAME=VALUE", help="The script's variables.")
    add("--vocab-size", dest="vocabulary", type=int, default=32000, metavar="N")
    add("--gpus-per-node", type=int, default=8, metavar="N")
    add("--gpu-memory", type=float, default=80, metavar="GB", help="Default: 80.")
    add(
        "--gpu-tflops", type=float, default=989, metavar="N", help="Peak, bf16. Default: an H100's."
    )
    add("--efficiency", type=float, default=0.5, help="What products reach of it. Default: 0.5.")
    add("--node-bandwidth", type=float, default=450, metavar="GB/s", help="Of a GPU. Default: 450.")
    add("--network-bandwidth", type=float, default=50, metavar="GB/s", help="Default: 50.")
    add("--kernels", choices=("te", "plain"), default="te", help="Layers. Default: te.")
    add("--layouts", type=int, default=5, metavar="N", help="How many to propose. Default: 5.")
    return parser


def report(args: Namespace, cpu: bool) -> str:
    """The whole report."""
    from megatron_slm.planning import recipe as recipes
    from megatron_slm.planning.cluster import Cluster, Plan, best_plans, plan
    from megatron_slm.planning.formulas import bubble, memory, parameters, step_flops
    from megatron_slm.planning.models import TINYLLAMA

    settings = dict(setting.split("=", 1) for setting in args.settings)
    recipe = recipes.read_recipe(args.recipe, settings)
    megatron = recipes.parse(recipe, 0, args.vocabulary, cpu)
    model = recipes.architecture_of(megatron, args.vocabulary)
    layout, work = recipes.layout_of(megatron), recipes.work_of(megatron, args.kernels, "cuda")
    reference = model if megatron.slm_reference_load is not None else None
    cluster = Cluster(
        gpus=recipe.ranks,
        gpus_per_node=args.gpus_per_node,
        memory=args.gpu_memory * 1e9,
        flops=args.gpu_tflops * 1e12,
        efficiency=args.efficiency,
        node_bandwidth=args.node_bandwidth * 1e9,
        network_bandwidth=args.network_bandwidth * 1e9,
    )

    def line(name: str, *values: object) -> str:
        return f"{name:<44}" + "  ".join(f"{value!s:>10}" for value in values)

    def described(one: Plan) -> str:
        parts = one.layout
        total = one.memory.total / GIB
        what = f"TP{parts.tp} PP{parts.pp} VP{parts.vp} CP{parts.cp} DP{parts.dp}"
        what += f" micro-batch {one.work.micro_batch}" + (
            " recompute" if one.work.recompute else ""
        )
        idle = f"{bubble(parts, one.work):.1%}"
        return line(
            what, f"{total:.1f}", idle, f"{one.seconds:.2f}", f"{one.tokens_per_day / 1e9:.2f}"
        )

    clm = step_flops(model, None, replace(work, ratio=1.0, head="dense"))
    ratios = {
        f"online, of {parameters(one, work.padded_vocabulary) / 1e9:.1f}B": one
        for one in (model, TINYLLAMA)
    } | {"cached": None}
    stages = sorted({0, layout.pp // 2, layout.pp - 1})
    by_stage = [memory(model, reference, layout, work, stage) for stage in stages]
    text = [
        line("parameters, billions", f"{parameters(model, work.padded_vocabulary) / 1e9:.3f}"),
        line("FLOPs of a step, 1e15", f"{step_flops(model, reference, work) / 1e15:.1f}"),
        *(
            line(
                f"SLM step / CLM step, reference {name}",
                f"{step_flops(model, one, work) / clm:.2f}",
            )
            for name, one in ratios.items()
        ),
        "",
        line("memory of a rank, GiB, by pipeline stage", *stages),
        *(
            line(f"  {part.name}", *(f"{getattr(m, part.name) / GIB:.2f}" for m in by_stage))
            for part in fields(by_stage[0])
        ),
        line("  total", *(f"{m.total / GIB:.2f}" for m in by_stage)),
        "",
        line("layout", "GiB", "bubble", "s a step", "Gtok a day"),
        described(plan(model, reference, layout, work, cluster)) + "  the recipe's",
        *map(described, best_plans(model, reference, work, layout.cp, cluster)[: args.layouts]),
    ]
    return "\n".join(text)


def main(arguments: list[str]) -> None:
    """Exit with code 2 on bad input."""
    args = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    cpu = not torch.cuda.is_available()
    with exit_on_user_error():
        for setting in args.settings:
            if "=" not in setting:
                raise UserError(f"{setting}: give the script's variables as NAME=VALUE")
        if cpu:
            from megatron_slm import platform

            platform.install()
        print(report(args, cpu))


if __name__ == "__main__":
    main(sys.argv[1:])
