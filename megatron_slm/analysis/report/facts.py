"""Say in words what a run was and how it ended: outcome, model, data and cost."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_slm.analysis.event_files import VALIDATION
from megatron_slm.analysis.report.run_files import RunFiles, Series
from megatron_slm.analysis.report.settings import RunSettings

# The tokens that each score selects (megatron_slm/selection/scores.py), and the tokens that compete
# with each other in each scope.
SELECTED = {
    "excess": "whose loss exceeds the reference's the most",
    "lowest": "whose loss exceeds the reference's the least",
    "reference": "that the reference finds likeliest",
    "reference-entropy": "where the reference is surest",
    "policy": "with the highest loss",
    "policy-entropy": "where the model is least sure",
    "random": "at random",
}
SCOPES_IN_WORDS = {
    "document": "of each document",
    "sequence": "of each sequence",
    "micro-batch": "of each micro-batch",
    "data-parallel": "of the micro-batches of all data-parallel ranks",
    "global-batch": "of each global batch",
}
Facts = list[tuple[str, str]]


def run_facts(run: RunFiles, length: int | None, alone: bool) -> Facts:
    """Return names and values: the model, its data, the selection, the final loss and the cost.

    Args:
        run: the run's files.
        length: tokens of a sequence, if known.
        alone: the page is about this run alone; the runs of a study share the model and the data,
            which the page then names elsewhere.
    """
    found = [
        ("Model", model(run.settings) if alone else ""),
        ("Data", data(run.settings) if alone else ""),
        ("Training", _training(run, length)),
        ("Tokens trained on", _selection(run)),
        ("Loss at the end", _losses(run)),
        ("Cost", _cost(run, length)),
    ]
    return [(name, value) for name, value in found if value]


def headline(run: RunFiles) -> str:
    """Return a run's outcome in one sentence."""
    for tag in (*validation_tags(run), "all-token loss", "lm loss"):
        if (series := run.scalars.get(tag)) is None:
            continue
        what = "Training loss"
        if VALIDATION.fullmatch(tag):
            what = "Validation" + spelt_out(tag).removeprefix("validation")
        start, last = f"{series.values[0]:.3f}", f"{series.last:.3f}"
        end = f"{last} nats a token at iteration {series.iterations[-1]:,}{_lost(series, '; {}')}"
        if len(series.values) == 1:
            return f"{what}: {end}"
        if start == last:
            return f"{what} begins and ends at {end}"
        change = "fell" if series.last < series.values[0] else "rose"
        return f"{what} {change} from {start} to {end}"
    if run.dumps:
        first = run.dumps[0]
        return (
            f"Losses of {int(first.valid.sum()):,} tokens from iteration {first.iteration:,} to "
            f"{run.dumps[-1].iteration:,}"
        )
    return "How the losses of single tokens changed"


def _lost(series: Series, form: str) -> str:
    """Say in a form from when on a scalar is NaN or infinite; nothing if it ends with a number."""
    if series.lost is None:
        return ""
    return form.format(f"NaN or infinite from iteration {series.lost:,} on")


def spelt_out(tag: str) -> str:
    """Return what the page calls a scalar of TensorBoard."""
    if VALIDATION.fullmatch(tag):
        _, _, name = tag.partition("validation-")
        return f"validation loss on {name}" if name else "validation loss"
    return CURVE_NAMES.get(tag, tag)


CURVE_NAMES = {
    "all-token loss": "all tokens",
    "selected loss": "selected tokens",
    "unselected loss": "tokens left out",
    "reference loss": "reference, all tokens",
    "lm loss": "training data",
    "threshold": "lowest score that is still selected",
    "excess loss": "mean excess of all tokens",
}


def validation_tags(run: RunFiles) -> list[str]:
    """Return the names of the scalars that are validation losses."""
    return sorted(filter(VALIDATION.fullmatch, run.scalars))


def model(settings: RunSettings) -> str:
    """Return the size of a model in words, as far as it is known."""
    layers, hidden = settings.number("num_layers"), settings.number("hidden_size")
    if layers is None or hidden is None:
        return ""
    shape = f"{layers} layers of width {hidden:,}"
    count = settings.parameters
    return f"GPT, {shape}" if count is None else f"GPT of {short(count)} parameters: {shape}"


def data(settings: RunSettings) -> str:
    """Return what a run trained on and was validated on, by the names of the datasets."""
    trained = settings.names("train_data_path") or settings.names("data_path")
    validated = settings.names("validation_set_names") or settings.names("valid_data_path")
    parts = [f"trained on {listed(trained)}" if trained else ""]
    parts += [f"validated on {listed(validated)}" if validated else ""]
    return ", ".join(filter(None, parts))


def listed(names: list[str], most: int = 4) -> str:
    """Join names with commas, after `most` of them with the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def short(count: float) -> str:
    """Format a number with three digits, from a million on with M, B or T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{float(f'{count:.3g}'):,.0f}"


def _training(run: RunFiles, length: int | None) -> str:
    last = max((series.iterations[-1] for series in run.scalars.values()), default=0)
    if not last:
        return ""
    batch = run.scalars.get("batch-size")
    if batch is None or length is None:
        return f"{last:,} iterations"
    each = batch.last * length
    return f"{last:,} iterations of {each:,.0f} tokens"


def _selection(run: RunFiles) -> str:
    ratio = run.scalars.get("selected ratio")
    if ratio is None:
        return "all" if "lm loss" in run.scalars else ""
    which, scope = SELECTED.get(score_of(run), ""), SCOPES_IN_WORDS.get(_told(run, "scope"), "")
    return " ".join(filter(None, (f"the {ratio.last:.0%}", which, scope and f"({scope})")))


def score_of(run: RunFiles) -> str:
    """Return the score that a run ranks tokens by; an empty string if it is not known."""
    return _told(run, "score")


def _told(run: RunFiles, name: str) -> str:
    """Return an option of the selection from the dumps, or else from the arguments."""
    told = getattr(run.dumps[-1].about, name) if run.dumps else None
    return str(told or run.settings.text(f"slm_{name}") or "")


def _losses(run: RunFiles) -> str:
    tags = [tag for tag in ("all-token loss", *validation_tags(run)) if tag in run.scalars]
    tags = tags or [tag for tag in ("lm loss",) if tag in run.scalars]
    parts = [
        f"{spelt_out(tag)} {run.scalars[tag].last:.3f}{_lost(run.scalars[tag], ' ({})')}"
        for tag in tags
    ]
    return f"{listed(parts)} nats" if parts else ""


def _cost(run: RunFiles, length: int | None) -> str:
    times, batch = run.scalars.get("iteration-time"), run.scalars.get("batch-size")
    if times is None:
        return ""
    step = statistics.median(times.values)
    parts = [f"{step:.3g} s a step"]
    if batch is not None and length is not None and step > 0:
        parts.append(f"{short(batch.last * length / step)} tokens a second")
    if share := run.scalars.get("reference time share"):
        parts.append(f"{statistics.median(share.values):.0%} of the time for the reference")
    return ", ".join(parts)


def sequence_length(run: RunFiles, study: dict[str, Any] | None) -> int | None:
    """Return how many tokens a sequence of a run has, according to its arguments, its dumps, or the
    tokens of the study's steps; None if nothing says so."""
    if length := run.settings.number("seq_length"):
        return length
    if run.dumps:
        return int(run.dumps[0].losses.shape[1])
    batch = run.scalars.get("batch-size")
    tokens = None if study is None else study.get("tokens_per_step")
    if tokens is None or batch is None or batch.values[0] <= 0:
        return None
    return round(tokens / batch.values[0])
