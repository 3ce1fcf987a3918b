"""The "selective language modeling" options: their names, values and help.

Declared without Megatron and torch, so that --help and the first check of a command line take a
moment (first_check.py).
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

# As selection/ has them, which imports torch.
SCORES = (
    "excess",
    "lowest",
    "reference",
    "reference-entropy",
    "policy",
    "policy-entropy",
    "random",
)
NEED_REFERENCE = SCORES[:4]
SCOPES = ("sequence", "micro-batch", "data-parallel", "global-batch")
WEIGHTINGS = ("hard", "relu", "softmax")


def ratio(text: str) -> float:
    """A part of the tokens."""
    value = _number(float, text)
    if not 0.0 < value <= 1.0:
        raise ArgumentTypeError(f"must be in (0, 1], not {text}; 0.6 is 60% of the tokens")
    return value


def count(text: str) -> int:
    """A number of things of which there is one at least."""
    value = _number(int, text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def whole(text: str) -> int:
    """A number of things of which there may be none."""
    value = _number(int, text)
    if value < 0:
        raise ArgumentTypeError(f"must not be negative, as {text} is")
    return value


def weight(text: str) -> float:
    """A factor that is not negative."""
    value = _number(float, text)
    if not 0.0 <= value < math.inf:
        raise ArgumentTypeError(f"must be finite and not negative, not {text}")
    return value


def temperature(text: str) -> float:
    """A positive number."""
    value = _number(float, text)
    if not 0.0 < value < math.inf:
        raise ArgumentTypeError(f"must be finite and above 0, not {text}")
    return value


def ratio_step(text: str) -> str:
    """N:K, as it was given."""
    iteration, _, part = text.partition(":")
    if not (iteration.isascii() and iteration.isdigit()):
        raise ArgumentTypeError(f"{text}: give iteration:ratio, as in 1000:0.7")
    ratio(part)
    return text


def domain_ratio(text: str) -> str:
    """NAME=K, as it was given."""
    name, _, part = text.rpartition("=")
    if not name:
        raise ArgumentTypeError(f"{text}: give NAME=RATIO, as in web=0.5")
    ratio(part)
    return text


def _number[T: (int, float)](kind: Callable[[str], T], text: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def add_options(parser: ArgumentParser) -> None:
    """Declare the options of training."""
    group = parser.add_argument_group("selective language modeling")
    group.add_argument(
        "--slm-token-ratio",
        type=ratio,
        default=1.0,
        metavar="K",
        help="Part of the tokens to train on, in (0, 1]: those with the highest scores. 1 without "
        "a reference is causal language modeling.",
    )
    group.add_argument(
        "--slm-reference-load",
        nargs="+",
        metavar="[NAME=]DIR",
        help="Directory with the checkpoint (torch_dist format) of the reference model. It may "
        "have another architecture and another layout; its tokenizer must be the same. Of several "
        "the mean loss is taken, or with names of the blend's datasets each one's own.",
    )
    group.add_argument(
        "--slm-reference",
        metavar="ema:DECAY",
        help="Instead of a checkpoint: the exponential moving average of the policy's weights.",
    )
    group.add_argument(
        "--slm-reference-cache",
        nargs="+",
        metavar="DIR",
        help="Instead of a checkpoint: reference losses stored by tools/score_reference.py.",
    )
    group.add_argument(
        "--slm-reference-offload",
        action="store_true",
        help="Keep the reference's weights in host memory and bring them layer by layer.",
    )
    group.add_argument(
        "--slm-reference-micro-batch-size",
        type=count,
        metavar="N",
        help="Samples that the reference scores at a time, a multiple of --micro-batch-size. "
        "Default: --micro-batch-size.",
    )
    group.add_argument(
        "--slm-reference-fp8",
        action="store_true",
        help="Let the reference compute in fp8 (e4m3, scales of the current tensors). Needs "
        "Transformer Engine.",
    )
    group.add_argument(
        "--slm-reference-ckpt-step",
        type=whole,
        metavar="N",
        help="Iteration of the reference checkpoint. Default: the latest.",
    )
    group.add_argument(
        "--slm-score",
        choices=SCORES,
        default="excess",
        help="What tokens are ranked by, highest first. excess: policy loss minus reference loss. "
        "lowest: the inverse, a control. reference, reference-entropy: low reference loss or "
        "entropy. policy, policy-entropy: high policy loss or entropy. random: a control. Only "
        "the first four need a reference. Default: excess.",
    )
    group.add_argument(
        "--slm-scope",
        choices=SCOPES,
        default="micro-batch",
        help="Tokens that compete for selection: of one sequence, one micro-batch, the "
        "micro-batches of all data-parallel ranks at a time, or the global batch. "
        "Default: micro-batch.",
    )
    group.add_argument(
        "--slm-global-batch",
        choices=("carried", "exact"),
        default="carried",
        help="With --slm-scope global-batch. carried: a threshold that follows the last steps. "
        "exact: a forward pass ranks all tokens of the step first. Default: carried.",
    )
    group.add_argument(
        "--slm-ratio-schedule",
        choices=("constant", "linear", "cosine", "steps"),
        default="constant",
        help="How --slm-token-ratio changes over iterations. Default: constant.",
    )
    group.add_argument(
        "--slm-final-token-ratio",
        type=ratio,
        metavar="K",
        help="Where a linear or cosine schedule ends.",
    )
    group.add_argument(
        "--slm-ratio-decay-iters",
        type=count,
        metavar="N",
        help="Iterations that a linear or cosine schedule takes. Default: --train-iters.",
    )
    group.add_argument(
        "--slm-ratio-steps",
        nargs="+",
        default=[],
        type=ratio_step,
        metavar="N:K",
        help="For schedule steps: from iteration N on the ratio is K, for example 1000:0.7.",
    )
    group.add_argument(
        "--slm-warmup-tokens",
        type=whole,
        default=0,
        metavar="N",
        help="Tokens of causal language modeling before the first selection. Default: 0.",
    )
    group.add_argument(
        "--slm-weighting",
        choices=WEIGHTINGS,
        default="hard",
        help="hard: selected tokens count equally, others not at all. relu, softmax: all tokens "
        "count, in proportion to max(score, 0) or exp(score / temperature), and the weights add "
        "up to the number hard selection would select. Default: hard.",
    )
    group.add_argument(
        "--slm-softmax-temperature",
        type=temperature,
        default=1.0,
        metavar="T",
        help="In nats, for excess scores. Default: 1.",
    )
    group.add_argument(
        "--slm-unselected-weight",
        type=weight,
        default=0.0,
        metavar="W",
        help="Add W times the mean loss of unselected tokens. Default: 0.",
    )
    group.add_argument(
        "--slm-domain-ratio",
        nargs="+",
        default=[],
        type=domain_ratio,
        metavar="NAME=K",
        help="Own ratios for datasets of the blend, by the name of their files (without "
        "directory and _text_document); their tokens compete among themselves.",
    )
    group.add_argument(
        "--slm-head",
        choices=("dense", "chunked"),
        help="Output layer and loss of the policy. dense: Megatron's own. chunked: losses without "
        "logits in memory, gradients of selected tokens only. Default: chunked when tokens are "
        "selected, else dense.",
    )
    group.add_argument(
        "--slm-changed",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Arguments of the model, such as rotary_base, in which this run is to differ from the "
        "checkpoint that it starts from, and reference or selection for a run that goes on without "
        "those it had. Any other difference is an error.",
    )
    group.add_argument(
        "--slm-dump-interval",
        type=count,
        metavar="N",
        help="Every N iterations, at the start and at the end, write the losses of all tokens of a "
        "few fixed samples, for tools/report.py.",
    )
    group.add_argument(
        "--slm-dump-dir", metavar="DIR", help="Where to. Default: dump in the directory of --save."
    )
    group.add_argument(
        "--slm-dump-samples",
        type=count,
        default=8,
        metavar="N",
        help="How many samples. Default: 8.",
    )
    group.add_argument(
        "--slm-dump-train-samples",
        action="store_true",
        help="The first of the training data, as the blend mixes it, though there is validation "
        "data.",
    )


def add_scoring_options(parser: ArgumentParser) -> None:
    """Declare the options of tools/score_reference.py."""
    group = parser.add_argument_group("score cache")
    group.add_argument(
        "--by",
        choices=("sample", "document"),
        default="sample",
        help="sample: the samples of this very run, each token with the context it will have. "
        "document: all tokens of the datasets, for runs of any mix, length and seed. "
        "Default: sample.",
    )
    group.add_argument(
        "--cache-dtype",
        choices=("uint16", "float32"),
        default="uint16",
        help="uint16: 2 bytes a token, within 1.2e-4 nats at 1 nat and 3.9e-4 at 10. "
        "float32: exact. Default: uint16.",
    )
    group.add_argument(
        "--shard-samples",
        type=int,
        metavar="N",
        help="Samples of a file. Default: chosen by their number.",
    )


def add_dynamics_options(parser: ArgumentParser) -> None:
    """Declare the options of tools/token_dynamics.py."""
    group = parser.add_argument_group("token dynamics")
    group.add_argument(
        "--dynamics",
        required=True,
        metavar="DIR",
        help="Where losses, table and plots go. In a run's directory it is called dynamics.",
    )
    group.add_argument(
        "--ckpt-steps",
        nargs="+",
        type=int,
        metavar="N",
        help="Iterations of --load to score with. Default: all that are there.",
    )
    group.add_argument(
        "--dynamics-tokens",
        type=int,
        default=320_000,  # as in the paper's appendix B.1
        metavar="N",
        help="Validation tokens to follow, in whole samples. Default: 320,000.",
    )
