"""A model's excess against itself is zero in float32, whatever its head, layout and padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed.test_layouts import LAYOUTS
from distributed.test_score_cache import records, train

from jobs import Checkpoints, Corpus
from megatron_slm.data.token_dump import read_dumps

# 1024 or 2048 rows for 257 tokens, of which the checkpoint has 512: some ranks have only padding.
PADDING = "--make-vocab-size-divisible-by 1024"
EXACT = "--slm-scope global-batch --slm-global-batch exact"
CASES = {
    "chunked": ("tp2 sp", f"--slm-reference-load POLICY --slm-head chunked {EXACT}"),
    "dense": ("tp2", "--slm-reference-load POLICY --slm-head dense"),
    "chunked, moving average": ("one rank", "--slm-reference ema:0.9 --slm-head chunked"),
    "dense, moving average": ("one rank", f"--slm-reference ema:0.9 --slm-head dense {EXACT}"),
}


@pytest.mark.parametrize("case", CASES)
def test_excess_of_a_model_against_itself(
    case: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    layout, flags = CASES[case]
    ranks, parallel = LAYOUTS[layout]
    once = "--train-iters 1 --eval-iters 0 --slm-dump-interval 1 --slm-dump-dir dump"
    extra = f"{flags.replace('POLICY', str(untied.policy))} {PADDING} {parallel} {once}"
    run = train(corpus, untied, tmp_path, extra, ranks)
    said = records(run)
    assert said and all((record["scores"] == 0.0).all() for record in said)
    assert all(record["reference"].std() > 0.1 for record in said)
    assert run.scalars("excess loss") == {1: 0.0}
    # What is trained has the padding in its softmax: of random rows, far more than of the tokens.
    assert run.scalars("all-token loss")[1] > run.scalars("reference loss")[1] + 0.3
    assert run.scalars("lm loss")[1] == pytest.approx(run.scalars("selected loss")[1], rel=1e-5)
    start = read_dumps(tmp_path / "dump")[0]
    assert start.iteration == 0 and np.array_equal(start.losses, start.reference_losses)
