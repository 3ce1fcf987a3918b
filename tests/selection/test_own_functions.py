"""A user's own scores and weights: how they are found, given options, and checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from documented_score import OPTION, SCORE, write_documented_score
from megatron_slm.errors import UserError
from megatron_slm.selection import SelectionSettings, Tokens, check_option_names, token_score
from megatron_slm.selection.functions import Bound

MODULE = """
import torch
from megatron_slm.selection import token_score, token_weight

@token_score(needs=("entropies",))
def surprise(tokens, *, power=1.0, positive=True):
    sign = 1.0 if positive else -1.0
    return sign * (tokens.losses - tokens.entropies).abs() ** power

@token_score()
def undeclared(tokens):
    return tokens.entropies

@token_score()
def short(tokens):
    return tokens.losses[:, 1:]

@token_score()
def whole(tokens):
    return tokens.losses > 0

@token_score()
def nothing(tokens):
    pass

@token_score()
def broken(tokens):
    return torch.where(tokens.losses > 0, tokens.losses, torch.nan)

@token_score(needs=("entropies",))
def changing(tokens):
    return tokens.losses.clamp_(min=0.0) - tokens.entropies

@token_weight()
def negative(tokens, chosen):
    return tokens.losses

@token_weight(needs=("positions",))
def late(tokens, chosen, *, scale=2):
    return chosen.normalized(tokens.positions.float() * scale)

def plain(tokens):
    return tokens.losses
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_scores.py").write_text(MODULE)
    (tmp_path / "lacks.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_scores", "lacks", "my_scores"):
        sys.modules.pop(name, None)


def tokens() -> Tokens:
    losses = torch.tensor([[1.0, -2.0, 3.0]])  # negative where not valid, which causes faults
    valid = torch.tensor([[True, False, True]])
    return Tokens(losses, valid, entropies=torch.tensor([[2.0, 2.0, 1.0]]))


def scorer(name: str, *options: str) -> Bound:
    return SelectionSettings(score=f"own_scores:{name}", options=options).scorer


def test_options_have_the_types_of_their_defaults() -> None:
    assert scorer("surprise")(tokens()).tolist() == [[1.0, 4.0, 2.0]]
    found = scorer("surprise", "power=2", "positive=false")(tokens())
    assert found.tolist() == [[-1.0, -16.0, -4.0]]
    weigher = SelectionSettings(weighting="own_scores:late", options=("scale=3",)).weigher
    assert weigher is not None and weigher.options == {"scale": 3}


def test_needs_are_those_of_both() -> None:
    settings = SelectionSettings(score="own_scores:surprise", weighting="own_scores:late")
    assert settings.needs == {"entropies", "positions"}
    assert SelectionSettings(score="policy").needs == frozenset()


def test_what_invalid_tokens_hold_does_not_matter() -> None:
    losses = torch.tensor([[1.0, -1.0]])
    assert scorer("broken")(Tokens(losses, losses > 0)).isnan().tolist() == [[False, True]]


REFUSED = {
    "undeclared": "reads tokens.entropies without saying so: add 'entropies' to the `needs`",
    "short": "--slm-score own_scores:short returned a tensor float32 [1, 2]; it has to be float32 "
    "[1, 3]",
    "whole": "--slm-score own_scores:whole returned a tensor bool [1, 3]; it has to be float32",
    "nothing": "--slm-score own_scores:nothing returned a NoneType; it has to be float32 [1, 3]",
    "changing": "--slm-score own_scores:changing changed tokens.losses in place: it has to leave",
    "absent": "--slm-score own_scores:absent: the module has no function absent",
    "plain": "--slm-score own_scores:plain is not a score: decorate the function with @token_score",
    "late": "--slm-score own_scores:late is not a score",
    "surprise power=high": "--slm-score-option power=high: it has to be a float, as 1.0",
    "surprise positive=1": "--slm-score-option positive=1: give true or false",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, *options = case.split()
    known = Tokens(tokens().losses, tokens().valid) if name == "undeclared" else tokens()
    with pytest.raises(UserError) as error:
        scorer(name, *options)(known)
    assert REFUSED[case] in str(error.value) and "\n" not in str(error.value)


def test_values_that_cannot_be() -> None:
    everywhere = Tokens(tokens().losses, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="own_scores:broken returned values that are NaN"):
        scorer("broken")(everywhere)
    weigher = SelectionSettings(weighting="own_scores:negative").weigher
    assert weigher is not None
    with pytest.raises(UserError, match="--slm-weighting own_scores:negative returned values that"):
        weigher(everywhere, None)


def test_faults_of_losses_are_not_the_functions() -> None:
    """What checks the loss says what is wrong, and whether the step is to be repeated."""
    losses, everywhere = torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2, dtype=torch.bool)
    found = scorer("surprise")(Tokens(losses, everywhere, entropies=torch.ones(1, 2)))
    assert found.isnan().tolist() == [[False, True]]
    with pytest.raises(UserError, match="own_scores:broken returned values that are NaN"):
        scorer("broken")(Tokens(losses.neg(), losses == 1.0))


