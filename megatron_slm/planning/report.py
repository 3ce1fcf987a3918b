"""Compose the report of tools/plan.py about a recipe."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice

from megatron_slm.model.architecture import Architecture
from megatron_slm.model.documents import packs_documents
from megatron_slm.planning.cluster import Cluster, Plan, best_plans, plan
from megatron_slm.planning.formulas import Memory, all_to_all_bytes, bubble, memory, step_flops
from megatron_slm.planning.job import Layout, ReferenceModel, Work
from megatron_slm.planning.launch_recipe import LaunchRecipe
from megatron_slm.planning.models import TINYLLAMA
from megatron_slm.planning.parameters import active_parameters, parameters
from megatron_slm.planning.recipe import (
    architecture_of,
    layout_of,
    not_counted,
    parse,
    references_of,
    work_of,
)

GIB = 2**30


def report(args: Namespace, recipe: LaunchRecipe) -> str:
    """Return the report on a recipe: FLOPs, memory by pipeline stage, time, and faster layouts.

    Args:
        args: command line of tools/plan.py.
        recipe: what the recipe starts.

    Raises:
        UserError: the job would refuse its arguments, a model is not a Llama, or stages differ in
            size.
    """
    megatron = parse(recipe, 0, args.vocabulary)
    model = architecture_of(megatron, args.vocabulary)
    layout, work = layout_of(megatron), work_of(megatron, args.kernels, "cuda")
    references = references_of(megatron, model, work)
    scoring = [reference.architecture for reference in references]
    cluster = Cluster(
        gpus=recipe.ranks,
        gpus_per_node=args.gpus_per_node,
        memory=args.gpu_memory * 1e9,
        flops=args.gpu_tflops * 1e12,
        efficiency=args.efficiency,
        memory_bandwidth=args.memory_bandwidth * 1e9,
        node_bandwidth=args.node_bandwidth * 1e9,
        network_bandwidth=args.network_bandwidth * 1e9,
    )
    own = plan(model, references, layout, work, cluster)
    best = (
        one
        for one in best_plans(model, references, work, layout.cp, cluster)
        if shape(one) != shape(own)
    )
    tokens = (megatron.train_samples or megatron.train_iters * work.global_batch) * work.sequence
    text = [
        *assumptions(args, cluster),
        *attention_within(megatron, work),
        *exchanged_within(layout),
        *uncounted(megatron),
        "",
        report_line("vocabulary, with padding", f"{work.padded_vocabulary:,}"),
        size_line("parameters", model, work),
        *(
            size_line("reference", one.architecture, work) + f"\n  {one.where}"
            for one in references
        ),
        report_line("FLOPs of a step, 1e15", f"{step_flops(model, scoring, work) / 1e15:.1f}"),
        *cost_of_selection(model, scoring, work),
        *traffic_of_experts(model, scoring, layout, work),
        "",
        *memory_by_stage(model, references, layout, work),
        "",
        row(
            f"{tokens / 1e9:.2f}B tokens",
            ("GiB", "bubble", "s a step", "Gtok/day", "days", "GPU hours"),
        ),
        described(own, tokens, cluster) + "  recipe",
        *(described(one, tokens, cluster) for one in islice(best, args.layouts)),
    ]
    return "\n".join(text)


def assumptions(args: Namespace, cluster: Cluster) -> Iterator[str]:
    """Yield the lines that say what the figures are based on."""
    yield (
        f"{args.recipe.name} on {cluster.gpus} GPUs, {cluster.gpus_per_node} a node, of "
        f"{args.gpu_memory:g} GB; formulas, not measurements."
    )
    yield (
        f"A GPU: {args.gpu_tflops:g} TFLOP/s at peak, of which matrix products reach "
        f"{args.efficiency:.0%}; {args.memory_bandwidth:g} GB/s to its memory,"
    )
    yield (
        f"{args.node_bandwidth:g} GB/s within a node, {args.network_bandwidth:g} GB/s between "
        f"nodes; {cluster.latency * 1e6:g} us a collective."
    )
    layers = "Transformer Engine's, with Apex" if args.kernels == "te" else "of plain torch"
    yield f"Layers: {layers}.  --help lists the flags that change these."


def attention_within(megatron: Namespace, work: Work) -> Iterator[str]:
    """Yield a line that says over how many tokens attention reaches, in runs of packed samples."""
    if work.document is not None:
        yield f"Documents do not see each other: {work.document:,.0f} tokens, the mean over tokens."
    elif packs_documents(megatron):
        yield "Documents do not see each other, but their lengths are not known: taken as samples."


def exchanged_within(layout: Layout) -> Iterator[str]:
    """Yield a line about the traffic of context-parallel ranks, if there are several."""
    if layout.cp > 1:
        yield "Context-parallel ranks exchange keys and values during attention, taken to hide it."


def uncounted(megatron: Namespace) -> Iterator[str]:
    """Yield a line that names the options whose effect is not in the figures, if there are any."""
    if flags := not_counted(megatron):
        yield f"Not in these figures: what {', '.join(flags)} changes."


def report_line(name: str, *values: object) -> str:
    """Format a row of the report."""
    return f"{name:<44}" + "  ".join(f"{value!s:>10}" for value in values)


def size_line(name: str, model: Architecture, work: Work) -> str:
    """Return the row of a model's parameters, with those that a token passes if it has experts."""
    counts = [parameters(model, work.padded_vocabulary)]
    if model.experts is not None:
        counts.append(active_parameters(model, work.padded_vocabulary))
    of = ", billions" if model.experts is None else ", billions; of a token"
    return report_line(name + of, *(f"{count / 1e9:.3f}" for count in counts))


