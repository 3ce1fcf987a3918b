"""Pictures of a study: what they show is read back, and compared with the runs."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from launch import REPOSITORY
from megatron_slm.analysis.experiments.results import Point, RunResult, cut, summary
from megatron_slm.analysis.report.picture import PICTURES, write_picture
from megatron_slm.errors import UserError
from pictures import SPACE, axis, read_picture, texts

STEPS = range(5, 45, 5)
SEEDS = (1, 2, 3)
# The loss that an arm ends near, its FLOPs a step, and those of its reference.
ARMS = {
    "clm": (4.0, 600, 0),
    "slm": (3.5, 800, 9000),
    "worse": (4.25, 400, 0),
    "lost": (30.0, 400, 0),
}


def loss(arm: str, seed: int, step: int) -> float:
    end = ARMS[arm][0]
    return end + (5.0 - end) / (1 + step / 8) + 0.02 * seed * (1 + step % 3)


def general(arm: str, seed: int) -> float:
    return 2.0 + 0.125 * list(ARMS).index(arm) + 0.01 * seed * len(arm)


def run(arm: str, seed: int) -> RunResult:
    _, flops, reference = ARMS[arm]
    steps = STEPS if arm == "clm" else STEPS[:6]
    points = (
        Point(at, at * 1000, loss(arm, seed, at), at * 1000, at * flops, at * 100) for at in steps
    )
    others = {"general": {30: general(arm, seed)}}
    return RunResult(f"runs/{arm}", tuple(points), reference, 1.0, 6.0, others)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Write results.json as tools/run_experiment.py does."""
    runs = {arm: {seed: run(arm, seed) for seed in SEEDS} for arm in ARMS}
    runs["worse"].pop(3)
    results = {
        "format": 1,
        "study": "study",
        "target": "prose & <code>",
        "arms": {
            arm: {
                "arguments": [],
                "description": f"what {arm} is \0",
                "seeds": {
                    seed: cut(each, 30).described() | {"curve": each.curve}
                    for seed, each in own.items()
                },
            }
            for arm, own in runs.items()
        },
        "summary": summary(runs),
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def change(study: Path, curve: Callable[[list[Any]], list[Any]]) -> None:
    """Change the curve of each seed in results.json."""
    results = json.loads((study / "results.json").read_text())
    for arm in results["arms"].values():
        for seed in arm["seeds"].values():
            seed["curve"] = curve(seed["curve"])
    (study / "results.json").write_text(json.dumps(results))


def drawn(study: Path, kind: str, *arms: str) -> Path:
    path = study / "picture.svg"
    write_picture(study, kind, arms, path)
    return path


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    runpy.run_path(str(REPOSITORY / "tools" / "report.py"))["main"]()


def test_curves_over_tokens(study: Path) -> None:
    picture = read_picture(drawn(study, "tokens", "slm", "worse"))
    assert len(picture.lines) == len(picture.bands) == 3
    for arm, line, band in zip(("clm", "slm", "worse"), picture.lines, picture.bands, strict=True):
        steps = np.array(STEPS if arm == "clm" else STEPS[:6])
        seeds = SEEDS[:2] if arm == "worse" else SEEDS
        losses = np.array([[loss(arm, seed, at) for at in steps] for seed in seeds])
        np.testing.assert_allclose(line[:, 0], steps * 1000, atol=50)
        np.testing.assert_allclose(line[:, 1], losses.mean(0), atol=2e-3)
        np.testing.assert_allclose(band[: len(steps), 1], losses.max(0), atol=2e-3)
        np.testing.assert_allclose(band[len(steps) :, 1], losses.min(0)[::-1], atol=2e-3)
    assert "Target: prose & <code>." in picture.texts
    ends = [loss("slm", seed, 30) for seed in SEEDS]
    assert f"{np.mean(ends):.4f} ± {np.std(ends, ddof=1):.4f}" in picture.texts
    assert any("losses after 30,000 tokens" in text for text in picture.texts)


def test_curves_over_compute(study: Path) -> None:
    """The reference's training comes first; the baseline takes 1 until all arms are compared."""
    picture = read_picture(drawn(study, "compute", "slm"))
    clm, slm = picture.lines
    whole = 30 * (600 + 100)
    np.testing.assert_allclose(clm[:, 0], np.array(STEPS) * 700 / whole, atol=2e-3)
    np.testing.assert_allclose(slm[:, 0], (9000 + np.array(STEPS[:6]) * 900) / whole, atol=2e-3)


def test_an_arm_that_diverges_is_cut(study: Path) -> None:
    picture = read_picture(drawn(study, "tokens"))
    _, top = axis(picture.root, "soft end", "y")
    highest = max(float(np.max(line[:, 1])) for line in picture.lines[:3])
    box = picture.root.find(f"{SPACE}clipPath/{SPACE}rect")
    assert box is not None
    slope, _ = axis(picture.root, "soft end", "y")
    assert highest < top + slope * float(box.attrib["y"]) < picture.lines[3][:, 1].max() / 2
    assert any(text.endswith("Higher losses are cut off.") for text in picture.texts)
    words = read_picture(drawn(study, "tokens", "slm")).texts
    assert not any("cut off" in text for text in words)


def test_an_arm_with_a_single_validation(study: Path) -> None:
    """It is seen, as a dash with a band, and so is an arm far above a baseline of this kind."""
    change(study, lambda curve: curve[5:6])
    picture = read_picture(drawn(study, "tokens", "slm", "lost"))
    for arm, line, band in zip(("clm", "slm", "lost"), picture.lines, picture.bands, strict=True):
        losses = [loss(arm, seed, 30) for seed in SEEDS]
        assert line[:, 0].mean() == pytest.approx(30_000, abs=50) and np.ptp(line[:, 0]) > 500
        np.testing.assert_allclose(line[:, 1], np.mean(losses), atol=2e-2)
        ends = [max(losses), max(losses), min(losses), min(losses)]
        np.testing.assert_allclose(band[:, 1], ends, atol=2e-2)


def bars(path: Path) -> list[tuple[str, float, float, bool]]:
    """Return each bar's role, ends in nats, and whether it has a point."""
    root = ElementTree.parse(path).getroot()
    slope, offset = axis(root, "soft middle", "x")
    found = []
    for bar in root.iter(f"{SPACE}path"):
        kind, _, role = bar.attrib["class"].partition(" ")
        if kind == "bar":
            zero, side = bar.attrib["d"][1:].partition("L")[0].split("H")
            tip = bar.attrib["d"].partition("L")[2].split()[0]
            start, end = (slope * float(at.split()[0]) + offset for at in (zero, tip))
            found.append((role, start, end, side != tip))
    return found


def test_bars(study: Path) -> None:
    path = drawn(study, "arms")
    found = bars(path)
    assert [role for role, *_ in found] == ["role-0", "role-1"] * 3
    words = texts(ElementTree.parse(path).getroot())
    expected = []
    for arm in ("slm", "worse", "lost"):
        seeds = SEEDS[:2] if arm == "worse" else SEEDS
        target = [loss(arm, seed, 30) - loss("clm", seed, 30) for seed in seeds]
        expected += [target, [general(arm, seed) - general("clm", seed) for seed in seeds]]
    for (_, zero, end, pointed), values in zip(found, expected, strict=True):
        assert zero == pytest.approx(0.0, abs=5e-3)
        assert pointed == (np.mean(values) > 5)
        assert pointed or end == pytest.approx(np.mean(values), abs=1e-2)
        assert f"{np.mean(values):+.3f} ± {np.std(values, ddof=1):.3f}" in words
    assert "target" in words and "general" in words and "what slm is" in [w.strip() for w in words]
    assert [role for role, *_ in bars(drawn(study, "arms", "worse"))] == ["role-0", "role-1"]


def test_legends_have_room(study: Path) -> None:
    """For long names of arms, beside which the losses stand, and for many validation sets."""
    name = "retrospective-average-"
    results: dict[str, Any] = json.loads((study / "results.json").read_text())
    for arms in (results["arms"], results["summary"]["arms"]):
        arms[name] = arms.pop("slm")
    for arm in results["arms"].values():
        for seed in arm["seeds"].values():
            seed["other_losses"] = {f"set {number}": 2.0 for number in range(7)}
    (study / "results.json").write_text(json.dumps(results))
    root = read_picture(drawn(study, "tokens", "worse", name)).root
    shown = [each for each in root.iter(f"{SPACE}text") if each.attrib["y"] == "158.0"]
    assert shown[0].text == name
    assert float(shown[1].attrib["x"]) >= float(shown[0].attrib["x"]) + 10 * len(name)
    root = ElementTree.parse(drawn(study, "arms")).getroot()
    legend = [each for each in root.iter(f"{SPACE}text") if (each.text or "").startswith("set ")]
    assert len({(each.attrib["x"], each.attrib["y"]) for each in legend}) == 7
    assert max(float(each.attrib["x"]) for each in legend) < 700


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_small_and_the_same_again(study: Path, kind: str) -> None:
    first = drawn(study, kind).read_bytes()
    assert first == drawn(study, kind).read_bytes() and len(first) < 30_000
    for asked in (b"http://", b"https://", b"url(http", b"@import", b"<script", b"@font-face"):
        assert asked not in first.replace(b'xmlns="http://www.w3.org/2000/svg"', b"")


def test_the_tool(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool(monkeypatch, study, "--figure", "tokens", "--arms", "slm")
    assert (study / "tokens.svg").read_bytes() == drawn(study, "tokens", "slm").read_bytes()
    with pytest.raises(SystemExit) as left:
        tool(monkeypatch, study, "--arms", "slm")
    assert left.value.code == 2
    assert "error: --arms chooses the arms of a picture" in capsys.readouterr().err


def test_what_is_refused(study: Path) -> None:
    whole = (study / "results.json").read_bytes()
    change(study, lambda curve: [[*curve[0][:2], 1e308, *curve[0][3:]]])
    with pytest.raises(UserError, match=r"Expected `float` <= 1e\+30 - at `\$\.arms"):
        drawn(study, "tokens")
    change(study, lambda curve: [[0, 0, 5.0, 0, 0, 0]])
    drawn(study, "tokens")
    results: dict[str, Any] = json.loads(whole)
    del results["summary"]["arms"]["slm"]["other_losses"]["general"]
    (study / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="the summary of slm lacks a validation set"):
        drawn(study, "arms")
    (study / "results.json").write_bytes(whole)
    with pytest.raises(UserError, match="--arms none: the study has clm, slm, worse, lost"):
        drawn(study, "tokens", "none")
    results = json.loads((study / "results.json").read_text())
    for seed in results["arms"]["slm"]["seeds"].values():
        seed["curve"] = [point[:3] for point in seed["curve"]]
    (study / "results.json").write_text(json.dumps(results))
    drawn(study, "tokens")
    with pytest.raises(UserError, match=r"no FLOPs of runs/slm: run the study again"):
        drawn(study, "compute")
    for key in ("arms", "summary"):
        inner = results[key] if key == "arms" else results[key]["arms"]
        for arm in list(inner)[1:]:
            del inner[arm]
    (study / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="no arm besides the baseline"):
        drawn(study, "arms")
