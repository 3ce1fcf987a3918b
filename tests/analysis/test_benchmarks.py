"""The paper's benchmarks against lm-eval's own files of tasks."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
import yaml

from megatron_slm.analysis.evaluation.benchmarks import GENERAL, MATH, Benchmark, benchmarks

MATH_FILES = {
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "minerva_math500": "minerva_math/minerva_math500.yaml",
    "asdiv_cot_llama": "asdiv/asdiv-cot-llama.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "mmlu_stem": "mmlu/default/_mmlu_stem.yaml",
}


class TaskFile(yaml.SafeLoader):
    """With names of functions as they stand."""


TaskFile.add_constructor("!function", lambda loader, node: node.value)


@pytest.mark.parametrize("benchmark", MATH, ids=lambda one: one.name)
def test_the_papers_metrics_are_lm_evals(benchmark: Benchmark) -> None:
    """By the task's own file: metrics and the filters whose names they bear."""
    file = Path(lm_eval.__file__).parent / "tasks" / MATH_FILES[benchmark.name]
    task = yaml.load(file.read_text(), TaskFile)
    assert benchmark.name in (task.get("task"), task.get("group"))
    if "include" in task:
        task = yaml.load(file.with_name(task["include"]).read_text(), TaskFile) | task
    metrics = task.get("metric_list") or task["aggregate_metric_list"]
    filters = task.get("filter_list") or [{"name": "none"}]
    assert benchmark.metric in {f"{m['metric']},{f['name']}" for m in metrics for f in filters}


def test_general_models_are_not_held_against_mathematical_ones() -> None:
    """Whose figures stand beside scores where they are asked for alone."""
    assert len(GENERAL) == 15
    assert all(one.paper is None and one.shots is None for one in GENERAL)
    assert {one.name for one in GENERAL if one.differs} == {"tydiqa_goldp", "humaneval", "mbpp"}
    for order in (["general", "math"], ["math", "general"]):
        found = {one.name: one for one in benchmarks(order)}
        assert len(benchmarks(order)) == len(found) == 15 + len(MATH) - 2
        assert {one for one in found.values() if one.paper} == set(MATH)
