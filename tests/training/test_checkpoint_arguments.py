"""The model that a run starts from against the one that its arguments describe."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_slm.model.architecture import Architecture, to_megatron
from megatron_slm.training.checkpoint_arguments import differences

MISTRAL_V1 = Architecture(
    layers=32,
    hidden=4096,
    ffn=14336,
    heads=32,
    groups=8,
    head_dim=128,
    vocabulary=32000,
    positions=32768,
    epsilon=1e-5,
    rope_theta=10000,
    rope_scaling=None,
    window=4096,
    tied=False,
)
MISTRAL_V3 = replace(MISTRAL_V1, rope_theta=1000000, window=None, vocabulary=32768)


def imported(architecture: Architecture, **changes: Any) -> Namespace:
    padded = -(-architecture.vocabulary // 128) * 128
    return Namespace(**to_megatron(architecture) | {"padded_vocab_size": padded} | changes)


def recipe(**changes: Any) -> Namespace:
    """Arguments of the 7B recipe, for Mistral v0.1."""
    return Namespace(**vars(imported(MISTRAL_V1)) | {"slm_vocab_size": 32000} | changes)


def test_another_model_is_told_by_every_option() -> None:
    found = {
        name: (there, here) for name, there, here in differences(imported(MISTRAL_V3), recipe())
    }
    assert set(found) == {"rotary_base", "window_size", "vocab_size"}
    assert found["rotary_base"] == (1000000, 10000)
    assert found["window_size"] == (None, (4095, 0))
    assert found["vocab_size"][0] == 32768
    assert not differences(imported(MISTRAL_V3), recipe(), found)


def test_what_means_the_same_is_no_difference() -> None:
    assert not differences(imported(MISTRAL_V1), recipe())
    # As a command line and as a checkpoint have it.
    assert not differences(
        imported(MISTRAL_V1, window_size=[4095, 0]), recipe(softmax_type="vanilla")
    )
    assert not differences(imported(MISTRAL_V1), recipe(max_position_embeddings=4096))
    # Every head has its own keys, said in two ways.
    llama = imported(replace(MISTRAL_V1, groups=32))
    assert not differences(llama, recipe(group_query_attention=False, num_query_groups=1))
    assert differences(llama, recipe())
    # A checkpoint of an older Megatron.
    old = imported(MISTRAL_V1)
    del old.softmax_type, old.rotary_base, old.vocab_size
    assert not differences(old, recipe(rotary_base=5))
    # A scaling that is not used has no factor.
    assert not differences(imported(MISTRAL_V1), recipe(rope_scaling_factor=32.0))
    llama3 = imported(replace(MISTRAL_V1, rope_scaling=8.0))
    names = [
        name
        for name, *_ in differences(llama3, recipe(use_rope_scaling=True, rope_scaling_factor=32.0))
    ]
    assert names == ["rope_scaling_factor"]


def test_vocabularies_differ_by_padding_alone() -> None:
    for saved, tokens, differ in (
        (32064, 32011, False),  # Hugging Face's own padding
        (32000, 32016, False),  # special tokens, for which padding has rows
        (32000, 32128, True),  # for which it has none
        (32128, 32000, True),
    ):
        base = imported(replace(MISTRAL_V1, vocabulary=saved), padded_vocab_size=32064)
        found = differences(base, recipe(slm_vocab_size=tokens))
        assert [name for name, *_ in found] == ["vocab_size"] * differ, (saved, tokens)


def test_a_gpt_becomes_a_hybrid_model() -> None:
    """Megatron loads it into twice as many layers; a hybrid model's pattern has to be the same, but
    for its stages, and there is no way back."""
    layers = "*-" * 32
    gpt, hybrid = recipe(), recipe(num_layers=64, hybrid_layer_pattern=layers)
    staged = recipe(num_layers=64, hybrid_layer_pattern=f"{layers[:32]}|{layers[32:]}")
    assert not differences(imported(MISTRAL_V1), hybrid)
    assert not differences(hybrid, staged)
    other = recipe(num_layers=62, hybrid_layer_pattern="*-" * 31)
    assert differences(imported(MISTRAL_V1), other) == [("num_layers", 32, 31)]
    assert [name for name, *_ in differences(hybrid, gpt)] == ["num_layers", "hybrid_layer_pattern"]
    mixed = recipe(num_layers=64, hybrid_layer_pattern=f"*{layers[1:]}-")
    assert differences(hybrid, mixed)
    for pattern in ("-*" * 32, "**--" * 16):
        swapped = recipe(num_layers=64, hybrid_layer_pattern=pattern)
        found = differences(imported(MISTRAL_V1), swapped)
        assert [name for name, *_ in found] == ["num_layers", "hybrid_layer_pattern"]


@pytest.mark.parametrize("name", ["window_attn_skip_freq", "no_rope_freq"])
def test_layers_of_a_hybrid_model_have_other_numbers(name: str) -> None:
    """Every second layer of a GPT is the third, seventh and so on of a hybrid model."""
    gpt = recipe(**{name: 2})
    of_second = int(name == "no_rope_freq")
    for value, same in ((2, False), ([1 - of_second, 0, of_second, 0] * 16, True)):
        hybrid = recipe(num_layers=64, hybrid_layer_pattern="*-" * 32, **{name: value})
        found = [one[0] for one in differences(gpt, hybrid)]
        assert found == ([] if same else [name])
