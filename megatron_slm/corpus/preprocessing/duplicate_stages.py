"""The stages before tokenization that find duplicates, each kept from run to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.corpus.cleaning.duplicates import (
    Verdicts,
    find_duplicates,
    fingerprint_documents,
    fingerprint_path,
)
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.pool import over_all_cores
from megatron_slm.corpus.preprocessing.settings import Setup, reading_options, wanted_of
from megatron_slm.corpus.progress import Progress
from megatron_slm.corpus.reading.input_records import what_changed
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.data.manifest import manifest_path, read_manifest, write_manifest
from megatron_slm.data.manifest_types import Fingerprints, VerdictsManifest
from megatron_slm.errors import UserError


def verdicts_path(layout: OutputPaths) -> Path:
    """Of the documents of all tasks, one after the other."""
    return layout.shards / "duplicates.verdicts"


def make_fingerprints(setup: Setup) -> None:
    """Of this rank's tasks."""
    directory = setup.layout.shards
    wanted, options = wanted_of(setup.settings), reading_options(setup.settings)
    missing = []
    for task in setup.own:
        manifest = read_manifest(fingerprint_path(directory, task, "json"), Fingerprints)
        if manifest is None or what_changed(task, options, manifest) is not None:
            missing.append(task)

    def work(task: Task, progress: Progress) -> dict[str, Any]:
        with setup.layout.alone_on(fingerprint_path(directory, task, "json")):
            return fingerprint_documents(task, directory, wanted, options, progress)

    for _ in over_all_cores("fingerprint", missing, work, setup.settings.workers):
        pass


def all_fingerprints(setup: Setup) -> list[dict[str, Any]]:
    """Manifests of all tasks' fingerprints.

    Raises:
        UserError: some are missing, or of other inputs or options.
    """
    options = reading_options(setup.settings)
    found = []
    for task in setup.tasks:
        manifest = read_manifest(fingerprint_path(setup.layout.shards, task, "json"), Fingerprints)
        if manifest is None or what_changed(task, options, manifest) is not None:
            raise UserError(f"{task.name} has no fingerprints yet: run --stage fingerprint first")
        found.append(manifest)
    return found


def make_verdicts(setup: Setup) -> None:
    """On all documents, unless they are there."""
    fingerprints = all_fingerprints(setup)
    path = verdicts_path(setup.layout)
    content = {"fingerprints": fingerprints}
    before = read_manifest(manifest_path(path), VerdictsManifest)
    if before is not None and before["fingerprints"] == fingerprints:
        return
    counts = [manifest["documents"] for manifest in fingerprints]
    near = setup.settings.dedup == "near"
    with setup.layout.alone_on(path):
        manifest_path(path).unlink(missing_ok=True)
        find_duplicates(setup.tasks, setup.layout.shards, counts, near, path)
        write_manifest(manifest_path(path), content)


def slices_of_verdicts(setup: Setup) -> dict[str, tuple[slice, list[str]]]:
    """Each task's part of the verdicts, and the hashes of its pieces; empty without dedup."""
    if setup.settings.dedup is None:
        return {}
    fingerprints = all_fingerprints(setup)
    before = read_manifest(manifest_path(verdicts_path(setup.layout)), VerdictsManifest)
    if before is None or before["fingerprints"] != fingerprints:
        raise UserError("the duplicates are not known yet: run --stage duplicates first")
    ends = np.cumsum([0, *(manifest["documents"] for manifest in fingerprints)]).tolist()
    spans = map(slice, ends, ends[1:])
    hashes = ([piece["sha256"] for piece in found["inputs"]] for found in fingerprints)
    names = (task.name for task in setup.tasks)
    return dict(zip(names, zip(spans, hashes, strict=True), strict=True))


def verdicts_of(
    task: Task, layout: OutputPaths, slices: dict[str, tuple[slice, list[str]]]
) -> Verdicts | None:
    """On a task's documents; None without dedup."""
    if not slices:
        return None
    own, hashes = slices[task.name]
    count = own.stop - own.start
    return Verdicts(np.fromfile(verdicts_path(layout), np.uint8, count, offset=own.start), hashes)
