"""Refuse command lines that Megatron would refuse late, by a bare assertion, or not at all.

These are mistakes that people do make, so each message names the remedy; what Megatron says of
other mistakes is put into one line by refusals.py.  All checks use the arguments as they were
parsed, before Megatron's validation.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_slm.errors import UserError
from megatron_slm.files import read_json
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.training.data_parts import split_spans

AT_LEAST_ONE = """
    num_layers hidden_size num_attention_heads seq_length micro_batch_size global_batch_size
    train_iters train_samples eval_interval log_interval save_interval make_vocab_size_divisible_by
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size
""".split()
NOT_NEGATIVE = ("eval_iters", "num_workers")
OF_ONE_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
SOURCES = ("data_path", "data_args_path", "per_split_data_args_path", "mock_data")
# Parts of a layer that only Transformer Engine can recompute.
RECOMPUTED_BY_TE = ("layernorm", "mla_up_proj", "moe_act")


class PerSplit(msgspec.Struct):
    """The content of --per-split-data-args-path: prefixes, each after its weight if it has one."""

    train: list[str] | str | None
    """The training datasets."""
    valid: list[str] | str | None
    """The validation datasets."""
    test: list[str] | str | None
    """The test datasets."""


def check_job(args: Namespace) -> None:
    """Check the arguments that training and scoring have in common.

    Raises:
        UserError: some contradict each other; the message says what to do.
    """
    for names, least in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and value < least:
                raise UserError(f"{_flag(name)} {value}: it must be {least} or more")
    _check_data(args)
    _check_formats(args)
    _check_shapes(args)


def check_training(args: Namespace) -> None:
    """Check the arguments that only a training run uses.

    Raises:
        UserError: some contradict each other; the message says what to do.
    """
    _check_needs(args)
    _check_batches(args)
    _check_optimizer(args)
    _check_saving(args)
    _check_validation(args)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_data(args: Namespace) -> None:
    own = [name for name in OF_ONE_SPLIT if getattr(args, name)]
    given = [name for name in SOURCES if getattr(args, name)] + own[:1]
    if len(given) > 1:
        first, second = map(_flag, given[:2])
        raise UserError(f"{first} and {second} name the data twice: give one of them")
    if args.data_args_path and args.split is None:
        raise UserError(
            f"--data-args-path {args.data_args_path} needs --split, the shares of training, "
            "validation and test, such as --split 969,30,1"
        )
    if args.split is not None and (own or args.per_split_data_args_path):
        raise UserError(
            f"--split {args.split} cuts the data of --data-path; {_flag(given[0])} names each part "
            "itself: leave --split out"
        )
    if args.per_split_data_args_path:
        read_json(Path(args.per_split_data_args_path), PerSplit)
    if args.dataloader_type == "external":
        raise UserError(
            "--dataloader-type external: loaders of a script's own are not supported: return "
            "datasets from its provider, and take --dataloader-type single or cyclic"
        )


def _check_formats(args: Namespace) -> None:
    if args.ckpt_format in ("torch_dcp", "fsdp_dtensor"):
        raise UserError(
            f"--ckpt-format {args.ckpt_format} is that of FSDP, which cannot be used with "
            "selective language modeling: leave it out, torch_dist is the default"
        )
    loads = [("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)]
    for load in args.slm_reference_load or []:
        named = load if Path(load).is_dir() else load.partition("=")[2]
        loads.append(("--slm-reference-load", named or None))
    for flag, load in loads:
        if load is not None and _is_hugging_face(Path(load)):
            raise UserError(
                f"{flag} {load} has a Hugging Face model: convert it once, by tools/"
                f"convert_checkpoint.py import --hf {load} --save NEW, and give {flag} NEW"
            )


def _is_hugging_face(directory: Path) -> bool:
    if (directory / TRACKER).exists() or not (directory / "config.json").is_file():
        return False
    return any(any(directory.glob(name)) for name in ("*.safetensors*", "pytorch_model*.bin*"))


def _check_shapes(args: Namespace) -> None:
    heads, groups = args.num_attention_heads, args.num_query_groups
    width = args.kv_channels
    if width is None and heads and args.hidden_size and args.hidden_size % heads == 0:
        width = args.hidden_size // heads
    if width and width % 2 and args.position_embedding_type in ("rope", "yarn"):
        raise UserError(
            f"heads of {width} channels (--kv-channels, or --hidden-size by --num-attention-heads) "
            "cannot be rotated in pairs: take an even number"
        )
    if heads and args.group_query_attention and groups and heads % groups:
        raise UserError(
            f"--num-attention-heads {heads} is not a multiple of --num-query-groups {groups}"
        )
    context, tensor = args.context_parallel_size, args.tensor_model_parallel_size
    pieces = 2 * context if context > 1 else 1
    if args.sequence_parallel and args.seq_length and args.seq_length % (context * tensor):
        raise UserError(
            f"--seq-length {args.seq_length} cannot be shared out by --sequence-parallel: take a "
            f"multiple of {context * tensor} (--tensor-model-parallel-size x "
            "--context-parallel-size)"
        )
    if args.seq_length and args.seq_length % pieces:
        raise UserError(
            f"--seq-length {args.seq_length} cannot be shared out by --context-parallel-size "
            f"{context}: take a multiple of {pieces}, twice that size"
        )


def _check_needs(args: Namespace) -> None:
    """Refuse options that lack another one they need; Megatron would say little or nothing."""
    if args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None:
        raise UserError("--use-checkpoint-args needs --load or --pretrained-checkpoint")
    if args.attention_backend.name == "local":
        raise UserError(
            "--attention-backend local needs --spec local, which is not for this model: leave it "
            "out"
        )
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise UserError(f"--wandb-project {args.wandb_project} needs --wandb-save-dir or --save")
    if args.phase_transition_iterations and args.train_samples is None:
        raise UserError("--phase-transition-iterations needs --train-samples, not --train-iters")


def _check_batches(args: Namespace) -> None:
    stages = args.pipeline_model_parallel_size
    ranks = args.tensor_model_parallel_size * stages * args.context_parallel_size
    replicas, left = divmod(int(os.getenv("WORLD_SIZE", "1")), ranks)
    micro, batch = args.micro_batch_size, args.global_batch_size
    if not micro or not batch or left:  # Megatron refuses it, or fills it in
        return
    number, left = divmod(batch, micro * replicas)
    if left and not args.decrease_batch_size_if_needed:
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro} x "
            f"{replicas} data-parallel ranks"
        )
    layers = args.num_layers_per_virtual_pipeline_stage
    virtual = args.num_virtual_stages_per_pipeline_rank or 1
    if layers and args.num_layers:
        virtual = args.num_layers // (layers * stages)
    if virtual > 1 and args.microbatch_group_size_per_vp_stage is None and number % stages:
        raise UserError(
            f"--global-batch-size {batch} makes {number} micro-batches of each data-parallel rank, "
            f"which virtual pipeline stages need to be a multiple of {stages} "
            "(--pipeline-model-parallel-size)"
        )


def check_packages(args: Namespace) -> None:
    """Check that the packages which some options need are installed.

    Raises:
        UserError: a package is missing.
    """
    for name, value in (
        ("num_distributed_optimizer_instances", args.num_distributed_optimizer_instances > 1),
        ("hierarchical_context_parallel_sizes", args.hierarchical_context_parallel_sizes),
    ):
        if value and find_spec("einops") is None:
            raise UserError(f"{_flag(name)} needs the package einops: pip install einops")
    if not HAVE_TE and args.recompute_granularity == "selective":
        modules = [part for part in args.recompute_modules or () if part in RECOMPUTED_BY_TE]
        if modules:
            raise UserError(
                f"--recompute-modules {modules[0]} needs Transformer Engine, which is not "
                "installed; core_attn and mlp do not"
            )


def _check_optimizer(args: Namespace) -> None:
    optimizer = args.optimizer
    if optimizer not in ("adam", "sgd") and find_spec("emerging_optimizers") is None:
        raise UserError(
            f"--optimizer {optimizer} needs the package emerging-optimizers, which is not "
            "installed; adam and sgd need none"
        )
    if optimizer == "sgd" and args.use_distributed_optimizer:
        raise UserError(
            "--use-distributed-optimizer cannot hold the state of --optimizer sgd: take adam, or "
            "leave --use-distributed-optimizer out"
        )


def _check_saving(args: Namespace) -> None:
    if args.save is not None and args.save_interval is None:
        raise UserError(
            f"--save {args.save} needs --save-interval N, the iterations between checkpoints"
        )
    if args.save is not None and Path(args.save).exists() and not Path(args.save).is_dir():
        raise UserError(f"--save {args.save} is not a directory")
    start = args.load if args.pretrained_checkpoint is None else None
    if start and args.exit_on_missing_checkpoint and not (Path(start) / TRACKER).is_file():
        raise UserError(f"--load {start}: there is no checkpoint ({TRACKER} is missing)")


def _check_validation(args: Namespace) -> None:
    """Refuse what Megatron would only refuse at the first evaluation, after steps of training."""
    if args.eval_interval is None and not args.skip_train:
        raise UserError("--eval-interval N is missing, which Megatron needs without validation too")
    if args.multiple_validation_sets and not args.full_validation:
        raise UserError("--multiple-validation-sets needs --full-validation")
    if args.full_validation:
        _check_full_validation(args)
    if args.validation_set_names and not args.multiple_validation_sets:
        raise UserError(
            "--validation-set-names needs --multiple-validation-sets and --full-validation"
        )
    _check_has_data(args)


def _check_has_data(args: Namespace) -> None:
    """Refuse a run that lacks the data it asks for; without training data, Megatron would silently
    train nothing."""
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is None and per_split is None:  # a script may have datasets of its own
        return
    given: Sequence[object] = per_split or split_spans(args.split or "969,30,1")
    train, valid, test = given
    how = "--split" if per_split is None else "--train-data-path and --valid-data-path"
    if train is None and not args.skip_train:
        raise UserError(f"there is no training data: see {how}; --skip-train validates alone")
    if valid is None and (args.full_validation or args.eval_iters):
        raise UserError(
            f"there is no validation data for --eval-iters {args.eval_iters}: give some with "
            f"{how}, or --eval-iters 0 for none"
        )
    if test is not None and args.full_validation:
        raise UserError(
            "--full-validation: Megatron fails at the end of the run where there is test data: "
            "leave --test-data-path out, or end --split with 0"
        )
    names = args.validation_set_names
    sets = 1 if per_split is None or valid is None else len(per_split[1][0])
    if names and len(names) != sets:
        raise UserError(
            f"--validation-set-names has {len(names)} names, for {sets} validation "
            f"set{'s' * (sets != 1)}"
        )


def _check_full_validation(args: Namespace) -> None:
    if not args.multiple_validation_sets:
        raise UserError("--full-validation needs --multiple-validation-sets, also for a single set")
    size = args.eval_micro_batch_size or args.micro_batch_size or 1
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if size > 1 and ranks > 1:  # the ranks share what one of them has read
        raise UserError(
            f"--full-validation reads one sample at a time, and micro-batches are of {size}: give "
            "--eval-micro-batch-size 1"
        )
