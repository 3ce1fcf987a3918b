"""Training on this device, and over two ranks, against training on the CPU.

    python tests/gpu/losses.py [--device cpu] [--small]

A start and a reference are made on the CPU, with layers of plain torch; five steps of CLM and SLM
from there have to give the same losses wherever they run, Transformer Engine's layers included.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from table import arguments, attempt, row, skipped

args = arguments(__doc__)

import torch
from training import LLAMA, train

from logged_run import Run

SIZES = """
    --num-layers 2 --hidden-size 256 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 256 --max-position-embeddings 256 --vocab-size 4095
"""
SMALL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --vocab-size 255
"""
MODEL = f"{LLAMA} {SMALL if args.small else SIZES} --micro-batch-size 2 --global-batch-size 4"
STEPS = "--lr 1e-3 --train-iters 5"
LAYOUTS = {
    "TP2 with sequence parallelism": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "CP2": "--context-parallel-size 2",
    "DP2": "",
}
TAGS = ("lm loss", "selected loss", "unselected loss", "all-token loss", "reference loss")
# Transformer Engine multiplies float32 in TF32, unless cuBLAS is told otherwise.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
# Its attention kernels add up in another order.
FUSED = find_spec("transformer_engine") is not None and args.device == "cuda"
LIMIT = 1e-3 if FUSED else 1e-4
BF16_LIMIT = 1e-2


def compare(what: str, run: Run, expected: Run, limit: float = LIMIT) -> None:
    """Losses of every step, relative to those expected."""
    worst, count = 0.0, 0
    for tag in expected.tags():
        if tag in (*TAGS, "grad-norm"):
            found = run.scalars(tag)
            for step, value in expected.scalars(tag).items():
                apart = abs(found[step] - value) / max(1.0, abs(value))
                worst = max(worst, apart / (10 if tag == "grad-norm" else 1))
                count += 1
    row(
        f"{what}: {count} losses and norms, furthest from those expected",
        f"{worst:.0e}",
        f"{limit:.0e}",
        worst <= limit,
    )


def why_not_two(gpus: int) -> str | None:
    """Say why two ranks cannot run; None if they can."""
    if args.device == "cpu" or gpus >= 2:
        return None
    nccl = torch.cuda.nccl.version()
    if nccl >= (2, 30):
        return None
    return f"one GPU, which NCCL {'.'.join(map(str, nccl))} does not share (2.30 does)"


def main() -> None:
    """All of it, in a temporary directory."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        saving = "--no-save-optim --save-interval 20"
        train(at / "a", f"{MODEL} --lr 1e-3 --train-iters 1 --save {at}/start {saving}", gpus=0)
        reference = f"--seed 7 --lr 1e-3 --train-iters 20 --save {at}/reference {saving}"
        train(at / "b", f"{MODEL} {reference}", gpus=0)
        loading = f"--pretrained-checkpoint {at}/start --finetune --no-load-optim --no-load-rng"
        start = f"{MODEL} {STEPS} {loading}"
        slm = f"{start} --slm-token-ratio 0.6 --slm-reference-load {at}/reference"
        expected = {
            name: train(at / f"cpu {name}".replace(" ", "-"), more, gpus=0)
            for name, more in (("CLM", start), ("SLM", slm))
        }
        for name, more in (
            ("CLM", start),
            ("SLM", slm),
            ("SLM, offloaded", f"{slm} --slm-reference-offload"),
        ):
            directory = at / name.replace(", ", "-")
            with attempt(name):
                compare(name, train(directory, more, gpus=gpus), expected[name[:3]])
        for number, (name, layout) in enumerate(list(LAYOUTS.items())[: 1 if args.small else None]):
            if why := why_not_two(gpus):
                skipped(f"SLM, {name}", why)
                continue
            # With context parallelism, no attention kernel of Transformer Engine's takes float32.
            own = f"{slm} --bf16" if FUSED and name == "CP2" else slm
            with attempt(f"SLM, {name}"):
                same = expected["SLM"] if own == slm else train(at / "bf16", own, gpus=gpus)
                run = train(at / f"layout{number}", f"{own} {layout}", ranks=2, gpus=gpus)
                compare(f"SLM, {name}", run, same, LIMIT if own == slm else BF16_LIMIT)


if __name__ == "__main__":
    main()
