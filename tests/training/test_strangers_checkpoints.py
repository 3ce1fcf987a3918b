"""Checkpoints that somebody else made, spoilt or meant badly: one line, in little time and memory,
and none of their code runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from jobs import Checkpoints
from megatron_slm.errors import UserError
from megatron_slm.model.torch_dist import ARGUMENTS, TRACKER, TorchDistReader
from megatron_slm.model.unpickling import refuse_code
from megatron_slm.training.checkpoint_arguments import check_start

ITERATION = "iter_0000002"
SECONDS, MEMORY = 20, 1 << 30  # of one checkpoint, and of all of them together
Spoil = Callable[[Path], None]


class RunsCode:
    """What an attacker would put into a pickle; its mark is IT-RAN in the checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.mark = directory / "IT-RAN"

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def tracker(content: bytes) -> Spoil:
    return lambda path: (path.parent / TRACKER).write_bytes(content) and None


def instead(name: str, make: Callable[[Path], Any]) -> Spoil:
    """Put something else in the place of a file."""

    def spoil(path: Path) -> None:
        file = path / name
        file.unlink(missing_ok=True)
        make(file)

    return spoil


def content(name: str, data: bytes) -> Spoil:
    return instead(name, lambda file: file.write_bytes(data))


def table(change: Callable[[Any], Any]) -> Spoil:
    """Change the table of blocks in place."""

    def spoil(path: Path) -> None:
        found = TorchDistReader(path).table
        change(found)
        (path / ".metadata").write_bytes(pickle.dumps(found))

    return spoil


def place(**values: Any) -> Spoil:
    """Change where a tensor's first block lies."""

    def change(found: Any) -> None:
        key = next(index for index in found.storage_data if index.offset is not None)
        found.storage_data[key] = replace(found.storage_data[key], **values)

    return table(change)


def tensor(**values: Any) -> Spoil:
    """Change what the table says of a tensor."""

    def change(found: Any) -> None:
        key = "decoder.final_layernorm.weight"
        found.state_dict_metadata[key] = replace(found.state_dict_metadata[key], **values)

    return table(change)


def chunk(**values: Any) -> Spoil:
    def change(found: Any) -> None:
        chunks = found.state_dict_metadata["decoder.final_layernorm.weight"].chunks
        chunks[0] = replace(chunks[0], **values)

    return table(change)


