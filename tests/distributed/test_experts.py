"""Mixtures of experts: the oracle is transformers' Mixtral, with the routers' losses and biases in
plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
from agreement import agrees_with_oracle
from forked_jobs import Server
from jobs import (
    GLOBAL_BATCH,
    LLAMA,
    OPTIMIZER,
    STEPS,
    UNTIED,
    VOCABULARY,
    Checkpoints,
    Corpus,
    as_hybrid,
)
from launch import Run, pretrain
from megatron_slm.selection import kept_by_goldfish
from oracle_experts import Balanced, mixtral

EXPERTS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --make-vocab-size-divisible-by 256 --num-experts 4
    --moe-ffn-hidden-size 48 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
""".split()
LOSSES = ["--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.01"]
BIASES = """
    --moe-router-load-balancing-type none --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.02
""".split()
BALANCED = {"losses": LOSSES, "biases": BIASES}


@pytest.fixture(scope="module")
def starts(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Models after two steps, by how their experts are balanced."""
    made = {}
    for balanced, flags in BALANCED.items():
        made[balanced] = tmp_path_factory.mktemp("experts") / balanced
        save = f"--train-iters 2 --micro-batch-size 4 --save {made[balanced]} --save-interval 2"
        arguments = [*corpus.arguments, *EXPERTS, *flags, *LLAMA, *UNTIED, *OPTIMIZER]
        server.run("train", 1, [*arguments, *save.split()], made[balanced].parent / "run")
    return made


@dataclass(frozen=True)
class Case:
    """balanced: of BALANCED.  reference: that of the dense tests, or a start.  pattern: of the
    layers, if the model is a hybrid one.  goldfish: k and h of the tokens that are left out."""

    ranks: int
    layout: str
    balanced: str
    ratio: float = 0.6
    micro_batch: int = 3
    reference: str = "dense"
    pattern: str | None = None
    goldfish: tuple[int, int] | None = None


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CASES = {
    "ep2": Case(2, "--expert-model-parallel-size 2", "losses"),
    "ep2 all tokens": Case(
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
        "losses",
        ratio=1.0,
        goldfish=(3, 4),
    ),
    "ep2 dp2": Case(4, "--expert-model-parallel-size 2", "biases", micro_batch=1),
    "ep2 tp2": Case(4, f"--expert-model-parallel-size 2 {TP2}", "losses"),
    "ep2 pp2": Case(
        4,
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "losses",
        goldfish=(2, 4),
    ),
    "ep4, reference from the host": Case(
        4, "--expert-model-parallel-size 4 --slm-reference-offload", "losses", reference="biases"
    ),
    "etp": Case(
        2, f"--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 {TP2}", "biases"
    ),
    "cp2": Case(2, "--context-parallel-size 2", "biases"),
    "ep2, hybrid": Case(2, "--expert-model-parallel-size 2", "losses", pattern="*E*E"),
}


@dataclass
class Setting:
    """What the cases share."""

    server: Server
    corpus: Corpus
    starts: dict[str, Path]
    dense: Checkpoints
    samples: dict[str, Tensor]
    watched: dict[str, Tensor]

    def arguments(self, case: Case) -> list[str]:
        reference = self.dense.reference if case.reference == "dense" else None
        left_out = "" if case.goldfish is None else "--slm-leave-out goldfish={}:{}"
        return [
            *left_out.format(*case.goldfish or ()).split(),
            *self.corpus.arguments,
            *(as_hybrid(EXPERTS, case.pattern) if case.pattern else EXPERTS),
            *BALANCED[case.balanced],
            *LLAMA,
            *UNTIED,
            *OPTIMIZER,
            *f"--load {self.starts[case.balanced]} --finetune --no-load-optim".split(),
            *f"--no-load-rng --train-iters {STEPS} --micro-batch-size {case.micro_batch}".split(),
            *f"--slm-reference-load {reference or self.starts[case.reference]}".split(),
            *f"--slm-token-ratio {case.ratio} --tensorboard-dir tensorboard".split(),
            *case.layout.split(),
        ]

    def model(self, name: str, scratch: Path) -> torch.nn.Module:
        """Return a start, or the dense reference."""
        if name == "dense":
            directory = self.dense.reference / "iter_0000010"
            return oracle.llama(directory, scratch, heads=6, groups=6, tied=False)
        return mixtral(self.starts[name] / "iter_0000002", scratch, heads=4, groups=2)

    def expected(self, case: Case, scratch: Path) -> tuple[list[oracle.Step], list[list[Tensor]]]:
        """Return the oracle's steps, and the gradients of its routers."""
        policy = self.model(case.balanced, scratch)
        samples = dict(self.samples)
        if case.goldfish is not None:
            kept = kept_by_goldfish(samples["labels"], *case.goldfish)
            samples["loss_mask"] = samples["loss_mask"] * kept
        rates = {"losses": {"load_balance": 0.1, "z": 0.01}, "biases": {"bias_rate": 0.02}}
        experts = Balanced(policy, case.micro_batch, **rates[case.balanced])
        experts.valid = list((self.samples["loss_mask"] > 0).split(GLOBAL_BATCH))
        steps = oracle.train(
            policy,
            self.model(case.reference, scratch),
            samples,
            oracle.Method(case.ratio, case.micro_batch, case.micro_batch),
            steps=STEPS,
            global_batch=GLOBAL_BATCH,
            vocabulary=VOCABULARY,
            watched=self.watched,
            experts=experts,
        )
        return steps, experts.gradients


@pytest.fixture(scope="module")
def setting(
    server: Server,
    corpus: Corpus,
    starts: dict[str, Path],
    untied: Checkpoints,
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
) -> Setting:
    watched = {name: rows[:1] for name, rows in validation.items()}
    return Setting(server, corpus, starts, untied, samples, watched)


@pytest.mark.parametrize("name", CASES)
def test_experts_agree_with_oracle(name: str, setting: Setting, tmp_path: Path) -> None:
    """Losses, selected tokens, gradient norms, and the routers' gradients."""
    case = CASES[name]
    outputs = setting.server.run("record experts", case.ranks, setting.arguments(case), tmp_path)
    run = Run(tmp_path, outputs, [0] * case.ranks)
    steps, gradients = setting.expected(case, tmp_path)
    if case.ratio == 1.0:
        for tag, of_step in (("lm loss", "lm_loss"), ("grad-norm", "grad_norm")):
            expected = [getattr(step, of_step) for step in steps]
            assert list(run.scalars(tag).values()) == pytest.approx(expected, rel=1e-5)
    else:
        agrees_with_oracle(run, steps, case.micro_batch)
    for rank in range(case.ranks):
        seen = torch.load(tmp_path / f"recorded/experts{rank}.pt")
        assert len(seen["gradients"]) == STEPS
        for found, expected in zip(seen["gradients"], gradients, strict=True):
            assert found
            for layer, gradient in found.items():
                number = layer // 2 if case.pattern else layer  # attention is a layer of its own
                wanted = expected[number - 1]
                scale = wanted.abs().max()
                torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * scale)
        assert "reference" in seen["passes"] or case.ratio == 1.0
        assert "validation" in seen["passes"]
        assert seen["moved"] == []


