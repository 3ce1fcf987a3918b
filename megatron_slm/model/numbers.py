"""Ranges of the numbers that describe a model."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Size = Annotated[int, Meta(ge=1, lt=2**31)]
SizeOrNone = Annotated[int, Meta(ge=0, lt=2**31)]  # 0: there is none
Layers = Annotated[int, Meta(ge=1, le=10_000)]  # bounds the memory for tables of all tensors
ExpertCount = Annotated[int, Meta(ge=1, le=10_000)]  # of a layer
Positive = Annotated[float, Meta(gt=0, lt=1e15)]
