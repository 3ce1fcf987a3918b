"""What is refused of a hybrid model, by the pattern of its layers and by the options beside it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_slm.errors import UserError
from megatron_slm.model import hybrid_pattern
from megatron_slm.training.command_line.hybrid import UNSUPPORTED, check_hybrid


def options(pattern: str | None, **more: Any) -> Namespace:
    plain = dict.fromkeys(UNSUPPORTED) | {"num_experts": None, "qk_layernorm": False, "spec": None}
    documents = {"sft": False, "dataloader_inter_document_masking": False}
    return Namespace(**plain | documents | {"hybrid_layer_pattern": pattern} | more)


@pytest.mark.parametrize(
    ("pattern", "more", "said"),
    [
        ("*-x", {}, "'x' is not a valid layer"),
        ("M-*-", {}, r"layers M \(Mamba\) need Transformer Engine and mamba-ssm, not installed"),
        ("G-", {}, "need Transformer Engine and flash-linear-attention, not installed"),
        ("+-", {}, r"layers \+ \(multi-latent attention\) need Transformer Engine, not installed"),
        ("D-", {}, "layers D"),
        ("*E", {}, "layers E need --num-experts"),
        ("*-/*-", {}, "no layers may follow a /"),
        ("*-", {"mtp_num_layers": 1}, "--mtp-num-layers cannot be used with"),
        ("*-", {"use_rope_scaling": True}, "--use-rope-scaling cannot be used with"),
        ("*-", {"rotary_interleaved": True}, "--rotary-interleaved cannot be used with"),
        ("*-", {"qk_layernorm": True}, "--qk-layernorm cannot be used with"),
    ],
)
def test_refused(pattern: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_hybrid(options(pattern, **more))


def test_a_state_would_pass_between_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_pattern, "HAVE_TE", True)
    monkeypatch.setattr(hybrid_pattern, "find_spec", lambda module: module)
    check_hybrid(options("M-*-|MM"))
    with pytest.raises(UserError, match="the state that the one before it left"):
        check_hybrid(options("M-*-", sft=True))


def test_accepted() -> None:
    for allowed in (options(None, use_rope_scaling=True), options("*-|*-", sft=True)):
        check_hybrid(allowed)
    check_hybrid(options("*E*-", num_experts=4))
