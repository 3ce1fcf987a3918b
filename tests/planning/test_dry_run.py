"""Every recipe, at its real world size, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import REPOSITORY, SUPPORT, launch
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.experts import Experts
from megatron_slm.model.hugging_face_config import from_hugging_face
from megatron_slm.planning.job import Layout
from megatron_slm.planning.parameters import parameters, stage_parameters
from random_llama import small_llama, write_random_llama

RECIPES = sorted(
    path.name
    for path in (REPOSITORY / "examples").glob("*.sh")
    if "slm_recipe=" in path.read_text()
)
OF_ANOTHER_SIZE = "train_reference_math.sh SIZE=7b"
WORLDS = {
    "pretrain_slm_1b.sh": 8,
    "pretrain_slm_7b.sh": 32,
    "pretrain_slm_qwen3_8b.sh": 32,
    "pretrain_slm_llama3_8b.sh": 32,
    "pretrain_slm_qwen3_30b_a3b.sh": 32,
    "pretrain_slm_mixtral_8x7b.sh": 64,
    "pretrain_slm_13b.sh": 64,
    "pretrain_slm_70b.sh": 256,
    "pretrain_slm_general.sh": 32,
    "train_reference_math.sh": 8,
    "train_reference_general.sh": 8,
    OF_ANOTHER_SIZE: 32,
    "finetune_tora.sh": 8,
    "4096": 4096,
}
USABLE = 0.92 * 80e9  # bytes of a GPU of 80 GB
TINYLLAMA = 1_100_048_384  # parameters, as published
TINYLLAMA_LAYER = (TINYLLAMA - 2 * 32000 * 2048 - 2048) // 22
# The numbers of parameters, and what config.json says of Qwen3-8B-Base, Llama-3.1-8B,
# Qwen3-30B-A3B-Base and Mixtral-8x7B-v0.1.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "pretrain_slm_qwen3_8b.sh": (
        8_190_735_360,
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 32768,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "pretrain_slm_llama3_8b.sh": (
        8_030_261_248,
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
    ),
    "pretrain_slm_qwen3_30b_a3b.sh": (
        30_532_122_624,
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 32768,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "pretrain_slm_mixtral_8x7b.sh": (
        46_702_792_704,
        {
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
}
REFUSALS = {
    "layers": "Megatron refuses",
    "heads": "--num-attention-heads 60 is not a multiple of",
    "batch": "--global-batch-size 100 is not a multiple of",
    "ratio": "--slm-token-ratio must be in (0, 1]",
    "option": "--fim-data",
    "scoring": "pretrain_slm_1b.sh scores with these settings",
    "rank": "ranks 0 to 7",
    "shapes": "returns the shape [512, 1, 8192] instead of [512, 1, 4096]",
    "groups": "dp group is",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small Llama for the recipe that takes its shape from a checkpoint."""
    directory = tmp_path_factory.mktemp("base")
    return write_random_llama(directory, small_llama(32000, 2048), torch.bfloat16)


@pytest.fixture(scope="module")
def ran(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("dry-run")
    script = str(SUPPORT / "build_recipes.py")
    launch(1, [script, str(base), *RECIPES, OF_ANOTHER_SIZE], directory)
    return json.loads((directory / "built.json").read_text())


def architecture(rank: dict[str, Any]) -> Architecture:
    """Read the architecture of a rank that was built."""
    a = Architecture(**rank["architecture"])
    if a.experts is None:
        return a
    experts = Experts(**rank["architecture"]["experts"])
    return replace(a, experts=replace(experts, layers=tuple(experts.layers)))


@pytest.mark.parametrize("recipe", [*RECIPES, OF_ANOTHER_SIZE, "4096"])
def test_every_stage_is_built(recipe: str, ran: dict[str, Any]) -> None:
    """With the parameters that the formulas say."""
    found = ran["built"][recipe]
    for rank in found:
        a, layout = architecture(rank), Layout(**rank["layout"])
        assert layout.ranks == WORLDS[recipe]
        expected = stage_parameters(a, rank["padded"], layout, rank["position"]["pp"])
        assert rank["policy"] == expected
        scores = recipe == "4096" or recipe.startswith("pretrain_slm")
        assert rank["reference"] == (expected if scores else 0)
        assert rank["chunks"] == layout.vp
    assert found[-1]["rank"] == layout.ranks - 1
    stages = [rank["position"]["pp"] for rank in found]
    assert stages == ([layout.pp - 1] if recipe == "4096" else list(range(layout.pp)))


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_models_are_as_published(recipe: str, ran: dict[str, Any]) -> None:
    count, config = PUBLISHED[recipe]
    found = ran["built"][recipe][0]
    a = architecture(found)
    # A command line names no model type, and the dry run has another tokenizer.
    published = from_hugging_face(config, recipe)
    assert a == replace(published, model_type=a.model_type, vocabulary=a.vocabulary)
    assert found["padded"] == published.vocabulary
    assert parameters(a, found["padded"]) == count


def test_references_are_taken_as_they_are(ran: dict[str, Any]) -> None:
    """Bytes that a rank holds, and parameters that the dry run builds: of 2 layers, or of 22."""
    found, layer = ran["references"], TINYLLAMA_LAYER
    small, large = (
        2 * 32000 * 64 + 64 + 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128 + 2 * 64),
        TINYLLAMA,
    )
    expected = {
        "on disk": ([2], small * 2, small),
        "several": ([2, 2, 22], (2 * small + large) * 2, 2 * small + large),
        "cached": ([], 0, 0),
        "values": ([], 0, 0),
        "streamed": ([22], 2 * layer * 2, large),
        "moving average": ([22], large * 6, large),
    }
    assert found == {
        case: {"layers": layers, "held": held, "built": built}
        for case, (layers, held, built) in expected.items()
    }


def test_every_recipe_fits(ran: dict[str, Any]) -> None:
    """Policies with their references, and references, of all sizes, as they are given."""
    needs = ran["needs"]
    assert len(needs) == len(RECIPES) + 3 * (8 - 1)
    for recipe, (ranks, bytes_) in needs.items():
        assert ranks % 8 == 0
        assert bytes_ < USABLE, recipe
    # Weights, gradients and reference, without anything else.
    assert needs["pretrain_slm_1b.sh {}"][1] > 8 * TINYLLAMA


def test_a_world_of_4096(ran: dict[str, Any]) -> None:
    assert ran["built"]["4096"][-1]["rank"] == 4095


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, ran: dict[str, Any]) -> None:
    assert REFUSALS[case] in ran["refused"][case]
