"""A script and a loop of one's own train as megatron_slm.pretrain does: docs/your-own-script.md."""

from __future__ import annotations

import difflib
import json
import struct
from pathlib import Path

from jobs import Checkpoints, Corpus
from launch import REPOSITORY, Run, launch, pretrain

PAGE = (REPOSITORY / "docs" / "your-own-script.md").read_text()
PLAIN = REPOSITORY / "tests" / "support" / "plain_pretrain.py"  # test_clm.py runs it
OWN_SAMPLES = REPOSITORY / "tests" / "support" / "own_samples.py"
OWN = REPOSITORY / "examples" / "your_own_pretrain.py"
STEPS = 4
TAGS = ("lm loss", "grad-norm", "selected loss", "reference loss")


def test_the_page_shows_what_changes_in_a_plain_script() -> None:
    lines = [path.read_text().splitlines(keepends=True) for path in (PLAIN, OWN)]
    changes = list(difflib.unified_diff(*lines, "pretrain_gpt.py", OWN.name))
    assert f"```diff\n{''.join(changes)}```\n" in PAGE
    new = sum(line.startswith("+") for line in changes) - 1  # the file's name
    assert new == 15 and "Fifteen lines are new." in PAGE


def test_script_and_loop_train_as_ours(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """Bit for bit, with a reference, on two pipeline stages, of which each reads data."""
    layout = f"--pipeline-model-parallel-size 2 --micro-batch-size 3 --train-iters {STEPS}"
    selection = "--slm-token-ratio 0.6 --slm-scope data-parallel --tensorboard-dir tensorboard"
    arguments = [*corpus.arguments, *untied.arguments, *layout.split(), *selection.split()]
    ours = pretrain(2, arguments, tmp_path / "ours")
    script = launch(2, [str(OWN), *arguments], tmp_path / "script")
    for tag in TAGS:
        assert len(ours.scalars(tag)) == STEPS
        assert script.scalars(tag) == ours.scalars(tag)
    assert sum("> wrapped in Megatron" in output for output in script.outputs) == 1

    loop = tmp_path / "loop.py"
    (code,) = [block for block in _blocks() if "forward_backward(" in block]
    loop.write_text(code)
    done = launch(2, [str(loop), *arguments], tmp_path / "loop")
    assert _printed(done) == ours.scalars("lm loss")


def test_samples_of_another_kind(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """Data without --data-path, and narrow types, which tensor-parallel ranks broadcast."""
    layout = f"--tensor-model-parallel-size 2 --micro-batch-size 3 --train-iters {STEPS}"
    rest = f"{layout} --slm-token-ratio 0.6 --tensorboard-dir tensorboard".split()
    named = [*corpus.arguments, *untied.arguments, *rest]
    ours = pretrain(2, named, tmp_path / "ours")
    own = ["--own-data" if word == "--data-path" else word for word in named]
    script = launch(2, [str(OWN_SAMPLES), *own], tmp_path / "script")
    for tag in TAGS:
        assert len(ours.scalars(tag)) == STEPS
        assert script.scalars(tag) == ours.scalars(tag)


def _blocks() -> list[str]:
    return [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]


def _printed(run: Run) -> dict[int, float]:
    """Return the losses that the last rank prints, as TensorBoard keeps them."""
    lines = [json.loads(line) for line in run.outputs[-1].splitlines() if line.startswith("{")]
    return {line["iteration"]: _float32(line["lm loss"]) for line in lines}


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)
