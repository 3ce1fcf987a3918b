"""The paper's benchmarks as lm-eval has them, with the paper's numbers.

Table 1 of the paper is few-shot chain of thought under the authors' own harness
(github.com/ZubinGou/math-evaluation-harness).  lm-eval's tasks come close to it in some cases only,
and `differs` says in what not.  It has no SVAMP, MAWPS or TabMWP, and other SAT questions.

The 15 general tasks are those of the paper's figure 5 (v1; it has MBPP and HumanEval twice, by
pass@1 and pass@10), listed in its appendix C.2: by lm-eval, except where `differs` says otherwise.
The paper gives no numbers of examples; they run with lm-eval's own.  Table 1's figures are those of
models trained on mathematics, and no measure for a general one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODELS = ("1B CLM", "1B SLM", "7B CLM", "7B SLM")


@dataclass(frozen=True)
class Benchmark:
    """A task, group or tag of lm-eval, and what the paper has for it.

    shots: number of examples before a question; None for lm-eval's.
    metric: the one nearest to the paper's, as lm-eval names it with its filter; None for all.
    paper: the paper's accuracies in percent, of MODELS, trained on 15 billion tokens.
    differs: in what, from the paper's.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    paper: tuple[float, float, float, float] | None = None
    differs: str = ""


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
    """What groups and lm-eval's names stand for, in the order given; each name once, and where it
    is asked for in two ways, as the paper's."""
    found: dict[str, Benchmark] = {}
    for name in names:
        for one in GROUPS.get(name, (BENCHMARKS.get(name, Benchmark(name)),)):
            if one.name not in found or one.paper is not None:
                found[one.name] = one
    return list(found.values())
