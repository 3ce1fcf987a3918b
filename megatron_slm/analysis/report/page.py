"""Put a page together from a run's directory or a study's.

Everything is in the one file: plotly.js, styles, scripts and data.  A content security policy in it
forbids the page any request.  Text from a corpus is data, in JSON without a `<`, and reaches the
page as text nodes alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from megatron_slm.analysis.dynamics_report import dynamics_section
from megatron_slm.analysis.report.curves import run_facts, run_figures
from megatron_slm.analysis.report.run_files import RunFiles, read_run
from megatron_slm.analysis.report.study import (
    RESULTS,
    read_study,
    run_directories,
    study_figures,
    study_table,
)
from megatron_slm.analysis.report.token_map import MOST_TOKENS, token_map
from megatron_slm.analysis.token_text import dump_tokenizer
from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

HERE = Path(__file__).parent


def write_report(directory: Path, output: Path, tokenizer_model: str | None) -> None:
    """Write the page about a run, or about a study if the directory has its results.

    Args:
        tokenizer_model: in the place of the one that the token dumps name.

    Raises:
        UserError: nothing to report on, damaged files, or no plotly.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("a report needs plotly: pip install 'megatron-slm[analysis]'") from error
    study = read_study(directory) if (directory / RESULTS).exists() else None
    if study is None:
        directories = [directory]
    else:
        directories = [directory / each for each in run_directories(study)]
    runs = [read_run(each) for each in directories]
    if not runs:
        raise UserError(f"{directory / RESULTS} has no finished run yet")
    most_tokens = MOST_TOKENS // len(runs)
    contents = [_run(run, tokenizer_model, most_tokens) for run in runs]
    data = {
        "study_figures": [] if study is None else study_figures(study),
        "runs": contents,
    }
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        title=directory.resolve().name if study is None else study["study"],
        subtitle=str(directory.resolve()),
        study=None if study is None else study_table(study),
        runs=[run.name for run in runs],
        shown=max(range(len(runs)), key=lambda at: _told(contents[at])),
        data=data,
        style=_asset("page.css"),
        plotly=Markup(get_plotlyjs()),
        scripts=_asset("token_map.js") + _asset("page.js"),
    )
    write_whole(output, page.encode())


def _run(run: RunFiles, tokenizer_model: str | None, most_tokens: int) -> dict[str, Any]:
    tokenizer = dump_tokenizer(run.dumps, tokenizer_model)
    return {
        "name": run.name,
        "facts": run_facts(run),
        "figures": run_figures(run),
        "map": token_map(run.dumps, tokenizer, most_tokens) if run.dumps else None,
        "dynamics": None if run.dynamics is None else dynamics_section(run.dynamics),
    }


def _told(content: dict[str, Any]) -> int:
    """How much more there is to a run than curves: who opens the page sees the first that has
    most."""
    return sum(content[part] is not None for part in ("map", "dynamics"))


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))
