"""Find out what a recipe asks for, by parsing its command line as pretraining does.

A recipe is a shell script that prints its command under DRY_RUN=1.  The files that it names need
not exist, neither data nor tokenizer.  A base checkpoint has to exist only if the recipe takes the
model's shape from it (--use-checkpoint-args).  A reference that does not exist is assumed to have
the policy's size.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_megatron
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.planning.documents import document_length
from megatron_slm.planning.job import FLOAT32, Layout, ReferenceModel, Work
from megatron_slm.reference.checkpoint import ReferenceCheckpoint, open_checkpoint
from megatron_slm.training.command_line.decisions import head_of

MODULE = "megatron_slm.pretrain"
FUSIONS = ("--moe-permute-fusion", "--moe-router-fusion")  # Transformer Engine's; change no plan
LIBRARIES = ("CUDA_", "GLOO_", "NCCL_", "OMP_", "PET_", "PYTORCH_", "TORCH_", "UCX_")


@dataclass(frozen=True)
class LaunchRecipe:
    """What a recipe starts."""

    arguments: list[str]
    """Arguments of megatron_slm.pretrain."""

    ranks: int
    """Number of ranks of the whole job."""


def read_launch_recipe(script: Path, settings: dict[str, str]) -> LaunchRecipe:
    """Run a script under examples/ with DRY_RUN=1 and read the command that it prints.

    Args:
        script: the recipe.
        settings: values of the script's variables that differ from its defaults.

    Raises:
        UserError: the script has no such variable, fails, or prints no command that trains.
    """
    known = _variables(script)
    for name in settings:
        if known and name not in known and not name.startswith(LIBRARIES):
            close = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else "see the top of the script and of launch.sh"
            )
            raise UserError(f"{script} has no variable {name}: {hint}")
    # The plan is for the job that was asked for, not for the one that this may run in.
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
                f"{script} scores with these settings, which takes less than training, since only "
                "the reference is in memory; leave out SCORE and CACHE to plan the training"
            )
    raise UserError(f"DRY_RUN=1 bash {script} prints no command that runs {MODULE}")


def _variables(script: Path) -> set[str]:
    """Return the variables that a script reads, and the scripts beside it that it sources."""
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


def parse(recipe: LaunchRecipe, rank: int, vocabulary: int) -> Namespace:
    """Return the arguments that a rank of the recipe's job has once it has started.

    Args:
        recipe: the job's arguments and number of ranks.
        rank: the rank.
        vocabulary: number of tokens, since the tokenizer may not be available.

    Raises:
        UserError: the job would refuse them.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    from megatron_slm.entry import add_arguments
    from megatron_slm.training.command_line.first_check import TRAINING, first_check
    from megatron_slm.training.command_line.parsing import parse_planned

    words = [word for word in _without_mix(recipe.arguments) if word not in FUSIONS]
    first_check(words, TRAINING)
    with _started_as(rank, recipe.ranks, words):
        args = parse_planned(add_arguments)
    if args.padded_vocab_size is None:
        args.padded_vocab_size = vocab_size_with_padding(vocabulary, args, logging_enabled=False)
    return args


def _without_mix(words: Sequence[str]) -> list[str]:
    """Replace a mix that does not exist yet by a dataset, since Megatron would read the mix's
    file."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-args-path")
    args, others = parser.parse_known_args(words)
    mix = args.data_args_path
    missing = mix is not None and not Path(mix).exists()
    return [*others, "--data-path", mix] if missing else list(words)


@contextmanager
def _started_as(rank: int, ranks: int, words: Sequence[str]) -> Iterator[None]:
    """Make this process look like a rank of a job for the block, and suppress what it prints."""
    command, environment = sys.argv, dict(os.environ)
    sys.argv = [MODULE, *words]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = command
        os.environ.clear()
        os.environ |= environment


def architecture_of(args: Namespace, vocabulary: int) -> Architecture:
    """Return the architecture of the recipe's policy.

    Raises:
        UserError: the model is not a Llama.
    """
    return from_megatron(args, vocabulary, "the recipe")


def reference_checkpoints(args: Namespace) -> list[ReferenceCheckpoint]:
    """Open the checkpoints of --slm-reference-load.

    A checkpoint that does not exist is given the policy's arguments.

    Raises:
        UserError: a checkpoint cannot be read.
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
    """Return the models that score while the policy trains; none with a score cache.

    Raises:
        UserError: a reference is not a Llama, or its checkpoint cannot be read.
    """
    if args.slm_reference is not None:  # a float32 average, and the copy that computes
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
            + (", which does not exist: the policy's size" if checkpoint.arguments is args else ""),
        )
        for checkpoint in reference_checkpoints(args)
    ]


def layout_of(args: Namespace) -> Layout:
    """Return the sizes of the parallel groups."""
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
    )


def work_of(
    args: Namespace, kernels: Literal["plain", "te"], device: Literal["cpu", "cuda"]
) -> Work:
    """Return what a step does.

    Args:
        args: the job's arguments.
        kernels: whose layers are used. "te" implies that Apex is installed, as in NVIDIA's
            containers, so that weight gradients are computed directly in their buffer, including
            the output layer's.
        device: device of the job.
    """
    half = args.bf16 or args.fp16
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
        head=head_of(args),
        backward=getattr(args, "slm_backward", "all"),  # older checkpoints' arguments lack it
        weight_bytes=2 if half else 4,
        gradient_bytes=2 if half and args.grad_reduce_in_bf16 else 4,
        optimizer_bytes=master + sum(dtype.itemsize for dtype in moments),
        kernels=kernels,
        fused_gradients=args.gradient_accumulation_fusion or kernels == "te",
        recompute=recompute or 0,
        device=device,
        document=document_length(args),
    )
