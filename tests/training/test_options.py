"""Options are declared once: their documentation and what they decide follow from that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.planning.launch_recipe import LaunchRecipe
from megatron_slm.planning.recipe import parse, work_of
from megatron_slm.training.command_line.arguments_page import page
from megatron_slm.training.settings import settings_from_arguments

RUN = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64
    --seq-length 64 --micro-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 256
    --mock-data --train-iters 3 --lr 1e-3 --eval-interval 100
"""
# Whether a run selects, and its head.
DECIDED = {
    "": (False, "dense"),
    "--slm-token-ratio 1": (False, "dense"),
    "--slm-token-ratio 0.6 --slm-score random": (True, "chunked"),
    "--slm-token-ratio 0.6 --slm-score random --slm-head dense": (True, "dense"),
    "--slm-score policy --slm-weighting relu": (True, "chunked"),
    "--slm-score policy --slm-ratio-schedule steps --slm-ratio-steps 2:0.5": (True, "chunked"),
    "--slm-token-ratio 1 --slm-reference ema:0.9": (True, "chunked"),
    "--slm-head chunked": (False, "chunked"),
}
# What a user's own score needs, and what is said of a run that cannot have it.
LACKING = {
    "entropies": "needs --slm-head chunked",
    "top_entropies": "needs --slm-head chunked",
    "reference_losses": "needs --slm-reference-load, or another reference",
    "documents": "needs samples whose documents do not see each other: give --dataloader-inter",
    "external": "needs --slm-token-values with a cache of external values",
    "datasets": "needs several datasets in --data-path, and --split",
}

DROPS_NOTHING = "--attention-dropout 0 --hidden-dropout 0"
UNIFORM = "--recompute-granularity full --recompute-method uniform"
NO_BACKWARD = {
    "": "--hidden-dropout 0",
    f"{DROPS_NOTHING} --slm-weighting relu": "cannot be used with --slm-weighting",
    f"{DROPS_NOTHING} --slm-unselected-weight 0.1": "cannot be used with --slm-unselected-weight",
    f"{DROPS_NOTHING} --spec one_sequence_layers layers": "needs the layers of plain torch",
    f"{DROPS_NOTHING} --num-experts 4": "routers balance all tokens",
    f"{DROPS_NOTHING} --recompute-granularity selective": "take full, which keeps least",
    f"{DROPS_NOTHING} {UNIFORM} --recompute-num-layers 2": "--recompute-num-layers 1",
}


def test_the_page_is_generated() -> None:
    written = (REPOSITORY / "docs" / "arguments.md").read_text()
    assert written == page(), (
        "python -m megatron_slm.training.command_line.arguments_page > docs/arguments.md"
    )


@pytest.mark.parametrize("more", DECIDED)
def test_planning_decides_as_training_does(more: str) -> None:
    args: Any = parse(LaunchRecipe([*RUN.split(), *more.split()], 1), 0, 256)
    settings = settings_from_arguments(args)
    assert (settings.selective, settings.head) == DECIDED[more]
    assert work_of(args, "plain", "cpu").head == settings.head


@pytest.mark.parametrize("more", NO_BACKWARD)
def test_what_a_backward_pass_through_selected_tokens_refuses(more: str) -> None:
    selects = "--slm-backward selected --slm-token-ratio 0.5 --slm-score random"
    with pytest.raises(UserError, match=NO_BACKWARD[more]):
        parse(LaunchRecipe([*RUN.split(), *selects.split(), *more.split()], 1), 0, 256)


def test_a_backward_pass_through_selected_tokens() -> None:
    flags = f"{DROPS_NOTHING} {UNIFORM} --recompute-num-layers 1 --slm-backward selected"
    args: Any = parse(LaunchRecipe([*RUN.split(), *flags.split()], 1), 0, 256)
    assert work_of(args, "plain", "cpu").backward == "selected"


@pytest.mark.parametrize("needs", LACKING)
def test_needs_that_a_run_cannot_meet(
    needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"needs_{needs}"
    (tmp_path / f"{module}.py").write_text(
        "from megatron_slm.selection import token_score\n\n"
        f"@token_score(needs=('{needs}',))\ndef own(tokens):\n    return tokens.{needs}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = f"--slm-token-ratio 0.6 --slm-score {module}:own --slm-head dense"
    args: Any = parse(LaunchRecipe([*RUN.split(), *flags.split()], 1), 0, 256)
    with pytest.raises(UserError) as error:
        settings_from_arguments(args)
    assert str(error.value).startswith(f"--slm-score {module}:own {LACKING[needs]}")
    del sys.modules[module]
