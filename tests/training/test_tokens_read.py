"""What scores and weights read of a micro-batch, and which of its tokens are left out."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.training import get_args
from torch import Tensor, distributed

from megatron_slm.errors import UserError
from megatron_slm.selection import (
    CarriedThreshold,
    Ranks,
    RatioSchedule,
    SelectionSettings,
    Tokens,
    TokenSelector,
    kept_by_goldfish,
    random_scores,
)
from megatron_slm.training.command_line.option_values import left_out as checked
from megatron_slm.training.left_out import LeftOut, tokens_left_out
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches
from megatron_slm.training.objective import MicroBatchObjective
from megatron_slm.training.settings import SelectiveSettings, Step
from megatron_slm.training.step import SelectiveStep

SAMPLES, LENGTH, SEED, ITERATION = 2, 12, 1, 3
FIELDS = "entropies reference_losses labels token_ids positions datasets external random".split()
MODULE = f"""
from megatron_slm.selection import token_score, token_weight

@token_score(needs={FIELDS})
def everything(tokens):
    return sum((getattr(tokens, name) for name in {FIELDS}), tokens.losses)

@token_weight(needs=("entropies", "scores"))
def unsure(tokens, chosen, *, power=1.0):
    return chosen.normalized(tokens.entropies ** power)
"""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    from megatron.core import mpu
    from megatron.training import global_vars

    # As on a GPU, but for where the tensors are.
    patch = pytest.MonkeyPatch()
    patch.setattr(Tensor, "cuda", lambda values, **_: values)
    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    global_vars.set_args(
        Namespace(
            sft=False,
            seq_length=LENGTH,
            context_parallel_size=1,
            pipeline_model_parallel_size=1,
            dataloader_inter_document_masking=False,
            mtp_num_layers=None,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
        )
    )
    one = mpu.get_context_parallel_group()
    yield Ranks(one, mpu.get_data_parallel_group(with_context_parallel=True), 0, 1, one)
    mpu.destroy_model_parallel()
    distributed.destroy_process_group()
    global_vars.destroy_global_vars()
    patch.undo()


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "read_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("read_scores", None)


def drawn() -> dict[str, Tensor]:
    """A collated micro-batch, as a loader yields it."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 50, (SAMPLES, LENGTH + 1), generator=draw)

    def uniform() -> Tensor:
        return torch.rand(SAMPLES, LENGTH, generator=draw)

    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (uniform() < 0.9).float(),
        "position_ids": torch.arange(LENGTH).repeat(SAMPLES, 1),
        "dataset_id": torch.tensor([0, 1]),
        "reference_losses": uniform(),
        "external": uniform(),
        "mask": (uniform() < 0.9).float(),
    }


def read(sample: dict[str, Tensor], left_out: LeftOut | None = None) -> MicroBatch:
    wanted = {f"with_{name}": True for name in ("domains", "losses", "tokens", "external")}
    # A loader yields each micro-batch anew.
    copies = {name: values.clone() for name, values in sample.items()}
    return next(read_micro_batches(iter([copies]), SAMPLES, 1, left_out=left_out, **wanted))


@pytest.mark.parametrize("scope", ["micro-batch", "sequence", "global-batch"])
def test_everything_is_read(ranks: Ranks, scope: str) -> None:
    sample = drawn()
    batch = read(sample)
    selection = SelectionSettings(
        scope=scope,
        score="read_scores:everything",
        weighting="read_scores:unsure",
        options=("power=2",),
    )
    settings = SelectiveSettings(
        selection, RatioSchedule(0.5), 0, True, "chunked", ("prose", "code"), SEED
    )
    selector = TokenSelector(selection, ranks)
    objective = MicroBatchObjective(batch, settings, Step(ITERATION, True, True, 0.5), selector)
    losses, entropies = torch.rand(2, SAMPLES, LENGTH)
    weights = objective.weigh(losses, entropies, losses)

    chance = random_scores(SEED, ITERATION, torch.arange(SAMPLES), LENGTH, losses.device)
    wanted = losses + entropies + sample["reference_losses"] + sample["external"] + chance
    wanted = wanted + sample["labels"] + sample["tokens"] + torch.arange(LENGTH)
    wanted = wanted + torch.tensor([[0], [1]])
    assert batch.scores is not None and objective.choice is not None
    torch.testing.assert_close(batch.scores, wanted)
    selected = objective.choice.selected
    raw = torch.where(selected, entropies**2, 0.0)
    sums = raw.sum(1, keepdim=True) if scope == "sequence" else raw.sum()
    count = selected.sum(1, keepdim=True) if scope == "sequence" else selected.sum()
    torch.testing.assert_close(weights, raw * count / sums)
    if scope == "global-batch":  # two micro-batches at once
        assert batch.scored is not None
        choice = selector.choose_from_step(
            torch.cat([batch.scores] * 2),
            torch.cat([batch.valid] * 2),
            0.5,
            None,
            2,
            Tokens.joined([batch.scored] * 2),
        )
        assert choice.weights is not None
        assert choice.weights.sum().item() == pytest.approx(choice.selected.sum().item(), rel=1e-5)


