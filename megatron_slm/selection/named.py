"""Find the score and the weight that a run names: built in, or module:function of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.selection.functions import CHOSEN_BY, Bound, Kind, TokenFunction, bound
from megatron_slm.selection.scores import SCORE_FUNCTIONS
from megatron_slm.selection.weights import OPTION_LIMITS, WEIGHT_FUNCTIONS

NEED_REFERENCE = frozenset(
    name
    for name, function in SCORE_FUNCTIONS.items()
    if function.needs & {"reference_losses", "reference_entropies"}
)


def find_score(name: str, options: Sequence[str]) -> Bound:
    """Return a score with its options, each NAME=VALUE; those of the weight are passed over.

    Raises:
        UserError: there is none of that name, or an option's value is not of its type.
    """
    return bound(name, SCORE_FUNCTIONS.get(name) or _own("score", name), _by_name(options))


def find_weight(name: str, options: Sequence[str], temperature: float = 1.0) -> Bound | None:
    """Return a weight as find_score does; None if selected tokens count alike.

    Args:
        name: its name.
        options: the options, each NAME=VALUE.
        temperature: of softmax.

    Raises:
        UserError: as find_score does; or with an option a weight could be negative or infinite.
    """
    function = WEIGHT_FUNCTIONS[name] if name in WEIGHT_FUNCTIONS else _own("weight", name)
    fixed: Mapping[str, Any] = {"temperature": temperature} if name == "softmax" else {}
    if function is None:
        return None
    found = bound(name, function, _by_name(options), fixed)
    for option, (above, most) in OPTION_LIMITS.get(name, {}).items():
        value = found.options.get(option, 1.0)  # a default is within the limits
        if not (above < value <= most and math.isfinite(value)):
            bounds = "0 or more" if most == math.inf else f"from 0 to {most:g}"
            wanted = (bounds if above < 0 else "above 0") + ", and finite" * math.isinf(value)
            raise UserError(f"--slm-score-option {option}={value:g}: it has to be {wanted}")
    return found


def check_option_names(options: Sequence[str], functions: Sequence[Bound | None]) -> None:
    """Refuse options that none of a run's functions has.

    Raises:
        UserError: there is such an option, or one is given twice.
    """
    used = [one for one in functions if one is not None]
    known = {name for one in used for name in one.function.options}
    names = [option.partition("=")[0] for option in options]
    for name, option in zip(names, options, strict=True):
        if name not in known:
            raise UserError(
                f"--slm-score-option {option}: {' and '.join(one.called for one in used)} have no "
                f"option {name!r}, only {', '.join(sorted(known)) or 'none'}"
            )
        if names.count(name) > 1:
            raise UserError(f"--slm-score-option {name} is given twice")


def _by_name(options: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def _own(kind: Kind, name: str) -> TokenFunction:
    """Import a user's own function."""
    module, _, function = name.partition(":")
    flag = f"{CHOSEN_BY[kind]} {name}"
    try:
        found = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{flag}: there is no module {error.name}; add its directory to PYTHONPATH"
        ) from error
    except AttributeError:
        raise UserError(f"{flag}: the module has no function {function}") from None
    if not isinstance(found, TokenFunction) or found.kind != kind:
        raise UserError(
            f"{flag} is not a {kind}: decorate the function with @token_{kind} of "
            "megatron_slm.selection"
        )
    return found
