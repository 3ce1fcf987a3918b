"""Corpora to Megatron indexed datasets.

    plan        the inputs are cut into tasks                       inputs.py
    duplicates  wanted only with dedup: two steps over all tasks    duplicates.py
    tokenize    each task writes its shard, over all cores          shard.py, pool.py
    finish      the shards become one dataset                       finish.py

Every step keeps what an earlier run has finished and what is still right, whoever ran it, so a run
that was killed goes on where it was, and several machines share one output directory.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.chat import chat_renderer
from megatron_slm.data.contamination import Contamination, read_evaluation_sets
from megatron_slm.data.documents import Wanted, read_documents
from megatron_slm.data.duplicates import find_duplicates, fingerprint, fingerprint_path
from megatron_slm.data.engines import choose_engine, load_engine
from megatron_slm.data.finish import (
    Summary,
    check_rejects,
    finish,
    is_complete,
    merged_shards,
    shard_manifest,
)
from megatron_slm.data.inputs import Task, plan_tasks
from megatron_slm.data.layout import Layout
from megatron_slm.data.lines import InputHash
from megatron_slm.data.manifest import (
    manifest_path,
    read_manifest,
    what_changed,
    write_manifest,
)
from megatron_slm.data.pool import Work, over_all_cores
from megatron_slm.data.shard import Progress, Recipe, make_shard, verdicts_hash
from megatron_slm.data.tokenizer import TokenizerFile, open_tokenizer
from megatron_slm.errors import UserError

STAGES = ("all", "fingerprint", "duplicates", "tokenize")
SAMPLED_TASKS, SAMPLED_DOCUMENTS = 64, 2048  # for the choice of an engine


@dataclass(frozen=True)
class Settings:
    """The command line of tools/preprocess_data.py, where every option is described."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    filters: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    domain: str | None = None
    append_eod: bool = False
    prepend_bos: bool = False
    special_ids: bool = False
    engine: str = "auto"
    dedup: str | None = None
    decontaminate: tuple[str, ...] = ()
    max_reject_fraction: float = 1e-4
    workers: int = 1
    shard_size: int = 1 << 28
    merge: bool = True
    stage: str = "all"
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or self.shard_size < 1:
            raise UserError("--workers and --shard-size must be at least 1")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise UserError("--json-keys names a key twice; each key makes one dataset")
        if not 0 <= self.max_reject_fraction <= 1:
            raise UserError("--max-reject-fraction is a part of all documents, from 0 to 1")
        if not 0 <= self.rank < self.world_size:
            raise UserError("--rank counts from 0 to --world-size - 1")
        if self.world_size > 1 and self.stage == "all":
            raise UserError("--world-size needs --stage: every rank does its part of one stage")
        if self.stage in ("fingerprint", "duplicates") and self.dedup is None:
            raise UserError(f"--stage {self.stage} needs --dedup")


@dataclass(frozen=True)
class Setup:
    """What a run knows before it starts.  options: of the manifests."""

    settings: Settings
    layout: Layout
    tasks: list[Task]
    file: TokenizerFile
    contamination: Contamination | None
    options: dict[str, Any]

    @property
    def own(self) -> list[Task]:
        """This rank's tasks."""
        return self.tasks[self.settings.rank :: self.settings.world_size]


def preprocess(settings: Settings) -> Summary | None:
    """Do what the settings say; None if other ranks or stages have still to do their part.

    Raises:
        UserError: bad input or options, or a full disk.  No dataset that could be taken for a good
            one is left then, and finished shards are kept for the next run.
    """
    setup = prepare(settings)
    layout, stage = setup.layout, settings.stage
    if stage == "all":
        complete = is_complete(layout, setup.tasks, setup.options, settings.merge)
        if complete is not None:
            check_rejects(layout, complete.counts, settings.max_reject_fraction)
            say("the dataset is complete: nothing to do")
            layout.clear(settings.merge)
            return complete
    if settings.dedup is not None and stage in ("all", "fingerprint"):
        make_fingerprints(setup)
    if settings.dedup is not None and stage in ("all", "duplicates"):
        make_verdicts(setup)
    if stage in ("fingerprint", "duplicates"):
        return None
    shards, merged_before = tokenize(setup)
    if stage == "tokenize":
        return None
    return finish(
        layout,
        [shards[task.name] for task in setup.tasks],
        merged_before,
        setup.options,
        settings.max_reject_fraction,
        settings.merge,
        settings.workers,
    )


