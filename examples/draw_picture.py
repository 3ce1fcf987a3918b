"""Draw README's picture from the results of examples/quickstart.sh.

    python examples/draw_picture.py runs/quickstart docs/images/quickstart.svg --sample 7

On the left, the target loss of each arm over the tokens it has seen, from results.json.  On the
right, tokens of the slm arm's last dump, shaded by excess loss, with the selected ones underlined.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from megatron_slm.analysis.experiments.study_file import read_results
from megatron_slm.analysis.token_text import dump_tokenizer, token_texts
from megatron_slm.data.token_dump import TokenDump, read_dumps

WIDTH, HEIGHT = 960, 420
STYLE = """
    text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
    .title { font-size: 15px; font-weight: 600 } .note { fill: #57606a } .end { text-anchor: end }
    .middle { text-anchor: middle } .grid { stroke: #d0d7de; stroke-width: 0.7 }
    .paper { fill: #fff } .curve { fill: none; stroke-width: 2.2 } .excess { fill: #fb8f44 }
    .clm { stroke: #6e7781 } .random { stroke: #bc4c00 } .slm, .chosen { stroke: #0969da }
    .chosen { stroke-width: 1.8 } .token { font: 10.6px ui-monospace, Menlo, Consolas, monospace }
    @media (prefers-color-scheme: dark) {
        text { fill: #e6edf3 } .note { fill: #9198a1 } .grid { stroke: #3d444d }
        .paper { fill: #151b23 } .excess { fill: #b6561c } .clm { stroke: #9198a1 }
        .random { stroke: #f0883e } .slm, .chosen { stroke: #58a6ff }
    }
"""
ARMS = {"clm": "all tokens", "random": "60% at random", "slm": "60% by excess loss"}
LEFT, TOP, CHART_WIDTH, CHART_HEIGHT = 60, 80, 400, 290
MAP_LEFT, MAP_TOP, COLUMNS, LINES, LETTER, LINE = 530, 106, 62, 16, 6.4, 19.0
TICK = 50_000  # tokens
FULL = 2.0  # nats of excess at which the shading is full


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "study", type=Path, metavar="DIR", help="Directory that quickstart.sh wrote to."
    )
    parser.add_argument("picture", type=Path, metavar="FILE.svg")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="Sample of the dump.")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="First token to show.")
    args = parser.parse_args()
    results = read_results(args.study / "results.json")
    run = args.study / results["arms"]["slm"]["seeds"]["1"]["directory"]
    dump = read_dumps(run / "checkpoints" / "dump")[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="paper"/>',
        *chart(results),
        *token_map(dump, args.sample, args.first),
        "</svg>",
    ]
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.picture.write_text("\n".join(parts) + "\n")


def text(x: float, y: float, words: str, kind: str = "", more: str = "") -> str:
    """Return an SVG text at a position, with the classes `kind`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(words)}</text>'


def chart(results: dict[str, Any]) -> Iterator[str]:
    """Draw the target loss of each arm over the tokens that it has seen."""
    curves = {
        name: [point[1:3] for point in results["arms"][name]["seeds"]["1"]["curve"]]
        for name in ARMS
    }
    points = [point for curve in curves.values() for point in curve]
    most = max(tokens for tokens, _ in points)
    low = int(2 * min(loss for _, loss in points)) / 2
    high = int(2 * max(loss for _, loss in points) + 1) / 2

    def place(tokens: float, loss: float) -> tuple[float, float]:
        part = (high - loss) / (high - low)
        return LEFT + CHART_WIDTH * tokens / most, TOP + CHART_HEIGHT * part

    yield text(LEFT - 36, 34, "Held-out text of the target domain", "title")
    yield text(LEFT - 36, 56, "loss in nats a token, over the tokens of training", "note")
    for half in range(round(2 * low), round(2 * high) + 1):
        _, y = place(0, half / 2)
        yield f'<path d="M{LEFT} {y:.1f}h{CHART_WIDTH}" class="grid"/>'
        yield text(LEFT - 8, y + 4, f"{half / 2:.1f}", "note end")
    for tokens in range(0, int(most) + 1, TICK):
        x, y = place(tokens, low)
        yield text(x, y + 22, f"{tokens // 1000}k" if tokens else "0", "note middle")
    for number, (name, what) in enumerate(ARMS.items()):
        corners = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curves[name])
        yield f'<polyline points="{corners}" class="curve {name}"/>'
        x, y = LEFT + CHART_WIDTH - 222, TOP + 24 + 22 * number
        yield f'<path d="M{x} {y - 4}h22" class="curve {name}"/>'
        yield text(x + 30, y, f"{name}: {what}, {curves[name][-1][1]:.2f}")


def token_map(dump: TokenDump, sample: int, first: int) -> Iterator[str]:
    """Draw tokens of a sample with their excess loss, and which of them are selected."""
    assert dump.reference_losses is not None and dump.selected is not None
    yield text(MAP_LEFT, 34, "What the slm run trains on", "title")
    yield text(
        MAP_LEFT, 56, "training text after the last step: the stronger the shade, the", "note"
    )
    yield text(MAP_LEFT, 74, "higher the excess loss; selected tokens are underlined", "note")
    texts = token_texts(dump_tokenizer([dump], None), dump.tokens[sample, 1:].tolist())
    excess = (dump.losses - dump.reference_losses)[sample].tolist()
    row = column = 0
    for at in range(first, len(texts)):
        shown = texts[at].replace("\n", "")
        if column + len(shown) > COLUMNS:
            row, column = row + 1, 0
        if row >= LINES:
            return
        x, y, width = MAP_LEFT + LETTER * column, MAP_TOP + LINE * row, LETTER * len(shown)
        shade = min(1.0, max(0.0, excess[at] / FULL))
        yield (
            f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="17" class="excess" '
            f'fill-opacity="{shade:.2f}"/>'
        )
        if dump.selected[sample, at]:
            yield f'<path d="M{x + 0.7:.1f} {y + 4:.1f}h{width - 1.4:.1f}" class="chosen"/>'
        if shown.strip():
            words = shown.replace(" ", "\N{NO-BREAK SPACE}")
            yield text(x, y, words, "token", f' textLength="{width:.1f}"')
        column += len(shown)
        if "\n" in texts[at]:
            row, column = row + 1, 0


if __name__ == "__main__":
    main()
