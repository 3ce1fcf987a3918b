"""A run and a study to make a report of: real text by a real tokenizer, losses that are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from corpus import MODEL, PIECES, texts
from megatron_slm.analysis.dynamics.write_dynamics import write_dynamics
from megatron_slm.data.manifest_types import DumpOrigin
from megatron_slm.data.token_dump import TokenDump, write_dump

SAMPLES, LENGTH = 8, 6272  # 50,176 tokens
ITERATIONS = [0, 10, 20, 40, 80]
HOSTILE = (
    "<script>window.ran = 1</script></script><!--<script>]]> <img src=x onerror='window.ran = 2'>"
    " \"'&amp;{{ 7 * 7 }} \u202etxet lanoitceridib\u202c \u2028\x1b[31m \ufeff\U0001f3b2"
)
# What Megatron logs of its arguments, here those of a Llama.
SETTINGS = {
    "num_layers": "2",
    "hidden_size": "8",
    "ffn_hidden_size": "20",
    "num_attention_heads": "2",
    "num_query_groups": "1",
    "kv_channels": "4",
    "group_query_attention": "False",
    "swiglu": "True",
    "normalization": "RMSNorm",
    "add_bias_linear": "False",
    "num_experts": "None",
    "padded_vocab_size": "64",
    "untie_embeddings_and_output_weights": "True",
    "data_path": "None",
    "train_data_path": "['0.3', 'data/web_text_document', '0.7', '/x/<b>code_text_document']",
    "validation_set_names": "['prose']",
    "slm_score": "excess",
    "slm_scope": "micro-batch",
}


def write_run(
    directory: Path,
    samples: int = SAMPLES,
    length: int = LENGTH,
    settings: dict[str, str] = SETTINGS,
) -> list[TokenDump]:
    """tensorboard/ and dump/; the dumps."""
    ids = [*PIECES.encode(HOSTILE), *PIECES.encode("\n".join(texts()))]
    ids = (ids * (samples * (length + 1) // len(ids) + 1))[: samples * (length + 1)]
    tokens = np.array(ids, np.int32).reshape(samples, length + 1)
    draw = np.random.default_rng(1)
    reference = draw.exponential(2.0, (samples, length)).astype(np.float32)
    valid = np.ones((samples, length), bool)
    valid[:, 5] = False
    dumps = []
    for at in ITERATIONS:
        change = draw.normal(0.2, 1.5, reference.shape) + 4.0 / (1 + at / 10)
        losses = np.maximum(reference + change, 0.0).astype(np.float32)
        excess = np.where(valid, losses - reference, -np.inf)
        dumps.append(
            TokenDump(
                iteration=at,
                tokens=tokens,
                losses=losses,
                valid=valid,
                samples=np.arange(samples),
                about=DumpOrigin(
                    tokenizer_type="SentencePieceTokenizer",
                    tokenizer_model=str(MODEL),
                    split="valid",
                    domains=["<b>web</b>", *["code"] * (samples - 1)],
                    score="excess",
                    scope="micro-batch",
                    ratio=0.6,
                ),
                reference_losses=reference,
                selected=excess >= np.quantile(excess[valid], 0.4),
            )
        )
        write_dump(directory / "dump", dumps[-1])
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for name, value in settings.items():
            writer.add_text(name, value)
        for at in range(1, ITERATIONS[-1] + 1):
            for number, tag in enumerate(
                """all-token loss,selected loss,unselected loss,reference loss,selected ratio,
                threshold,excess loss,selected ratio <b>web</b>,selected ratio code,
                selected loss code,iteration-time,batch-size,lm loss validation-prose,
                lm loss validation-prose ppl""".split(",")
            ):
                writer.add_scalar(tag.strip(), 1.0 + number / 10 + 5 / at, at)
        writer.add_scalar("lm loss", float("nan"), 1)
    return dumps


def write_study(directory: Path) -> None:
    """Two arms of two seeds, with small runs."""
    arms: dict[str, Any] = {}
    for arm, loss in (("CLM", 3.0), ("SLM <i>60%</i>", 2.5)):
        seeds = {}
        for seed in (1, 2):
            own = f"runs/{arm[:3].lower()}-seed{seed}"
            settings = {} if arm == "CLM" else SETTINGS
            write_run(directory / own, samples=2, length=64, settings=settings)
            if arm == "CLM":  # has nothing to dump
                shutil.rmtree(directory / own / "dump")
            elif seed == 2:
                write_dynamics(directory / own / "dump", directory / own / "dynamics", None)
            seeds[str(seed)] = {
                "curve": [[at, at * 1000, loss + 1 / at + seed / 100] for at in (1, 2, 4)],
                "final_loss": loss + seed / 10,
                "directory": own,
            }
        arms[arm] = {"arguments": ["--x"], "description": "an arm", "seeds": seeds}
    results = {
        "format": 1,
        "study": "study",
        "target": "prose",
        "tokens_per_step": 1000,
        "arms": arms,
        "summary": {
            "baseline": "CLM",
            "compared": {"iteration": 4, "tokens": 4000},
            "arms": {arm: _summary(arm, own) for arm, own in arms.items()},
        },
    }
    (directory / "results.json").write_text(json.dumps(results))


def _summary(arm: str, own: dict[str, Any]) -> dict[str, Any]:
    """As tools/run_experiment.py writes it."""
    losses = [seed["final_loss"] for seed in own["seeds"].values()]
    loss = {"mean": mean(losses), "std": stdev(losses), "values": losses, "missing": 0}
    none = {"mean": None, "std": None, "values": [None, None], "missing": 2}
    one = {"mean": 1.25, "std": None, "values": [1.25, 1.25], "missing": 0}
    return {
        "final_loss": loss,
        "difference": {"mean": -0.5, "std": 0.0707, "values": [-0.55, -0.45], "missing": 0},
        "part_of_baseline_tokens": none,
        "flops_ratio": one,
        "selected_part": one,
        "step_seconds": one,
        "equal_compute": {"arm_at_baseline_flops": none, "baseline_at_arm_flops": one},
        "verdict": f"{arm} WINS by far.",
    }
