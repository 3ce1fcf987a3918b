"""What a recipe asks for, from its command line, by the parser of pretraining.

A recipe is a shell script that prints its command under DRY_RUN=1.  Nothing it names has to be
there, neither data nor tokenizer; a base only where the recipe takes the model's shape from it
(--use-checkpoint-args).  A reference that is there is taken as it is, another of the policy's size.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_megatron
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.planning.formulas import FLOAT32, Layout, ReferenceModel, Work
from megatron_slm.reference.checkpoint import ReferenceCheckpoint, open_checkpoint

MODULE = "megatron_slm.pretrain"
LIBRARIES = ("CUDA_", "GLOO_", "NCCL_", "OMP_", "PET_", "PYTORCH_", "TORCH_", "UCX_")


@dataclass(frozen=True)
class LaunchRecipe:
    """arguments: of megatron_slm.pretrain.  ranks: of the whole job."""

    arguments: list[str]
    ranks: int


def read_launch_recipe(script: Path, settings: dict[str, str]) -> LaunchRecipe:
    """The command of a script under examples/.

    Args:
        settings: its variables that are to differ from its defaults.

    Raises:
        UserError: it fails, or prints no command that trains.
    """
    known = _variables(script)
    for name in settings:
        if known and name not in known and not name.startswith(LIBRARIES):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "its head, and launch.sh's, list them"
            raise UserError(f"{script} has no variable {name}: {hint}")
    # The cluster is the one that was asked for, not the job in which this runs.
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(script)],
        env=own | settings | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"DRY_RUN=1 bash {script} failed: {done.stderr.strip()}")
    for line in done.stdout.splitlines():
        words = shlex.split(line, comments=True)
        if MODULE in words:
            options = dict(word.split("=", 1) for word in words if "=" in word)
            nodes = options.get("--nnodes", "1").split(":")[-1]
            at = words.index(MODULE)
            return LaunchRecipe(words[at + 1 :], int(nodes) * int(options["--nproc-per-node"]))
        if any(word.endswith("score_reference.py") for word in words):
            raise UserError(
                f"{script} with these settings scores, for which it holds the reference alone and "
                "needs less than training with it: leave SCORE out, and CACHE"
            )
    raise UserError(f"DRY_RUN=1 bash {script} prints no command that runs {MODULE}")


def _variables(script: Path) -> set[str]:
    """Return the variables that a script, and those it sources from beside it, read."""
    found: set[str] = set()
    unread, read = [script], set[Path]()
    while unread:
        path = unread.pop()
        if path in read or not path.is_file():
            continue
        read.add(path)
        text = path.read_text(errors="replace")
        found |= set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-=?]", text))
        found |= set(re.findall(r'"\$\{?([A-Z][A-Z0-9_]*)', text))
        unread += [script.parent / name for name in re.findall(r"source .*?([\w.-]+\.sh)", text)]
    return {name for name in found if not name.startswith(("SLURM_", "BASH_", "SLM_"))}


def parse(recipe: LaunchRecipe, rank: int, vocabulary: int, cpu: bool) -> Namespace:
    """Arguments as rank `rank` has them, after Megatron's own validation.

    Args:
        vocabulary: number of tokens, since the tokenizer may not be here.
        cpu: whether the CPU platform is installed, as it must be where there is no GPU.

    Raises:
        UserError: Megatron refuses them.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    from megatron_slm.entry import add_arguments
    from megatron_slm.training.arguments import validate_arguments
    from megatron_slm.training.first_check import options_in
    from megatron_slm.training.option_checks import check_options

    world = {"RANK": str(rank), "WORLD_SIZE": str(recipe.ranks)}
    before, command = {name: os.environ.get(name) for name in world}, sys.argv
    os.environ |= world
    sys.argv = [MODULE, *recipe.arguments]
    try:
        with redirect_stdout(io.StringIO()):  # all arguments, on rank 0
            args: Namespace = parse_args(partial(add_arguments, cpu=cpu))
            check_options(args, options_in(recipe.arguments))
            if args.use_checkpoint_args:
                _check_shape_is_here(args)
                load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
                load_args_from_checkpoint(args)
            if args.data_args_path is not None and not Path(args.data_args_path).exists():
                # A mix that was not made yet, in the place of which any name of a dataset does.
                args.data_path, args.data_args_path = [args.data_args_path], None
            validate_args(args, {})
        validate_arguments(args)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses the recipe's arguments: {error}") from error
    finally:
        sys.argv = command
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if args.padded_vocab_size is None:
        args.padded_vocab_size = vocab_size_with_padding(vocabulary, args, logging_enabled=False)
    return args


