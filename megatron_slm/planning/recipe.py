"""Find out what a recipe asks for, by parsing its command line as pretraining does.

The files that it names need not exist, neither data nor tokenizer.  A base checkpoint has to exist
only if the recipe takes the model's shape from it (--use-checkpoint-args).  A reference that does
not exist is assumed to have the policy's size.
"""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Literal

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_megatron
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.planning.documents import document_length
from megatron_slm.planning.job import FLOAT32, Layout, ReferenceModel, Work
from megatron_slm.planning.launch_recipe import MODULE, LaunchRecipe
from megatron_slm.reference.checkpoint import ReferenceCheckpoint, open_checkpoint
from megatron_slm.training.command_line.decisions import head_of

FUSIONS = ("--moe-permute-fusion", "--moe-router-fusion")  # Transformer Engine's; change no plan
# Stages that are not all of one size, which the formulas do not know: flag, and argument.
UNEVEN = {
    "--pipeline-model-parallel-layout": "pipeline_model_parallel_layout",
    "--decoder-first-pipeline-num-layers": "decoder_first_pipeline_num_layers",
    "--decoder-last-pipeline-num-layers": "decoder_last_pipeline_num_layers",
    "--account-for-embedding-in-pipeline-split": "account_for_embedding_in_pipeline_split",
    "--account-for-loss-in-pipeline-split": "account_for_loss_in_pipeline_split",
}


def parse(recipe: LaunchRecipe, rank: int, vocabulary: int) -> Namespace:
    """Return the arguments that a rank of the recipe's job has once it has started.

    Args:
        recipe: the job's arguments and number of ranks.
        rank: the rank.
        vocabulary: number of tokens, since the tokenizer may not be available; used if the
            arguments do not say.

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
        args.padded_vocab_size = vocab_size_with_padding(
            args.vocab_size or vocabulary, args, logging_enabled=False
        )
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
    """Return the sizes of the parallel groups.

    Raises:
        UserError: the pipeline's stages differ in size.
    """
    for flag, name in UNEVEN.items():
        if getattr(args, name):
            raise UserError(
                f"{flag}: memory and time are estimated for stages of equal size only; --dry-run "
                "builds a rank of any stage"
            )
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size if args.num_experts else 1,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        optimizer_instances=args.num_distributed_optimizer_instances,
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
    together, share = _recomputed(args)
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
        gradient_bytes=2 if half and not args.accumulate_allreduce_grads_in_fp32 else 4,
        optimizer_bytes=_optimizer_bytes(args),
        kernels=kernels,
        fused_gradients=args.gradient_accumulation_fusion or kernels == "te",
        recompute=together,
        recomputed=share,
        device=device,
        document=document_length(args),
    )


def _recomputed(args: Namespace) -> tuple[int, float]:
    """Return how many layers are recomputed together, and the share of the layers that are.

    By the method "block", the first layers of each virtual stage are, each by itself.
    """
    if args.recompute_granularity != "full":
        return 0, 1.0
    if args.recompute_method != "block":
        return args.recompute_num_layers, 1.0
    virtual = args.virtual_pipeline_model_parallel_size or 1
    of_stage = args.num_layers / (args.pipeline_model_parallel_size * virtual)
    return 1, min(1.0, args.recompute_num_layers / of_stage)


def _optimizer_bytes(args: Namespace) -> int:
    """Return the bytes on the device of a parameter's optimizer states."""
    if args.optimizer == "sgd":
        moments = FLOAT32 * (args.sgd_momentum > 0)
    else:
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    master = args.main_params_dtype.itemsize if args.bf16 or args.fp16 else 0
    if args.use_precision_aware_optimizer and args.bf16 and not args.optimizer_cpu_offload:
        master = min(master, 2)  # of float32, only the half that a weight in bf16 does not have
    on_host = args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0
    return round((master + moments) * (1.0 - on_host))


def not_counted(args: Namespace) -> list[str]:
    """Return the options of a job that change its memory or FLOPs, but not the formulas'."""
    modules = set(args.recompute_modules or ()) - {"core_attn"}
    found = {
        "--fp8-format": args.fp8,
        "--fp4-format": args.fp4,
        "--recompute-modules": args.recompute_granularity == "selective" and modules,
        "--distribute-saved-activations": args.distribute_saved_activations,
        "--cpu-offloading-num-layers": args.cpu_offloading_num_layers,
        "--fine-grained-activation-offloading": args.fine_grained_activation_offloading,
        f"--optimizer {args.optimizer}": args.optimizer not in ("adam", "sgd"),
        "--step-batch-size-schedule": args.step_batch_size_schedule,
    }
    return [flag for flag, value in found.items() if value]
