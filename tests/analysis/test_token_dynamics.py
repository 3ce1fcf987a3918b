"""The paper's four classes against numpy's own least squares, and checkpoints scored in two layouts
against Hugging Face's Llama."""

from __future__ import annotations

import base64
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.test_layouts import LAYOUTS
from pyarrow import parquet
from torch.nn.functional import cross_entropy

import oracle
from jobs import SEQUENCE, VOCABULARY, Checkpoints, Corpus
from launch import REPOSITORY, Run, launch, pretrain
from megatron_slm.analysis.dynamics import dynamics_files
from megatron_slm.analysis.dynamics.dynamics_files import (
    read_dynamics_table,
    write_dynamics_table,
)
from megatron_slm.analysis.dynamics.rows import in_context
from megatron_slm.analysis.dynamics.token_dynamics import TokenDynamics, classify
from megatron_slm.analysis.report.settings import RunSettings
from megatron_slm.analysis.report.token_map import token_map
from megatron_slm.data.manifest_types import DumpOrigin
from megatron_slm.data.token_dump import TokenDump, read_dumps, write_dump
from megatron_slm.errors import UserError

TOOL = str(REPOSITORY / "tools" / "token_dynamics.py")
STEPS = 3


def dumps_of(losses: np.ndarray, iterations: list[int], valid: np.ndarray) -> list[TokenDump]:
    """losses: [K, n, s]."""
    tokens = np.arange(losses[0].size + len(valid), dtype=np.int32).reshape(len(valid), -1)
    return [
        TokenDump(at, tokens, each, valid, np.arange(len(valid)), DumpOrigin(None, None))
        for at, each in zip(iterations, losses, strict=True)
    ]


def test_classes_are_those_of_polyfit() -> None:
    draw = np.random.default_rng(5)
    iterations = [0, 100, 250, 300, 1000]  # not at even steps
    start = draw.exponential(3.0, (1, 7, 50))
    drift = draw.normal(0.0, 0.6, (1, 7, 50)) * np.linspace(0, 1, 5)[:, None, None]
    losses = np.abs(start + drift + draw.normal(0, 0.1, (5, 7, 50))).astype(np.float32)
    valid = draw.random((7, 50)) < 0.9
    found = classify(dumps_of(losses, iterations, valid))
    names = [("H->H", "H->L", "L->H", "L->L")[number] for number in found.classes]
    mean = losses[-1][valid].mean()
    expected = []
    for row, column in zip(*valid.nonzero(), strict=True):
        own = losses[:, row, column].astype(float)
        line = np.polynomial.Polynomial.fit(iterations, own, 1)
        change = line(iterations[-1]) - line(iterations[0])
        stays = "L->L" if own[-1] <= mean else "H->H"
        expected.append("H->L" if change < -0.2 else "L->H" if change > 0.2 else stays)
    assert names == expected
    assert set(expected) == {"H->H", "H->L", "L->H", "L->L"}
    for name in set(expected):
        own = losses[:, valid][:, np.array(expected) == name]
        np.testing.assert_allclose(found.mean_curve(name), own.mean(1), rtol=1e-5)
        assert found.share(name) == pytest.approx(expected.count(name) / len(expected))
        assert all(expected[at] == name for at in found.examples(name, 3))


def test_documents_that_do_not_see_each_other(tmp_path: Path) -> None:
    """A token is shown among those of its own document, in the table and the map too."""
    documents = np.array([[0, 0, 1, 1, 1, 2]], np.int32)  # of tokens 0 to 5
    losses = np.stack([np.full((1, 6), 3.0), np.full((1, 6), 1.0)]).astype(np.float32)
    dumps = dumps_of(losses, [1, 2], np.ones((1, 6), bool))
    dumps = [replace(dump, documents=documents) for dump in dumps]
    found = classify(dumps)
    assert found.documents is not None and found.documents.tolist() == [0, 1, 1, 1, 2, 2]
    texts = list("bcdefg")
    assert in_context(found, texts, 2)[:3] == ("c", "d", "e")
    assert in_context(replace(found, documents=None), texts, 2)[:3] == ("bc", "d", "efg")
    table, read_texts = read_dynamics_table(write_dynamics_table(tmp_path, found, texts, None))
    assert read_texts == texts and np.array_equal(table.documents, found.documents)
    write_dump(tmp_path, dumps[0])
    (read,) = read_dumps(tmp_path)
    packed = token_map([read], None, RunSettings({}))
    assert base64.b64decode(packed["begins"]) == bytes([0b010010])
    assert token_map([replace(read, documents=None)], None, RunSettings({}))["begins"] == ""


def test_a_table_that_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = classify(dumps_of(np.ones((2, 1, 5), np.float32), [1, 2], np.ones((1, 5), bool)))
    monkeypatch.setattr(dynamics_files, "MOST_VALUES", 39)  # 5 tokens, 8 columns
    with pytest.raises(UserError, match="would have 40 values; 39 can be read: take fewer dumps"):
        write_dynamics_table(tmp_path / "new", found, list("bcdef"), None)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(dynamics_files, "MOST_VALUES", 40)
    read_dynamics_table(write_dynamics_table(tmp_path / "new", found, list("bcdef"), None))


