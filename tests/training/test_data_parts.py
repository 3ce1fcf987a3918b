"""A part of the data on which Megatron would hang or fail is refused, and no other: each case is
also given to Megatron's own builder, which has to hang, fail or build what the run draws."""

from __future__ import annotations

import multiprocessing
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch

from gpt_datasets import gpt_config
from megatron_slm.data.indexed_format import open_index
from megatron_slm.errors import UserError
from megatron_slm.training.data_parts import check_parts

SEQUENCE = 8
FORKING = multiprocessing.get_context("fork")  # a builder that hangs cannot be interrupted
PATIENCE = 0.7  # seconds, of what takes a few milliseconds


@dataclass(frozen=True)
class Case:
    """documents: lengths of each dataset's, by its name.  data: the blend, or one for each split.
    samples: that the run draws of each split.  said: part of the refusal, None if all is well."""

    documents: dict[str, list[int]]
    data: list[str] | dict[str, list[str]]
    said: str | None
    split: str | None = "969,30,1"
    samples: tuple[int, int | None, int] = (12, 4, 4)
    sets: bool = False


HUNDRED = {"a": [9] * 100}
TWO = {"a": [9] * 40, "b": [20] * 40}
THREE_PARTS = "80,10,10"
CASES = {
    "the default split, 500 documents": Case({"a": [9] * 501}, ["a"], None),
    "the default split, 100 documents": Case(
        HUNDRED, ["a"], "a has 100 documents, of which --split 969,30,1 leaves the test part none"
    ),
    "nothing drawn from the part": Case(HUNDRED, ["a"], "the test part none", samples=(12, 4, 0)),
    "no such part": Case(HUNDRED, ["a"], None, split="97,3,0"),
    "one document": Case({"a": [90]}, ["a"], "1 document, of which --split 50,50,0", "50,50,0"),
    "a part of empty documents": Case(
        {"a": [9] * 8 + [0, 0]},
        ["a"],
        "the validation part documents 8 to 9, which have no tokens",
        "80,20,0",
    ),
    "empty documents among others": Case({"a": [9, 0] * 50}, ["a"], None, "80,20,0"),
    "a part of a single token": Case({"a": [9] * 9 + [1]}, ["a"], None, "90,10,0"),
    "a short part that is not drawn from": Case(
        {"a": [9] * 9 + [1]}, ["a"], None, "90,10,0", samples=(12, 0, 0)
    ),
    "a blend": Case(TWO, ["0.5", "a", "0.5", "b"], None, THREE_PARTS),
    "a member of a blend": Case(
        TWO | {"b": [9] * 4}, ["0.5", "a", "0.5", "b"], "b has 4 documents", THREE_PARTS
    ),
    "a blend that is not drawn from": Case(
        TWO, ["0.5", "a", "0.5", "b"], None, THREE_PARTS, samples=(12, 0, 0)
    ),
    "a member of weight 0": Case(TWO, ["0", "a", "1", "b"], "a: its weight", THREE_PARTS),
    "a blend without weights": Case(
        TWO | {"c": [9] * 40}, ["a", "b", "c"], None, THREE_PARTS, samples=(12, 2, 2)
    ),
    "a member of it without a sample": Case(
        TWO | {"c": [9] * 4 + [1] * 4}, ["a", "b", "c"], "c: its validation part has 1", "80,10,10"
    ),
    "more than it has": Case(
        TWO, ["a", "b"], "143 samples, of 200 that the run draws", "100,0,0", samples=(200, 0, 0)
    ),
    "as many as it has": Case(TWO, ["a", "b"], None, "100,0,0", samples=(143, 0, 0)),
    "data of its own for each split": Case(
        {"a": [9] * 3, "b": [4]}, {"train": ["a"], "valid": ["b"]}, None, None
    ),
    "validation data without tokens": Case(
        {"a": [9] * 3, "b": [0, 0]},
        {"train": ["a"], "valid": ["b"]},
        "b has 2 documents, none of which has a token",
        None,
    ),
    "sets for full validation": Case(
        {"a": [9] * 3, "b": [9], "c": [10]},
        {"train": ["a"], "valid": ["b", "c"]},
        None,
        None,
        samples=(12, None, 0),
        sets=True,
    ),
    "a set too short for full validation": Case(
        {"a": [9] * 3, "b": [9], "c": [8]},
        {"train": ["a"], "valid": ["b", "c"]},
        "c: its validation part has 8 tokens",
        None,
        samples=(12, None, 0),
        sets=True,
    ),
    "weights for full validation": Case(
        {"a": [9] * 3, "b": [9], "c": [9]},
        {"train": ["a"], "valid": ["1", "b", "1", "c"]},
        "without weights",
        None,
        samples=(12, None, 0),
        sets=True,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_part(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, lengths in case.documents.items():
        _write(name, lengths)
    indices = {name: open_index(Path(f"{name}.idx")) for name in case.documents}
    if case.said is None:
        check_parts(_arguments(case), indices)
    else:
        with pytest.raises(UserError) as refusal:
            check_parts(_arguments(case), indices)
        assert case.said in str(refusal.value)
    assert _megatron_gives(case) is (case.said is None)


@pytest.mark.parametrize("split", ["nonsense", "0,0,0", "1,1,1,1", "1.2.3", ""])
def test_split_that_is_none(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write("a", [9] * 9)
    with pytest.raises(UserError, match="such as 969,30,1"):
        check_parts(
            _arguments(Case({"a": []}, ["a"], None, split)), {"a": open_index(Path("a.idx"))}
        )


def test_part_that_would_be_repeated_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which Megatron would count and list more passes than memory holds."""
    monkeypatch.chdir(tmp_path)
    _write("a", [9] * 9 + [1])
    case = Case({"a": []}, ["a"], None, "90,10,0", samples=(12, 4 * 10**9, 0))
    with pytest.raises(UserError, match="validation part has only 1 token"):
        check_parts(_arguments(case), {"a": open_index(Path("a.idx"))})


def _write(name: str, lengths: list[int]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{name}.bin", dtype=numpy.uint16)
    for length in lengths:
        builder.add_document(torch.ones(length, dtype=torch.int64), [length])
    builder.finalize(f"{name}.idx")


def _arguments(case: Case) -> Namespace:
    """Return the arguments of a run that draws so many samples, one a step."""
    per_split = case.data if isinstance(case.data, dict) else {}
    train, valid, test = case.samples
    return Namespace(
        data_path=None if per_split else case.data,
        data_args_path=None,
        per_split_data_args_path=None,
        **{f"{split}_data_path": per_split.get(split) for split in ("train", "valid", "test")},
        split=case.split,
        seq_length=SEQUENCE,
        global_batch_size=1,
        eval_global_batch_size=1,
        data_parallel_size=1,
        train_iters=train,
        train_samples=None,
        # One validation, after training.
        eval_iters=(valid or test) if valid is None or valid != test else valid,
        eval_interval=train + 1,
        start_eval_at_iter=None,
        skip_train=False,
        full_validation=valid is None,
        multiple_validation_sets=case.sets,
        phase_transition_iterations=None,
        step_batch_size_schedule=None,
        exit_interval=None,
        exit_duration_in_mins=None,
        dataloader_type="single",
    )


def _megatron_gives(case: Case) -> bool:
    """Whether Megatron builds what is drawn, before patience is lost."""
    process = FORKING.Process(target=lambda: os._exit(0 if _builds(case) else 1))
    process.start()
    process.join(PATIENCE if case.said else 60)
    process.kill()
    process.join()
    return process.exitcode == 0


def _builds(case: Case) -> bool:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import get_blend_from_list

    per_split = None
    if isinstance(case.data, dict):
        of_splits = [case.data.get(split) for split in ("train", "valid", "test")]
        per_split = [get_blend_from_list(each) for each in of_splits]
    config = gpt_config(
        SEQUENCE,
        10,
        blend=None if per_split else get_blend_from_list(case.data),
        blend_per_split=per_split,
        split=case.split,
        full_validation=case.samples[1] is None,
        multiple_validation_sets=case.sets,
    )
    try:
        built = BlendedMegatronDatasetBuilder(
            GPTDataset, list(case.samples), lambda: True, config
        ).build()
    except AssertionError:
        return False
    return all(
        len(dataset) >= (count or 1)
        for datasets, count in zip(built, case.samples, strict=True)
        for dataset in (datasets if isinstance(datasets, list) else [datasets])
        if dataset is not None and count != 0
    )