def prepare(settings: Settings) -> Setup:
    """Look at inputs, tokenizer and evaluation sets."""
    layout = Layout(settings.output_prefix, settings.json_keys)
    layout.make()
    layout.remove_leftovers()
    inputs = [layout.spool_stdin() if name == "-" else name for name in settings.inputs]
    tasks = plan_tasks(inputs, settings.shard_size)
    file = open_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    if settings.append_eod and file.eod is None:
        raise UserError("--append-eod: the tokenizer has no end-of-document token")
    if settings.prepend_bos and file.bos is None:
        raise UserError("--prepend-bos: the tokenizer has no token that begins a document")
    contamination = read_evaluation_sets(settings.decontaminate) if settings.decontaminate else None
    if contamination is not None and contamination.too_short:
        say(f"{contamination.too_short} evaluation texts are too short to be looked for")
    options = {
        "tokenizer": {
            "name": Path(settings.tokenizer_model).name,
            "sha256": file.sha256,
            "vocab_size": file.vocab_size,
        },
        "domain": settings.domain,
        "append_eod": file.eod if settings.append_eod else None,
        "prepend_bos": file.bos if settings.prepend_bos else None,
        "special_tokens_in_text": "ids" if settings.special_ids else "text",
        "decontaminate": None if contamination is None else contamination.sha256,
        **reading_options(settings),
    }
    return Setup(settings, layout, tasks, file, contamination, options)


def reading_options(settings: Settings) -> dict[str, Any]:
    """Those that decide which texts are read."""
    template = settings.chat_template
    return {
        "json_keys": list(settings.json_keys),
        "filters": [list(pair) for pair in settings.filters],
        "chat_template": None
        if template is None
        else hashlib.sha256(Path(template).read_bytes()).hexdigest(),
        "dedup": settings.dedup,
    }


def wanted_of(settings: Settings) -> Wanted:
    """What to take of a record."""
    template = settings.chat_template
    render = None if template is None else chat_renderer(template)
    return Wanted(settings.json_keys, settings.filters, render)


@dataclass(frozen=True)
class FingerprintJob:
    """Sent to the workers of the fingerprint stage."""

    settings: Settings
    directory: Path

    def start(self) -> Work:
        wanted, options = wanted_of(self.settings), reading_options(self.settings)
        return lambda task, progress: fingerprint(task, self.directory, wanted, options, progress)


@dataclass(frozen=True)
class TokenizeJob:
    """Sent to the workers of the tokenize stage.  dropped: what of the verdicts is each task's."""

    setup: Setup
    engine: str
    dropped: dict[str, slice]

    def start(self) -> Work:
        settings, setup = self.settings, self.setup
        file = setup.file
        recipe = Recipe(
            wanted=wanted_of(settings),
            encode=load_engine(self.engine, file, settings.special_ids),
            engine=self.engine,
            vocab_size=file.vocab_size,
            before=(file.bos,) if settings.prepend_bos and file.bos is not None else (),
            after=(file.eod,) if settings.append_eod and file.eod is not None else (),
            contamination=setup.contamination,
            options=setup.options,
        )

        def work(task: Task, progress: Progress) -> dict[str, Any]:
            dropped = self.verdicts(task)
            return make_shard(task, setup.layout, recipe, dropped, progress)

        return work

    @property
    def settings(self) -> Settings:
        return self.setup.settings

    def verdicts(self, task: Task) -> NDArray[np.uint8] | None:
        """On the task's documents; None without dedup."""
        if not self.dropped:
            return None
        path = verdicts_path(self.setup.layout)
        return np.fromfile(path, np.uint8)[self.dropped[task.name]]


def verdicts_path(layout: Layout) -> Path:
    """Of the documents of all tasks, one after the other."""
    return layout.shards / "duplicates.verdicts"


def make_fingerprints(setup: Setup) -> None:
    """Of this rank's tasks."""
    options = reading_options(setup.settings)
    missing = []
    for task in setup.own:
        manifest = read_manifest(fingerprint_path(setup.layout.shards, task, "json"))
        if manifest is None or what_changed(task, options, manifest) is not None:
            missing.append(task)
    job = FingerprintJob(setup.settings, setup.layout.shards)
    for _ in over_all_cores("fingerprint", missing, job, setup.settings.workers):
        pass


