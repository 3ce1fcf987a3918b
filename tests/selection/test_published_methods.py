"""Published scores and weights against their authors' formulas, on random logits.

The formulas are written down from the papers or the authors' public code, in double precision and
on logits, and share nothing with the package but the numbers that go in.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss.likeliest import LikeliestTokens
from megatron_slm.selection import (
    DocumentPlaces,
    Ranks,
    SelectionSettings,
    Tokens,
    TokenSelector,
)

SAMPLES, LENGTH, VOCABULARY = 4, 40, 37
DOCUMENT = 23  # tokens of a sample's first document; the second one is the rest


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(distributed.group.WORLD, distributed.group.WORLD, 0, 1)
    distributed.destroy_process_group()


class Drawn:
    """Logits of a policy and of a reference, and the labels."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (SAMPLES, LENGTH, VOCABULARY)
        self.policy = 2.0 * torch.randn(shape, generator=draw, dtype=torch.float64)
        self.reference = 2.0 * torch.randn(shape, generator=draw, dtype=torch.float64)
        self.labels = torch.randint(VOCABULARY, shape[:2], generator=draw)
        self.valid = torch.rand(shape[:2], generator=draw) < 0.8

    def loss(self, logits: Tensor) -> Tensor:
        return cross_entropy(logits.transpose(1, 2), self.labels, reduction="none")

    @property
    def tokens(self) -> Tokens:
        entropies = torch.distributions.Categorical(logits=self.policy).entropy()
        rows = self.policy.flatten(0, 1)
        likeliest = LikeliestTokens(len(rows), rows.device)
        for chunk in rows.split([9, 28], dim=1):
            likeliest.add(chunk)
        places = torch.arange(LENGTH).expand(SAMPLES, -1)
        return Tokens(
            self.loss(self.policy).float(),
            self.valid,
            entropies=entropies.float(),
            top_entropies=likeliest.entropies(distributed.group.WORLD).view(SAMPLES, LENGTH),
            reference_losses=self.loss(self.reference).float(),
            document_positions=torch.where(places < DOCUMENT, places, places - DOCUMENT),
        )


def weights(drawn: Drawn, ranks: Ranks, weighting: str, *options: str, scope: str) -> Tensor:
    """Return the weights of all tokens with a ratio of 1."""
    settings = SelectionSettings(scope=scope, score="policy", weighting=weighting, options=options)
    tokens = drawn.tokens
    scores = settings.scorer(tokens)
    choice = TokenSelector(settings, ranks).choose(scores, drawn.valid, 1.0, tokens=tokens)
    assert torch.equal(choice.selected, drawn.valid)
    assert choice.weights is not None
    return choice.weights.double()


def helm(drawn: Drawn, long: Tensor, short: Tensor, sparsity: float | None, mixed: float) -> Tensor:
    """Compute the weights of ShortLongLoss in the code of Helm et al.: absolute, L1, mixed."""
    result = torch.zeros_like(long)
    for sample in range(SAMPLES):
        may = drawn.valid[sample]
        raw = (long[sample] - short[sample]).abs()[may]
        if sparsity is not None:
            kept = raw.argsort(descending=True)[: int(sparsity * len(raw) + 0.5)]
            raw = torch.zeros_like(raw).index_fill_(0, kept, 1.0)
        result[sample, may] = mixed + (1.0 - mixed) * raw / raw.sum() * len(raw)
    return result


def talr(drawn: Drawn, losses: Tensor, floor: float) -> Tensor:
    """Compute Lin et al.'s weights, p ** (1 / tau) from below; tau as it is for each batch."""
    probability = (-losses).exp()
    means = torch.stack([own[may].mean() for own, may in zip(losses, drawn.valid, strict=True)])
    return (probability ** (1 / means.median())).clamp_min(floor)


def exact(drawn: Drawn, alpha: float, gamma: float, tau: int) -> Tensor:
    """Compute Zhu et al.'s weights: counts of buckets, and alpha of extra weight for each token."""
    buckets = [(0, 7), *((2**power, 2 ** (power + 1) - 1) for power in range(3, 12))]
    found, of_token, counts = torch.ones(SAMPLES, LENGTH, dtype=torch.float64), {}, {}
    for sample, target in drawn.valid.nonzero().tolist():
        context = target + 1 if target < DOCUMENT else target + 1 - DOCUMENT  # of the label
        (bucket,) = [one for one in buckets if one[0] <= context <= one[1]]
        if bucket[0] >= tau:
            of_token[sample, target] = bucket
            counts[bucket] = counts.get(bucket, 0) + 1
    share = {bucket: count / len(of_token) for bucket, count in counts.items()}
    rarity = {bucket: q**-gamma for bucket, q in share.items()}
    mean = sum(share[bucket] * rarity[bucket] for bucket in share)
    for place, bucket in of_token.items():
        found[place] = 1 + alpha * rarity[bucket] / mean
    return found


