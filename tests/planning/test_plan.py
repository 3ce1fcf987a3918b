"""tools/plan.py on the recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import REPOSITORY, launch
from megatron_slm.errors import UserError


def plan(directory: Path, recipe: str, *more: str) -> tuple[int, str]:
    """Exit code and output."""
    command = [str(REPOSITORY / "tools" / "plan.py"), str(REPOSITORY / "examples" / recipe), *more]
    run = launch(1, command, directory, check=False)
    return run.codes[0], run.outputs[0]


def of_a_token(layers: int, hidden: int, keys: int, ffn: int) -> tuple[float, float, float]:
    """Multiplications of a forward: projections, causal attention over 4096 tokens, output layer.
    Queries are as wide as hidden."""
    projections = layers * hidden * (2 * hidden + 2 * keys + 3 * ffn)
    return projections, layers * hidden * 4096, hidden * 32000


def cost_of_70b(scoring: tuple[float, float, float]) -> float:
    """Return the cost of an SLM step that selects 70%, relative to a CLM step."""
    projections, attention, head = of_a_token(80, 8192, 1024, 28672)
    layers = 3 * projections + 3.5 * attention
    return (layers + (1 + 3 * 0.7) * head + sum(scoring)) / (layers + 3 * head)


COSTS_OF_70B = {
    "the recipe's": cost_of_70b(of_a_token(80, 8192, 1024, 28672)),
    "reference online, 69.0B": cost_of_70b(of_a_token(80, 8192, 1024, 28672)),
    "reference online, 1.1B": cost_of_70b(of_a_token(22, 2048, 256, 5632)),
    "cached": cost_of_70b((0, 0, 0)),
}


def costs(output: str) -> dict[str, float]:
    """Return the costs of SLM relative to CLM that a plan prints."""
    found = re.findall(r"^SLM / CLM step, (.*?) +([\d.]+)$", output, re.MULTILINE)
    return {what: float(ratio) for what, ratio in found}


def test_a_recipe_fits_and_better_layouts_are_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # in which a plan is made, of one node
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    code, output = plan(tmp_path, "pretrain_slm_70b.sh", "NODES=16", "--layouts", "3")
    assert code == 0, output
    lines = output.splitlines()
    assert re.search(r"^parameters, billions +68\.977$", output, re.MULTILINE)
    found = [line for line in lines if re.match(r"TP\d", line)]
    assert "TP8 PP4 VP4 CP1 DP4 " in found[0]
    assert found[0].endswith("recipe")
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("pretrain_slm_70b.sh on 128 GPUs, 8 a node, of 80 GB")
    rows = [re.split(r"  +", line.removesuffix("recipe").rstrip()) for line in found]
    layouts = [row[0] for row in rows]
    assert len(set(layouts)) == 4  # the recipe's once
    figures = [[float(word.strip("%").replace(",", "")) for word in row[1:]] for row in rows]
    seconds = [row[2] for row in figures]
    assert len(seconds) == 4
    assert seconds[1:] == sorted(seconds[1:])
    for size, _, second, billions, days, hours in figures:
        assert size < 80
        # 15B tokens in steps of 256 x 4096, on 128 GPUs.
        assert days == pytest.approx(15e9 / (256 * 4096) * second / 86400, rel=0.01)
        assert billions * days == pytest.approx(15, rel=0.01)
        assert hours == pytest.approx(days * 24 * 128, rel=0.01)
    assert costs(output) == pytest.approx(COSTS_OF_70B, abs=0.006)
    # The parts of every stage add up.
    parts = [line for line in lines if re.match(r"  \w+ +[\d.]", line)]
    columns = [[float(x) for x in line.split()[1:]] for line in parts]
    for *summands, total in zip(*columns, strict=True):
        assert sum(summands) == pytest.approx(total, abs=0.04)


def test_refused(tmp_path: Path) -> None:
    # 24 ranks are no multiple of TP8 x PP4.
    code, output = plan(tmp_path, "pretrain_slm_70b.sh", "NODES=3")
    assert code == 2
    assert output.splitlines()[-1].startswith("error: Megatron refuses these arguments")
    code, output = plan(tmp_path, "no_such_recipe.sh")
    assert code == 2
    assert "no_such_recipe.sh failed" in output.splitlines()[-1]
    code, output = plan(tmp_path, "pretrain_slm_7b.sh", "TOKENZ=5")
    assert code == 2
    assert output.splitlines()[-1].endswith("has no variable TOKENZ: did you mean TOKENS?")
    code, output = plan(tmp_path, "finetune_tora.sh", "BASE=nowhere")
    assert code == 2
    assert "there is none in checkpoints/tora-1b or nowhere" in output.splitlines()[-1]


@pytest.mark.parametrize(
    "flag",
    ["efficiency 0", "efficiency 5", "gpu-tflops 0", "node-bandwidth nan", "layouts -1"],
)
def test_numbers_out_of_range(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import plan as tool

    name, number = flag.split()
    args = tool.build_parser().parse_args(["x.sh", f"--{name}={number}"])
    with pytest.raises(UserError, match=f"^--{name} {number}: give a "):
        tool.check_numbers(args)