def _check_shape_is_here(args: Namespace) -> None:
    """
    Raises:
        UserError: the model's shape is to come from a checkpoint that is not here.
    """
    places = [place for place in (args.pretrained_checkpoint, args.load) if place is not None]
    if not any((Path(place) / TRACKER).is_file() for place in places):
        raise UserError(
            "the recipe takes the model's shape from its base (--use-checkpoint-args), and there "
            f"is no checkpoint in {' or '.join(places) or 'any directory it names'}: import one "
            "with tools/convert_checkpoint.py, or name it with BASE=DIR"
        )


def architecture_of(args: Namespace, vocabulary: int) -> Architecture:
    """Raises UserError for a model that is no Llama."""
    return from_megatron(args, vocabulary, "the recipe")


def reference_checkpoints(args: Namespace) -> list[ReferenceCheckpoint]:
    """Those of --slm-reference-load; with the policy's arguments where there is none on disk.

    Raises:
        UserError: as open_checkpoint.
    """
    found = []
    for load in args.slm_reference_load or []:
        path = Path(load)
        if "=" in load and not path.exists():  # NAME=DIR, for a dataset
            path = Path(load.partition("=")[2])
        if (path / TRACKER).is_file():
            found.append(open_checkpoint(str(path), args.slm_reference_ckpt_step))
        else:
            found.append(ReferenceCheckpoint(path, args))
    return found


def references_of(args: Namespace, policy: Architecture, work: Work) -> list[ReferenceModel]:
    """What scores beside the policy: none with a score cache.

    Raises:
        UserError: a reference that is no Llama, or as open_checkpoint.
    """
    if args.slm_reference is not None:  # the average in float32, and its copy that computes
        return [ReferenceModel(policy, FLOAT32 + work.weight_bytes, where="moving average")]
    return [
        ReferenceModel(
            from_megatron(
                Namespace(**vars(args) | checkpoint.architecture()),
                policy.vocabulary,
                str(checkpoint.directory),
            ),
            work.weight_bytes,
            streamed=args.slm_reference_offload,
            where=f"{checkpoint.directory}"
            + (", not here: the policy's size" if checkpoint.arguments is args else ""),
        )
        for checkpoint in reference_checkpoints(args)
    ]


def layout_of(args: Namespace) -> Layout:
    """The parallel groups' sizes."""
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
    )


def work_of(
    args: Namespace, kernels: Literal["plain", "te"], device: Literal["cpu", "cuda"]
) -> Work:
    """What a step does.

    Args:
        kernels: "te" also stands for Apex, which NVIDIA's containers have beside it: by it weight
            gradients go straight into their buffer, also the output layer's.
    """
    half = args.bf16 or args.fp16
    reference = args.slm_reference_load or args.slm_reference or args.slm_reference_cache
    selects = args.slm_token_ratio < 1.0 or bool(reference)
    recompute = args.recompute_num_layers if args.recompute_granularity == "full" else 0
    moments: list[Any] = [args.exp_avg_dtype, args.exp_avg_sq_dtype]
    master = args.main_params_dtype.itemsize if half else 0
    return Work(
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        padded_vocabulary=args.padded_vocab_size,
        ratio=args.slm_token_ratio,
        ranks_first=args.slm_global_batch == "exact",
        head=args.slm_head or ("chunked" if selects else "dense"),
        weight_bytes=2 if half else 4,
        gradient_bytes=2 if half and args.grad_reduce_in_bf16 else 4,
        optimizer_bytes=master + sum(dtype.itemsize for dtype in moments),
        kernels=kernels,
        fused_gradients=args.gradient_accumulation_fusion or kernels == "te",
        recompute=recompute or 0,
        device=device,
    )
