"""The selective head: per-token losses without logits in memory, and the loss of the selected."""

from megatron_slm.loss.chunked import TokenLosses, selected_loss, token_losses
from megatron_slm.loss.head import Scoring, Selecting, all_losses, loss_of_selected

__all__ = [
    "Scoring",
    "Selecting",
    "TokenLosses",
    "all_losses",
    "loss_of_selected",
    "selected_loss",
    "token_losses",
]