def expected(drawn: Drawn, method: str) -> Tensor:
    long, short = drawn.loss(drawn.policy), drawn.loss(drawn.reference)
    log_p = drawn.policy.log_softmax(-1)
    if method == "dft":  # the softmax of the logits at the label
        found = drawn.policy.softmax(-1).gather(2, drawn.labels[..., None])[..., 0]
    elif method.startswith("mile"):
        gamma = 1.0 if method == "mile" else 2.0
        found = (1.0 - (log_p.exp() * log_p).sum(-1)) ** gamma
        found = found / found[drawn.valid].mean()
    elif method.startswith("eaft"):  # entropy_approx of LLaMA-Factory
        highest = drawn.policy.topk(20, dim=-1).values
        log_q = highest - highest.logsumexp(-1, keepdim=True)
        found = torch.pow(-(log_q.exp() * log_q).sum(-1) / 3.0, 1 if method == "eaft" else 2)
    elif method.startswith("talr"):
        found = talr(drawn, long, 0.01 if method == "talr" else 0.3)
    elif method.startswith("exact"):
        found = exact(drawn, *((0.15, 0.5, 10) if method == "exact" else (0.4, 1.0, 8)))
    elif method.startswith("longce"):
        bound = 5.0 if method == "longce" else 2.0
        found = torch.minimum((short - long).exp(), torch.tensor(bound))
    else:
        found = helm(drawn, long, short, None, 0.0 if method == "context" else 0.5)
    return torch.where(drawn.valid, found, 0.0)


@pytest.mark.parametrize(
    "method",
    [
        "dft",
        "mile",
        "mile gamma=2",
        "eaft",
        "eaft alpha=2",
        "talr",
        "talr floor=0.3",
        "exact",
        "exact alpha=0.4 gamma=1 tau=8",
        "longce",
        "longce gamma=2",
        "context",
        "context interpolation=0.5",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_weights(ranks: Ranks, method: str, seed: int) -> None:
    drawn = Drawn(seed)
    scope = "sequence" if method.startswith("context") else "micro-batch"
    found = weights(drawn, ranks, *method.split(), scope=scope)
    torch.testing.assert_close(found, expected(drawn, method), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "document"])
def test_the_sequences_of_talr(ranks: Ranks, scope: str) -> None:
    """Where each sequence or document is a set of its own, tau is its mean loss."""
    drawn = Drawn(3)
    settings = SelectionSettings(scope=scope, score="policy", weighting="talr")
    tokens, places = drawn.tokens, torch.arange(LENGTH).expand(SAMPLES, -1)
    second = (places >= DOCUMENT).long()
    documents = DocumentPlaces(second, tokens.document_positions)
    choice = TokenSelector(settings, ranks).choose(
        settings.scorer(tokens), drawn.valid, 1.0, documents=documents, tokens=tokens
    )
    assert choice.weights is not None
    losses = drawn.loss(drawn.policy)
    sequences = torch.arange(SAMPLES)[:, None] * 2 + (second if scope == "document" else 0)
    for one in sequences.unique():
        own = (sequences == one) & drawn.valid
        weights = (-losses[own] / losses[own].mean()).exp().clamp_min(0.01)
        torch.testing.assert_close(choice.weights[own].double(), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_weights_are_a_selection(ranks: Ranks, seed: int) -> None:
    """Over the mean of all tokens, kept ones count n / kept; ours count 1 over the mean of them."""
    drawn = Drawn(seed)
    settings = SelectionSettings(scope="sequence", score="context")
    scores = settings.scorer(drawn.tokens)
    chosen = TokenSelector(settings, ranks).choose(scores, drawn.valid, 0.3).selected
    theirs = helm(drawn, drawn.loss(drawn.policy), drawn.loss(drawn.reference), 0.3, 0.0)
    assert torch.equal(chosen, theirs > 0)
    for sample in range(SAMPLES):
        n, kept = drawn.valid[sample].sum(), chosen[sample].sum()
        ours = chosen[sample].double() / kept
        torch.testing.assert_close(theirs[sample] / n, ours, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("score", ["retrospective", "policy", "policy-entropy"])
def test_scores(ranks: Ranks, score: str) -> None:
    """ssToken's retrospective excess loss, and the value at risk of ESLM at alpha = 0.7."""
    drawn = Drawn(5)
    log_p, log_h = drawn.policy.log_softmax(-1), drawn.reference.log_softmax(-1)
    at = drawn.labels[..., None]
    theirs = {
        "retrospective": (log_p - log_h).gather(2, at)[..., 0],  # log P_policy / P_history
        "policy": -log_p.gather(2, at)[..., 0],
        "policy-entropy": -(log_p.exp() * log_p).sum(-1),
    }[score]
    settings = SelectionSettings(score=score)
    scores = settings.scorer(drawn.tokens)
    torch.testing.assert_close(scores.double(), theirs, rtol=1e-5, atol=1e-5)
    if score != "retrospective":
        of_all = theirs[drawn.valid]
        kept = int(0.3 * len(of_all) + 0.5)
        at_risk = of_all.sort().values[len(of_all) - kept]  # the lowest of the top 1 - alpha
        chosen = TokenSelector(settings, ranks).choose(scores, drawn.valid, 0.3).selected
        assert torch.equal(chosen, drawn.valid & (theirs >= at_risk))


@pytest.mark.parametrize("weighting", ["dft", "mile"])
def test_weights_with_a_selection(ranks: Ranks, weighting: str) -> None:
    """Only the selected tokens are weighed, and normalized over them alone."""
    drawn = Drawn(7)
    settings = SelectionSettings(score="policy", weighting=weighting)
    tokens = drawn.tokens
    choice = TokenSelector(settings, ranks).choose(
        settings.scorer(tokens), drawn.valid, 0.5, tokens=tokens
    )
    assert choice.weights is not None and 0 < choice.selected.sum() < drawn.valid.sum()
    assert torch.equal(choice.weights > 0, choice.selected)
    if weighting == "mile":
        total = choice.weights.double().sum()
        assert total.item() == pytest.approx(choice.selected.sum().item(), rel=1e-6)
