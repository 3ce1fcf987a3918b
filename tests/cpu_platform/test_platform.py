"""The CPU platform, and that nothing but entry points knows it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from jobs import LLAMA, OPTIMIZER, POLICY, UNTIED, Corpus
from launch import REPOSITORY, SUPPORT, launch, pretrain


def test_names_of_cuda_mean_the_cpu(tmp_path: Path) -> None:
    run = launch(1, [str(SUPPORT / "on_the_platform.py")], tmp_path, fresh_threads=1)
    assert "all right" in run.outputs[0]


def test_only_the_entry_point_imports_the_platform() -> None:
    package = REPOSITORY / "megatron_slm"
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(name.startswith("megatron_slm.cpu_platform") for name in names):
                found.add(file.relative_to(package).as_posix())
    assert found == {"entry.py", "cpu_platform/__init__.py"}


def test_a_gpu_machine_never_imports_the_platform(tmp_path: Path) -> None:
    """With a CUDA device reported, the entry goes past the platform to Megatron's arguments."""
    script = (
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from megatron_slm import pretrain\n"
        "sys.argv = ['pretrain', '--help-megatron']\n"
        "try:\n    pretrain.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "platform = 'megatron_slm.cpu_platform'\n"
        "assert not [name for name in sys.modules if name.startswith(platform)]\n"
        "assert 'megatron.training.arguments' in sys.modules\n"
    )
    run = launch(1, ["-c", script], tmp_path, fresh_threads=1)
    assert "selective language modeling" in run.outputs[0]
    assert "--slm-token-ratio" in run.outputs[0]


def test_without_a_gpu_no_kernels_for_one_are_used(tmp_path: Path) -> None:
    """An image for GPUs has them all the same."""
    kernels = tmp_path / "apex" / "multi_tensor_apply"
    kernels.mkdir(parents=True)
    (kernels / "__init__.py").write_text("multi_tensor_applier = None\n")
    (tmp_path / "amp_C.py").write_text("multi_tensor_l2norm = multi_tensor_scale = None\n")
    script = (
        "from megatron_slm import use_device\n"
        "use_device()\n"
        "from megatron.core.optimizer import clip_grads, optimizer\n"
        "assert callable(clip_grads.l2_norm_impl)\n"
        "assert callable(optimizer.multi_tensor_applier)\n"
        "print('all right')\n"
    )
    run = launch(1, ["-c", script], tmp_path, fresh_threads=1)
    assert "all right" in run.outputs[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ],
)
def test_initial_weights_do_not_depend_on_the_layout(
    ranks: int, layout: str, corpus: Corpus, tmp_path: Path
) -> None:
    common = [
        *corpus.arguments,
        *POLICY,
        *LLAMA,
        *UNTIED,
        *OPTIMIZER,
        *"--train-iters 2 --micro-batch-size 3".split(),
    ]
    one = pretrain(1, common, tmp_path / "one", fresh_threads=1).scalars("lm loss")
    cut = pretrain(ranks, [*common, *layout.split()], tmp_path / "cut").scalars("lm loss")
    assert cut == pytest.approx(one, rel=1e-6)
    log = (tmp_path / "one" / "rank0.log").read_text()
    assert log.count("running on the CPU platform") == 1
