"""plain_pretrain.py, a script for Megatron alone, on the CPU platform, with the layers that stand
in for Transformer Engine's."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from megatron_slm import cpu_platform

cpu_platform.install()

from megatron_slm.training import megatron_hooks

FLAGS = """
    --distributed-backend gloo --use-cpu-initialization --transformer-impl local
    --spec megatron_slm.model.layer_spec plain_block_spec --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-create-attention-mask-in-dataloader --calculate-per-token-loss
""".split()

if __name__ == "__main__":
    megatron_hooks.install_for_scoring()  # for data alone
    sys.argv += FLAGS
    runpy.run_path(str(Path(__file__).with_name("plain_pretrain.py")), run_name="__main__")
