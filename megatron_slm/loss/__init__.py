"""The selective head: per-token losses without logits in memory, and the loss of the selected."""

from megatron_slm.loss.chunked import TokenLosses, selected_loss, token_losses

__all__ = ["TokenLosses", "selected_loss", "token_losses"]
