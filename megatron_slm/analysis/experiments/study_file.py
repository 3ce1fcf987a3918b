"""Define and read a study's results.json, which experiments write and reports show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, inside, read_bounded

STUDY_FORMAT = 1

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]  # and so are its sums and squares


class Spread(TypedDict):
    """A figure over the seeds; it may be unknown for some of them."""

    mean: float | None
    """Mean of the known values."""

    std: float | None
    """Their sample standard deviation; None for fewer than two."""

    values: list[float | None]
    """The value of each seed."""

    missing: NotNegative
    """The number of seeds whose value is unknown."""


class Known(TypedDict):
    """A figure that is known for every seed; the fields are those of Spread."""

    mean: float
    std: float | None
    values: list[float]
    missing: NotNegative


class EqualCompute(TypedDict):
    """Losses at equal compute, in nats a token."""

    arm_at_baseline_flops: Spread
    """The arm's loss when it has taken as many FLOPs as the baseline did."""

    baseline_at_arm_flops: Spread
    """The baseline's loss when it has taken as many FLOPs as the arm did."""


class ArmSummary(TypedDict):
    """An arm over its seeds, compared with the baseline."""

    final_loss: Known
    """Target loss where all runs are compared, in nats a token."""

    difference: Spread
    """That loss minus the baseline's of the same seed."""

    part_of_baseline_tokens: Spread
    """Tokens that it takes to reach the baseline's loss, as a fraction of the baseline's tokens."""

    flops_ratio: Known
    """The arm's FLOPs divided by the baseline's."""

    selected_part: Known
    """Fraction of the tokens that the arm trained on."""

    step_seconds: Known
    """Mean seconds of a training step."""

    equal_compute: EqualCompute
    """Losses at equal compute."""

    other_losses: NotRequired[dict[str, Spread]]
    """Loss on each further validation set, by its name, in nats a token."""

    scores: NotRequired[dict[str, Spread]]
    """Scores of lm-eval by task and metric, if arms were evaluated."""

    verdict: str
    """The comparison in words."""


class Compared(TypedDict):
    """The point at which all runs are compared."""

    iteration: NotNegative
    """The last iteration at which every run was validated."""

    tokens: NotNegative
    """Tokens that each run had seen by then."""


class StudySummary(TypedDict):
    """The comparison of all arms."""

    baseline: str
    compared: Compared
    arms: dict[str, ArmSummary]


class SeedResult(TypedDict):
    """A run of an arm with one seed."""

    directory: str
    """Directory of the run, relative to the study's."""

    final_loss: Finite
    """Target loss where all runs are compared, in nats a token."""

    curve: Annotated[
        list[Annotated[list[Finite], msgspec.Meta(min_length=3)]], msgspec.Meta(min_length=1)
    ]
    """Validations, each of which begins with the iteration, the tokens and the target loss."""

    first_loss: NotRequired[float | None]
    """Loss of all tokens of the first step, in nats; null if it was not logged."""

    tokens_seen: NotRequired[NotNegative]
    """Tokens that the run had seen where all runs are compared."""

    tokens_selected: NotRequired[NotNegative]
    """Tokens of these that it trained on."""

    other_losses: NotRequired[dict[str, Finite | None]]
    """Loss on each further validation set where all runs are compared, by its name."""

    scores: NotRequired[dict[str, float]]
    """Scores of the last checkpoint by lm-eval's task and metric, if it was evaluated."""

    wall_seconds: NotRequired[float]
    """Time of its training steps."""

    flops: NotRequired[dict[str, int]]
    """FLOPs of the policy, of training its references, and of scoring with them."""


class Arm(TypedDict):
    """A way of selecting tokens, and its runs."""

    arguments: list[str]
    """Arguments of its pretraining runs."""

    description: str
    """What it is, in words."""

    seeds: Annotated[dict[str, SeedResult], msgspec.Meta(min_length=1)]
    """Its runs by seed."""


class Results(TypedDict):
    """The whole file."""

    format: Literal[1]
    """Version of the format: STUDY_FORMAT."""

    study: str
    """Name of the study."""

    target: str
    """Description of the target domain."""

    tokens_per_step: NotRequired[NotNegative]
    """Tokens of a training step."""

    arms: dict[str, Arm]
    """The arms by name."""

    summary: StudySummary
    """The comparison of the arms."""


class _Version(msgspec.Struct):
    format: int


def read_results(path: Path) -> dict[str, Any]:
    """Read the file and check it against the types above.

    Returns:
        The whole content, including keys that the types do not name.

    Raises:
        UserError: it is not such a file, or its parts contradict each other.
    """
    content = read_bounded(path)
    if decode_json(content, _Version, path).format != STUDY_FORMAT:
        raise UserError(f"{path} is not in the format that this version reads ({STUDY_FORMAT})")
    results = decode_json(content, Results, path)
    arms, summary = results["arms"], results["summary"]
    if arms.keys() != summary["arms"].keys() or summary["baseline"] not in arms:
        raise UserError(f"{path}: its arms are not those of its summary")
    sets = summary["arms"][summary["baseline"]].get("other_losses", {}).keys()
    for name, found in summary["arms"].items():
        if not sets <= found.get("other_losses", {}).keys():
            raise UserError(f"{path}: the summary of {name} lacks a validation set of the others")
    for arm in arms.values():
        for seed in arm["seeds"].values():
            inside(path.parent, seed["directory"])
            if len({len(point) for point in seed["curve"]}) > 1:
                raise UserError(f"{path}: the points of {seed['directory']} differ in length")
    whole: dict[str, Any] = decode_json(content, dict[str, Any], path)
    return whole
