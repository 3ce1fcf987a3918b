"""Losses of a pretrained model, token by token, minus those that transformers computes.

    python examples/experiments/smollm2.py MODEL
    python tests/benchmarks/pretrained.py MODEL

The text is docstrings of Python's library, tokenized by tools/preprocess_data.py on one side and by
transformers on the other.  Both compute in float32.  The model has 9 heads in 3 groups and 30
layers, so it can be split over three tensor-parallel ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launch import REPOSITORY, launch
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import read_cache_manifest
from real_text import docstrings

LENGTH, WINDOWS = 192, 8
MOST = 1e-5  # nats between two means
LAYOUTS = {
    "one rank": (1, ""),
    "TP3": (3, "--tensor-model-parallel-size 3"),
    "TP3, SP": (3, "--tensor-model-parallel-size 3 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "CP2": (2, "--context-parallel-size 2"),
}


def of_transformers(model: Path, texts: list[str]) -> np.ndarray:
    """Return the loss of each token in windows of LENGTH, which begin with the end of a document,
    [WINDOWS, LENGTH]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    end = [tokenizer.eos_token_id]
    stream = torch.tensor(end + [id for text in texts for id in tokenizer.encode(text) + end])
    tokens, labels = (stream[at : at + WINDOWS * LENGTH].view(WINDOWS, LENGTH) for at in (0, 1))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for window, following in zip(tokens, labels, strict=True):
        with torch.no_grad():
            logits = loaded(window[None]).logits[0].double()  # so that the sum is exact
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
    return torch.stack(losses).numpy()


def of_layout(model: Path, prefix: Path, directory: Path, ranks: int, flags: str) -> np.ndarray:
    """Return the same losses from a score cache that a job of so many ranks makes."""
    command = [
        str(REPOSITORY / "tools/score_reference.py"),
        *f"--data-path {prefix} --split 100,0,0 --seq-length {LENGTH}".split(),
        *f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {model / 'hf'}".split(),
        *"--micro-batch-size 4 --global-batch-size 4 --train-iters 1 --eval-iters 0".split(),
        *f"--slm-reference-load {model / 'megatron'} --slm-reference-cache cache".split(),
        *f"--by document --cache-dtype float32 {flags}".split(),
    ]
    launch(ranks, command, directory, timeout=3600)
    manifest = read_cache_manifest(directory / "cache")
    stored = Section(directory / "cache", manifest, prefix.name)
    return np.stack([stored.losses(number, None) for number in range(WINDOWS)])


def main() -> None:
    """Print the differences; exit with code 1 if a mean is too far away."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="directory made by smollm2.py")
    model: Path = parser.parse_args().model.resolve()
    texts = docstrings(["statistics", "difflib"])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (scratch / "text.jsonl").write_text("".join(lines))
        tool = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "--append-eod"]
        files = f"--input {scratch}/text.jsonl --output-prefix {scratch}/held-out --workers 1"
        tokenizer = ["--tokenizer-model", str(model / "hf/tokenizer.json")]
        subprocess.run([*tool, *files.split(), *tokenizer], check=True, stdout=subprocess.DEVNULL)
        expected = of_transformers(model / "hf", texts)
        print(f"transformers: {expected.mean():.6f} nats a token, {expected.size:,} tokens")
        worst = 0.0
        for layout, (ranks, flags) in LAYOUTS.items():
            prefix = scratch / "held-out_text_document"
            found = of_layout(model, prefix, scratch / layout.replace(" ", "-"), ranks, flags)
            apart = float(abs(found.mean() - expected.mean()))
            worst = max(worst, apart)
            print(
                f"{layout:10} {found.mean():.6f}, means {apart:.1e} apart, "
                f"tokens at most {np.abs(found - expected).max():.1e}",
                flush=True,
            )
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
