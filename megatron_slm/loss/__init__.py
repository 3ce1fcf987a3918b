"""The selective head: losses of all tokens without logits in memory, and the loss to train on."""

from megatron_slm.loss.chunked import TokenLosses, selected_loss, token_losses
from megatron_slm.loss.head import (
    Scoring,
    Selecting,
    Telling,
    all_losses,
    dense_losses,
    loss_of_selected,
)
from megatron_slm.loss.ranks import same_on_ranks

__all__ = [
    "Scoring",
    "Selecting",
    "Telling",
    "TokenLosses",
    "all_losses",
    "dense_losses",
    "loss_of_selected",
    "same_on_ranks",
    "selected_loss",
    "token_losses",
]
