"""Every option of training and of the jobs that score for it, with its type, default and help.

Nothing else declares them: the command line (option_groups.py) and docs/arguments.md
(arguments_page.py) come from these dataclasses.  Neither torch nor Megatron is imported, so that
--help and the first check of a command line (first_check.py) take no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from megatron_slm.training.command_line.option_values import (
    Count,
    Named,
    Natural,
    Ratio,
    Temperature,
    Weight,
    domain_ratio,
    left_out,
    ratio_step,
    score_option,
)

# The same as in selection/, which imports torch; a test compares them.
Score = Literal[
    "excess",
    "lowest",
    "retrospective",
    "reference",
    "reference-entropy",
    "context",
    "policy",
    "policy-entropy",
    "external",
    "random",
]
NEED_REFERENCE = (
    "excess",
    "lowest",
    "retrospective",
    "reference",
    "reference-entropy",
    "context",
)
Scope = Literal["document", "sequence", "micro-batch", "data-parallel", "global-batch"]
Weighting = Literal[
    "hard", "relu", "softmax", "dft", "mile", "eaft", "talr", "exact", "longce", "context"
]
NEED_ENTROPIES = ("policy-entropy", "mile", "eaft")  # of the policy
OF_SCORES = ("relu", "softmax")  # weigh all tokens, by their scores
COMPARES_WITH_REFERENCE = ("longce", "context")


@dataclass(frozen=True)
class SelectiveOptions:
    """Which tokens a run trains on, where reference losses come from, and what the run records."""

    TITLE: ClassVar[str] = "selective language modeling"

    slm_token_ratio: Annotated[Ratio, "K"] = 1.0
    """Fraction of the tokens to train on, in (0, 1]: those with the highest scores. 1 without a
    reference is causal language modeling."""

    slm_reference_load: Annotated[list[str] | None, "[NAME=]DIR"] = None
    """Directory with the checkpoint of the reference model, in the torch_dist format. The reference
    may have another architecture and another parallel layout than the policy; its tokenizer must be
    the same. Of several references, tokens are scored by the mean loss, or, where each is given the
    name of a dataset of the blend, by the loss of that dataset's own reference."""

    slm_reference: Annotated[str | None, "ema:DECAY"] = None
    """Use the exponential moving average of the policy's weights as the reference, in place of a
    checkpoint."""

    slm_reference_cache: Annotated[list[str] | None, "DIR"] = None
    """Read reference losses that tools/score_reference.py stored, in place of a checkpoint."""

    slm_reference_offload: bool = False
    """Keep the reference's weights in host memory and copy them to the device layer by layer."""

    slm_reference_micro_batch_size: Annotated[Count | None, "N"] = None
    """Samples that the reference scores at a time, a multiple of --micro-batch-size; by default,
    just as many."""

    slm_reference_fp8: bool = False
    """Let the reference compute in fp8 (e4m3, with scales taken from the current tensors). Needs
    Transformer Engine."""

    slm_reference_ckpt_step: Annotated[Natural | None, "N"] = None
    """Iteration of the reference checkpoint; by default, the latest."""

    slm_score: Annotated[str, Named(get_args(Score)), "NAME"] = "excess"
    """What tokens are ranked by, highest first; docs/when-slm-helps.md explains each. The first six
    need a reference, external needs --slm-token-values. module:function: a score of your own."""

    slm_scope: Scope = "micro-batch"
    """Tokens that compete with each other for selection: those of one document (with
    --dataloader-inter-document-masking or --sft), of one sequence, of one micro-batch, of the
    micro-batches that all data-parallel ranks hold at a time, or of the global batch."""

    slm_global_batch: Literal["carried", "exact"] = "carried"
    """How --slm-scope global-batch selects. carried: by a threshold that follows the last steps.
    exact: by ranking all tokens of the step in a forward pass of its own."""

    slm_ratio_schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    """How --slm-token-ratio changes over the iterations."""

    slm_final_token_ratio: Annotated[Ratio | None, "K"] = None
    """Ratio at the end of a linear or cosine schedule."""

    slm_ratio_decay_iters: Annotated[Count | None, "N"] = None
    """Iterations that a linear or cosine schedule takes; by default, --train-iters."""

    slm_ratio_steps: Annotated[list[str], ratio_step, "N:K"] = field(default_factory=list)
    """Steps of the schedule `steps`: from iteration N on, the ratio is K. For example 1000:0.7."""

    slm_warmup_tokens: Annotated[Natural, "N"] = 0
    """Tokens of causal language modeling before the first selection."""

    slm_weighting: Annotated[str, Named(get_args(Weighting)), "NAME"] = "hard"
    """hard: selected tokens count equally, others not at all. relu, softmax: all tokens count, in
    proportion to max(score, 0) or to exp(score / temperature), in sum as many as hard selection
    selects. The others weigh selected tokens; docs/when-slm-helps.md explains each.
    module:function: a weighting of your own."""

    slm_score_option: Annotated[list[str], score_option, "NAME=VALUE"] = field(default_factory=list)
    """Options of the score and of the weighting."""

    slm_softmax_temperature: Annotated[Temperature, "T"] = 1.0
    """Temperature of --slm-weighting softmax; in nats if scores are losses."""

    slm_unselected_weight: Annotated[Weight, "W"] = 0.0
    """Add W times the mean loss of the unselected tokens to the loss."""

    slm_token_values: Annotated[list[str], "DIR"] = field(default_factory=list)
    """Caches of tools/import_scores.py: external values, and masks of training tokens."""

    slm_leave_out: Annotated[list[str], left_out, "HOW"] = field(default_factory=list)
    """Leave training tokens out of the loss: above=X or below=X by their external value, and
    goldfish=K:H one in K by a hash of the H tokens that end with it."""

    slm_domain_ratio: Annotated[list[str], domain_ratio, "NAME=K"] = field(default_factory=list)
    """Give datasets of the blend a ratio of their own; the tokens of such a dataset compete among
    themselves. NAME is the name of the dataset's files without directory and _text_document."""

    slm_head: Literal["dense", "chunked"] | None = None
    """How the policy's output layer and loss are computed. dense: by Megatron's own. chunked:
    without logits in memory, and with gradients of the selected tokens only. By default, chunked
    where tokens are selected, and dense elsewhere."""

    slm_backward: Literal["all", "selected"] = "all"
    """Tokens whose hidden states get gradients. all: all that a selected token sees, which is
    exact. selected: in each layer, the hidden states of tokens that are not selected are constants,
    so that the backward pass costs what is selected. Needs the layers of plain torch."""

    slm_changed: Annotated[list[str], "NAME"] = field(default_factory=list)
    """Arguments of the model, such as rotary_base, in which this run is meant to differ from the
    checkpoint that it starts from; and reference or selection for a run that continues without
    those it had. Any other difference is an error."""

    slm_dump_interval: Annotated[Count | None, "N"] = None
    """Write the losses of all tokens of a few fixed samples every N iterations, at the start and at
    the end, for tools/report.py."""

    slm_dump_dir: Annotated[str | None, "DIR"] = None
    """Directory for these losses; by default, dump in the directory of --save."""

    slm_dump_samples: Annotated[Count, "N"] = 8
    """Number of these samples."""

    slm_dump_train_samples: bool = False
    """Take these samples from the start of the training data, as the blend mixes it, even if there
    is validation data."""