def stored(key: str, make: Callable[[Path], bytes]) -> Spoil:
    """Put bytes in the place of an object, at the end of the first file."""

    def spoil(path: Path) -> None:
        found = TorchDistReader(path).table
        name = next(index.fqn for index in found.storage_data if key in index.fqn)
        file, data = path / "__0_0.distcp", make(path)
        info = _StorageInfo(file.name, file.stat().st_size, len(data))
        found.storage_data[MetadataIndex(name)] = info
        with file.open("ab") as end:
            end.write(data)
        (path / ".metadata").write_bytes(pickle.dumps(found))

    return spoil


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def common(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change what is beside tensors, or give something else in its place."""

    def spoil(path: Path) -> None:
        found = TorchDistReader(path).common_state
        other = change(found)
        stored(ARGUMENTS, lambda _: saved([found if other is None else other]))(path)

    return spoil


def argument(name: str, value: Any) -> Spoil:
    return common(lambda found: setattr(found["args"], name, value))


def nested(depth: int) -> Any:
    value: Any = 1.0
    for _ in range(depth):
        value = [value, value]
    return value


def pickled_code(path: Path) -> torch.Tensor:
    """As Transformer Engine keeps its states."""
    return torch.frombuffer(bytearray(pickle.dumps({"a": RunsCode(path)})), dtype=torch.uint8)


def older(name: str, make: Callable[[Path], Any]) -> Spoil:
    """Replace the checkpoint by one in the format before torch_dist."""

    def spoil(path: Path) -> None:
        shutil.rmtree(path)
        (path / "mp_rank_00").mkdir(parents=True)
        make(path / "mp_rank_00" / name)

    return spoil


MEMO_BOMB = b"\x80\x02]r\xff\xff\xff\x3f."  # room for a thousand million objects
ONCE_MORE = "is not an iteration"
BAD: dict[str, tuple[Spoil, str]] = {
    "a tracker that is empty": (tracker(b""), ONCE_MORE),
    "of blanks": (tracker(b" \n "), ONCE_MORE),
    "with a superscript": (tracker("²".encode()), ONCE_MORE),
    "with Arabic digits": (tracker("٢".encode()), ONCE_MORE),
    "with a sign": (tracker(b"+2"), ONCE_MORE),
    "below zero": (tracker(b"-2"), ONCE_MORE),
    "with an underscore": (tracker(b"0_2"), ONCE_MORE),
    "of a fraction": (tracker(b"2.0"), ONCE_MORE),
    "of many digits": (tracker(b"2" * 999), ONCE_MORE),
    "of a megabyte": (tracker(b"2" * 1_000_000), "more than 1000 bytes"),
    "of zeros": (tracker(b"\0" * 7), ONCE_MORE),
    "of another encoding": (tracker(b"\xff\xfe2\0"), ONCE_MORE),
    "of an iteration that is not there": (tracker(b"3"), "there is no iter_0000003"),
    "of a release that is not there": (tracker(b"release"), "there is no release"),
    "a tracker that is a directory": (instead(f"../{TRACKER}", Path.mkdir), "not a regular file"),
    "a pipe": (instead(f"../{TRACKER}", os.mkfifo), "not a regular file"),
    "a link to nothing": (
        instead(f"../{TRACKER}", lambda file: file.symlink_to("nowhere")),
        "No such file",
    ),
    "a device": (
        instead(f"../{TRACKER}", lambda file: file.symlink_to("/dev/zero")),
        "not a regular file",
    ),
    "no format": (instead("metadata.json", lambda _: None), "metadata.json"),
    "a format that is no JSON": (content("metadata.json", b"{"), "metadata.json cannot be read"),
    "a list": (content("metadata.json", b"[]"), "metadata.json cannot be read"),
    "null": (content("metadata.json", b"null"), "metadata.json cannot be read"),
    "nested": (content("metadata.json", b"[" * 60_000), "metadata.json cannot be read"),
    "garbage": (content("metadata.json", os.urandom(99)), "metadata.json cannot be read"),
    "long": (content("metadata.json", b" " * 100_000), "more than 65536 bytes"),
    "another backend": (
        content("metadata.json", json.dumps({"sharded_backend": "zarr"}).encode()),
        "zarr",
    ),
    "a newer backend": (
        content(
            "metadata.json", b'{"sharded_backend": "torch_dist", "sharded_backend_version": 2}'
        ),
        "sharded_backend_version",
    ),
    "a format that is a pipe": (instead("metadata.json", os.mkfifo), "not a regular file"),
    "no table": (instead(".metadata", lambda _: None), "has no .metadata file"),
    "an empty table": (content(".metadata", b""), "is damaged"),
    "a table of text": (content(".metadata", b"hello"), "is damaged"),
    "a table that is a number": (content(".metadata", pickle.dumps(5)), "not a table of blocks"),
    "a table that makes room": (content(".metadata", MEMO_BOMB), "not a table of blocks"),
    "a directory for a table": (instead(".metadata", Path.mkdir), "not a regular file"),
    "a pipe for a table": (instead(".metadata", os.mkfifo), "not a regular file"),
    "a table that runs code": (
        lambda path: (path / ".metadata").write_bytes(pickle.dumps(RunsCode(path))) and None,
        "it wants to run posix.system",
    ),
    "a table cut short": (
        lambda path: os.truncate(path / ".metadata", (path / ".metadata").stat().st_size // 2),
        "is damaged",
    ),
    "no blocks": (table(lambda t: setattr(t, "storage_data", None)), "where blocks lie"),
    "no tensors": (table(lambda t: setattr(t, "state_dict_metadata", [1])), "what there is"),
    "a block with a name alone": (
        table(lambda t: t.storage_data.update({"x": None})),
        "is damaged: block 'x'",
    ),
    "a block that is a text": (
        table(lambda t: t.storage_data.update({MetadataIndex("x"): "there"})),
        "is damaged: block x",
    ),
    "a block outside": (place(relative_path="../../etc/passwd"), "not inside the directory"),
    "a block anywhere": (place(relative_path="/etc/passwd"), "not inside the directory"),
    "a block in a text": (place(relative_path=5), "Expected `str`"),
    "a block in the directory itself": (place(relative_path="."), "is missing"),
    "a block before the file": (place(offset=-1), "Expected `int` >= 0"),
    "a block nowhere": (place(offset=None), "missing required field `offset`"),
    "a block at a text": (place(offset="0"), "Expected `int`"),
    "a block behind the file": (place(offset=1 << 40), "is truncated"),
    "a block at 10^30": (place(offset=10**30), "is damaged"),
    "a block without a length": (place(length=None), "missing required field `length`"),
    "a block of a negative length": (place(length=-5), "Expected `int` >= 0"),
    "a block that is packed": (place(transform_descriptors=["zstd"]), "Expected `null`"),
    "a block too short": (place(length=3), "too short for it"),
    "a file that is a pipe": (instead("__0_0.distcp", os.mkfifo), "is missing"),
    "a file that is not there": (instead("__0_0.distcp", lambda _: None), "is missing"),
    "a tensor of a text": (tensor(size="64"), "is damaged"),
    "a tensor of no size": (tensor(size=None), "is damaged"),
    "a negative tensor": (tensor(size=torch.Size([-64])), "is damaged"),
    "a tensor of no chunks": (tensor(chunks=None), "is damaged"),
    "a tensor of no dtype": (tensor(properties=None), "is damaged"),
    "a chunk outside": (chunk(offsets=torch.Size([64])), "a chunk outside of it"),
    "a chunk too long": (chunk(sizes=torch.Size([65])), "a chunk outside of it"),
    "a chunk of two dimensions": (chunk(sizes=torch.Size([8, 8])), "a chunk outside of it"),
    "an object that lies nowhere": (
        table(lambda t: t.storage_data.pop(MetadataIndex(ARGUMENTS))),
        "lies nowhere",
    ),
    "layers as text": (argument("num_layers", "4"), "Expected `int`, got `str`"),
    "no layers": (argument("num_layers", None), "num_layers"),
    "zero layers": (argument("num_layers", 0), "num_layers"),
    "layers -1": (argument("num_layers", -1), "num_layers"),
    "true layers": (argument("num_layers", True), "num_layers"),
    "10^9 layers": (argument("num_layers", 10**9), "num_layers"),
    "layers that are missing": (
        common(lambda found: delattr(found["args"], "num_layers")),
        "missing required field `num_layers`",
    ),
    "a fraction of a unit": (argument("hidden_size", 64.5), "hidden_size"),
    "no vocabulary": (argument("padded_vocab_size", None), "padded_vocab_size"),
    "heads as a list": (argument("num_attention_heads", [4]), "num_attention_heads"),
    "tied by a text": (argument("untie_embeddings_and_output_weights", "false"), "untie_embedd"),
    "tied by a number": (argument("untie_embeddings_and_output_weights", 0), "untie_embedd"),
    "gated by a text": (argument("swiglu", "false"), "swiglu"),
    "biased by a text": (argument("add_bias_linear", "False"), "add_bias_linear"),
    "a rotary base that is no number": (argument("rotary_base", float("nan")), "rotary_base"),
    "an infinite rotary base": (argument("rotary_base", float("inf")), "rotary_base"),
    "a rotary base of a text": (argument("rotary_base", "10000"), "rotary_base"),
    "epsilon 0": (argument("layernorm_epsilon", 0.0), "layernorm_epsilon"),
    "a window of a text": (argument("window_size", "(3,0)"), "window_size"),
    "a window of one": (argument("window_size", [3]), "window_size"),
    "a normalization of a number": (argument("normalization", 5), "normalization"),
    "a vocabulary below zero": (argument("slm_vocab_size", -3), "slm_vocab_size"),
    "no arguments": (common(lambda found: found.pop("args") and None), "no readable arguments"),
    "arguments in a dictionary": (
        common(lambda found: found.update(args=vars(found["args"]))),
        "dict instead of arguments",
    ),
    "a list for everything": (common(lambda _: [1]), "no readable arguments"),
    "a newer Megatron": (common(lambda found: found.update(checkpoint_version=4.0)), "<= 3.0"),
    "a version of a text": (
        common(lambda found: found.update(checkpoint_version="3")),
        "checkpoint_version",
    ),
    "an iteration of a text": (common(lambda found: found.update(iteration="2")), "iteration"),
    "no iteration": (common(lambda found: found.pop("iteration") and None), "`iteration`"),
    "a text for what is in it": (
        common(lambda found: found.update(content_metadata="x")),
        "content_metadata",
    ),
    "arguments of no bytes": (stored(ARGUMENTS, lambda _: b""), "no readable arguments"),
    "arguments of noise": (stored(ARGUMENTS, lambda _: os.urandom(999)), "no readable arguments"),
    "arguments that run code": (
        stored(ARGUMENTS, lambda path: saved([{"args": RunsCode(path)}])),
        "no readable arguments (it wants to run posix.system",
    ),
    "an older file of arguments that runs code": (
        lambda path: torch.save({"args": RunsCode(path)}, path / "common.pt"),
        "no readable arguments (it wants to run posix.system",
    ),
    "a pipe of arguments": (instead("common.pt", os.mkfifo), "not a regular file"),
    "an extra state that runs code": (
        stored("linear_fc1._extra_state", lambda path: saved([RunsCode(path)])),
        "_extra_state/shard_0_4 that is damaged or would run code: it wants to run posix.system",
    ),
    "one that Transformer Engine would run": (
        stored("linear_fc1._extra_state", lambda path: saved([pickled_code(path)])),
        "_extra_state/shard_0_4 that is damaged or would run code",
    ),
    "one in a file in memory": (
        stored("linear_fc1._extra_state", lambda path: saved([io.BytesIO(saved(RunsCode(path)))])),
        "_extra_state/shard_0_4 that is damaged or would run code: it wants to run posix.system",
    ),
    "a random state that runs code": (
        stored("rng_state", lambda path: saved([[{"numpy": [RunsCode(path)]}]])),
        "an object rng_state/shard_0.0_1.1 that is damaged or would run code",
    ),
    "a state of reruns that runs code": (
        stored("rerun_state", lambda path: pickle.dumps(RunsCode(path))),
        "an object rerun_state_machine_state/shard_0_1 that is damaged or would run code",
    ),
    "an object of no bytes": (stored("rng_state", lambda _: b""), "an object rng_state"),
    "an older checkpoint that runs code": (
        older("model_optim_rng.pt", lambda file: torch.save(RunsCode(file.parent), file)),
        "model_optim_rng.pt is damaged or would run code",
    ),
    "an older checkpoint of noise": (
        older("model_optim_rng.pt", lambda file: file.write_bytes(os.urandom(999))),
        "model_optim_rng.pt is damaged or would run code",
    ),
    "an older checkpoint of nothing": (
        older("other.pt", lambda file: file.touch()),
        "model_optim_rng.pt",
    ),
    "an older checkpoint that is a pipe": (
        older("model_optim_rng.pt", os.mkfifo),
        "not a regular file",
    ),
}


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail, in a process that may hang, after so many seconds."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def run(untied: Checkpoints) -> Namespace:
    """Arguments of a run that goes on with the policy's checkpoint."""
    return TorchDistReader(untied.policy / ITERATION).arguments


def copy(untied: Checkpoints, run: Namespace, directory: Path) -> Namespace:
    """Copy a checkpoint to spoil, and return the arguments of a run that continues from it."""
    shutil.copytree(untied.policy, directory)
    return Namespace(**vars(run) | {"load": str(directory), "finetune": False})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_one_that_is_good(untied: Checkpoints, run: Namespace, tmp_path: Path) -> None:
    args = copy(untied, run, tmp_path / "checkpoints")
    assert check_start(args).num_layers == 4
    # What is shared, or holds itself, is looked at once.
    stored("rng_state", lambda _: saved([nested(60)]))(tmp_path / "checkpoints" / ITERATION)
    with at_most(SECONDS):
        assert check_start(args).num_layers == 4


def test_all_that_are_bad(untied: Checkpoints, run: Namespace, tmp_path: Path) -> None:
    before, wrong = peak(), {}
    for number, (case, (spoil, message)) in enumerate(BAD.items()):
        args = copy(untied, run, tmp_path / str(number))
        spoil(tmp_path / str(number) / ITERATION)
        try:
            with at_most(SECONDS):
                check_start(args)
            wrong[case] = "it is taken"
        except UserError as error:
            said = str(error)
            if message not in said or "\n" in said or len(said) > 1000:
                wrong[case] = said
        except Exception as error:
            wrong[case] = repr(error)
        if list(tmp_path.rglob("IT-RAN")):
            wrong[case] = "its code ran"
        shutil.rmtree(tmp_path / str(number))
    assert not wrong, "\n".join(f"{case}: {said}" for case, said in wrong.items())
    assert peak() - before < MEMORY


@pytest.mark.parametrize("step", [0, -2])
def test_iterations_count_from_1(untied: Checkpoints, run: Namespace, step: int) -> None:
    """Megatron takes 0 for the latest."""
    with pytest.raises(UserError, match="--ckpt-step"):
        check_start(Namespace(**vars(run) | {"load": str(untied.policy), "ckpt_step": step}))


def test_nothing_of_this_process_runs_code(
    untied: Checkpoints, run: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reads a checkpoint, also where it is not checked first."""
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")  # so that it is as it was when the test ends
    monkeypatch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
    copy(untied, run, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / ITERATION
    refuse_code()
    assert FileSystemReader(path).read_metadata().state_dict_metadata
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(saved(RunsCode(path))), weights_only=False)
    (path / ".metadata").write_bytes(pickle.dumps(RunsCode(path)))
    with pytest.raises(pickle.UnpicklingError):
        FileSystemReader(path).read_metadata()
    assert not list(tmp_path.rglob("IT-RAN"))
    pickle.loads(pickle.dumps(RunsCode(path)))
    assert list(tmp_path.rglob("IT-RAN"))  # it would have run
