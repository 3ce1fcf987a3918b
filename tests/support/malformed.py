"""Ways in which the files that analysis reads can be bad, and what is said of each.

    python tests/support/malformed.py DIRECTORY       prints {name: message} as JSON

In a process whose memory is bounded, so that what would take all of it fails instead.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from safetensors.numpy import save
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_slm.analysis.dynamics import dynamics_files
from megatron_slm.analysis.dynamics.write_dynamics import write_dynamics
from megatron_slm.analysis.experiments.recipe import read_experiment
from megatron_slm.analysis.experiments.tasks import Instance
from megatron_slm.analysis.inspect_cache import inspect
from megatron_slm.analysis.report.page import write_report
from megatron_slm.data import score_cache
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import Section, write_shard
from megatron_slm.data.score_manifest import CacheManifest, read_cache_manifest
from megatron_slm.errors import UserError

MEMORY, SECONDS = 1 << 30, 30  # beyond what is there after the imports; for each
DEEP = "[" * 100_000
Case = tuple[Callable[[Path], None], str]


# Token dumps


def arrays() -> dict[str, Any]:
    return {
        "tokens": np.zeros((1, 5), np.int32),
        "losses": np.ones((1, 4), np.float32),
        "valid": np.ones((1, 4), bool),
        "samples": np.zeros(1, np.int64),
    }


ABOUT = {"tokenizer_type": "x", "tokenizer_model": None}


def dump(name: str = "iter_0000001", **changes: Any) -> Callable[[Path], None]:
    """Make a dump with changed arrays or metadata; None leaves one out."""

    def make(directory: Path) -> None:
        (directory / "dump").mkdir(exist_ok=True)
        about = {"about": json.dumps(ABOUT), "iteration": "1"}
        parts = arrays() | {"format": "megatron-slm token dump 1", **about} | changes
        parts = {key: part for key, part in parts.items() if part is not None}
        texts = {key: part for key, part in parts.items() if isinstance(part, str)}
        content = save({key: parts[key] for key in parts.keys() - texts.keys()}, texts)
        (directory / "dump" / f"{name}.safetensors").write_bytes(content)

    return make


def about(**changes: Any) -> Callable[[Path], None]:
    return dump(about=json.dumps(ABOUT | changes))


def file(name: str, content: bytes | str = b"", size: int | None = None) -> Callable[[Path], None]:
    """Make a file with this content, or a sparse one of a size."""

    def make(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if size is not None:
            os.truncate(path, size)

    return make


def fifo(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


def two_dumps(directory: Path) -> None:
    dump()(directory)
    dump("iter_0000001-copy")(directory)


def of_two_runs(**others: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        dump()(directory)
        dump("iter_0000002", iteration="2", **others)(directory)

    return make


ITERATION = "dump/iter_0000001.safetensors"
DUMPS: dict[str, Case] = {
    "about is not JSON": (dump(about="{"), "cannot be read"),
    "about is missing": (dump(about=None), "cannot be read"),
    "about says nothing": (dump(about="{}"), "missing required field"),
    "about is a list": (dump(about="[1]"), "Expected `object`, got `array`"),
    "about is nested": (dump(about='{"x": ' + DEEP), "nested too deeply"),
    "a tokenizer that is a number": (
        about(tokenizer_model=5),
        "got `int` - at `$.tokenizer_model`",
    ),
    "domains for other samples": (about(domains=["a", "b"]), "2 domains for 1 samples"),
    "domains that are numbers": (about(domains=[1]), "got `int`"),
    "a score without a scope": (about(score="excess"), "one of score and scope"),
    "a ratio that is text": (about(ratio="0.6"), "Expected `float`, got `str`"),
    "iteration is text": (dump(iteration="x"), "the iteration of"),
    "iteration is missing": (dump(iteration=None), "the iteration of"),
    "iteration below zero": (dump(iteration="-1"), "which its name does not say"),
    "iteration beyond all numbers": (dump(iteration="9" * 5000), "out of range"),
    "iteration of another name": (dump(iteration="2"), "which its name does not say"),
    "two of one iteration": (two_dumps, "which its name does not say"),
    "other samples": (of_two_runs(samples=np.ones(1, np.int64)), "are of different runs"),
    "other parts": (of_two_runs(selected=np.ones((1, 4), bool)), "are of different runs"),
    "no losses": (dump(losses=None), "it has the arrays"),
    "an array more": (dump(x=np.ones(1)), "it has the arrays"),
    "losses of another shape": (dump(losses=np.ones((1, 2), np.float32)), "not int32 [1, 3]"),
    "losses of another type": (dump(losses=np.ones((1, 4))), "losses is float64"),
    "tokens that are fractions": (dump(tokens=np.zeros((1, 5), np.float32)), "tokens is float32"),
    "tokens below zero": (dump(tokens=np.full((1, 5), -1, np.int32)), "below 0"),
    "no sample": (dump(samples=np.zeros(0, np.int64)), "not float32 [0, 4]"),
    "one number for all": (dump(samples=np.array(0)), "not float32 [0, 4]"),
    "no token that counts": (dump(valid=np.zeros((1, 4), bool)), "no token that counts"),
    "selection of another shape": (dump(selected=np.ones((2, 4), bool)), "selected is bool [2, 4]"),
    "another format": (
        dump(format="megatron-slm token dump 9"),
        "not a token dump of this version",
    ),
    "no safetensors": (file(ITERATION, "text"), "cannot read"),
    "a header of 2^60 bytes": (file(ITERATION, b"\0" * 7 + b"\x10{}"), "cannot read"),
    "nothing in it": (file(ITERATION), "cannot read"),
    "a terabyte of nothing": (file(ITERATION, size=1 << 40), "have more than 4294967296"),
    "a pipe as a dump": (fifo(ITERATION), "not a regular file"),
    "a directory as a dump": (file(f"{ITERATION}/x"), "not a regular file"),
}


# A study


def spread(mean: Any = 1.0, count: int = 1) -> dict[str, Any]:
    return {"mean": mean, "std": None, "values": [mean] * count, "missing": 0}


def study() -> dict[str, Any]:
    figures = "final_loss difference part_of_baseline_tokens flops_ratio selected_part step_seconds"
    arm = {name: spread() for name in figures.split()}
    equal = {"arm_at_baseline_flops": spread(), "baseline_at_arm_flops": spread()}
    seed = {"directory": "runs/clm", "final_loss": 1.0, "curve": [[1, 10, 2.0], [2, 20, 1.0]]}
    return {
        "format": 1,
        "study": "s",
        "target": "t",
        "arms": {"clm": {"arguments": [], "description": "", "seeds": {"1": seed}}},
        "summary": {
            "baseline": "clm",
            "compared": {"iteration": 2, "tokens": 20},
            "arms": {"clm": arm | {"equal_compute": equal, "verdict": ""}},
        },
    }


def results(place: str = "", value: Any = None) -> Callable[[Path], None]:
    """Make a study with another value at a place such as "arms.clm.seeds"."""

    def make(directory: Path) -> None:
        events()(directory / "runs" / "clm")
        content = study()
        *way, last = place.split(".") if place else [""]
        inner = content
        for step in way:
            inner = inner[step]
        if place:
            inner[last] = value
        (directory / "results.json").write_text(json.dumps(content))

    return make


SEED = "arms.clm.seeds.1"
STUDIES: dict[str, Case] = {
    "a list": (file("results.json", "[1]"), "Expected `object`, got `array`"),
    "a text": (file("results.json", '"x"'), "Expected `object`, got `str`"),
    "nothing said": (file("results.json", "{}"), "missing required field `format`"),
    "a format alone": (file("results.json", '{"format": 1}'), "missing required field"),
    "format is text": (results("format", "1"), "got `str` - at `$.format`"),
    "format of tomorrow": (results("format", 2), "that this version reads"),
    "arms is a list": (results("arms", [1]), "got `array` - at `$.arms`"),
    "an arm without seeds": (results("arms.clm.seeds", {}), "length >= 1"),
    "seeds is a list": (results("arms.clm.seeds", [1]), "got `array`"),
    "a run out of the study": (results(f"{SEED}.directory", "../.."), "not inside the directory"),
    "a run at the root": (results(f"{SEED}.directory", "/etc"), "not inside the directory"),
    "a run that is not there": (results(f"{SEED}.directory", "x"), "is not a directory"),
    "a curve without points": (results(f"{SEED}.curve", []), "length >= 1"),
    "a curve of text": (results(f"{SEED}.curve", ["abc"]), "got `str`"),
    "a curve of short points": (results(f"{SEED}.curve", [[1, 2]]), "length >= 3"),
    "a curve of different points": (
        results(f"{SEED}.curve", [[1, 2, 3], [1, 2, 3, 4]]),
        "differ in length",
    ),
    "a loss that is null": (results("summary.arms.clm.final_loss.mean", None), "got `null`"),
    "a verdict that is a list": (results("summary.arms.clm.verdict", []), "got `array`"),
    "a summary of other arms": (results("summary.arms", {}), "not those of its summary"),
    "another baseline": (results("summary.baseline", "x"), "not those of its summary"),
    "compared with nothing": (results("summary.compared", None), "got `null`"),
    "nested deep": (file("results.json", '{"x": ' + DEEP), "nested too deeply"),
    "a number out of range": (file("results.json", '{"format": 1e999}'), "out of range"),
    "100 MB": (file("results.json", "{", 100 << 20), "too many for a file of its kind"),
    "a pipe": (fifo("results.json"), "not a regular file"),
}


# TensorBoard's events


def event(step: int = 1, tag: str = "lm loss", value: float = 1.0) -> bytes:
    values = [Summary.Value(tag=tag, simple_value=value)]
    content: bytes = Event(step=step, summary=Summary(value=values)).SerializeToString()
    return content


def events(
    *contents: bytes, spoil: Callable[[bytearray], object] = bytes
) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
        path = directory / "tensorboard" / "events.out.tfevents.1"
        with path.open("wb") as opened:
            for content in contents or (event(), event(2)):
                RecordWriter(opened).write(content)
        content = bytearray(path.read_bytes())
        spoil(content)
        path.write_bytes(content)

    return make


def flip(at: int) -> Callable[[bytearray], object]:
    def change(content: bytearray) -> None:
        content[at] ^= 1

    return change


LOG = "tensorboard/events.out.tfevents.1"
# Of what a dump names, a report alone reads the tokenizer.
TOKENIZERS: dict[str, Case] = {
    "a tokenizer that is a device": (about(tokenizer_model="/dev/zero"), "not a regular file"),
    "a tokenizer that is gone": (about(tokenizer_model="/none"), "No such file"),
}
EVENTS: dict[str, Case] = {
    "events that are text": (
        file(LOG, "no events at all, just text\n" * 9),
        "not a TensorBoard event file",
    ),
    "a damaged value": (events(spoil=flip(14)), "damaged before byte"),
    "a damaged length": (events(spoil=flip(0)), "damaged before byte"),
    "no event inside": (events(b"\xff" * 40), "damaged before byte"),
    "a step below zero": (events(event(-1)), "damaged before byte"),
    "a tag that is no text": (events(event(tag="aaaa").replace(b"aaaa", b"\xff" * 4)), "damaged"),
    "nothing but zeros": (file(LOG, size=1 << 40), "damaged before byte"),
    "a pipe as events": (fifo(LOG), "not a regular file"),
    "no scalar": (events(Event().SerializeToString()), "has neither"),
}


# Tables of token dynamics


def columns() -> dict[str, Any]:
    return {
        "sample": pa.array([0, 0], pa.int64()),
        "position": pa.array([1, 2], pa.int64()),
        "token": pa.array([7, 8], pa.int64()),
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "class": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["H->H", "L->L"]),
        "delta": pa.array([0.0, 1.0], pa.float32()),
        "loss_0000001": pa.array([1.0, 2.0], pa.float32()),
        "loss_0000002": pa.array([1.0, 2.0], pa.float32()),
    }


def table(**changes: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / "dynamics").mkdir(exist_ok=True)
        own = {name: part for name, part in (columns() | changes).items() if part is not None}
        parquet.write_table(pa.table(own), directory / "dynamics" / "token_dynamics.parquet")

    return make


def strange_classes() -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["H->H", "x"])


TABLE = "dynamics/token_dynamics.parquet"
TABLES: dict[str, Case] = {
    "no parquet": (file(TABLE, "text"), "cannot read"),
    "a column less": (table(text=None), "not a table of token dynamics"),
    "a column more": (table(x=pa.array([1, 2])), "not a table of token dynamics"),
    "losses that are text": (table(loss_0000002=pa.array(["1", "2"])), "not a table"),
    "one checkpoint": (table(loss_0000002=None), "not a table of token dynamics"),
    "values missing": (table(delta=pa.array([None, 1.0], pa.float32())), "missing values"),
    "losses that are no numbers": (
        table(loss_0000002=pa.array([float("nan"), 1.0], pa.float32())),
        "NaN or infinite",
    ),
    "iterations that fall": (
        table(loss_0000000=pa.array([1.0, 2.0], pa.float32())),
        "out of order",
    ),
    "classes of its own": (table(**{"class": strange_classes()}), "classes other than"),
    "too many values": (
        table(**{f"loss_{at:07d}": columns()["delta"] for at in range(3, 99)}),
        "too many to be read",
    ),
}


# Score caches


SOURCE: Any = {"tokenizer": "t", "vocabulary": 9, "datasets": {}, "blends": {}}


def cache(section: str = "train", **changes: Any) -> Callable[[Path], None]:
    """Make a cache of four records in two shards, with a changed manifest."""

    def make(directory: Path) -> None:
        source = ScoredData(**SOURCE)
        manifest = CacheManifest("sample", "float32", 3, 2, {section: 4}, source, {})
        manifest.write(directory)
        for shard in range(2):
            losses = np.full((2, 3), 1.0 + shard, np.float32)
            labels, domains = np.ones((2, 3), np.int32), np.zeros(2, np.int64)
            write_shard(directory, manifest, section, shard, losses, labels, domains)
        content = json.loads((directory / "manifest.json").read_text()) | changes
        (directory / "manifest.json").write_text(json.dumps(content))

    return make


def exchanged(directory: Path) -> None:
    cache()(directory)
    one, other = (directory / "train" / f"0000{at}.losses" for at in range(2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def instead(make: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    """Make a complete cache with something else in place of one of its files."""

    def both(directory: Path) -> None:
        cache()(directory)
        (directory / name).unlink()
        make(directory)

    return both


SHARD = "train/00001.losses"
CACHES: dict[str, Case] = {
    "losses in float16": (cache(dtype="float16"), "Invalid enum value 'float16' - at `$.dtype`"),
    "no records a shard": (cache(shard_records=0), "Expected `int` >= 1 - at `$.shard_records`"),
    "records a shard as text": (cache(shard_records="16"), "got `str` - at `$.shard_records`"),
    "10^12 samples": (cache(sections={"train": 10**12}), "more than 1048576"),
    "10^12 samples of one shard": (
        cache(sections={"train": 10**12}, shard_records=10**12),
        "is damaged: it has 48 bytes",
    ),
    "samples below zero": (cache(sections={"train": -4}), "Expected `int` >= 1"),
    "samples as a list": (cache(sections=[4]), "got `array` - at `$.sections`"),
    "a section elsewhere": (cache(sections={"../train": 4}), "`$.sections`"),
    "the section above": (cache(sections={"..": 4}), "`$.sections`"),
    "no source": (cache(source=None), "got `null` - at `$.source`"),
    "a source of other parts": (cache(source={"datasets": []}), "at `$.source"),
    "a source without blends": (
        cache(source={"tokenizer": "t", "vocabulary": 9, "datasets": {}}),
        "no blends",
    ),
    "losses of a dataset without a name": (cache(kind="document"), "has not the datasets"),
    "blends of numbers": (cache(source=SOURCE | {"blends": {"all": [1, 2]}}), "got `int`"),
    "samples of 2^40 tokens": (cache(sequence_length=1 << 40), "at `$.sequence_length`"),
    "samples of true tokens": (cache(sequence_length=True), "got `bool`"),
    "another kind": (cache(kind="token"), "Invalid enum value 'token'"),
    "a format of tomorrow": (cache(format=3), "it is of format 3, and this version reads 1 and 2"),
    "format as text, too": (cache(format="2"), "got `str` - at `$.format`"),
    "a list as manifest": (file("manifest.json", "[]"), "got `array`"),
    "a manifest nested deep": (file("manifest.json", '{"x": ' + DEEP), "nested too deeply"),
    "a manifest of 100 MB": (file("manifest.json", "{", 100 << 20), "too many for a file"),
    "a pipe as manifest": (fifo("manifest.json"), "not a regular file"),
    "no manifest": (file("x"), "is not a score cache"),
    "another reference": (cache(reference={"files": "x"}), "or is another shard"),
    "shards exchanged": (exchanged, "damaged at record 0 (sample 0), or is another shard"),
    "a shard cut short": (instead(file(SHARD, b"x" * 47), SHARD), "it has 47 bytes, not 48"),
    "a shard of a terabyte": (instead(file(SHARD, size=1 << 40), SHARD), "it has 1099511627776"),
    "a shard of zeros": (instead(file(SHARD, size=48), SHARD), "is damaged at record 0 (sample 2)"),
    "a pipe as shard": (instead(fifo(SHARD), SHARD), "not a regular file"),
    "a directory as shard": (instead(file(f"{SHARD}/x"), SHARD), "not a regular file"),
    "a shard that is gone": (instead(file("x"), SHARD), "00001.losses is missing"),
}


# Recipes of experiments, and what is kept of them

RECIPE = "seeds: [1]\narms: {clm: {}}\n"


def recipe(text: str) -> Callable[[Path], None]:
    return file("recipe.yaml", text)


def chain(directory: Path) -> None:
    for at in range(30):
        name = "recipe" if at == 0 else f"r{at}"
        (directory / f"{name}.yaml").write_text(f"extends: r{at + 1}.yaml\n{RECIPE}")


RECIPES: dict[str, Case] = {
    "an alias": (recipe("seeds: &a [1]\narms: {clm: *a}"), "line 2: the alias *a is not allowed"),
    "a seed that is NaN": (recipe("seeds: [.nan]"), "got `float` - at `$.seeds[0]`"),
    "a seed that is true": (recipe("seeds: [true]"), "got `bool`"),
    "a seed of 20 digits": (recipe("seeds: [10000000000000000000]"), "at `$.seeds[0]`"),
    "a seed of a megabyte": (recipe(f"seeds: [{'9' * 900_000}]"), "cannot be read"),
    "no seeds in the list": (recipe("seeds: []"), "length >= 1"),
    "a million ranks": (recipe(RECIPE + "ranks: 1000000"), "at `$.ranks`"),
    "a name that is NaN": (recipe(RECIPE + "name: .nan"), "got `float` - at `$.name`"),
    "arguments that are a number": (recipe(RECIPE + "arguments: 5"), "at `$.arguments`"),
    "a NUL in a command": (recipe(RECIPE + 'arguments: "a\\0b"'), "NUL"),
    "half a character": (recipe(RECIPE + 'arguments: "\\ud800"'), "surrogates"),
    "an arm that is a number": (recipe("seeds: [1]\narms: {1: {}}"), "at `key` in `$.arms`"),
    "an arm twice": (recipe("seeds: [1]\narms: {clm: {}, clm: {}}"), "'clm' occurs twice"),
    "an arm out of the study": (recipe("seeds: [1]\narms: {../x: {}}"), "cannot be a name in arms"),
    "stages of two kinds": (
        recipe(RECIPE + "stages: {a: {run: x, score: y}}"),
        "stage a: a stage needs exactly one of",
    ),
    "brackets and no end": (recipe(DEEP), "nested too deeply"),
    "thirty recipes in a row": (chain, "more than 20 recipes"),
    "two megabytes": (recipe(RECIPE + "#" * (2 << 20)), "too many for a file of its kind"),
    "a recipe that is a pipe": (fifo("recipe.yaml"), "not a regular file"),
    "a Python object": (recipe("!!python/object/apply:os.system [true]"), "cannot be read"),
}

BEGUN = "runs/clm-seed1/begun.json"
STATES: dict[str, Case] = {
    "state that is a list": (file(BEGUN, "[]"), "move "),
    "state that is text": (file(BEGUN, "x"), "move "),
    "a hash that is a number": (file(BEGUN, '{"hash": 5}'), "got `int` - at `$.hash`"),
    "a pipe as state": (fifo(BEGUN), "not a regular file"),
    "a directory of others": (file("runs/clm-seed1/theirs", "x"), "this study did not make it"),
}


# What reads them


def report(directory: Path) -> None:
    write_report(directory, directory / "report.html", None)


def classify(directory: Path) -> None:
    write_dynamics(directory / "dump", directory / "dynamics", None)


def look_at_cache(directory: Path) -> None:
    inspect([str(directory)])


def train_from_cache(directory: Path) -> None:
    manifest = read_cache_manifest(directory)
    for name in manifest.sections:
        section = Section(directory, manifest, name)
        for number in range(len(section)):
            section.losses(number, None)


def experiment(directory: Path) -> None:
    read_experiment(directory / "recipe.yaml")


def prepare(directory: Path) -> None:
    recipe(RECIPE)(directory)
    read = read_experiment(directory / "recipe.yaml")
    Instance(read, read.arms["clm"], 1).prepare(directory)


GROUPS: list[tuple[Callable[[Path], None], dict[str, Case]]] = [
    (report, DUMPS | TOKENIZERS | STUDIES | EVENTS | TABLES),
    (classify, DUMPS),
    (look_at_cache, CACHES),
    (train_from_cache, CACHES),
    (experiment, RECIPES),
    (prepare, STATES),
]
GOOD: list[tuple[Callable[[Path], None], Callable[[Path], None]]] = [
    (report, dump()),
    (report, results()),
    (report, events()),
    (report, events(spoil=lambda content: content.__delitem__(slice(-9, None)))),  # killed
    (report, table()),
    (look_at_cache, cache()),
    (train_from_cache, cache()),
    (experiment, recipe(RECIPE)),
    (prepare, recipe(RECIPE)),
]


def said(read: Callable[[Path], None], make: Callable[[Path], None], directory: Path) -> str:
    """Return the error that an input leads to, or what else happens."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    make(directory)
    score_cache._open_shard.cache_clear()  # of files under the same names
    signal.alarm(SECONDS)
    try:
        read(directory)
    except UserError as error:
        return f"error: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "accepted"


def main(scratch: Path) -> None:
    """Try all."""

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    dynamics_files.MOST_VALUES = 100
    found = {
        f"good {at}": said(read, make, scratch / "input") for at, (read, make) in enumerate(GOOD)
    }
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for read, cases in GROUPS:
        for name, (make, _) in cases.items():
            found[f"{read.__name__}: {name}"] = said(read, make, scratch / "input")
    (scratch / "said.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
