"""What a run logged and selected, against the oracle's steps."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import oracle
from jobs import GLOBAL_BATCH, SEQUENCE, STEPS, VOCABULARY, Checkpoints
from launch import Run
from megatron_slm.data.token_dump import read_dumps

# Scores this close to the threshold may fall on either side of it.
NEAR_TIE = 1e-6


def train_oracle(
    start: Checkpoints,
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    method: oracle.Method,
    steps: int = STEPS,
) -> list[oracle.Step]:
    """Train the oracle from the checkpoints that runs start from, and validate it."""
    return oracle.train(
        *oracle_models(start),
        samples,
        method,
        steps=steps,
        global_batch=GLOBAL_BATCH,
        vocabulary=VOCABULARY,
        watched=validation,
    )


def oracle_models(start: Checkpoints) -> list[LlamaForCausalLM]:
    """Return the oracle's policy and reference."""
    with tempfile.TemporaryDirectory() as scratch:
        return [
            oracle.llama(
                directory, Path(scratch), heads=heads, groups=groups, tied=start.tied, base=base
            )
            for directory, heads, groups, base in (
                (start.policy / "iter_0000002", 4, 2, start.base),
                (start.reference / "iter_0000010", 6, 6, 10000),
            )
        ]


def agrees_with_oracle(run: Run, expected: list[oracle.Step], micro_batch: int) -> None:
    """Losses and gradient norms to 1e-5, selected tokens exactly but for near-ties."""
    chosen = selected_tokens(run, micro_batch)
    for number, step in enumerate(expected, start=1):
        for tag, value in (
            ("lm loss", step.lm_loss),
            ("selected loss", step.selected_loss),
            ("unselected loss", step.unselected_loss),
            ("all-token loss", step.all_token_loss),
            ("reference loss", step.reference_loss),
            ("excess loss", step.excess_loss),
            ("threshold", step.thresholds.mean().item()),
            ("grad-norm", step.grad_norm),
            ("selected ratio", (step.selected.sum() / step.valid.sum()).item()),
        ):
            if math.isnan(value):  # all tokens are selected
                continue
            near = 1e-5 if tag in ("excess loss", "threshold") else 0.0
            logged = run.scalars(tag)[number]
            assert logged == pytest.approx(value, rel=1e-5, abs=near), (tag, number)
        apart = (step.scores - step.thresholds[:, None]).abs() > NEAR_TIE
        assert torch.equal(chosen[number][apart], step.selected[apart])
        assert chosen[number].sum() == step.selected.sum()


def dumps_agree_with_oracle(
    run: Run, expected: list[oracle.Step], validation: dict[str, Tensor], method: oracle.Method
) -> None:
    """Token dumps in `dump`: ids and mask exactly, losses to 1e-5, selected but for near-ties."""
    dumps = read_dumps(run.directory / "dump")
    valid = validation["loss_mask"] > 0
    assert [dump.iteration for dump in dumps] == [0, 3, STEPS]
    for dump in dumps:
        count = len(dump.losses)
        assert count == 8
        whole = torch.cat([validation["tokens"][:, :1], validation["labels"]], dim=1)[:count]
        assert torch.equal(torch.from_numpy(dump.tokens).long(), whole)
        assert torch.equal(torch.from_numpy(dump.valid), valid[:count])
        if dump.iteration < STEPS:
            policy, reference = expected[dump.iteration].watched
            found = torch.from_numpy(dump.losses), torch.from_numpy(dump.reference_losses)
            torch.testing.assert_close(found[0], policy[:count], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1], reference[:count], rtol=1e-5, atol=1e-5)
            scores = policy - reference
            selected, thresholds = oracle.select(scores, valid, method, None)
            apart = ((scores - thresholds[:, None]).abs() > NEAR_TIE)[:count]
            chosen = torch.from_numpy(dump.selected)
            assert torch.equal(chosen[apart], selected[:count][apart])


def selected_tokens(run: Run, micro_batch: int) -> dict[int, Tensor]:
    """Collect the selected tokens of all ranks by iteration, bool [global batch, s]."""
    whole = {
        number: torch.zeros(GLOBAL_BATCH, SEQUENCE, dtype=torch.bool)
        for number in range(1, STEPS + 1)
    }
    seen: dict[tuple[int, ...], Tensor] = {}
    for file in sorted((run.directory / "recorded").glob("rank*.pt")):
        saved = torch.load(file)
        where = saved["where"]
        assert bool(saved["records"]) == where["last_stage"]
        for record in saved["records"]:
            key = (record["iteration"], record["number"], where["dp"], where["cp"])
            if key in seen:  # tensor-parallel ranks agree to the bit
                assert torch.equal(seen[key], record["weights"])
            seen[key] = record["weights"]
            first = (record["number"] * where["dp_size"] + where["dp"]) * micro_batch
            rows = whole[record["iteration"] + 1][first : first + micro_batch]
            chunks = rows.chunk(2 * where["cp_size"], dim=1)
            mine = (where["cp"], 2 * where["cp_size"] - 1 - where["cp"])
            for chunk, part in zip(mine, record["selected"].chunk(2, dim=1), strict=True):
                chunks[chunk].copy_(part)
    return whole