def test_what_is_no_number_is_refused() -> None:
    losses = np.ones((3, 1, 5), np.float32)
    losses[1, 0, 2] = np.nan
    with pytest.raises(UserError, match="losses of iteration 20 are NaN"):
        classify(dumps_of(losses, [10, 20, 30], np.ones((1, 5), bool)))
    there = np.ones((1, 5), bool)
    there[0, 2] = False  # padding may have any loss
    assert len(classify(dumps_of(losses, [10, 20, 30], there)).classes) == 4


@pytest.fixture(scope="module")
def run(corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a checkpoint after every step."""
    directory = tmp_path_factory.mktemp("run")
    arguments = [*corpus.arguments, *untied.without_reference]
    arguments += f"--train-iters {STEPS} --micro-batch-size 3 --lr 3e-3".split()
    arguments += ["--save", "saved", "--save-interval", "1"]
    return pretrain(1, arguments, directory)


def score(corpus: Corpus, run: Run, layout: str, directory: Path, extra: str = "") -> Run:
    ranks, flags = LAYOUTS[layout]
    arguments = [*corpus.arguments, *f"--micro-batch-size 4 --eval-iters 1 {flags}".split()]
    arguments += ["--load", str(run.directory / "saved"), "--dynamics", "dynamics"]
    arguments += ["--dynamics-tokens", str(9 * SEQUENCE), *extra.split()]
    return launch(ranks, [TOOL, *arguments], directory)


def test_checkpoints_of_a_run(
    corpus: Corpus, run: Run, validation: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    one = score(corpus, run, "one rank", tmp_path / "one")
    others = [score(corpus, run, layout, tmp_path / layout) for layout in ("dp2 pp2", "tp2 cp2")]
    dumps = [read_dumps(each.directory / "dynamics" / "losses") for each in (one, *others)]
    assert [dump.iteration for dump in dumps[0]] == list(range(1, STEPS + 1))
    for each in zip(*dumps, strict=True):
        checkpoint = run.directory / "saved" / f"iter_{each[0].iteration:07d}"
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            model = oracle.llama(checkpoint, Path(scratch), heads=4, groups=2, tied=False)
            logits = model(validation["tokens"][:9]).logits[..., :VOCABULARY]
        labels = validation["labels"][:9]
        expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        for found in each:
            np.testing.assert_allclose(found.losses, expected.view_as(labels), rtol=1e-5, atol=1e-5)
            assert np.array_equal(found.tokens[:, 1:], labels)
    _the_files(one.directory / "dynamics", dumps[0])
    # The same command again has nothing to score; of what is there it takes what it was asked for.
    again = score(corpus, run, "one rank", tmp_path / "one", "--ckpt-steps 1 3")
    assert again.outputs[0].count("scored before") == 2
    read, _ = read_dynamics_table(one.directory / "dynamics" / "token_dynamics.parquet")
    assert read.iterations == [1, 3]
    _the_words(again.outputs[0], classify([dumps[0][0], dumps[0][2]]))


def _the_words(output: str, dynamics: TokenDynamics) -> None:
    """Check what is printed: where the tokens that started high, or low, have gone."""
    for start in "HL":
        part = {end: dynamics.share(f"{start}->{end}") for end in "HL"}
        both = sum(part.values())
        ends = r"\s+".join(f"{part[end] / both:.1%}" if both else "" for end in "HL").strip()
        name = {"H": "high", "L": "low"}[start]
        assert re.search(rf"from {name}\s+{both:.1%}\s*{ends}", output), output
    assert re.search(r"H\u2192L falls\n(  .*\[\S+\].*nats\n)+", output), output


def _the_files(directory: Path, dumps: list[TokenDump]) -> None:
    """Check the table, which has a row per unmasked token, and the plots."""
    table = parquet.read_table(directory / "token_dynamics.parquet").to_pydict()
    valid = dumps[0].valid
    assert len(table["token"]) == valid.sum()
    rows, columns = valid.nonzero()
    assert table["sample"] == rows.tolist()
    assert table["position"] == (columns + 1).tolist()
    for dump in dumps:
        assert table[f"loss_{dump.iteration:07d}"] == dump.losses[valid].tolist()
    assert set(table["class"]) <= {"H->H", "H->L", "L->H", "L->L"}
    read, texts = read_dynamics_table(directory / "token_dynamics.parquet")
    assert texts == [f"⟨{token}⟩" for token in table["token"]]
    assert np.array_equal(read.classes, classify(dumps).classes)
    assert (directory / "token_dynamics.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (directory / "token_dynamics.svg").read_text()


def test_one_checkpoint_is_not_enough(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    arguments = [*corpus.arguments, "--micro-batch-size", "4", "--dynamics", "dynamics"]
    refused = launch(1, [TOOL, *arguments, "--load", str(untied.policy)], tmp_path, check=False)
    assert refused.codes == [2]
    assert "need at least two checkpoints" in refused.outputs[0]
