"""The report in a real browser: it loads from its one file, runs nothing of the corpus, and answers
to the slider, the pointer and the keys."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import REPOSITORY
from megatron_slm.analysis.report.figures import curve, figure
from megatron_slm.analysis.report.page import build_page, write_report
from megatron_slm.analysis.report.picture import write_picture
from megatron_slm.analysis.report.run_files import RunFiles, Series
from megatron_slm.analysis.report.settings import RunSettings
from megatron_slm.analysis.report.study import outcome
from megatron_slm.data.token_dump import TokenDump, read_dump, write_dump
from megatron_slm.errors import UserError
from report_page import ITERATIONS, LENGTH, SAMPLES, SETTINGS, write_run, write_study

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome is installed: apt install chromium"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TokenDump]]:
    """Write a page of 50,176 tokens with the tool; return its directory and the dumps it shows."""
    directory = tmp_path_factory.mktemp("slm")
    dumps = write_run(directory)
    tool = [sys.executable, str(REPOSITORY / "tools" / "report.py"), str(directory)]
    printed = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    assert printed == f"> {directory / 'report.html'}\n"
    return directory / "report.html", dumps


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=BROWSER, args=["--headless=new", "--no-sandbox"]
        )
        yield started
        started.close()


def opened(browser: Any, file: Path, **options: Any) -> Any:
    """Open a page, and check that it logs nothing and requests nothing but its own file."""
    page = browser.new_page(**options)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    page.locator("#controls").scroll_into_view_if_needed()
    page.wait_for_selector(".sample:first-child .text .s", state="attached")
    assert said == [file.as_uri()]
    page.said = said
    return page


@pytest.fixture(scope="module")
def page(browser: Any, run: tuple[Path, list[TokenDump]]) -> Any:
    return opened(browser, run[0])


def token(sample: int, at: int) -> str:
    """Return the CSS selector of a sample's token, counted among those with a loss."""
    return f".sample:nth-child({sample + 1}) .text i:nth-child({at + 2})"


def classes(page: Any, sample: int, count: int) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        f".sample:nth-child({sample + 1}) .text i",
        f"tokens => tokens.slice(1, {count + 1}).map(token => token.className)",
    )
    return found


def expected_classes(dump: TokenDump, sample: int, count: int, scale: float) -> list[str]:
    """Five levels of each sign, and s for the selected."""
    found = []
    for at in range(count):
        if not dump.valid[sample, at]:
            found.append("off")
            continue
        own, reference = (
            round(float(values[sample, at]) * 1000)
            for values in (dump.losses, dump.reference_losses)
        )
        excess = (own - reference) / 1000
        level = min(5, int(abs(excess) / scale * 5 + 0.5))
        shade = f"{'a' if excess >= 0 else 'b'}{level}" if level else ""
        found.append(f"{shade} s" if dump.selected[sample, at] else shade)
    return found


def move_slider(page: Any, to: int) -> None:
    page.eval_on_selector(
        "#iteration",
        f"slider => {{ slider.value = {to}; slider.dispatchEvent(new Event('input')) }}",
    )


@in_browser
def test_slider_goes_through_the_run(page: Any, run: tuple[Path, list[TokenDump]]) -> None:
    scale = page.evaluate("data.runs[0].map.scale")
    assert page.locator(".sample .text i").count() == SAMPLES * (LENGTH + 1)
    assert page.input_value("#iteration") == str(len(ITERATIONS) - 1)
    for at in (len(ITERATIONS) - 1, 0, 2):
        move_slider(page, at)
        assert f"{ITERATIONS[at]} of 80" in page.inner_text("#iteration-value")
        assert classes(page, 0, 500) == expected_classes(run[1][at], 0, 500, scale)
    # What was out of sight follows when it comes into sight.
    page.locator(".sample").last.scroll_into_view_if_needed()
    expected = expected_classes(run[1][2], SAMPLES - 1, 500, scale)
    for _ in range(100):
        if classes(page, SAMPLES - 1, 500) == expected:
            break
        page.wait_for_timeout(100)
    assert classes(page, SAMPLES - 1, 500) == expected


