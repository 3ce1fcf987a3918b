"""Duplicates and contamination against plain set computations."""

from __future__ import annotations

import json
import os
import random
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from corpus import ids_of, preprocess, read_dataset, texts, write_jsonl
from megatron_slm.corpus.cleaning import duplicates
from megatron_slm.corpus.cleaning.duplicates import band_hashes, find_duplicates, fingerprint_path
from megatron_slm.corpus.cleaning.shingles import shingles
from megatron_slm.corpus.preprocessing import settings
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.errors import UserError

LONG = [text for text in texts() if len(text.split()) > 60][:60]


def words(text: str) -> list[str]:
    return re.findall(r"[0-9a-z]+|[^\x00-\x7f]+", text.lower())


def runs(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + n]) for at in range(len(found) - n + 1)}


@pytest.mark.parametrize("at_once", [1 << 24, 50])
def test_exact_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The first stays, wherever the others are, in whatever parts the hashes are sorted."""
    monkeypatch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
    rng = random.Random(5)
    found = rng.choices([*texts()[:150], "x"], k=400)
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", found[n * 200 : (n + 1) * 200]) for n in (0, 1)]
    result = preprocess(inputs, tmp_path / "out", "--dedup", "exact", "--shard-size", "10K")
    kept = list(dict.fromkeys(found))
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(t, eod=False) for t in kept]
    assert f"{400 - len(kept)} exact duplicates" in result.out
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_text())
    counted = sum(shard["counts"]["exact_duplicates"] for shard in manifest["shards"])
    assert counted == 400 - len(kept)


def test_duplicates_of_more_tasks_than_may_be_open(tmp_path: Path) -> None:
    tasks = [Task(f"task-{at}", ()) for at in range(200)]
    for task in tasks:
        hashes = np.arange(3 * 14, dtype=np.uint64).reshape(3, 14)
        hashes[:, :2].tofile(fingerprint_path(tmp_path, task, "exact"))
        hashes.T.tofile(fingerprint_path(tmp_path, task, "near"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        find_duplicates(tasks, tmp_path, [3] * 200, True, tmp_path / "verdicts")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    verdicts = np.fromfile(tmp_path / "verdicts", np.uint8)
    assert verdicts.tolist() == [0] * 3 + [1] * 597
    fingerprint_path(tmp_path, tasks[7], "near").unlink()
    with pytest.raises(UserError, match=r"cannot read .*task-7\.fingerprints\.near"):
        find_duplicates(tasks, tmp_path, [3] * 200, True, tmp_path / "verdicts")


def test_near_duplicates(tmp_path: Path) -> None:
    """A word changed, case, white space: gone.  Other texts and short ones: kept."""
    changed = []
    for at, text in enumerate(LONG):
        parts = text.split(" ")
        parts[len(parts) // 2] += " indeed"
        changed.append([text.upper(), "  ".join(text.split(" ")), " ".join(parts)][at % 3])
    short = ["too short", "too short!", "one two three four"]
    source = write_jsonl(tmp_path / "in.jsonl", [*LONG, *short, *changed])
    result = preprocess(source, tmp_path / "out", "--dedup", "near", "--shard-size", "20K")
    documents = read_dataset(tmp_path / "out_text_document")
    # Each that is gone shares most of its runs with one that is kept.
    kept = [text for text in [*LONG, *short, *changed] if ids_of(text, eod=False) in documents]
    gone = [text for text in [*LONG, *changed] if text not in kept]
    for text in gone:
        own = runs(text, 5)
        likeness = [len(own & runs(other, 5)) / len(own | runs(other, 5)) for other in kept[:60]]
        assert max(likeness) > 0.6
    assert set(short) <= set(kept)
    assert len(gone) >= 0.95 * len(changed)
    assert f"{len(gone)} near duplicates" in result.out


def test_bands_find_the_likeness_they_promise() -> None:
    """1 - (1 - s^8)^14 of pairs of Jaccard similarity s share a band."""
    rng = random.Random(1)
    vocabulary = [f"w{at}" for at in range(100_000)]
    for wanted, low, high in ((0.8, 0.85, 0.98), (0.5, 0.01, 0.12)):
        hits = 0
        for _ in range(300):
            first = rng.sample(vocabulary, 400)
            both = round(396 * 2 * wanted / (1 + wanted)) + 4
            second = first[:both] + rng.sample(vocabulary, 400 - both)
            one, two = band_hashes([" ".join(first), " ".join(second)])
            hits += bool((one == two).any())
        assert low < hits / 300 < high


def test_shingles_are_of_words() -> None:
    for text in LONG:
        for n in (1, 5, 13):
            assert len(np.unique(shingles(text, n))) == len(runs(text, n))
    assert np.array_equal(shingles("A, b. C!", 2), shingles("a b c", 2))
    assert np.array_equal(
        shingles("“Ça” va\u2014bien\u3000东京。大阪", 2), shingles("ça va bien 东京 大阪", 2)
    )
    assert shingles("a b", 3).size == 0


def test_words_of_any_script() -> None:
    """Symbols part words, what is invisible does not, and however a character is composed."""
    for written, meant in {
        "5€≠£7→“x🎲y” ❤\ufe0f one™\x85two": "5 7 x y one two",
        "co\u00adoper\u200date \ufeffthe\u200e end": "cooperate the end",
        "zero\u200bwidth\u2028space": "zero width space",
        "\ufb01ne cafe\u0301 \uff37ide \U0001d401old": "fine café wide bold",
        "हिन्दी": "हिन्दी",
    }.items():
        assert np.array_equal(shingles(written, 1), shingles(meant, 1)), written
        assert len(shingles(written, 1)) == len(meant.split())


def test_what_was_found_with_other_words_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", LONG)
    options = ("--dedup", "near", "--no-merge")
    preprocess(source, tmp_path / "out", *options)
    assert "nothing to do" in preprocess(source, tmp_path / "out", *options).err
    monkeypatch.setattr(settings, "SHINGLES_VERSION", settings.SHINGLES_VERSION + 1)
    said = preprocess(source, tmp_path / "out", *options).err
    assert "fingerprint: 100%" in said and "made again: other words" in said


def test_decontamination(tmp_path: Path) -> None:
    """Documents with thirteen words in a row of an evaluation set, in other case and spacing."""
    questions = LONG[:5]
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(
        "".join(
            json.dumps({"question": text, "choices": [{"text": "short"}], "n": 1}) + "\n"
            for text in questions
        )
    )
    forbidden = set().union(*(runs(text, 13) for text in questions))
    thirteen = " ".join(words(questions[0])[3:16])
    twelve = " ".join(words(questions[0])[3:15])
    found = [*LONG[3:], f"{LONG[9]} {thirteen.upper()} end", f"{LONG[10]}. {twelve} end"]
    source = write_jsonl(tmp_path / "in.jsonl", found)
    result = preprocess(source, tmp_path / "out", "--decontaminate", evaluation)
    kept = [text for text in found if not runs(text, 13) & forbidden]
    assert 3 <= len(found) - len(kept) < 10 and found[-1] in kept
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(t, eod=False) for t in kept]
    assert f"{len(found) - len(kept)} contaminated" in result.out
    assert "5 evaluation texts are too short" in result.err