def test_dense_policy_with_experts_as_reference(setting: Setting, tmp_path: Path) -> None:
    """Over tensor-parallel ranks that do not share out the sequence, as training experts must."""
    arguments = [
        *setting.corpus.arguments,
        *setting.dense.without_reference,
        *f"--slm-reference-load {setting.starts['losses']} --train-iters {STEPS}".split(),
        *"--micro-batch-size 3 --slm-token-ratio 0.6 --tensorboard-dir tensorboard".split(),
        *"--tensor-model-parallel-size 2".split(),
    ]
    outputs = setting.server.run("record experts", 2, arguments, tmp_path)
    directory = setting.dense.policy / "iter_0000002"
    expected = oracle.train(
        oracle.llama(directory, tmp_path, heads=4, groups=2, tied=False),
        setting.model("losses", tmp_path),
        setting.samples,
        oracle.Method(0.6, 3, 3),
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        vocabulary=VOCABULARY,
        watched=setting.watched,
    )
    agrees_with_oracle(Run(tmp_path, outputs, [0, 0]), expected, 3)


def test_losses_that_experts_scored_before(setting: Setting, tmp_path: Path) -> None:
    """Bit for bit the run with the reference itself; its experts stay within a replica."""
    plain = setting.arguments(Case(1, "--eval-interval 2", "biases", reference="losses"))
    cache = ["--slm-reference-cache", str(tmp_path / "cache")]
    job = [*plain, *cache, "--cache-dtype", "float32"]
    setting.server.run("score", 1, job, tmp_path)
    setting.server.run("train", 1, plain, tmp_path / "online")
    at = plain.index("--slm-reference-load")
    plain[at : at + 2] = cache
    setting.server.run("train", 1, plain, tmp_path / "cached")
    online, cached = (Run(tmp_path / name, [], []) for name in ("online", "cached"))
    for tag in ("lm loss", "excess loss", "grad-norm", "excess loss validation"):
        assert cached.scalars(tag) == online.scalars(tag) != {}
    setting.server.start("score", 2, [*job, "--expert-model-parallel-size", "2"], tmp_path / "ep2")
    assert setting.server.codes() == [2, 2]
    assert "shared out between replicas" in (tmp_path / "ep2" / "rank0.log").read_text()