@in_browser
def test_tokens_tell_their_values(page: Any, run: tuple[Path, list[TokenDump]]) -> None:
    dump = run[1][1]
    move_slider(page, 1)
    page.focus("#samples")
    card = ""
    for _ in range(50):  # samples that come into sight move others
        page.mouse.move(0, 0)
        page.hover(token(0, 7))
        card = page.inner_text("#card")
        if f"{dump.losses[0, 7]:.3f}" in card:
            break
        page.wait_for_timeout(100)
    excess = (np.rint(dump.losses * 1000) - np.rint(dump.reference_losses * 1000))[dump.valid]
    own = round(float(dump.losses[0, 7]) * 1000) - round(float(dump.reference_losses[0, 7]) * 1000)
    for value in (
        f"{dump.losses[0, 7]:.3f}",
        f"{dump.reference_losses[0, 7]:.3f}",
        f"{own / 1000:.3f}",
        f"{(excess > own).sum() + 1:,} of {dump.valid.sum():,}",
        "yes" if dump.selected[0, 7] else "no",
    ):
        assert value in card
    assert page.locator("#card svg path").count() == 2
    page.keyboard.press("ArrowRight")
    assert f"{dump.losses[0, 8]:.3f}" in page.inner_text("#card")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#card") == card
    page.eval_on_selector("#samples", "samples => samples.blur()")
    assert page.locator("#card").is_hidden()


@in_browser
def test_a_corpus_runs_nothing(page: Any) -> None:
    """Its markup is there to be read."""
    assert page.evaluate("window.ran") is None
    assert page.locator("img, b, iframe").count() == 0
    shown = page.inner_text(".sample:nth-child(1) .text")
    assert "<script>window.ran = 1</script></script><!--<script>" in shown
    assert "{{ 7 * 7 }}" in shown
    assert "⟨E2⟩⟨80⟩⟨AE⟩" in shown and "\u202e" not in page.content()
    assert "<b>web</b>" in page.inner_text(".sample:nth-child(1) h3")
    assert page.said == [page.url]


@in_browser
def test_size(run: tuple[Path, list[TokenDump]]) -> None:
    """Of a page of 50,176 tokens."""
    assert run[0].stat().st_size <= 1_500_000