def all_fingerprints(setup: Setup) -> list[dict[str, Any]]:
    """Manifests of all tasks' fingerprints.

    Raises:
        UserError: some are missing, or of other inputs or options.
    """
    options = reading_options(setup.settings)
    found = []
    for task in setup.tasks:
        manifest = read_manifest(fingerprint_path(setup.layout.shards, task, "json"))
        if manifest is None or what_changed(task, options, manifest) is not None:
            raise UserError(f"{task.name} has no fingerprints yet: run --stage fingerprint first")
        found.append(manifest)
    return found


def make_verdicts(setup: Setup) -> None:
    """On all documents, unless they are there."""
    fingerprints = all_fingerprints(setup)
    path = verdicts_path(setup.layout)
    content = {"fingerprints": fingerprints}
    before = read_manifest(manifest_path(path))
    if before is not None and before["fingerprints"] == fingerprints:
        return
    manifest_path(path).unlink(missing_ok=True)
    counts = [manifest["documents"] for manifest in fingerprints]
    near = setup.settings.dedup == "near"
    find_duplicates(setup.tasks, setup.layout.shards, counts, near, path)
    write_manifest(manifest_path(path), content)


def slices_of_verdicts(setup: Setup) -> dict[str, slice]:
    """Each task's part of the verdicts; empty without dedup."""
    if setup.settings.dedup is None:
        return {}
    fingerprints = all_fingerprints(setup)
    before = read_manifest(manifest_path(verdicts_path(setup.layout)))
    if before is None or before["fingerprints"] != fingerprints:
        raise UserError("the duplicates are not known yet: run --stage duplicates first")
    ends = np.cumsum([0, *(manifest["documents"] for manifest in fingerprints)]).tolist()
    spans = map(slice, ends, ends[1:])
    return {task.name: span for task, span in zip(setup.tasks, spans, strict=True)}


def tokenize(setup: Setup) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Make the shards of this rank that are missing.

    Returns:
        manifests by task, and the tasks whose shards are part of the merged dataset.
    """
    job = TokenizeJob(setup, "", slices_of_verdicts(setup))
    in_dataset = merged_shards(setup.layout) if setup.settings.merge else {}
    shards: dict[str, dict[str, Any]] = {}
    merged_before: set[str] = set()
    missing = []
    for task in setup.own:
        reason = None
        verdicts = verdicts_hash(job.verdicts(task))
        for manifest in (shard_manifest(setup.layout, task), in_dataset.get(task.name)):
            if manifest is None:
                continue
            reason = what_changed(task, setup.options, manifest)
            if reason is None and manifest["dropped"] != verdicts:
                reason = "other duplicates"
            if reason is None:
                shards[task.name] = manifest
                if manifest is in_dataset.get(task.name):
                    merged_before.add(task.name)
                break
        else:
            missing.append(task)
            if reason is not None:
                say(f"{task.name}: made again: {reason}")
    if missing:
        settings = setup.settings
        chosen = choose_engine(
            settings.engine, setup.file, settings.special_ids, sample(setup, missing)
        )
        say(f"engine: {chosen.why}")
        job = TokenizeJob(setup, chosen.engine, job.dropped)
        for task, manifest in over_all_cores("tokenize", missing, job, settings.workers):
            shards[task.name] = manifest
    return shards, merged_before


def sample(setup: Setup, tasks: Sequence[Task]) -> list[str]:
    """The first documents of tasks all over the corpus.

    Raises:
        UserError: none of them can be used.
    """
    wanted = wanted_of(setup.settings)
    texts: list[str] = []
    first_reject = None
    chosen = np.unique(np.linspace(0, len(tasks) - 1, SAMPLED_TASKS).astype(int))
    for at in chosen:
        seen = InputHash(lambda _: None)
        for batch in read_documents(tasks[at].pieces[0], wanted, seen):
            texts += [
                text for texts in batch.texts[: SAMPLED_DOCUMENTS // len(chosen)] for text in texts
            ]
            first_reject = first_reject or next(iter(batch.rejects), None)
            break
    if not texts and first_reject is not None:
        where = f"{first_reject['file']}:{first_reject['line']}"
        raise UserError(f"{where}: {first_reject['reason']}; nor can any other of the first lines")
    return texts


def say(line: str) -> None:
    """To people; results go to stdout."""
    print(f"> {line}", file=sys.stderr, flush=True)
