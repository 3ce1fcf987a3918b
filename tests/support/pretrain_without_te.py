"""megatron_slm.pretrain, as it is where Transformer Engine is not installed."""

import sys

sys.modules["transformer_engine"] = None  # type: ignore[assignment]

from megatron_slm import pretrain

if __name__ == "__main__":
    pretrain.main()