def test_nothing_is_read_that_is_not_needed(ranks: Ranks) -> None:
    selection = SelectionSettings(score="policy", weighting="dft")
    settings = SelectiveSettings(selection, RatioSchedule(1.0), 0, True, "chunked", (), SEED)
    step = Step(ITERATION, True, True, 1.0)
    batch = read(drawn())
    objective = MicroBatchObjective(batch, settings, step, TokenSelector(selection, ranks))
    losses = torch.rand(SAMPLES, LENGTH)
    weights = objective.weigh(losses)
    assert batch.scored is not None and batch.scored.known().keys() == {"losses", "valid"}
    torch.testing.assert_close(weights, torch.where(batch.valid, (-losses).exp(), 0.0))


@pytest.mark.parametrize("selects", [True, False])
def test_the_head_finds_entropies_where_tokens_are_weighed(
    selects: bool, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slm_vocab_size", "padded_vocab_size"):
        monkeypatch.setattr(get_args(), name, 50, raising=False)
    selection = SelectionSettings(score="policy-entropy", weighting="eaft")
    settings = SelectiveSettings(selection, RatioSchedule(0.5), 9, True, "chunked", (), SEED)
    run = SelectiveStep(settings, None, None, Namespace())
    run.step = Step(ITERATION, True, selects, 0.5)
    selector = TokenSelector(selection, ranks)
    objective = MicroBatchObjective(read(drawn()), settings, run.step, selector)
    context = run._head(objective)["output_processor_context"]
    assert (context.entropies, context.top_entropies) == (selects, selects)


def test_no_threshold_is_carried_where_all_tokens_are_selected(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_args(), "consumed_train_samples", 0, raising=False)
    for ratio, own, carried in ((1.0, (), False), (0.9, (), True), (1.0, (0.5, None), True)):
        selection = SelectionSettings(
            scope="global-batch", score="policy", weighting="dft", domain_ratios=own
        )
        settings = SelectiveSettings(selection, RatioSchedule(ratio), 0, True, "chunked", (), SEED)
        step = SelectiveStep(settings, None, None, Namespace())
        assert step.carried is not None
        step.carried.carried = CarriedThreshold((1.0,) * (len(own) or 1), 2)
        assert (step._begin(True, ITERATION).thresholds is not None) == carried


def test_left_out(ranks: Ranks) -> None:
    sample = drawn()
    external, masked = sample["external"], sample["mask"] > 0
    by_hash = kept_by_goldfish(sample["labels"], 2, 3)
    kept = {
        LeftOut(): torch.ones_like(masked),
        LeftOut(goldfish=(2, 3)): by_hash,
        LeftOut(masked=True): masked,
        LeftOut(above=0.7): external <= 0.7,
        LeftOut(below=0.2): external >= 0.2,
        LeftOut((2, 3), True, 0.7, 0.2): by_hash & masked & (external <= 0.7) & (external >= 0.2),
    }
    for how, wanted in kept.items():
        assert torch.equal(read(sample, how).valid, wanted & (sample["loss_mask"] > 0)), how


def test_goldfish_in_fine_tuning(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of prompts are hashed too, and no window reaches into another conversation."""
    monkeypatch.setattr(get_args(), "sft", True)
    k, h = 2, 3
    sample, ends = drawn(), [[0, 5, LENGTH], [0, LENGTH, LENGTH]]
    ids = sample["labels"].clone()
    padded = [row + [LENGTH] * (LENGTH + 1 - len(row)) for row in ends]
    sample["cu_seqlens"] = torch.tensor(padded, dtype=torch.int32)
    prompts = torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.4
    sample["labels"][prompts] = -100
    sample["loss_mask"] = (~prompts).float()
    found = read(sample, LeftOut(goldfish=(k, h))).valid
    for row, whole, valid, of_prompt in zip(ends, ids, found, prompts, strict=True):
        for start, stop in itertools.pairwise(row):
            kept = torch.ones(stop - start, dtype=torch.bool)
            if stop - start >= h:
                kept = kept_by_goldfish(whole[None, start:stop], k, h)[0]
            assert torch.equal(valid[start:stop], kept & ~of_prompt[start:stop])
    assert not torch.equal(found, ~prompts)


def test_left_out_by_arguments() -> None:
    def found(words: str, *kinds: str) -> LeftOut:
        given = [checked(word) for word in words.split()]
        return tokens_left_out(Namespace(slm_leave_out=given, seq_length=64), kinds)

    assert not found("")
    assert found("above=0.5 goldfish=4:13", "external") == LeftOut((4, 13), False, 0.5)
    assert found("below=-1", "external", "mask") == LeftOut(None, True, None, -1.0)
    for words, said in {
        "above=1": "--slm-leave-out needs --slm-token-values with a cache of external values",
        "goldfish=4:65": "goldfish=4:65: 65 tokens are more than --seq-length 64",
        "goldfish=4:4 goldfish=5:5": "names one way twice",
    }.items():
        with pytest.raises(UserError, match=said):
            found(words)
    assert found("above=0.5 below=0.5", "external") == LeftOut(None, False, 0.5, 0.5)
    with pytest.raises(UserError, match=r"below=0.6 leaves out all tokens"):
        found("above=0.5 below=0.6", "external")