@pytest.mark.parametrize(
    ("optimizer", "runs"),
    [
        ("", [(2, 2, 1), (1, 1, 3), (4, 4, STEPS)]),
        (
            "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
            [(2, 1, 1), (4, 4, 2), (2, 2, 3), (1, 1, STEPS)],
        ),
    ],
    ids=["plain", "distributed"],
)
def test_resumes_with_other_expert_parallelism(
    optimizer: str, runs: list[tuple[int, int, int]], setting: Setting, tmp_path: Path
) -> None:
    """With the biases in the checkpoints; of each run its ranks, their size, and its last step."""
    case = Case(2, optimizer, "biases")
    plain = setting.arguments(case)
    start = plain.index("--load")
    resumed = [*plain[:start], "--load", "saved", *plain[start + 5 :]]
    save = "--save saved --save-interval 1 --exit-interval".split()
    for ranks, size, last in runs:
        layout = ["--expert-model-parallel-size", str(size), *save, str(last)]
        arguments = [*(plain if last == 1 else resumed), *layout]
        setting.server.run("train", ranks, arguments, tmp_path)
    steps, _ = setting.expected(case, tmp_path)
    scalars = Run(tmp_path, [], []).scalars
    for tag, of_step in (("lm loss", "lm_loss"), ("grad-norm", "grad_norm")):
        expected = [getattr(step, of_step) for step in steps]
        assert list(scalars(tag).values()) == pytest.approx(expected, rel=1e-5)


def test_moving_average_of_experts(setting: Setting, tmp_path: Path) -> None:
    """It starts as the policy, with its biases, and a resumed run goes on with it."""
    plain = setting.arguments(Case(2, "--expert-model-parallel-size 2", "biases"))
    reference, start = plain.index("--slm-reference-load"), plain.index("--load")
    plain[reference : reference + 2] = ["--slm-reference", "ema:0.5"]
    save = ["--save", "saved", "--save-interval", "2"]
    setting.server.run("train", 2, [*plain, *save], tmp_path / "whole")
    saved = ["--load", str(tmp_path / "whole" / "saved"), "--ckpt-step", "2"]
    resumed = [*plain[:start], *saved, *plain[start + 5 :]]
    setting.server.run("train", 2, resumed, tmp_path / "resumed")
    whole, rest = (Run(tmp_path / name, [], []) for name in ("whole", "resumed"))
    assert whole.scalars("excess loss")[1] == 0.0
    for tag in ("lm loss", "excess loss", "grad-norm"):
        expected = {step: value for step, value in whole.scalars(tag).items() if step > 2}
        assert rest.scalars(tag) == expected


@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "capacity"])
def test_full_ratio_is_bitwise_causal_language_modeling(
    drops: bool, setting: Setting, tmp_path: Path
) -> None:
    """With all that Megatron has for experts, whatever passes come between, and with each of them
    leaving routers as they were.  A ranking finds the scores of the training pass, also where
    experts drop tokens."""
    common = [
        *setting.corpus.arguments,
        *EXPERTS,
        *LLAMA,
        *UNTIED,
        *OPTIMIZER,
        *BIASES[2:],
        *"--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss".split(),
        *"--moe-aux-loss-coeff 0.1 0.05 0.02 --moe-z-loss-coeff 0.01".split(),
        *"--moe-layer-freq [0,1] --moe-shared-expert-intermediate-size 24".split(),
        *"--moe-shared-expert-gate --expert-model-parallel-size 2".split(),
        *"--train-iters 3 --micro-batch-size 3 --eval-interval 2".split(),
        *(["--moe-expert-capacity-factor", "0.75"] if drops else []),
    ]
    megatron = pretrain(2, common, tmp_path / "megatron", module="megatron_pretrain")
    passes = (
        "--slm-head dense --slm-dump-interval 1 --slm-dump-dir dump --tensorboard-dir tensorboard"
    )
    ours = [*common, *passes.split(), "--slm-reference-load", str(setting.starts["losses"])]
    for name, extra in (
        ("full", ["--slm-token-ratio", "1"]),
        (
            "ranked",
            "--slm-token-ratio 0.6 --slm-scope global-batch --slm-global-batch exact".split(),
        ),
    ):
        setting.server.run("record experts", 2, [*ours, *extra], tmp_path / name)
    tags = ("lm loss", "grad-norm", "load_balancing_loss", "global_load_balancing_loss", "z_loss")
    full = Run(tmp_path / "full", [], [])
    for tag in tags:
        assert len(megatron.scalars(tag)) == 3
        assert full.scalars(tag) == megatron.scalars(tag)
    ranked: list[dict[str, Tensor]] = []
    for name, wanted in (("full", {"policy"}), ("ranked", {"policy", "reference"})):
        for rank in range(2):
            seen = torch.load(tmp_path / name / f"recorded/experts{rank}.pt")
            assert set(seen["passes"]) == wanted | {"reference", "validation"}
            assert seen["moved"] == []
            routed = 3 * GLOBAL_BATCH // 2 * 64 * 2  # steps, samples, tokens, top 2
            assert (0.5 * routed < seen["counted"] < routed) if drops else seen["counted"] == routed
            if name == "ranked":
                ranked += torch.load(tmp_path / name / f"recorded/rank{rank}.pt")["records"]
    for step, ratio in Run(tmp_path / "ranked", [], []).scalars("selected ratio").items():
        own = [one for one in ranked if one["iteration"] == step - 1]
        scores, selected = (torch.cat([one[key] for one in own]) for key in ("scores", "selected"))
        above = scores[~selected] > scores[selected].min()
        assert above.sum() <= scores.numel() - round(selected.sum().item() / ratio)  # masked ones
