"""The checkpoint that a policy starts from: what the run takes over, and what it must agree in.

Megatron 0.19 takes over some of a checkpoint's architecture with --use-checkpoint-args, and without
compares little of it; nothing with --pretrained-checkpoint or --finetune.  Weights of one rotary
base, window or activation load into a model of another without a word.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import NOT_TAKEN_BY_MEGATRON, vocabulary_of
from megatron_slm.model.torch_dist import TRACKER, TorchDistReader, iteration_directory
from megatron_slm.reference.checkpoint import ARCHITECTURE

# Hugging Face's vocabularies may be padded up to this multiple beyond the tokenizer's.
PADDING = 128


def take_from_checkpoint(parser: ArgumentParser) -> None:
    """Make the checkpoint's the defaults of `parser`, if the command line asks for them.

    Raises:
        UserError: a damaged checkpoint.
    """
    asked = ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--use-checkpoint-args", action="store_true")
    asked.add_argument("--load")
    asked.add_argument("--pretrained-checkpoint")
    asked.add_argument("--ckpt-step", type=int)
    args, _ = asked.parse_known_args()
    if not args.use_checkpoint_args:
        return
    start = _start(args)
    if start is not None:
        saved = vars(TorchDistReader(start[1]).arguments)
        parser.set_defaults(
            **{name: saved[name] for name in NOT_TAKEN_BY_MEGATRON if name in saved}
        )


def check_start(args: Namespace) -> None:
    """Compare the model that the arguments describe with the one in the checkpoint.

    Sets what checkpoints carry of the model that the run started from: slm_model_vocab_size, its
    tokens, of which the tokenizer may have fewer, and slm_model_type.

    Raises:
        UserError: naming every option that differs, or a damaged checkpoint.
    """
    args.slm_model_vocab_size = args.slm_vocab_size
    unknown = set(args.slm_changed) - {*ARCHITECTURE, "vocab_size"}
    if unknown:
        raise UserError(f"--slm-changed: {', '.join(sorted(unknown))} shapes no model")
    start = _start(args)
    if start is None or not (start[1] / ".metadata").is_file():  # a format of Megatron's own
        return
    flag, directory = start
    saved = TorchDistReader(directory).arguments
    args.slm_model_type = getattr(saved, "slm_model_type", None)
    differ = differences(saved, args, args.slm_changed)
    if differ:
        said = ", ".join(f"{name} is {there} there and {here} here" for name, there, here in differ)
        raise UserError(
            f"{flag} {directory} has another model than this run's arguments describe: {said}; "
            "take over what the checkpoint has (--use-checkpoint-args does), name another "
            f"checkpoint, or allow what is meant to change with --slm-changed {differ[0][0]}"
        )
    tokens = max(vocabulary_of(saved) or 0, args.slm_vocab_size)
    if tokens <= args.padded_vocab_size:
        args.slm_model_vocab_size = tokens


def differences(
    saved: Namespace, args: Namespace, allowed: Collection[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Names by which two models differ, with their values in `saved` and in `args`.

    What `saved` lacks is not compared, and the vocabulary up to its padding.
    """
    there, here = _shape(vars(saved)), _shape(vars(args))
    found = [
        (name, there[name], here[name])
        for name in ARCHITECTURE
        if name in there and name in here and not _same(there[name], here[name])
    ]
    own = args.slm_vocab_size
    rows = getattr(saved, "padded_vocab_size", None) or own
    tokens = vocabulary_of(saved) or min(own, rows)
    if own > rows or -(-min(tokens, own) // PADDING) * PADDING < tokens:
        found.append(("vocab_size", tokens, f"{own} (the tokenizer)"))
    return [one for one in found if one[0] not in allowed]


def _start(args: Namespace) -> tuple[str, Path] | None:
    """The option and the directory of the checkpoint that Megatron will load; None without one."""
    for flag, load in (
        ("--load", args.load),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if load is not None and (Path(load) / TRACKER).is_file():
            return flag, iteration_directory(Path(load), args.ckpt_step, flag, "--ckpt-step")
    return None


def _shape(arguments: dict[str, Any]) -> dict[str, Any]:
    """What shapes a model, without what has no effect in it."""
    shape = {name: arguments[name] for name in ARCHITECTURE if name in arguments}
    if not shape.pop("group_query_attention", True):
        shape["num_query_groups"] = shape.get("num_attention_heads")
    if shape.get("position_embedding_type") != "learned_absolute":
        shape.pop("max_position_embeddings", None)
    if not shape.get("use_rope_scaling"):
        shape.pop("rope_scaling_factor", None)
    return shape


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other) or not (one or other)  # None, False and 0 mean the same