def test_modules_that_are_not_there() -> None:
    for name, lacking in (("nowhere:score", "nowhere"), ("lacks:score", "not_installed_anywhere")):
        with pytest.raises(UserError, match=f"there is no module {lacking}; add its directory to"):
            _ = SelectionSettings(score=name).scorer


def test_options_of_nobody() -> None:
    settings = SelectionSettings(score="own_scores:surprise", weighting="mile")
    functions = [settings.scorer, settings.weigher]
    check_option_names(("gamma=2", "power=3"), functions)
    with pytest.raises(UserError) as error:
        check_option_names(("gama=2",), functions)
    assert str(error.value) == (
        "--slm-score-option gama=2: --slm-score own_scores:surprise and --slm-weighting mile have "
        "no option 'gama', only gamma, positive, power"
    )
    with pytest.raises(UserError, match="--slm-score-option gamma is given twice"):
        check_option_names(("gamma=2", "gamma=3"), functions)


def test_options_that_would_turn_weights_around() -> None:
    for name, option, said in (
        ("softmax", "temperature=-1", "temperature=-1: it has to be above 0"),
        ("longce", "gamma=0", "gamma=0: it has to be above 0"),
        ("eaft", "alpha=-1", "alpha=-1: it has to be 0 or more"),
        ("eaft", "alpha=inf", "alpha=inf: it has to be 0 or more, and finite"),
        ("talr", "floor=1.5", "floor=1.5: it has to be from 0 to 1"),
        ("exact", "tau=-8", "tau=-8: it has to be 0 or more"),
        ("context", "interpolation=1.5", "interpolation=1.5: it has to be from 0 to 1"),
        ("context", "interpolation=nan", "interpolation=nan: it has to be from 0 to 1"),
    ):
        with pytest.raises(UserError, match=f"--slm-score-option {said}"):
            _ = SelectionSettings(weighting=name, options=(option,)).weigher
    assert SelectionSettings(weighting="context", options=("interpolation=0",)).weigher


def test_needs_that_nobody_has() -> None:
    with pytest.raises(UserError, match="a score needs entropy, which tokens do not have; known: "):

        @token_score(needs=("entropy",))
        def wrong(tokens: Tokens) -> Tensor:
            return tokens.losses


def test_values_that_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two ranks, which receives what the first has."""

    class Two:
        def size(self) -> int:
            return 2

    known, received = tokens(), torch.zeros(1, 3)
    of_first = scorer("surprise")(known)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda to, **_: to.copy_(received))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    received.copy_(of_first)
    received[0, 1] = 7.0  # of a token that is not valid
    received[0, 2] += 1e-6  # by rounding
    assert not torch.equal(received, of_first)
    assert torch.equal(scorer("surprise")(known, group=Two()), received)
    received[0, 2] += 1e-3
    with pytest.raises(UserError, match="surprise returned other values on one tensor-parallel"):
        scorer("surprise")(known, group=Two())


def test_options_without_a_default() -> None:
    with pytest.raises(UserError, match="the option power of the score wrong needs a default"):

        @token_score()
        def wrong(tokens: Tokens, *, power: float) -> Tensor:
            return tokens.losses**power


def test_the_documented_score(tmp_path: Path) -> None:
    write_documented_score(tmp_path)
    found = SelectionSettings(score=SCORE, options=(OPTION,)).scorer(tokens())
    assert found.tolist() == [[1.0, 16.0, 4.0]]