@dataclass(frozen=True)
class ScoringOptions:
    """What tools/score_reference.py stores, and how."""

    TITLE: ClassVar[str] = "score cache"

    by: Literal["sample", "document"] = "sample"
    """sample: score the samples of this very run, each token with the context that it will have in
    training. document: score all tokens of the datasets, for runs of any mix, sequence length and
    seed."""

    cache_dtype: Literal["uint16", "float32"] = "uint16"
    """uint16: 2 bytes a token, with an error of at most 1.2e-4 nats at 1 nat and 3.9e-4 at 10.
    float32: exact."""

    shard_samples: Annotated[int | None, "N"] = None
    """Samples in a file; by default, chosen by how many there are."""


@dataclass(frozen=True)
class DynamicsOptions:
    """What tools/token_dynamics.py scores, and where it writes."""

    TITLE: ClassVar[str] = "token dynamics"

    dynamics: Annotated[str, "DIR"]
    """Directory for losses, table and plots. In a run's directory it is called dynamics."""

    ckpt_steps: Annotated[list[int] | None, "N"] = None
    """Iterations of --load to score with; by default, all that are there."""

    dynamics_tokens: Annotated[int, "N"] = 320_000  # as in the paper's appendix B.1
    """Validation tokens to follow, in whole samples."""
