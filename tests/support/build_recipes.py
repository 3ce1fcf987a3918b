"""Dry-run ranks of recipes, and what should be refused; to built.json."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_slm import cpu_platform

cpu_platform.install()
logging.disable(logging.WARNING)

import pytest

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.planning import dry_run, recipe
from megatron_slm.planning.cluster import Cluster, plan
from megatron_slm.planning.formulas import memory
from megatron_slm.planning.launch_recipe import read_launch_recipe

SIZES = (
    *("1b", "7b", "13b", "70b"),
    *("qwen3-8b", "llama3-8b", "qwen3-30b-a3b", "mixtral-8x7b"),
)


def built(script: str, settings: dict[str, str], every_stage: bool) -> list[dict[str, Any]]:
    """Build the last rank, or one rank of every pipeline stage."""
    read = read_launch_recipe(REPOSITORY / "examples" / script, settings)
    args = recipe.parse(read, 0, 32000)
    a, layout = recipe.architecture_of(args, 32000), recipe.layout_of(args)
    per_stage = read.ranks // layout.pp
    ranks = {read.ranks - 1}
    if every_stage:
        ranks |= {stage * per_stage + 1 for stage in range(layout.pp - 1)}
    return [
        asdict(dry_run.dry_run(read, rank, 32000))
        | {"architecture": asdict(a), "layout": vars(layout), "padded": args.padded_vocab_size}
        for rank in sorted(ranks)
    ]


def largest_rank(script: str, settings: dict[str, str]) -> tuple[int, int]:
    """Ranks of a recipe's job, and bytes of the one that needs most."""
    read = read_launch_recipe(REPOSITORY / "examples" / script, settings)
    args = recipe.parse(read, 0, 32000)
    a, work = recipe.architecture_of(args, 32000), recipe.work_of(args, "te", "cuda")
    found = recipe.references_of(args, a, work)
    made = plan(a, found, recipe.layout_of(args), work, Cluster(read.ranks))
    return read.ranks, made.memory.total


def references(extra: str, **settings: str) -> dict[str, Any]:
    """Return what the 1B recipe's plan counts of its references, and what a rank builds."""
    read = read_launch_recipe(
        REPOSITORY / "examples" / "pretrain_slm_1b.sh", {"EXTRA": extra} | settings
    )
    if "ema" in extra:
        at = read.arguments.index("--slm-reference-load")
        del read.arguments[at : at + 2]
    args = recipe.parse(read, 0, 32000)
    policy, work = recipe.architecture_of(args, 32000), recipe.work_of(args, "te", "cuda")
    found = recipe.references_of(args, policy, work)
    held = memory(policy, found, recipe.layout_of(args), work, 0).reference
    built = dry_run.dry_run(read, 0, 32000).reference
    return {"layers": [one.architecture.layers for one in found], "held": held, "built": built}


def refusal(script: str, settings: dict[str, str], rank: int) -> str:
    try:
        dry_run.dry_run(read_launch_recipe(REPOSITORY / "examples" / script, settings), rank, 32000)
    except UserError as error:
        return str(error)
    return "not refused"


def wrong_shapes() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "get_tensor_shapes", lambda **kwargs: [(512, 1, 4096)])
        return refusal("pretrain_slm_70b.sh", {}, 0)


def wrong_groups() -> str:
    initialize = dry_run.mpu.initialize_model_parallel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dry_run.mpu,
            "initialize_model_parallel",
            lambda *args, **kwargs: initialize(*args, **kwargs | {"order": "tp-cp-ep-pp-dp"}),
        )
        return refusal("pretrain_slm_70b.sh", {}, 100)


if __name__ == "__main__":
    os.environ["BASE"] = sys.argv[1]  # of finetune_tora.sh, which takes its shape from it
    found: dict[str, Any] = {}
    needs: dict[str, tuple[int, int]] = {}
    for named in sys.argv[2:]:
        script, *settings = named.split()
        values = dict(each.split("=") for each in settings)
        found[named] = built(script, values, every_stage=True)
        own_size = "${SIZE:=" not in (REPOSITORY / "examples" / script).read_text()
        for size in [values] if own_size else [{"SIZE": size} for size in SIZES]:
            needs[f"{script} {size}"] = largest_rank(script, size)
    found["4096"] = built("pretrain_slm_70b.sh", {"NODES": "512", "BATCH": "1024"}, False)
    more = {
        "layers": refusal("pretrain_slm_70b.sh", {"EXTRA": "--num-layers 82"}, 0),
        "heads": refusal("pretrain_slm_70b.sh", {"EXTRA": "--num-attention-heads 60"}, 0),
        "batch": refusal("pretrain_slm_7b.sh", {"BATCH": "100"}, 0),
        "ratio": refusal("pretrain_slm_7b.sh", {"RATIO": "1.7"}, 0),
        "option": refusal("pretrain_slm_7b.sh", {"EXTRA": "--fim-data"}, 0),
        "scoring": refusal("pretrain_slm_1b.sh", {"SCORE": "1", "CACHE": "scores"}, 0),
        "rank": refusal("pretrain_slm_1b.sh", {}, 8),
        "shapes": wrong_shapes(),
        "groups": wrong_groups(),
    }
    small = sys.argv[1]
    scored = {
        "on disk": references("", REFERENCE=small),
        "several": references(f"--slm-reference-load web={small} books={small} absent"),
        "cached": references("", CACHE="scores"),
        "streamed": references("--slm-reference-offload"),
        "values": references("--slm-score external --slm-token-values values", CACHE="scores"),
        "moving average": references("--slm-reference ema:0.99"),
    }
    everything = {"built": found, "needs": needs, "refused": more, "references": scored}
    Path("built.json").write_text(json.dumps(everything))