def traffic_of_experts(
    model: Architecture, scoring: Sequence[Architecture], layout: Layout, work: Work
) -> Iterator[str]:
    """Yield a line about what a rank sends to the experts of others, if any model has experts."""
    if any(one.experts is not None for one in (model, *scoring)):
        sent = all_to_all_bytes(model, scoring, layout, work)
        yield report_line("all-to-all of a step, GB that a rank sends", f"{sent / 1e9:.1f}")


def cost_of_selection(
    model: Architecture, scoring: Sequence[Architecture], work: Work
) -> Iterator[str]:
    """Yield the FLOPs of an SLM step relative to a CLM step: for the recipe itself, for an online
    reference of the policy's size and one of TinyLlama's, and for a score cache."""
    clm = step_flops(model, [], replace(work, ratio=1.0, head="dense", ranks_first=False))
    selecting = replace(work, head="chunked", ranks_first=False)
    yield report_line(
        "SLM / CLM step, the recipe's", f"{step_flops(model, scoring, work) / clm:.2f}"
    )
    for one in dict.fromkeys((model, TINYLLAMA)):
        size = parameters(one, work.padded_vocabulary) / 1e9
        ratio = step_flops(model, [one], selecting) / clm
        yield report_line(f"SLM / CLM step, reference online, {size:.1f}B", f"{ratio:.2f}")
    yield report_line("SLM / CLM step, cached", f"{step_flops(model, [], selecting) / clm:.2f}")


def memory_by_stage(
    model: Architecture, references: Sequence[ReferenceModel], layout: Layout, work: Work
) -> Iterator[str]:
    """Yield the table of memory by part for the first, the middle and the last pipeline stage."""
    stages = sorted({0, layout.pp // 2, layout.pp - 1})
    held = [memory(model, references, layout, work, stage) for stage in stages]
    yield report_line("memory of a rank, GiB, by pipeline stage", *stages)
    for part in fields(Memory):
        yield report_line(f"  {part.name}", *(f"{getattr(m, part.name) / GIB:.2f}" for m in held))
    yield report_line("  total", *(f"{m.total / GIB:.2f}" for m in held))


def shape(one: Plan) -> tuple[Layout, int, int, float]:
    """Return what distinguishes layouts: parallel sizes, micro-batch and recomputation."""
    groups = replace(
        one.layout, sequence_parallel=False, distributed_optimizer=False, optimizer_instances=1
    )
    return groups, one.work.micro_batch, one.work.recompute, one.work.run_again


def described(one: Plan, tokens: int, cluster: Cluster) -> str:
    """Format the row of a layout."""
    parts, days = one.layout, one.days(tokens)
    what = f"TP{parts.tp} PP{parts.pp} VP{parts.vp} CP{parts.cp} DP{parts.dp}"
    what += f" EP{parts.ep}" * (parts.ep > 1) + f" ETP{parts.etp}" * (parts.ep > 1 < parts.etp)
    what += f" MB{one.work.micro_batch}" + " recompute" * (one.work.recompute > 0)
    figures = (
        f"{one.memory.total / GIB:.1f}",
        f"{bubble(parts, one.work):.1%}",
        f"{one.seconds:.2f}",
        f"{one.tokens_per_day / 1e9:.2f}",
        f"{days:.2f}",
        f"{days * 24 * cluster.gpus:,.0f}",
    )
    return row(what, figures)


def row(name: str, figures: Sequence[str]) -> str:
    """Format a row of the table of layouts."""
    widths = (8, 8, 9, 9, 8, 11)
    columns = zip(figures, widths, strict=True)
    return f"{name:<38}" + "".join(f"{figure:>{width}}" for figure, width in columns)


def build_ranks(args: Namespace, recipe: LaunchRecipe) -> Iterator[str]:
    """Build the ranks that --dry-run names, and yield a line about each.

    Raises:
        UserError: the job would fail at its start.
    """
    from megatron_slm.planning.dry_run import dry_run

    for rank in args.dry_run:
        built = dry_run(recipe, rank, args.vocabulary)
        where = " ".join(f"{name}{number}" for name, number in built.position.items())
        yield (
            f"rank {rank} of {recipe.ranks} ({where}): policy of {built.policy:,} parameters in "
            f"{built.chunks} chunks, reference of {built.reference:,}: built, "
            + ("shapes meet" if built.passed else "shapes not checked, as only a GPU could")
        )
