"""Run the stages before tokenization that find duplicates; their results are kept between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_slm.corpus.cleaning.duplicates import (
    Verdicts,
    find_duplicates,
    fingerprint_documents,
    fingerprint_path,
)
from megatron_slm.corpus.preprocessing.pool import over_all_cores
from megatron_slm.corpus.preprocessing.settings import Setup, reading_options, wanted_of
from megatron_slm.corpus.progress import Progress
from megatron_slm.corpus.reading.input_records import what_changed
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.data.manifest import manifest_path, read_manifest, write_manifest
from megatron_slm.data.manifest_types import Fingerprints, VerdictsManifest
from megatron_slm.errors import UserError


@dataclass(frozen=True)
class AllVerdicts:
    """The verdicts on the documents of all tasks, one after the other in a file."""

    path: Path
    tasks: dict[str, tuple[slice, list[str]]]
    """For each task's name, its part of the file and the hashes of its pieces."""

    def on(self, task: Task) -> Verdicts:
        """Return the verdicts on a task's documents."""
        part, hashes = self.tasks[task.name]
        count = part.stop - part.start
        return Verdicts(np.fromfile(self.path, np.uint8, count, offset=part.start), hashes)


def make_fingerprints(setup: Setup) -> list[Fingerprints]:
    """Fingerprint the documents of this rank's tasks, and return the manifests in their order."""
    directory = setup.layout.shards
    wanted, options = wanted_of(setup.settings), reading_options(setup.settings)
    found = _known_fingerprints(setup, setup.own)

    def work(task: Task, progress: Progress) -> Fingerprints:
        with setup.layout.alone_on(fingerprint_path(directory, task, "json")):
            return fingerprint_documents(task, directory, wanted, options, progress)

    missing = [task for task in setup.own if task.name not in found]
    for task, made in over_all_cores("fingerprint", missing, work, setup.settings.workers):
        found[task.name] = made
    return [found[task.name] for task in setup.own]


def all_fingerprints(setup: Setup) -> list[Fingerprints]:
    """Return the manifests of all tasks' fingerprints, which ranks have made.

    Raises:
        UserError: some are missing, or were made from other inputs or with other options.
    """
    found = _known_fingerprints(setup, setup.tasks)
    for task in setup.tasks:
        if task.name not in found:
            raise UserError(f"{task.name} has no fingerprints yet: run --stage fingerprint first")
    return [found[task.name] for task in setup.tasks]


def _known_fingerprints(setup: Setup, tasks: Sequence[Task]) -> dict[str, Fingerprints]:
    """Return the manifests of fingerprints that are still valid, by the task's name."""
    options = reading_options(setup.settings)
    found = {}
    for task in tasks:
        path = fingerprint_path(setup.layout.shards, task, "json")
        manifest = read_manifest(path, Fingerprints)
        if manifest is not None and what_changed(task, options, manifest) is None:
            found[task.name] = manifest
    return found


def make_verdicts(setup: Setup, fingerprints: list[Fingerprints]) -> AllVerdicts:
    """Find the duplicates among all documents, unless they are known."""
    path = _verdicts_path(setup)
    if not _are_known(setup, fingerprints):
        counts = [manifest.documents for manifest in fingerprints]
        near = setup.settings.dedup == "near"
        with setup.layout.alone_on(path):
            manifest_path(path).unlink(missing_ok=True)
            find_duplicates(setup.tasks, setup.layout.shards, counts, near, path)
            write_manifest(manifest_path(path), VerdictsManifest(fingerprints))
    return _verdicts(setup, fingerprints)


def known_verdicts(setup: Setup, fingerprints: list[Fingerprints]) -> AllVerdicts:
    """Return the verdicts of an earlier stage.

    Raises:
        UserError: there are none for these documents.
    """
    if not _are_known(setup, fingerprints):
        raise UserError("the duplicates are not known yet: run --stage duplicates first")
    return _verdicts(setup, fingerprints)


def _are_known(setup: Setup, fingerprints: list[Fingerprints]) -> bool:
    before = read_manifest(manifest_path(_verdicts_path(setup)), VerdictsManifest)
    return before is not None and before.fingerprints == fingerprints


def _verdicts(setup: Setup, fingerprints: list[Fingerprints]) -> AllVerdicts:
    tasks, start = {}, 0
    for task, manifest in zip(setup.tasks, fingerprints, strict=True):
        part = slice(start, start + manifest.documents)
        tasks[task.name] = part, [piece.sha256 for piece in manifest.inputs]
        start = part.stop
    return AllVerdicts(_verdicts_path(setup), tasks)


def _verdicts_path(setup: Setup) -> Path:
    return setup.layout.shards / "duplicates.verdicts"
