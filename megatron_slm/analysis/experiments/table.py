"""Format the results of an experiment as a table, for the terminal and in Markdown.

The functions take the `summary` of results.json (StudySummary in study_file.py).
"""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "arm",
    "target loss",
    "minus CLM",
    "tokens to CLM's loss",
    "selected",
    "FLOPs / CLM's",
    "s a step",
    "at CLM's FLOPs",
    "CLM at its FLOPs",
)


def columns(summary: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the columns: COLUMNS, and one for each further validation set and for
    each score."""
    others = summary["arms"][summary["baseline"]]["other_losses"]
    losses = (f"{name} loss" for name in others)
    return (*COLUMNS[:3], *losses, *score_names(summary), *COLUMNS[3:])


def score_names(summary: dict[str, Any]) -> list[str]:
    """Return the names of the scores that lm-eval gave any of the arms."""
    arms = summary["arms"].values()
    return list(dict.fromkeys(name for found in arms for name in found.get("scores", {})))


def rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of the columns for each arm."""
    others = summary["arms"][summary["baseline"]]["other_losses"]
    return [
        (
            arm,
            spread(found["final_loss"]),
            "" if arm == summary["baseline"] else spread(found["difference"], "+"),
            *(spread(found["other_losses"][name]) for name in others),
            *(score_in_words(found, name) for name in score_names(summary)),
            "" if arm == summary["baseline"] else part(found["part_of_baseline_tokens"]),
            f"{found['selected_part']['mean']:.0%}",
            f"{found['flops_ratio']['mean']:.2f}",
            f"{found['step_seconds']['mean']:.3g}",
            spread(found["equal_compute"]["arm_at_baseline_flops"]),
            spread(found["equal_compute"]["baseline_at_arm_flops"]),
        )
        for arm, found in summary["arms"].items()
    ]


def spread(values: dict[str, Any], sign: str = "") -> str:
    """Format the mean and the standard deviation over the seeds.

    Args:
        values: a Spread of study_file.py.
        sign: "+" to show the sign of positive means as well.
    """
    return _format(values, sign, ".4f", "not known")


def score_in_words(found: dict[str, Any], name: str) -> str:
    """Format an arm's score over the seeds.

    Args:
        found: the arm's ArmSummary of study_file.py.
        name: the score's name.
    """
    values = found.get("scores", {}).get(name)
    return "not known" if values is None else _format(values, "", ".3f", "not known")


def part(values: dict[str, Any]) -> str:
    """Format a fraction of the baseline's tokens as a percentage.

    Args:
        values: a Spread of study_file.py.
    """
    return _format(values, "", ".0%", "not reached")


def _format(values: dict[str, Any], sign: str, form: str, none: str) -> str:
    """Format a Spread, or say that there is none."""
    if values["mean"] is None:
        return none
    text = f"{values['mean']:{sign}{form}}"
    if values["std"] is not None:
        text += f" ± {values['std']:{form}}"
    missing, count = values["missing"], len(values["values"])
    return f"{text} ({count - missing} of {count} seeds)" if missing else text


def results_table(summary: dict[str, Any]) -> str:
    """Return aligned columns, followed by a line in words for each arm."""
    lines = [columns(summary), *rows(summary)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in lines]
    return "\n".join([*text, "", *verdicts(summary)])


def markdown(name: str, target: str, summary: dict[str, Any]) -> str:
    """Return the content of results.md.

    Args:
        name: name of the study.
        target: description of the target domain.
        summary: the comparison of the arms.
    """
    at = summary["compared"]
    text = [f"# {name}", "", f"Target domain: {target}.", ""]
    text += [
        f"After {at['tokens']:,} tokens; losses in nats a token, mean ± standard deviation over "
        "seeds.",
        "",
    ]
    if score_names(summary):
        text += ["Scores of lm-eval's tasks are those of each arm's last checkpoint.", ""]
    head = columns(summary)
    lines = [head, ("---",) * len(head), *rows(summary)]
    text += ["| " + " | ".join(row) + " |" for row in lines]
    text += ["", *(f"- {line}" for line in verdicts(summary))]
    return "\n".join(text) + "\n"


def verdicts(summary: dict[str, Any]) -> list[str]:
    """Return the verdict on each arm other than the baseline."""
    arms = summary["arms"].items()
    return [found["verdict"] for arm, found in arms if arm != summary["baseline"]]
