"""Build a report page from the directory of a run or of a study.

The page is a single file with its styles, scripts and data, at most 1.5 MB however long and many
the runs are.  Its content security policy forbids any request.  Text from a corpus is embedded as
JSON in which `<` is escaped, and enters the page only as text nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from megatron_slm.analysis.report.curves import run_figures
from megatron_slm.analysis.report.dynamics_section import dynamics_section
from megatron_slm.analysis.report.facts import headline, run_facts, sequence_length
from megatron_slm.analysis.report.figures import fit
from megatron_slm.analysis.report.run_files import RunFiles, read_run_files
from megatron_slm.analysis.report.study import RESULTS, read_study, run_directories, study_view
from megatron_slm.analysis.report.study_figures import study_figure
from megatron_slm.analysis.report.token_map import token_map
from megatron_slm.analysis.token_text import dump_tokenizer
from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

HERE = Path(__file__).parent
ALONE = (
    "This is one run. Whether selecting tokens helped shows only in a comparison of several, which "
    "tools/run_experiment.py makes."
)


def write_report(directory: Path, output: Path, tokenizer_model: str | None) -> None:
    """Write the page about a run, or about a study if the directory has its results.

    Args:
        directory: the run's or the study's.
        output: the HTML file to write.
        tokenizer_model: tokenizer to use in place of the one that the token dumps name.

    Raises:
        UserError: there is nothing to report on, or a file is damaged.
    """
    study = read_study(directory) if (directory / RESULTS).exists() else None
    if study is None:
        runs = {directory.resolve().name: read_run_files(directory)}
    else:
        runs = {
            name: read_run_files(directory / each) for name, each in run_directories(study).items()
        }
    if not runs:
        raise UserError(f"{directory / RESULTS} has no finished run yet")
    page = build_page(directory, study, runs, tokenizer_model)
    write_whole(output, page.encode(errors="replace"))  # a path need not be text


def build_page(
    directory: Path,
    study: dict[str, Any] | None,
    runs: dict[str, RunFiles],
    tokenizer_model: str | None,
) -> str:
    """Return the page's HTML.

    Args:
        directory: the run's or the study's, which the page names.
        study: what read_study returned; None for a single run.
        runs: the files of each run, by what the page calls the run.
        tokenizer_model: tokenizer to use in place of the one that the token dumps name.
    """
    mapped = sum(bool(run.dumps) for run in runs.values())
    contents = [_run(run, study, tokenizer_model, max(1, mapped)) for run in runs.values()]
    view = None if study is None else study_view(study, list(runs.values()))
    told = view or {
        "headline": headline(next(iter(runs.values()))),
        "certainty": ALONE,
        "facts": contents[0]["facts"],
    }
    fit([figure for content in contents for figure in content["figures"]])
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("page.html").render(
        title=directory.resolve().name if study is None else study["study"],
        directory=str(directory.resolve()),
        headline=told["headline"],
        certainty=told["certainty"],
        facts=told["facts"],
        study=view,
        runs=list(runs),
        shown=max(range(len(runs)), key=lambda at: _told(contents[at])),
        data={
            "study_figure": None if study is None else study_figure(study),
            "runs": [{"name": name} | each for name, each in zip(runs, contents, strict=True)],
        },
        style=_asset("page.css"),
        scripts=_asset("chart.js") + _asset("token_map.js") + _asset("page.js"),
    )


def _run(
    run: RunFiles, study: dict[str, Any] | None, tokenizer_model: str | None, mapped: int
) -> dict[str, Any]:
    """Return what the page shows of a run.

    Args:
        run: the run's files.
        study: the study's results, if the run is part of one.
        tokenizer_model: tokenizer to use in place of the one that the token dumps name.
        mapped: number of runs that share the page's room for token maps.
    """
    tokenizer = dump_tokenizer(run.dumps, tokenizer_model)
    length = sequence_length(run, study)
    return {
        "facts": run_facts(run, length, alone=study is None),
        "figures": run_figures(run, length),
        "map": token_map(run.dumps, tokenizer, run.settings, mapped) if run.dumps else None,
        "dynamics": None if run.dynamics is None else dynamics_section(run.dynamics),
    }


def _told(content: dict[str, Any]) -> int:
    """Count what a run has besides curves; the page opens with the first run that has most."""
    return sum(content[part] is not None for part in ("map", "dynamics"))


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))
