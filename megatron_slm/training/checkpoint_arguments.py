"""The checkpoint that a policy starts from: what the run takes over, and what it must agree in.

Megatron 0.19 takes over some of a checkpoint's architecture with --use-checkpoint-args, and without
compares little of it; nothing with --pretrained-checkpoint or --finetune.  Weights of one rotary
base, window or activation load into a model of another without a word.
"""

from __future__ import annotations

import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import NOT_TAKEN_BY_MEGATRON, vocabulary_of
from megatron_slm.model.checkpoint_table import FORMAT_FILE
from megatron_slm.model.torch_dist import TRACKER, TorchDistReader, iteration_directory
from megatron_slm.model.unpickling import check_file, refuse_code
from megatron_slm.reference.checkpoint import ARCHITECTURE
from megatron_slm.training.resumed import CHANGES, check_resumed

# Hugging Face's vocabularies may be padded up to this multiple beyond the tokenizer's.
PADDING = 128
STEP = "--ckpt-step"


@dataclass(frozen=True)
class Start:
    """flag, directory: the option that names a checkpoint, and that of its iteration.
    resumes: whether the run goes on where the checkpoint's ended.
    """

    flag: str
    directory: Path
    resumes: bool

    @property
    def iteration(self) -> int:
        """0 for a model that was imported."""
        return int(self.directory.name.removeprefix("iter_").replace("release", "0"))


def take_from_checkpoint(parser: ArgumentParser) -> None:
    """Make the checkpoint's the defaults of `parser`, if the command line asks for them.

    From here on no checkpoint that torch or Megatron reads runs code in this process.

    Raises:
        UserError: a damaged checkpoint.
    """
    refuse_code()
    asked = ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--use-checkpoint-args", action="store_true")
    asked.add_argument("--load")
    asked.add_argument("--pretrained-checkpoint")
    asked.add_argument("--ckpt-step", type=int)
    asked.add_argument("--ckpt-format", default="torch_dist")
    asked.add_argument("--non-persistent-ckpt-type")
    asked.add_argument("--non-persistent-global-ckpt-dir")
    asked.set_defaults(finetune=False)
    args, _ = asked.parse_known_args()
    if not args.use_checkpoint_args:
        return
    # Megatron takes over some of either, and of --load last.
    for load in (None, args.load):
        start = _start(Namespace(**vars(args) | {"load": load}))
        if start is None or not _is_torch_dist(start, args):
            continue
        saved = vars(TorchDistReader(start.directory).arguments)
        if saved.get("spec"):
            raise UserError(
                f"{start.flag} {start.directory} names Python code, {saved['spec']}, that "
                "--use-checkpoint-args would run: give the model's arguments yourself"
            )
        parser.set_defaults(
            **{name: saved[name] for name in NOT_TAKEN_BY_MEGATRON if name in saved}
        )


def check_start(args: Namespace) -> Namespace:
    """Check the checkpoint that the run starts from, and compare its model with this run's.

    Sets what checkpoints carry of the model that the run started from: slm_model_vocab_size, its
    tokens, of which the tokenizer may have fewer, and slm_model_type.

    Returns:
        arguments of the run that this one goes on with; empty where it starts afresh.

    Raises:
        UserError: naming every option that differs; a damaged checkpoint, one that would run code,
            or one that this run cannot go on with.
    """
    if args.save is not None:
        _check_save(Path(args.save))
    args.slm_model_vocab_size = args.slm_vocab_size
    unknown = set(args.slm_changed) - {*ARCHITECTURE, "vocab_size", *CHANGES}
    if unknown:
        raise UserError(f"--slm-changed: {', '.join(sorted(unknown))} shapes no model")
    start = _start(args)
    if start is None or not _is_torch_dist(start, args):
        return Namespace()
    reader = TorchDistReader(start.directory)
    saved = reader.arguments
    reader.check_objects()
    where = f"{start.flag} {start.directory}"
    args.slm_model_type = getattr(saved, "slm_model_type", None)
    differ = differences(saved, args, args.slm_changed)
    if differ:
        said = ", ".join(f"{name} is {there} there and {here} here" for name, there, here in differ)
        raise UserError(
            f"{where} has another model than this run's arguments describe: {said}; "
            "take over what the checkpoint has (--use-checkpoint-args does), name another "
            f"checkpoint, or allow what is meant to change with --slm-changed {differ[0][0]}"
        )
    tokens = max(vocabulary_of(saved) or 0, args.slm_vocab_size)
    if tokens <= args.padded_vocab_size:
        args.slm_model_vocab_size = tokens
    if not start.resumes:
        return Namespace()
    check_resumed(args, reader.common_state, where)
    return saved


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


def _check_save(save: Path) -> None:
    """Find out before the first step, and not when hours of them are to be saved.

    Raises:
        UserError: there can be no checkpoints.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save).close()
    except OSError as error:
        raise UserError(f"--save {save} cannot be written to: {error.strerror}") from error
    if (save / TRACKER).is_dir():
        raise UserError(f"--save {save}: {TRACKER} is a directory")


def _start(args: Namespace) -> Start | None:
    """Find the checkpoint that Megatron will load; None where there is none.

    Raises:
        UserError: there is a tracker file, and not what it names.
    """
    step = args.ckpt_step
    if step is not None and step < 1:
        raise UserError(f"{STEP} {step}: iterations count from 1")
    loads = [("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)]
    given = [(flag, Path(load)) for flag, load in loads if load is not None]
    flag, load = next(
        ((flag, load) for flag, load in given if os.path.lexists(load / TRACKER)),
        given[-1] if given else ("--load", None),
    )
    start = None
    if load is not None and os.path.lexists(load / TRACKER):
        directory = iteration_directory(load, step, flag, STEP)
        resumes = flag == "--load" and not args.finetune and directory.name != "release"
        start = Start(flag, directory, resumes)
    if args.non_persistent_ckpt_type != "global":
        return start
    # Megatron prefers a later one that is not for keeps.
    temporary = args.non_persistent_global_ckpt_dir or (load and load / "non_persistent")
    if temporary is None or not os.path.lexists(Path(temporary) / TRACKER):
        return start
    flag = "--non-persistent-global-ckpt-dir"
    later = Start(flag, iteration_directory(Path(temporary), None, flag, STEP), not args.finetune)
    return later if start is None or later.iteration >= start.iteration else start


def _is_torch_dist(start: Start, args: Namespace) -> bool:
    """Whether a checkpoint is of the format that is compared and checked here; the others are
    Megatron's to load, who runs no code of theirs either.

    Raises:
        UserError: of Megatron's older format and damaged, for which it would leave without a word.
    """
    directory = start.directory
    if os.path.lexists(directory / FORMAT_FILE):
        return True
    older = sorted(directory.glob("mp_rank_0*"))
    for file in older[:1]:
        check_file(file / "model_optim_rng.pt")
    return args.ckpt_format == "torch_dist" and not older


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