@in_browser
def test_fifty_thousand_tokens(page: Any, record_property: Any) -> None:
    """How long a frame takes that the slider has changed is told, and not judged."""
    times = page.evaluate(
        """async () => {
            const slider = document.getElementById("iteration"), times = [];
            for (let turn = 0; turn < 9; turn++) {
                const before = performance.now();
                slider.value = turn % 2 ? 0 : slider.max;
                slider.dispatchEvent(new Event("input"));
                await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
                times.push(performance.now() - before);
            }
            return times;
        }"""
    )
    print(f"50,176 tokens, slider to next frame: median {np.median(times):.0f} ms of {len(times)}")
    record_property("median_ms", float(np.median(times)))
    assert len(times) == 9


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_schemes_and_print(browser: Any, scheme: str, tmp_path: Path) -> None:
    """Text keeps a contrast of 4.5 (WCAG AA) to every shade, on the screen and on paper."""
    write_run(tmp_path, samples=2, length=256)
    write_report(tmp_path, tmp_path / "report.html", None)
    page = opened(browser, tmp_path / "report.html", color_scheme=scheme)
    for media in ("screen", "print"):
        page.emulate_media(media=media, color_scheme=scheme)
        colours = page.evaluate(
            """() => ["", "a1", "a2", "a3", "a4", "a5", "b1", "b2", "b3", "b4", "b5"].map(name => {
                const token = document.querySelector(".text i:nth-child(9)");
                const before = token.className;
                token.className = name;
                const style = getComputedStyle(token);
                const pair = [style.color, style.backgroundColor];
                token.className = before;
                return pair;
            })"""
        )
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = luminance(paper) > 0.5
        assert bright == (scheme == "light" or media == "print")
        backgrounds = [paper if back == "rgba(0, 0, 0, 0)" else back for _, back in colours]
        assert len(set(backgrounds)) == 11
        for (ink, _), back in zip(colours, backgrounds, strict=True):
            assert contrast(ink, back) >= 4.5
        lines = page.evaluate(
            """() => [0, 1, 2, 3, 4, 5].map(role => getComputedStyle(document.body)
                .getPropertyValue(`--role-${role}`).trim())"""
        )
        assert all(contrast(line, paper) >= 3.0 for line in lines)
        wanted = pytest.approx(luminance(lines[0]), abs=0.01)
        for _ in range(100):
            drawn = page.eval_on_selector(
                "#run-figures .plot .line", "line => getComputedStyle(line).stroke"
            )
            if luminance(drawn) == wanted:
                break
            page.wait_for_timeout(100)
        assert luminance(drawn) == wanted
    assert len(page.pdf()) > 10_000
    page.close()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb" or "rgb(r, g, b)"."""
    if colour.startswith("#"):
        numbers = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        numbers = [int(number) for number in re.findall(r"\d+", colour)[:3]]
    linear = [
        (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for part in (number / 255 for number in numbers)
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@in_browser
def test_a_study_and_its_runs(browser: Any, tmp_path: Path) -> None:
    write_study(tmp_path)
    write_report(tmp_path, tmp_path / "study.html", None)
    page = opened(browser, tmp_path / "study.html")
    assert page.inner_text("h1") == "SLM <i>60%</i>'s loss ends 0.500 nats below CLM's on prose"
    lead = page.inner_text("#headline + .lead")
    assert "39% lower" in lead  # 1 - exp(-0.5)
    assert "Both seeds agree: from -0.550 to -0.450 nats, -0.500 ± 0.071" in lead
    assert "1.25 times CLM's compute" in lead
    facts = page.inner_text("#outcome .facts")
    assert "GPT of 2,540 parameters: 2 layers of width 8" in facts
    assert "trained on web, <b>code, validated on prose" in facts
    assert "4,000 tokens in each run" in facts
    rows = page.locator("#outcome tbody tr").all_inner_texts()
    assert len(rows) == 2
    assert "3.1500 ± 0.0707" in rows[0] and "lowest" not in rows[0]
    assert "SLM <i>60%</i> (lowest loss)" in rows[1] and "2.6500" in rows[1]
    assert "-0.5000 ± 0.0707" in rows[1]
    assert "not reached" in page.locator("#compute tbody tr").all_inner_texts()[0]
    assert page.locator("#study-figure .plot .line").count() == 2
    assert page.locator("#study-figure .plot .band").count() == 2
    titles = page.locator("#run-figures figcaption").all_inner_texts()
    assert titles[0] == "Loss" and "Selected part of each dataset" in titles
    names = page.locator("#run-figures figure >> nth=0").locator(".legend li").all_inner_texts()
    assert names == [
        *("all tokens", "selected tokens", "tokens left out", "reference, all tokens"),
        "validation loss on prose",
    ]
    assert "(web, <b>code)" not in page.inner_text("#map-lead")
    assert "validation data (prose)" in page.inner_text("#map-lead")
    # The run that has most to show, CLM's having least.
    assert page.input_value("#run") == "3"
    assert page.inner_text("#curves .of") == "SLM <i>60%</i>, seed 2"
    content = page.inner_text("#dynamics-content")
    assert "H→L" in content and "from high" in content
    assert "When tokens are learned" in content and "inside word" in content
    spectra = page.locator("#dynamics-figures figcaption").all_inner_texts()[1:]
    assert [title.partition(" by ")[2] for title in spectra] == ["domain", "kind of token"]
    axis = (
        page.locator("#dynamics-figures figure >> nth=1").locator(".plot text").all_text_contents()
    )
    assert "10" in axis and "31.6" in axis  # powers of ten
    legend = page.locator("#study-figure .legend li").all_inner_texts()
    assert legend == ["CLM", "SLM <i>60%</i>"]
    units = page.evaluate(
        """data.runs.map(run => run.figures.find(figure => figure.title === "Throughput").y)"""
    )
    assert units == ["tokens a second"] * 4
    page.select_option("#run", "0")
    assert page.inner_text("#curves .of") == "CLM, seed 1"
    assert not page.is_visible("#map") and not page.is_visible("#dynamics")
    assert page.locator("#bar a:visible").all_inner_texts() == ["Outcome", "Cost", "Curves"]
    page.select_option("#run", "2")
    assert page.locator("#run-figures .plot svg").count() > 0
    assert page.locator(".sample .text i").count() == 2 * 65
    assert page.said == [page.url]
    page.close()


@in_browser
def test_a_picture_in_light_and_in_dark_mode(browser: Any, tmp_path: Path) -> None:
    write_study(tmp_path)
    write_picture(tmp_path, "tokens", (), tmp_path / "picture.svg")
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((tmp_path / "picture.svg").as_uri())
        assert len(asked) == 1
        paper, ink, line = (
            page.eval_on_selector(place, f"one => getComputedStyle(one).{of}")
            for place, of in ((".paper", "fill"), (".title", "fill"), (".line", "stroke"))
        )
        assert (luminance(paper) < 0.1) == (scheme == "dark")
        assert contrast(ink, paper) > 7 and contrast(line, paper) > 4.5
        page.close()


@in_browser
def test_sections_are_reached_and_covered_by_nothing(browser: Any, tmp_path: Path) -> None:
    """By links and by the address, with nothing shown between the bars that stay."""
    write_study(tmp_path)
    write_report(tmp_path, tmp_path / "study.html", None)
    for size in ({"width": 1280, "height": 800}, {"width": 390, "height": 844}):
        page = opened(browser, tmp_path / "study.html", viewport=size)
        for link in page.locator("#bar a").all():
            link.focus()
            page.keyboard.press("Enter")
            page.wait_for_timeout(200)
            section = link.get_attribute("href")
            heading = page.locator(f"{section} :is(h1, h2)").bounding_box()
            bar = page.locator("#bar").bounding_box()
            assert heading["y"] >= bar["y"] + bar["height"], section
            assert heading["y"] < size["height"] - 50, section
        page.locator(".sample").last.scroll_into_view_if_needed()
        covered = page.evaluate(
            """() => {
                const bars = document.getElementById("controls").getBoundingClientRect();
                const across = [bars.left + 2, bars.left + bars.width / 2, bars.right - 2];
                const found = [];
                for (let y = 0; y < bars.bottom; y++) for (const x of across) {
                    const there = document.elementFromPoint(x, y);
                    if (!there.closest("#bar, #controls")) found.push([x, y, there.className]);
                }
                return [bars.bottom, found];
            }"""
        )
        assert covered[0] > 40 and covered[1] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.close()


@in_browser
def test_a_finger_and_the_keys(browser: Any, tmp_path: Path) -> None:
    """A tap shows a token's card until the next, and a figure's values; so do the keys."""
    dump = write_run(tmp_path, samples=2, length=256)[-1]
    dump.losses[0, 10] = np.nan
    write_dump(tmp_path / "dump", dump)
    write_report(tmp_path, tmp_path / "report.html", None)
    page = opened(
        browser,
        tmp_path / "report.html",
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
    )
    page.locator(token(0, 9)).tap()
    page.wait_for_timeout(200)
    assert f"{dump.losses[0, 9]:.3f}" in page.inner_text("#card")
    card, tapped = (page.locator(each).bounding_box() for each in ("#card", token(0, 9)))
    assert card["x"] >= 0 and card["x"] + card["width"] <= 390
    assert card["y"] >= tapped["y"] + tapped["height"] or card["y"] + card["height"] <= tapped["y"]
    page.keyboard.press("ArrowRight")
    for value in ("over 65.5, or not a number", f"{dump.reference_losses[0, 10]:.3f}", "not known"):
        assert value in page.inner_text("#card")
    page.locator("#map-heading").tap()
    assert page.locator("#card").is_hidden()
    plot = page.locator("#run-figures .plot").first
    plot.tap()
    values = page.locator("#run-figures .values").first
    assert "iteration" in values.inner_text() and "selected tokens" in values.inner_text()
    plot.focus()
    page.keyboard.press("Escape")
    assert values.is_hidden()
    page.keyboard.press("ArrowLeft")  # the last iteration, 80, at which it was 1 + 0.1 + 5 / 80
    assert "iteration 80" in values.inner_text() and "1.163" in values.inner_text()
    assert "from 6 to 1.063" in plot.get_attribute("aria-label")  # all tokens
    page.close()


@in_browser
def test_a_part_of_a_figure(page: Any) -> None:
    """Dragging shows it, a button and a double click show all."""
    plot = page.locator("#run-figures .plot").first
    plot.scroll_into_view_if_needed()
    before = plot.locator("text").all_text_contents()
    box = plot.bounding_box()
    for x, press in ((0.3, page.mouse.down), (0.6, page.mouse.up)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + 100)
        press()
    assert plot.locator("text").all_text_contents() != before
    page.locator("#run-figures .all").first.click()
    assert plot.locator("text").all_text_contents() == before
    button = page.locator("#run-figures .legend button").first
    drawn = plot.locator(".line").count()
    button.click()
    assert plot.locator(".line").count() == drawn - 1
    button.click()
    assert plot.locator(".line").count() == drawn


def arm(values: list[float], base: float = 3.0) -> dict[str, Any]:
    """Make the summary of an arm that differs from the baseline by these values, one per seed."""
    spread = {"mean": np.mean(values), "std": np.std(values, ddof=1) if values[1:] else None}
    return {
        "final_loss": {"mean": base + np.mean(values)},
        "difference": {**spread, "values": values},
        "flops_ratio": {"mean": 2.3},
    }


@pytest.mark.parametrize(
    ("values", "headline", "certainty"),
    [
        (
            [-0.2],
            "slm's loss ends 0.200 nats below clm's on prose",
            "This is one seed: how much of",
        ),
        ([0.2], "No loss ends below clm's on prose: the closest, slm's, ends", "This is one seed"),
        ([-0.2, -0.3, -0.25], "ends 0.250 nats below clm's", "All 3 seeds agree: from -0.300 to"),
        ([-0.2, 0.1], "slm and clm cannot be told apart on prose", "-0.200 to +0.100 over 2 seeds"),
        ([-0.5, -0.001], "slm and clm cannot be told apart", "no more than chance explains"),
    ],
)
def test_an_outcome_and_how_sure_it_is(values: list[float], headline: str, certainty: str) -> None:
    arms = {"clm": arm([0.0] * len(values)), "slm": arm(values), "worse": arm([1.0])}
    told = outcome({"baseline": "clm", "arms": arms}, "prose")
    assert headline in told["headline"] and certainty in told["certainty"]
    assert "2.30 times clm's compute" in told["certainty"]
    assert not re.search("WINS|LOSES", str(told))


def test_parameters_are_those_of_the_planner() -> None:
    from megatron_slm.model.architecture import Architecture
    from megatron_slm.planning.parameters import parameters

    shape = Architecture(2, 8, 20, 2, 2, 4, 60, 16, 1e-5, 10000, None, None, tied=False)
    assert RunSettings(SETTINGS).parameters == parameters(shape, 64) == 2536
    assert RunSettings(SETTINGS | {"num_layers": "9" * 5000}).parameters is None
    assert RunSettings(SETTINGS | {"swiglu": "False"}).parameters is None


def test_a_page_stays_small(tmp_path: Path) -> None:
    """However long and many the runs: 1.5 MB."""
    long = list(range(1, 20_001))
    series = Series(long, np.random.default_rng(1).normal(5, 1, len(long)).tolist())
    scalars = {f"selected {what} d{n}": series for what in ("ratio", "loss") for n in range(8)}
    scalars |= {"all-token loss": series, "selected loss": series, "unselected loss": series}
    dumps = write_run(tmp_path, samples=2, length=8192)
    many = [replace(dumps[0], iteration=at) for at in range(40)]
    wide = replace(
        dumps[0],
        **{
            name: np.tile(getattr(dumps[0], name), (1, 20))
            for name in ("tokens", "losses", "valid", "reference_losses", "selected")
        },
    )
    for count, own in ((1, many), (1, [wide]), (12, many)):
        runs = {f"run {n}": RunFiles(f"{n}", tmp_path, scalars, dumps=own) for n in range(count)}
        assert len(build_page(tmp_path, None, runs, None).encode()) <= 1_500_000


def test_lines_can_be_told_apart() -> None:
    """Colours begin anew after six."""
    lines = [curve(str(number), [0, 1], [0, 1], number) for number in range(24)]
    traces = figure("", "", "", lines)["lines"]
    looks = {(each["role"] % 6, each["dash"]) for each in traces}
    assert len(looks) == 24


def test_what_cannot_be_reported_on(tmp_path: Path) -> None:
    def refused(directory: Path, tokenizer: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            write_report(directory, tmp_path / "page.html", tokenizer)
        assert not (tmp_path / "page.html").exists()
        return str(error.value)

    assert "not a directory" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither TensorBoard's events" in refused(tmp_path / "empty")
    run = tmp_path / "run"
    write_run(run, samples=2, length=32)
    assert "--tokenizer-model gone" in refused(run, "gone")
    file = run / "dump" / "iter_0000020.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "iter_0000020.safetensors" in refused(run)
    file.write_bytes(whole)
    other = read_dump(file)
    changed = TokenDump(**{**vars(other), "tokens": other.tokens + 1})
    write_dump(run / "dump", changed)
    assert "other samples" in refused(run)
    (run / "results.json").write_text('{"format": 2}')
    assert "not in the format that this version reads" in refused(run)
