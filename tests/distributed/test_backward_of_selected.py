"""A backward pass through selected tokens alone, against an oracle that detaches all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.test_packed_documents import both as packed_samples
from distributed.test_packed_documents import packed, texts
from torch import Tensor
from torch.nn.functional import cross_entropy

import oracle
from agreement import agrees_with_oracle, oracle_models, train_oracle
from forked_jobs import Server
from jobs import GLOBAL_BATCH, POLICY, UNTIED, VOCABULARY, Checkpoints, Corpus, train_checkpoint
from launch import Run

__all__ = ["packed", "packed_samples", "texts"]

RATIOS = 0.5, 0.05, 1.0  # of three steps, of which the last is exact
SELECTED = f"""
    --train-iters 3 --num-workers 0 --tensorboard-dir tensorboard --slm-backward selected
    --slm-token-ratio {RATIOS[0]} --slm-ratio-schedule steps
    --slm-ratio-steps 1:{RATIOS[1]} 2:{RATIOS[2]}
""".split()
TP2, PP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline"))
CP2 = "--context-parallel-size 2"
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MASKED = "--dataloader-inter-document-masking"
LAYOUTS = {
    # ranks, samples of a micro-batch
    "dp2": (2, 3, SHARDED),
    "tp2": (2, 3, f"{TP2} --slm-head dense"),
    "tp2 sp, packed": (2, 3, f"{TP2} --sequence-parallel {MASKED}"),
    "pp2": (2, 1, PP2),
    "pp2 vpp2, recomputed": (
        2,
        3,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 {RECOMPUTED}",
    ),
    "cp2, packed, recomputed": (2, 3, f"{CP2} {MASKED} {RECOMPUTED}"),
    "tp2 pp2, recomputed": (4, 3, f"{TP2} --sequence-parallel {PP2} {RECOMPUTED}"),
    "pp2 cp2": (4, 3, f"{PP2} {CP2} --use-distributed-optimizer"),
}


def method(samples: int) -> oracle.Method:
    later = dict(enumerate(RATIOS))
    return oracle.Method(RATIOS[0], samples, samples, later=later, backward="selected")


@pytest.fixture(scope="module")
def oracles(
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    packed_samples: list[dict[str, Tensor]],
    untied: Checkpoints,
) -> dict[tuple[str, int], list[oracle.Step]]:
    """By corpus and micro-batch size."""
    of = {"whole": (samples, validation), "packed": packed_samples}
    return {
        (corpus, size): train_oracle(untied, *of[corpus], method(size), steps=len(RATIOS))
        for corpus, size in (("whole", 1), ("whole", 3), ("packed", 3))
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_oracle(
    layout: str,
    server: Server,
    corpus: Corpus,
    packed: Corpus,
    untied: Checkpoints,
    oracles: dict[tuple[str, int], list[oracle.Step]],
    tmp_path: Path,
) -> None:
    ranks, size, flags = LAYOUTS[layout]
    of = "packed" if MASKED in flags else "whole"
    arguments = [
        *[*(packed if of == "packed" else corpus).arguments, *untied.arguments],
        *[*SELECTED, "--micro-batch-size", str(size), *flags.split()],
    ]
    outputs = server.run("record", ranks, arguments, tmp_path)
    agrees_with_oracle(Run(tmp_path, outputs, [0] * ranks), oracles[of, size], size)


def test_ranks_without_a_selected_token(
    server: Server, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """A few tokens of a step are selected, so that most micro-batches have none."""
    arguments = [
        *[*corpus.arguments, *untied.arguments, "--micro-batch-size", "1"],
        *"--train-iters 2 --num-workers 0 --tensorboard-dir tensorboard".split(),
        *"--slm-backward selected --slm-token-ratio 0.004".split(),
        *"--slm-scope global-batch --slm-global-batch exact".split(),
    ]
    layouts = {"one": (1, ""), "split": (4, f"{TP2} --sequence-parallel {CP2} {SHARDED}")}
    for name, (ranks, flags) in layouts.items():
        server.run("record", ranks, [*arguments, *flags.split()], tmp_path / name)
    one, split = (Run(tmp_path / name, [], []) for name in layouts)
    for tag in ("lm loss", "grad-norm"):
        found = split.scalars(tag)
        assert sorted(found) == [1, 2]
        assert found == pytest.approx(one.scalars(tag), rel=1e-5)


def test_gradients_of_one_rank(
    server: Server, corpus: Corpus, samples: dict[str, Tensor], untied: Checkpoints, tmp_path: Path
) -> None:
    """Weights before a step of gradient descent minus those after it, of a policy with norms of
    queries and keys and with biases."""
    ratio, rate = 0.3, 100.0
    more = "--add-qkv-bias --qk-layernorm --kv-channels 24".split()
    start = Checkpoints(tmp_path / "policy", untied.reference, False, more)
    train_checkpoint(corpus, start.policy, [*POLICY, *more, *UNTIED], steps=2)
    step = f"--train-iters 1 --optimizer sgd --lr {rate} --weight-decay 0 --clip-grad 0"
    arguments = [
        *[*corpus.arguments, *start.arguments],
        *f"--micro-batch-size 3 --slm-backward selected --slm-token-ratio {ratio} {step}".split(),
        *f"--save {tmp_path / 'saved'} --save-interval 1 --eval-iters 0 --num-workers 0".split(),
    ]
    server.run("train", 1, arguments, tmp_path / "run")
    policy, reference = oracle_models(start)
    tokens, labels, mask = (
        samples[name][:GLOBAL_BATCH] for name in ("tokens", "labels", "loss_mask")
    )
    with torch.no_grad():
        losses, others = (
            cross_entropy(model(tokens).logits[..., :VOCABULARY].mT, labels, reduction="none")
            for model in (policy, reference)
        )
    selected, _ = oracle.select(losses - others, mask > 0, oracle.Method(ratio, 3, 3), None)
    gradients = []
    for cut in (~selected, torch.zeros_like(selected)):
        policy.zero_grad()
        with oracle.constant(policy, cut):
            trained = cross_entropy(policy(tokens).logits.mT, labels, reduction="none")
        trained[selected].mean().backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters()})
    after = oracle.llama(tmp_path / "saved/iter_0000001", tmp_path, heads=4, groups=2, tied=False)
    weights = dict(after.named_parameters())
    exact = set()
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            found = (weight - weights[name]).detach() / rate
            of_selected, of_all = (each[name] for each in gradients)
            near = 1e-5 * float(of_selected.abs().max())
            torch.testing.assert_close(found, of_selected, rtol=1e-5, atol=near)
            if torch.allclose(found, of_all, rtol=1e-2, atol=near):
                exact.add(name)
    # Of the last layer, only keys and values reach other tokens.
    assert all(name.startswith(("model.layers.3.", "model.norm.", "lm_head.")) for name in exact)
    assert not any(".k_proj." in name or ".v_proj." in name for name in exact)
