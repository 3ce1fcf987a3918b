"""Memory of the co-located reference: what it holds between passes, and what a pass adds.

    python tests/benchmarks/reference_memory.py [--offload]

A bf16 Llama of 168 million parameters scores 4 micro-batches of 2 x 1024 tokens, one rank.  The
resident set before it is built, after, after a pass, and at its highest in between, against

    weights      2 bytes a parameter; with --offload in host memory, on a CPU the same
    a pass       one layer's activations, n (3 h + 5 f) 2 bytes (residual, its norm, its sum; gate
                 and up, shifted, activated and multiplied; 3 f with the fused SwiGLU of a GPU), or
                 the head's, n h 2 and a chunk of logits in bf16 and float32, whichever is more;
                 with --offload embedding and output layer too, which are there for the pass
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

# So that what is freed leaves the resident set; read when a process starts.
if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, *sys.argv])
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]

from megatron_slm.entry import add_arguments, use_device

use_device()

import torch
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron

from megatron_slm.loss import Scoring
from megatron_slm.loss.chunked import chunk_columns
from megatron_slm.model.layer_spec import plain_block_spec
from megatron_slm.reference.online import OnlineReference, build_model, frozen_arguments
from megatron_slm.training.megatron_hooks import install_for_scoring
from megatron_slm.training.micro_batch import MicroBatch
from resident import resident

LAYERS, HIDDEN, FFN, VOCABULARY = 8, 1024, 2816, 32000
SEQUENCE, SAMPLES, COUNT = 1024, 2, 4
MIB = 1 << 20
MODEL = f"""
    --num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size {FFN} --num-attention-heads 16
    --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --position-embedding-type rope
    --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --bf16 --micro-batch-size {SAMPLES} --train-iters 1 --lr 1e-4 --tokenizer-type NullTokenizer
    --vocab-size {VOCABULARY - 1} --mock-data --eval-interval 1 --eval-iters 0
"""


def score(reference: OnlineReference) -> None:
    """One pass over a step's micro-batches."""
    batches = []
    for number in range(COUNT):
        ids = torch.randint(0, VOCABULARY, (SAMPLES, SEQUENCE))
        positions = torch.arange(SEQUENCE).expand(SAMPLES, SEQUENCE)
        batches.append(MicroBatch(number, tokens=ids, position_ids=positions, labels=ids))
    reference.score(iter(batches), COUNT, SAMPLES)


def main() -> None:
    """Print what was measured beside what it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offload", action="store_true")
    offload = parser.parse_args().offload
    sys.argv[1:] = [*MODEL.split(), *(["--slm-reference-offload"] if offload else [])]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    install_for_scoring()
    initialize_megatron()
    start = resident("VmRSS")
    model = build_model(frozen_arguments(args), plain_block_spec)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    parameters = sum(p.numel() for p in model.parameters())
    reference = OnlineReference(model, frozen_arguments(args), Scoring(VOCABULARY))
    gc.collect()
    built = resident("VmRSS")
    score(reference)  # what the libraries need once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    score(reference)
    peak, after = resident("VmHWM"), resident("VmRSS")
    tokens = SAMPLES * SEQUENCE
    layer = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN) * 2
    chunk = tokens * chunk_columns(tokens, "cpu") * (2 + 4)
    activations = max(tokens * (3 * HIDDEN + 5 * FFN) * 2, tokens * HIDDEN * 2 + chunk)
    if offload:  # embedding and output layer are here for the pass
        activations += 2 * VOCABULARY * HIDDEN * 2
    print(f"parameters {parameters:,}")
    held = 2 * parameters
    print(f"between passes {(built - start) / MIB:.0f} MiB, weights {held / MIB:.0f} MiB")
    if offload:
        print(f"of these on a device {2 * layer / MIB:.0f} MiB, in two buffers")
    print(f"in a pass {(peak - before) / MIB:+.0f} MiB, expected {activations / MIB:+.0f} MiB")
    print(f"left by a pass {(after - before) / MIB:+.1f} MiB")


if __name__ == "__main__":
    main()
