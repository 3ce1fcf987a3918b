"""What a score or a weight may read of the tokens that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

import torch
from torch import Tensor

from megatron_slm.errors import UserError


@dataclass(init=False, frozen=True, eq=False, repr=False)
class Tokens:
    """The tokens to predict of b samples on one rank, each tensor [b, s/c] on the same device.

    All but `losses` and `valid` are there only for functions that declare that they need them.
    Losses and entropies are in nats, without the vocabulary's padding in the softmax and without
    gradient.  A token's context is what precedes it in its sample.
    """

    losses: Tensor
    """The policy's losses, float32."""
    valid: Tensor
    """Which tokens may be selected, bool.  What the others hold means nothing."""
    entropies: Tensor
    """Entropies of the policy's predictions, float32.  Needs the chunked head, and makes its first
    pass over the vocabulary sum one more value."""
    top_entropies: Tensor
    """Entropies of the policy's predictions among its 20 likeliest tokens alone, whose
    probabilities add up to 1, float32.  Needs the chunked head, and makes its first pass over the
    vocabulary find those."""
    reference_losses: Tensor
    """The reference's losses, float32."""
    reference_entropies: Tensor
    """Entropies of the reference's predictions, float32.  Needs a reference that runs."""
    labels: Tensor
    """The ids of the tokens to predict, int64."""
    token_ids: Tensor
    """The ids of the tokens before them, from which they are predicted, int64."""
    positions: Tensor
    """How many tokens of the sample precede the one it is predicted from, int64."""
    documents: Tensor
    """The number of the token's document within its sample, from 0, int64.  Needs samples whose
    documents do not see each other."""
    document_positions: Tensor
    """How many tokens of the document precede the one it is predicted from, int64.  Needs samples
    whose documents do not see each other."""
    datasets: Tensor
    """The number of the sample's dataset in the blend, int64.  Needs a blend."""
    external: Tensor
    """Outside values of the tokens to predict, float32.  Needs --slm-token-values."""
    random: Tensor
    """Uniform numbers in [0, 1), float32, that depend on the run's seed, the iteration and the
    token's place in the step alone, and so not on the layout."""
    scores: Tensor
    """What the tokens were ranked by, float32; for weights alone."""

    def __init__(self, losses: Tensor, valid: Tensor, **others: Tensor) -> None:
        """Take what is known; anything else cannot be read."""
        unknown = others.keys() - READABLE
        assert not unknown, f"tokens have no {', '.join(unknown)}"
        self.__dict__.update(others, losses=losses, valid=valid)

    def __getattr__(self, name: str) -> NoReturn:
        if name in READABLE:
            raise UserError(
                f"a score or weight reads tokens.{name} without saying so: add {name!r} to the "
                "`needs` of its decorator"
            )
        raise AttributeError(f"tokens have no {name}")

    def known(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        return dict(self.__dict__)

    def also(self, **others: Tensor) -> Tokens:
        """Return the same tokens with more known of them."""
        return Tokens(**self.known() | others)

    @staticmethod
    def joined(parts: Sequence[Tokens]) -> Tokens:
        """Join the samples of several micro-batches, of which the same is known."""
        known = [part.known() for part in parts]
        return Tokens(**{name: torch.cat([one[name] for one in known]) for name in known[0]})


READABLE = frozenset(field.name for field in fields(Tokens)) - {"losses", "valid"}
