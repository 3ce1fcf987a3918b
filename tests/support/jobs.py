"""The runs that distributed tests share: one small corpus, and models to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from launch import pretrain

SEQUENCE = 64
GLOBAL_BATCH = 12
STEPS = 5
VOCABULARY = 257  # bytes and an end-of-document token
SPLIT = "90,10,0"


@dataclass
class Corpus:
    """prefix: of the indexed dataset; arguments: for a run that reads it."""

    prefix: Path

    @property
    def arguments(self) -> list[str]:
        return (
            f"--data-path {self.prefix} --split {SPLIT} --seq-length {SEQUENCE} "
            f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --eod-mask-loss"
        ).split()


# A policy of two key-value groups, and a reference of another depth and width.
POLICY = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --make-vocab-size-divisible-by 256
""".split()
REFERENCE = """
    --num-layers 2 --hidden-size 96 --num-attention-heads 6 --make-vocab-size-divisible-by 64
""".split()
LLAMA = f"""
    --max-position-embeddings {SEQUENCE} --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --init-method-std 0.04
""".split()
UNTIED = ["--untie-embeddings-and-output-weights"]
OPTIMIZER = f"""
    --global-batch-size {GLOBAL_BATCH} --lr 3e-4 --lr-decay-style constant --clip-grad 1.0
    --weight-decay 0.01 --adam-beta2 0.999 --eval-iters 1 --eval-interval 1000 --log-interval 1
""".split()


def write_dataset(prefix: Path, texts: list[str]) -> None:
    """Write an indexed dataset of bytes, with an end-of-document token after each text."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for text in texts:
        ids = [*text.encode(), VOCABULARY - 1]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@dataclass
class Checkpoints:
    """Two models after a few steps of plain causal language modeling on one rank.

    more: what the policy has beyond POLICY; base: of its rotary embedding.
    """

    policy: Path
    reference: Path
    tied: bool
    more: list[str] = field(default_factory=list)
    base: int = 10000

    @property
    def embeddings(self) -> list[str]:
        return [] if self.tied else UNTIED

    @property
    def without_reference(self) -> list[str]:
        """Start from the policy at iteration 0."""
        return [
            *POLICY,
            *LLAMA,
            *f"--rotary-base {self.base}".split(),
            *self.more,
            *self.embeddings,
            *OPTIMIZER,
            *f"--load {self.policy} --finetune --no-load-optim --no-load-rng".split(),
        ]

    @property
    def arguments(self) -> list[str]:
        """The same, with the reference at hand."""
        return [*self.without_reference, "--slm-reference-load", str(self.reference)]


def as_hybrid(arguments: list[str], pattern: str) -> list[str]:
    """Return the arguments of a GPT's run with a hybrid model in the GPT's place."""
    at = arguments.index("--num-layers")
    return [*arguments[:at], "--hybrid-layer-pattern", pattern, *arguments[at + 2 :]]


def from_own_checkpoint(arguments: list[str], saved: Path) -> list[str]:
    """Return the arguments of the same run, started from its own checkpoint."""
    at = arguments.index("--load")
    # and no --finetune, --no-load-*
    return [*arguments[:at], "--load", str(saved), *arguments[at + 5 :]]


def train_checkpoints(corpus: Corpus, directory: Path, tied: bool) -> Checkpoints:
    made = Checkpoints(directory / "policy", directory / "reference", tied)
    for path, model, steps in ((made.policy, POLICY, 2), (made.reference, REFERENCE, 10)):
        train_checkpoint(corpus, path, [*model, *made.embeddings], steps)
    return made


def train_checkpoint(corpus: Corpus, path: Path, model: list[str], steps: int) -> None:
    arguments = f"--train-iters {steps} --micro-batch-size 4 --save {path} --save-interval 10"
    pretrain(
        1,
        [*corpus.arguments, *LLAMA, *model, *OPTIMIZER, *arguments.split()],
        path.with_name(f"run-{path.name}"),
    )
