"""A study's results.json: what tools/run_experiment.py writes of its arms, and a report reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, inside, read_bounded

STUDY_FORMAT = 1

NotNegative = Annotated[int, msgspec.Meta(ge=0)]


class Spread(TypedDict):
    """A figure over the seeds; `missing` of them have none."""

    mean: float | None
    std: float | None
    values: list[float | None]
    missing: NotNegative


class Known(TypedDict):
    """A figure that each seed has."""

    mean: float
    std: float | None
    values: list[float]
    missing: NotNegative


class EqualCompute(TypedDict):
    """Losses where an arm and the baseline have taken as many FLOPs as the other."""

    arm_at_baseline_flops: Spread
    baseline_at_arm_flops: Spread


class ArmSummary(TypedDict):
    """An arm over its seeds, compared with the baseline."""

    final_loss: Known
    difference: Spread
    part_of_baseline_tokens: Spread
    flops_ratio: Known
    selected_part: Known
    step_seconds: Known
    equal_compute: EqualCompute
    verdict: str


class Compared(TypedDict):
    """Where all runs are compared."""

    iteration: NotNegative
    tokens: NotNegative


class StudySummary(TypedDict):
    """Of all arms."""

    baseline: str
    compared: Compared
    arms: dict[str, ArmSummary]


class SeedResult(TypedDict):
    """A run.  curve: points that begin with iteration, tokens and target loss."""

    directory: str
    final_loss: float
    curve: Annotated[
        list[Annotated[list[float], msgspec.Meta(min_length=3)]], msgspec.Meta(min_length=1)
    ]
    first_loss: NotRequired[float | None]
    tokens_seen: NotRequired[NotNegative]
    tokens_selected: NotRequired[NotNegative]
    wall_seconds: NotRequired[float]
    flops: NotRequired[dict[str, int]]


class Arm(TypedDict):
    """A way of selecting tokens, and its runs."""

    arguments: list[str]
    description: str
    seeds: Annotated[dict[str, SeedResult], msgspec.Meta(min_length=1)]


class Results(TypedDict):
    """The whole file."""

    format: Literal[1]
    study: str
    target: str
    tokens_per_step: NotRequired[NotNegative]
    arms: dict[str, Arm]
    summary: StudySummary


class _Version(msgspec.Struct):
    format: int


def read_results(path: Path) -> dict[str, Any]:
    """Read the file as what it says, which has the types above.

    Raises:
        UserError: not such a file, or its parts do not belong together.
    """
    content = read_bounded(path)
    if decode_json(content, _Version, path).format != STUDY_FORMAT:
        raise UserError(f"{path} is not of a study that this version knows")
    results = decode_json(content, Results, path)
    arms, summary = results["arms"], results["summary"]
    if arms.keys() != summary["arms"].keys() or summary["baseline"] not in arms:
        raise UserError(f"{path}: its arms are not those of its summary")
    for arm in arms.values():
        for seed in arm["seeds"].values():
            inside(path.parent, seed["directory"])
            if len({len(point) for point in seed["curve"]}) > 1:
                raise UserError(f"{path}: the points of {seed['directory']} are of several kinds")
    whole: dict[str, Any] = decode_json(content, dict[str, Any], path)
    return whole
