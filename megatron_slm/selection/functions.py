"""Scores and weights are functions of tokens, which declare what they read.

    @token_score(needs=("reference_losses",))
    def excess(tokens: Tokens) -> Tensor:
        return tokens.losses - tokens.reference_losses

A score returns what tokens are ranked by, highest first.  A weight returns how much each token that
was chosen counts, 0 or more.  Keyword-only parameters are options, which a run sets by
--slm-score-option NAME=VALUE; the default says the type.  A function has to give the same on each
tensor-parallel rank, must not change its arguments, and may not issue collectives of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_slm.errors import UserError
from megatron_slm.selection.tokens import READABLE, Tokens

Kind = Literal["score", "weight"]
CHOSEN_BY: dict[Kind, str] = {"score": "--slm-score", "weight": "--slm-weighting"}


@dataclass(frozen=True)
class TokenFunction:
    """A score or a weight, and what it declares."""

    kind: Kind
    compute: Callable[..., Tensor]
    """The function of (tokens, **options), or of (tokens, chosen, **options) for a weight."""
    needs: frozenset[str]
    """The fields of Tokens that it reads, beside `losses` and `valid`."""
    of_all: bool = False
    """Whether a weight is for all valid tokens, and not for the selected ones alone."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options' defaults, by name."""
        found = inspect.signature(self.compute).parameters.values()
        return {one.name: one.default for one in found if one.kind is one.KEYWORD_ONLY}


def token_score(*, needs: Iterable[str] = ()) -> Callable[[Callable[..., Tensor]], TokenFunction]:
    """Declare a function of tokens that returns scores, float [b, s/c].

    Args:
        needs: fields of Tokens that it reads, beside `losses` and `valid`.
    """
    return _declared("score", needs, False)


def token_weight(
    *, needs: Iterable[str] = (), of_all: bool = False
) -> Callable[[Callable[..., Tensor]], TokenFunction]:
    """Declare a function of tokens and Chosen that returns weights, float [b, s/c], 0 or more.

    Args:
        needs: fields of Tokens that it reads, beside `losses` and `valid`.
        of_all: whether all valid tokens get its weights, and not the selected ones alone.
    """
    return _declared("weight", needs, of_all)


def _declared(
    kind: Kind, needs: Iterable[str], of_all: bool
) -> Callable[[Callable[..., Tensor]], TokenFunction]:
    """Return the decorator of a kind of function.

    Raises:
        UserError: the function needs what tokens do not have, or has an option without a default.
    """
    wanted = frozenset(needs)
    known = READABLE - {"scores"} if kind == "score" else READABLE
    if unknown := sorted(wanted - known):
        raise UserError(
            f"a {kind} needs {', '.join(unknown)}, which tokens do not have; known: "
            f"{', '.join(sorted(known))}"
        )

    def declare(compute: Callable[..., Tensor]) -> TokenFunction:
        function = TokenFunction(kind, compute, wanted, of_all)
        for name, default in function.options.items():
            if not isinstance(default, bool | int | float | str):
                raise UserError(
                    f"the option {name} of the {kind} {compute.__name__} needs a default that is a "
                    "number, a string, True or False"
                )
        return function

    return declare


@dataclass(frozen=True)
class Bound:
    """A function with the name and the options that a run gives it."""

    name: str
    function: TokenFunction
    options: Mapping[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """The fields of Tokens that it reads, beside `losses` and `valid`."""
        return self.function.needs

    @property
    def called(self) -> str:
        """The option and the name by which the user chose it."""
        return f"{CHOSEN_BY[self.function.kind]} {self.name}"

    @torch.no_grad()
    def __call__(self, tokens: Tokens, *others: Any, group: ProcessGroup | None = None) -> Tensor:
        """Compute and check the function's values, float32 [b, s/c].

        The host waits for the device once if the function is a user's own.

        Args:
            tokens: the tokens, of which all is known that it needs.
            others: what a weight takes beside them.
            group: the tensor-parallel ranks, on which a user's own function is compared.

        Raises:
            UserError: the values are not of the tokens' shape and kind; or the function is a user's
                own and changes its arguments, or its values are NaN, or negative or infinite as
                weights, or differ between ranks.
        """
        known, shape = tokens.known(), tokens.valid.shape
        before = {name: read._version for name, read in known.items()}
        values: Any = self.function.compute(tokens, *others, **self.options)
        changed = sorted(name for name, read in known.items() if read._version != before[name])
        if changed:
            raise UserError(
                f"{self.called} changed tokens.{' and tokens.'.join(changed)} in place: it has to "
                "leave its arguments as they are"
            )
        if not isinstance(values, Tensor):
            found = f"a {type(values).__name__}"
        elif not values.is_floating_point() or values.shape != shape:
            found = f"a tensor {str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        else:
            values = values.detach().float()
            return self._checked(values, tokens, group) if ":" in self.name else values
        raise UserError(f"{self.called} returned {found}; it has to be float32 {list(shape)}")

    def _checked(self, values: Tensor, tokens: Tokens, group: ProcessGroup | None) -> Tensor:
        """Check the values of a user's own function, and return those of the first rank.

        Collective over the tensor-parallel ranks, whose values may differ by rounding: sums of a
        GPU depend on an order that is not fixed.  A NaN is not the function's fault where losses or
        entropies are not finite; what comes of these is checked with the loss.
        """
        valid, shared = tokens.valid, group is not None and group.size() > 1
        own = values
        if shared:
            values = values.clone()
            torch.distributed.broadcast(values, group=group, group_src=0)
        wrong = own.isnan() if self.function.kind == "score" else ~(own >= 0) | own.isinf()
        read = [one for name, one in tokens.known().items() if name != "scores"]
        finite = [one.isfinite() | ~valid for one in read if one.is_floating_point()]
        flags = [(wrong & valid).any() & torch.stack(finite).all()]
        if shared:
            same = own.isclose(values, rtol=1e-4, atol=1e-5, equal_nan=True)
            flags.append((~same & valid & ~wrong).any())
        found = torch.stack(flags).int()
        if shared:  # so that all of them end here
            torch.distributed.all_reduce(found, ReduceOp.MAX, group=group)
        bad, *differs = found.tolist()
        if bad:
            what = "NaN" if self.function.kind == "score" else "negative, infinite or NaN"
            raise UserError(f"{self.called} returned values that are {what} for valid tokens")
        if any(differs):
            raise UserError(
                f"{self.called} returned other values on one tensor-parallel rank than on another: "
                "it has to be a function of its arguments alone; for chance, take tokens.random"
            )
        return values


def bound(
    name: str, function: TokenFunction, given: Mapping[str, str], fixed: Mapping[str, Any] = {}
) -> Bound:
    """Give a function its options, converted to the types of their defaults.

    Args:
        name: how the user named it.
        function: the function.
        given: options by name, as text; those of another function are passed over.
        fixed: options by name, which `given` overrides.

    Raises:
        UserError: a value is not of its option's type.
    """
    options = dict(fixed)
    for option, text in given.items():
        if option in function.options:
            options[option] = _converted(option, text, function.options[option])
    return Bound(name, function, options)


def _converted(option: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"--slm-score-option {option}={text}: give true or false")
        return text == "true"
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise UserError(
            f"--slm-score-option {option}={text}: it has to be a {kind.__name__}, as {default!r}"
        ) from None
