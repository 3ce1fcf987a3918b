"""megatron_slm.pretrain, as it is where Transformer Engine is not installed."""

import sys

for name in ("transformer_engine", "transformer_engine_torch"):
    sys.modules[name] = None  # type: ignore[assignment]

from megatron_slm import pretrain

if __name__ == "__main__":
    pretrain.main()
