"""Compare a run with the checkpoint that its policy starts from, and take over its architecture.

With --use-checkpoint-args, Megatron 0.19 takes over some of a checkpoint's architecture.  Without
it, Megatron compares little of the architecture, and with --pretrained-checkpoint or --finetune
nothing.  So weights trained with one rotary base, window or activation load silently into a model
with another; what Megatron does not compare is compared here.
"""

from __future__ import annotations

import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import NOT_TAKEN_BY_MEGATRON, vocabulary_of
from megatron_slm.model.checkpoint_table import FORMAT_FILE
from megatron_slm.model.hybrid_pattern import layers_of
from megatron_slm.model.torch_dist import TRACKER, TorchDistReader, iteration_directory
from megatron_slm.model.unpickling import check_file, refuse_code
from megatron_slm.reference.checkpoint import ARCHITECTURE
from megatron_slm.training.resumed import CHANGES, check_resumed

# Arguments that go by the number of a layer, from 1, and what a frequency, or None, means for it.
BY_NUMBER: dict[str, Callable[[int, int | None], bool]] = {
    "window_attn_skip_freq": lambda number, every: not every or number % every != 0,
    "no_rope_freq": lambda number, every: bool(every) and number % (every or 1) == 0,
}
# Hugging Face's vocabularies may be padded up to this multiple beyond the tokenizer's.
PADDING = 128
STEP = "--ckpt-step"


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    flag: str
    """The option that names it."""
    directory: Path
    """The directory of its iteration."""
    resumes: bool
    """Whether the run continues the one that wrote it."""

    @property
    def iteration(self) -> int:
        """The iteration it was written after; 0 for an imported model."""
        return int(self.directory.name.removeprefix("iter_").replace("release", "0"))


def take_from_checkpoint(parser: ArgumentParser) -> None:
    """Make the checkpoint's architecture the defaults of `parser` if --use-checkpoint-args asks.

    From here on, no checkpoint that torch or Megatron reads can run code in this process.

    Raises:
        UserError: the checkpoint is damaged.
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
    # Megatron takes over some of both checkpoints; where they differ, --load wins.
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

    Also sets the arguments by which later checkpoints remember the original model: slm_model_type,
    slm_model_special_ids, and slm_model_vocab_size, the size of its vocabulary, which may exceed
    the tokenizer's.

    Returns:
        The arguments of the run that this one resumes; empty if it starts afresh.

    Raises:
        UserError: the models differ, and the message names every difference; or the checkpoint is
            damaged, would run code, or cannot be resumed by this run.
    """
    if args.save is not None:
        _check_save(Path(args.save))
    args.slm_model_vocab_size = args.slm_vocab_size
    unknown = set(args.slm_changed) - {*ARCHITECTURE, "vocab_size", *CHANGES}
    if unknown:
        raise UserError(
            f"--slm-changed: unknown argument {', '.join(sorted(unknown))}; known: "
            f"{', '.join(sorted({*ARCHITECTURE, 'vocab_size', *CHANGES}))}"
        )
    start = _start(args)
    if start is None or not _is_torch_dist(start, args):
        return Namespace()
    reader = TorchDistReader(start.directory)
    saved = reader.arguments
    reader.check_objects()
    where = f"{start.flag} {start.directory}"
    for name in ("slm_model_type", "slm_model_special_ids"):
        setattr(args, name, getattr(saved, name, None))
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
    """Return the arguments in which two models differ, with their values in `saved` and in `args`.

    Arguments that `saved` lacks are not compared; vocabularies may differ within their padding.
    """
    there, here = _shape(vars(saved)), _shape(vars(args))
    if here.get("hybrid_layer_pattern") and not there.get("hybrid_layer_pattern"):
        _read_as_gpt(here, there)
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
    """Check that checkpoints can be written, before any step that would be lost if they could not.

    Raises:
        UserError: they cannot.
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
        UserError: a tracker file names a checkpoint that is not there.
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
    # Megatron prefers a non-persistent checkpoint if it is a later one.
    temporary = args.non_persistent_global_ckpt_dir or (load and load / "non_persistent")
    if temporary is None or not os.path.lexists(Path(temporary) / TRACKER):
        return start
    flag = "--non-persistent-global-ckpt-dir"
    later = Start(flag, iteration_directory(Path(temporary), None, flag, STEP), not args.finetune)
    return later if start is None or later.iteration >= start.iteration else start


def _is_torch_dist(start: Start, args: Namespace) -> bool:
    """Return whether a checkpoint has the format that is compared and checked here.

    Megatron loads the other formats itself, and they cannot run code either.

    Raises:
        UserError: the checkpoint has Megatron's older format and is damaged, at which Megatron
            would exit without a message.
    """
    directory = start.directory
    if os.path.lexists(directory / FORMAT_FILE):
        return True
    older = sorted(directory.glob("mp_rank_0*"))
    for file in older[:1]:
        check_file(file / "model_optim_rng.pt")
    return args.ckpt_format == "torch_dist" and not older


def _shape(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that shape a model, without those that have no effect on it."""
    shape = {name: arguments[name] for name in ARCHITECTURE if name in arguments}
    if not shape.pop("group_query_attention", True):
        shape["num_query_groups"] = shape.get("num_attention_heads")
    if shape.get("position_embedding_type") != "learned_absolute":
        shape.pop("max_position_embeddings", None)
    if not shape.get("use_rope_scaling"):
        shape.pop("rope_scaling_factor", None)
    if shape.get("hybrid_layer_pattern"):
        shape["hybrid_layer_pattern"] = layers_of(shape["hybrid_layer_pattern"])
    return shape


def _read_as_gpt(hybrid: dict[str, Any], gpt: dict[str, Any]) -> None:
    """Change the shape of a hybrid model to that of the GPT whose checkpoint Megatron loads into
    it, of which each layer becomes two.  A pattern that no GPT fits is left.

    What goes by the numbers of layers is spelled out in both shapes, as numbers differ.
    """
    pattern = hybrid["hybrid_layer_pattern"]
    try:
        maps = gpt_compatible_layer_maps(pattern)
    except ValueError:
        return
    paired = [symbol for symbol in pattern if symbol in "*-E"]
    if any(symbol != "*" for symbol in paired[::2]):
        return  # Megatron pairs attention with MLPs by number, in whatever order they run
    attention = sorted(maps.attention_to_gpt)
    for name in BY_NUMBER:
        if name in gpt and (hybrid.get(name) or gpt[name]):
            gpt[name] = _by_layer(name, gpt[name], gpt.get("num_layers") or len(attention))
            of_all = _by_layer(name, hybrid.get(name), len(pattern))
            hybrid[name] = [of_all[place] for place in attention if place < len(of_all)]
    hybrid |= {"num_layers": maps.num_gpt_layers, "hybrid_layer_pattern": None}


def _by_layer(name: str, value: Any, layers: int) -> list[int]:
    """Return the value of each layer of one of BY_NUMBER, which may be given as a frequency."""
    if isinstance(value, list | tuple):
        return [int(bool(of_layer)) for of_layer in value]
    return [int(BY_NUMBER[name](number, value)) for number in range(1, layers + 1)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other) or not (one or other)  # None, False and 0 mean the same here
