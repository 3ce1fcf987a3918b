"""List the paper's benchmarks under lm-eval's names, with the paper's numbers.

Table 1 of the paper is few-shot chain of thought in the authors' own harness
(github.com/ZubinGou/math-evaluation-harness).  Some of lm-eval's tasks come close; `differs` says
how each deviates.  lm-eval lacks SVAMP, MAWPS and TabMWP, and has other SAT questions.

The 15 general tasks are those of figure 5 (v1 of the paper, with MBPP and HumanEval by pass@1 and
by pass@10), listed in appendix C.2.  The paper ran them in lm-eval unless `differs` says otherwise.
It does not give the numbers of shots, so lm-eval's defaults apply.  Table 1's figures come from
models trained on mathematics and are no yardstick for a general model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODELS = ("1B CLM", "1B SLM", "7B CLM", "7B SLM")


@dataclass(frozen=True)
class Benchmark:
    """A task, group or tag of lm-eval, and what the paper reports for it."""

    name: str
    """lm-eval's name."""

    shots: int | None = None
    """Number of examples before a question; None for lm-eval's default."""

    metric: str | None = None
    """lm-eval's name, with the filter, of the metric closest to the paper's; None for all
    metrics."""

    paper: tuple[float, float, float, float] | None = None
    """The accuracies that the paper reports for MODELS after 15 billion tokens, in percent."""

    differs: str = ""
    """How the task differs from the paper's."""


MATH = (
    Benchmark(
        "gsm8k_cot",
        8,
        "exact_match,flexible-extract",
        (6.4, 29.8, 42.9, 66.9),
        "the paper's examples; here the answer is always the last number",
    ),
    Benchmark(
        "minerva_math500",
        4,
        "math_verify,none",
        (2.4, 14.0, 22.2, 31.0),
        "the paper's examples and 500 questions; here math_verify compares the answers",
    ),
    Benchmark(
        "asdiv_cot_llama",
        8,
        "exact_match,flexible-extract",
        (36.7, 61.4, 71.0, 79.0),
        "the paper's examples, here under an instruction; the paper drops some questions",
    ),
    Benchmark(
        "mathqa",
        4,
        "acc,none",
        (13.9, 30.4, 47.7, 58.7),
        "here likelihoods of the choices, without reasoning, and all questions; the paper has 1000",
    ),
    Benchmark(
        "mmlu_stem",
        4,
        "acc,none",
        (23.0, 24.7, 52.6, 54.6),
        "here likelihoods of the letters, without reasoning, and anatomy; the paper leaves it out",
    ),
)
GENERAL_NAMES = """
    mmlu bbh_cot_fewshot agieval arc_easy arc_challenge boolq piqa hellaswag winogrande openbookqa
    tydiqa_goldp humaneval mbpp gsm8k_cot minerva_math500
""".split()
OTHER_HARNESS = (
    Benchmark("tydiqa_goldp", differs="the paper has F1 by open-instruct"),
    Benchmark("humaneval", differs="the paper has pass@1 and pass@10 by open-instruct"),
    Benchmark("mbpp", differs="the paper has pass@1 and pass@10 by DeepSeek-Coder's harness"),
)
BENCHMARKS = {one.name: one for one in (*MATH, *OTHER_HARNESS)}
_DIFFERS = {one.name: one for one in OTHER_HARNESS}
GENERAL = tuple(_DIFFERS.get(name, Benchmark(name)) for name in GENERAL_NAMES)
GROUPS = {"math": MATH, "general": GENERAL}


def benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that names of groups and of lm-eval's tasks stand for, in the order
    given.

    Each task is listed once.  One that is asked for both by itself and through the group that has
    the paper's settings gets the paper's settings.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        for one in GROUPS.get(name, (BENCHMARKS.get(name, Benchmark(name)),)):
            if one.name not in found or one.paper is not None:
                found[one.name] = one
    return list(found.values())
