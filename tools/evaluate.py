"""Evaluate a checkpoint few-shot with lm-eval, and show the paper's numbers beside its scores.

    python tools/evaluate.py --model policy-hf --tasks math
    python tools/evaluate.py --model policy --like TinyLlama-1.1B --tasks math general
    python tools/evaluate.py --model policy-hf --tasks mine --include-path tasks   # tasks/mine.yaml
    torchrun --nproc_per_node 8 tools/evaluate.py --model policy-hf --tasks math

A Megatron checkpoint is first exported to a temporary directory (in TMPDIR).  Tasks in
--include-path that read local files need no network.
"""

from __future__ import annotations

import sys

from megatron_slm.analysis.evaluation.command import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__)
