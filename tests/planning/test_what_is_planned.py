"""What a recipe's script and its arguments say is what is planned, or it is refused or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.planning.documents import length_in_samples
from megatron_slm.planning.job import Layout
from megatron_slm.planning.launch_recipe import LaunchRecipe, read_launch_recipe
from megatron_slm.planning.recipe import layout_of, not_counted, parse, work_of
from megatron_slm.planning.report import exchanged_within

RUN = """
    --num-layers 8 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64
    --seq-length 64 --micro-batch-size 1 --global-batch-size 8 --tokenizer-type NullTokenizer
    --vocab-size 999 --mock-data --train-iters 3 --lr 1e-3 --eval-interval 100
"""
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers"
STAGES = "--pipeline-model-parallel-size 4"
PROGRAM = "-m megatron_slm.pretrain --num-layers 2"


def parsed(flags: str, precision: str = "--bf16") -> Any:
    """Return the arguments of a job of 8 ranks."""
    return parse(LaunchRecipe([*RUN.split(), precision, *flags.split()], 8), 0, 32000)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("", {"recompute": 0, "optimizer_bytes": 12, "padded_vocabulary": 1024}),
        ("--vocab-size 5000", {"padded_vocabulary": 5120}),
        (f"{BLOCK} 2", {"recompute": 1, "recomputed": 0.25}),
        (f"{BLOCK} 1 {STAGES}", {"recompute": 1, "recomputed": 0.5}),
        (f"{BLOCK} 9", {"recompute": 1, "recomputed": 1.0}),
        ("--optimizer sgd", {"optimizer_bytes": 8}),
    ],
)
def test_work(flags: str, found: dict[str, float]) -> None:
    work = work_of(parsed(flags), "te", "cuda")
    assert {name: getattr(work, name) for name in found} == found


def test_gradients() -> None:
    """In float32 for bf16, unless the run says otherwise; in the weights' type for fp16."""
    bytes_of = {
        flags: work_of(parsed(flags, precision), "te", "cuda").gradient_bytes
        for flags, precision in (
            ("", "--bf16"),
            ("--grad-reduce-in-bf16", "--bf16"),
            ("--loss-scale 1024", "--fp16"),
            ("--accumulate-allreduce-grads-in-fp32", "--fp16"),
        )
    }
    assert list(bytes_of.values()) == [4, 2, 2, 4]


def test_a_precision_aware_optimizer() -> None:
    """It keeps the half of a float32 weight that the bf16 weight does not have, and two moments."""
    args = parsed("")
    args.use_precision_aware_optimizer = True
    assert work_of(args, "te", "cuda").optimizer_bytes == 2 + 4 + 4


def test_an_optimizer_on_the_host() -> None:
    args = parsed("")
    args.optimizer_cpu_offload, args.optimizer_offload_fraction = True, 0.75
    assert work_of(args, "te", "cuda").optimizer_bytes == 3


def test_layout() -> None:
    args = parsed("")
    args.expert_tensor_parallel_size, args.num_distributed_optimizer_instances = 4, 2
    assert layout_of(args).etp == 1  # a dense model has no experts, whatever Megatron's default
    assert layout_of(args).optimizer_instances == 2
    for flags in (
        "--decoder-first-pipeline-num-layers 5",
        "--decoder-last-pipeline-num-layers 2",
        "--account-for-loss-in-pipeline-split --num-layers 7",
        "--pipeline-model-parallel-layout Et*2|t*2|t*2|t*2L",
    ):
        with pytest.raises(UserError, match=f"^{flags.split()[0]}: .* equal size only"):
            layout_of(parsed(f"{STAGES} {flags}"))


def test_what_is_not_counted_is_named() -> None:
    assert not_counted(parsed("--recompute-granularity selective")) == []
    selective = "--recompute-granularity selective --recompute-modules core_attn mlp"
    assert not_counted(parsed(selective)) == ["--recompute-modules"]
    assert list(exchanged_within(Layout(1, 1))) == []
    (said,) = exchanged_within(Layout(1, 1, cp=2))
    assert said.startswith("Context-parallel ranks exchange keys and values")


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        (f"echo torchrun --nproc-per-node=8 --nnodes=2 {PROGRAM}", 16),
        (f"echo torchrun --nproc_per_node 4 --nnodes 1:3 {PROGRAM} --split=1", 12),
        (f"echo torchrun {PROGRAM}", 1),
        (f'echo "it\'s planned"; echo torchrun --nproc-per-node=2 {PROGRAM}', 2),
        (f"echo torchrun --nproc-per-node=gpu {PROGRAM}", "--nproc-per-node gpu: give it a number"),
        (f"echo torchrun --nnodes=0 {PROGRAM}", "--nnodes 0: give it a number"),
        (f"echo 'torchrun {PROGRAM}", "failed: "),
        ("echo torchrun train.py", "prints no command"),
    ],
)
def test_scripts(text: str, ranks: int | str, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f": ${{DRY_RUN:=0}}\n{text}\n")
    if isinstance(ranks, int):
        assert read_launch_recipe(script, {}).ranks == ranks
        return
    with pytest.raises(UserError, match=ranks):
        read_launch_recipe(script, {})


def test_a_script_that_would_start_the_job_is_not_run(tmp_path: Path) -> None:
    script, started = tmp_path / "run.sh", tmp_path / "started"
    script.write_text(f"touch {started}  # not a launch.sh\ntorchrun {PROGRAM}\n")
    with pytest.raises(UserError, match="does not look at DRY_RUN"):
        read_launch_recipe(script, {})
    assert not started.exists()
    script.write_text(f"NODES=2 bash {REPOSITORY}/examples/pretrain_slm_1b.sh\n")
    assert read_launch_recipe(script, {}).ranks == 16


def test_datasets_without_tokens() -> None:
    for lengths in ([], [0, 0]):
        assert length_in_samples(np.array(lengths, np.int32), 64) == 0.0
