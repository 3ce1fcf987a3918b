"""Turn corpora into Megatron's indexed datasets.

    plan        cut the inputs into tasks                           inputs.py
    look        find what earlier runs have left that can be used   found.py
    duplicates  with --dedup, two steps over all tasks              duplicates.py
    tokenize    write each task's shard, on all cores               shard.py, pool.py
    finish      turn the shards into datasets                       finish.py

Every step keeps what earlier runs have finished and is still valid.  So a run that was killed can
be continued, and several machines can share one output directory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_slm.corpus.preprocessing.duplicate_stages import (
    AllVerdicts,
    all_fingerprints,
    known_verdicts,
    make_fingerprints,
    make_verdicts,
)
from megatron_slm.corpus.preprocessing.finish import (
    PreprocessingSummary,
    check_rejects,
    finish,
    remove_lists,
)
from megatron_slm.corpus.preprocessing.found import (
    Found,
    Serving,
    complete_datasets,
    look,
    serving,
)
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.pool import over_all_cores
from megatron_slm.corpus.preprocessing.settings import (
    PreprocessingSettings,
    Setup,
    prepare,
    wanted_of,
)
from megatron_slm.corpus.preprocessing.settle import settle
from megatron_slm.corpus.preprocessing.shard import ShardRecipe, make_shard
from megatron_slm.corpus.progress import Progress, announce
from megatron_slm.corpus.reading.documents import read_documents
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.corpus.reading.lines import InputHash
from megatron_slm.corpus.tokenizers.engines import choose_engine
from megatron_slm.data.manifest_types import ShardManifest
from megatron_slm.errors import UserError

SAMPLED_TASKS, SAMPLED_CHARACTERS = 64, 1 << 20  # used to choose an engine


def preprocess(settings: PreprocessingSettings) -> PreprocessingSummary | None:
    """Run preprocessing, or the stage of it that the settings name.

    Returns:
        The datasets; None if other ranks or stages still have to do their part.

    Raises:
        UserError: the input or an option is wrong, or the disk is full. No dataset that could be
            mistaken for a complete one is left then; finished shards are kept for the next run.
    """
    layout = OutputPaths(settings.output_prefix, settings.json_keys)
    try:
        with layout.claim(alone=settings.stage == "all"):
            return run_stages(prepare(settings, layout))
    except OSError as error:
        raise UserError(
            f"{layout.prefix}: {error}; run again when this is mended: finished shards are kept"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{layout.prefix}: there is not enough memory; run again, with fewer --workers: "
            "finished shards are kept"
        ) from error
    finally:
        layout.remove_leftovers()


def run_stages(setup: Setup) -> PreprocessingSummary | None:
    """Run the stages, once the output is claimed; return and raise what `preprocess` does."""
    layout, settings, stage = setup.layout, setup.settings, setup.settings.stage
    if stage == "fingerprint":
        make_fingerprints(setup)
        return None
    if stage == "duplicates":
        make_verdicts(setup, all_fingerprints(setup))
        return None
    if stage == "all":
        settle(layout)
    found = look(setup)
    serves = serving(setup, found)
    if stage == "all" and (datasets := complete_datasets(setup, found, serves)) is not None:
        summary = PreprocessingSummary(layout, datasets)
        check_rejects(layout, summary.shards, settings.max_reject_fraction)
        announce("the dataset is complete: nothing to do")
        layout.clear(settings.merge)
        return summary
    verdicts = None
    if settings.dedup is not None and stage == "all":
        verdicts = make_verdicts(setup, make_fingerprints(setup))
    elif settings.dedup is not None:
        verdicts = known_verdicts(setup, all_fingerprints(setup))
    shards, merged = tokenize(setup, found, serves, verdicts)
    if stage == "tokenize":
        return None
    return finish(setup, [shards[task.name] for task in setup.tasks], merged, found)


def tokenize(
    setup: Setup, found: Found, serves: dict[str, Serving], verdicts: AllVerdicts | None
) -> tuple[dict[str, ShardManifest], set[str]]:
    """Make this rank's shards that are missing.

    Returns:
        The manifest of each task's shard, and the names of the tasks whose shards are part of the
        merged datasets.
    """
    shards: dict[str, ShardManifest] = {}
    merged: set[str] = set()
    missing = []
    for task in setup.own:
        there = serves[task.name]
        dropped = None if verdicts is None else verdicts.on(task).sha256
        if there.shard is not None and there.shard.dropped == dropped:
            shards[task.name] = there.shard
        elif there.merged is not None and there.merged.dropped == dropped:
            shards[task.name] = there.merged
            merged.add(task.name)
        else:
            missing.append(task)
            other = there.shard is not None or there.merged is not None
            if reason := "other duplicates" if other else there.changed:
                announce(f"{task.name}: made again: {reason}")
    if missing:
        remove_lists(found, setup.layout)
        recipe = recipe_of(setup, missing)

        def work(task: Task, progress: Progress) -> ShardManifest:
            own = None if verdicts is None else verdicts.on(task)
            with setup.layout.alone_on(setup.layout.shards / f"{task.name}.json"):
                return make_shard(task, setup.layout, recipe, own, progress)

        for task, manifest in over_all_cores("tokenize", missing, work, setup.settings.workers):
            shards[task.name] = manifest
    return shards, merged


def recipe_of(setup: Setup, tasks: Sequence[Task]) -> ShardRecipe:
    """Return how the tasks' documents become token ids, with an engine chosen for them."""
    settings, file = setup.settings, setup.file
    engine = choose_engine(settings.engine, file, settings.special_ids, sample(setup, tasks))
    announce(f"engine: {engine.why}")
    return ShardRecipe(
        wanted=wanted_of(settings),
        encode=engine.encode,
        engine=engine.name,
        vocab_size=file.vocab_size,
        before=(file.bos,) if settings.prepend_bos and file.bos is not None else (),
        after=(file.eod,) if settings.append_eod and file.eod is not None else (),
        contamination=setup.contamination,
        options=setup.options,
    )


def sample(setup: Setup, tasks: Sequence[Task]) -> list[str]:
    """Return the texts of the first usable documents of up to SAMPLED_TASKS tasks."""
    texts: list[str] = []
    chosen = np.unique(np.linspace(0, len(tasks) - 1, SAMPLED_TASKS).astype(int))
    for at in chosen:
        seen = InputHash(lambda _: None)
        batch = next(read_documents(tasks[at].pieces[0], wanted_of(setup.settings), seen), None)
        room = SAMPLED_CHARACTERS // len(chosen)
        for document in () if batch is None else batch.texts:
            texts += document
            room -= sum(map(len, document))
            if room <= 0:
                break
    return texts
