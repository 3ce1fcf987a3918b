"""How much a reference's tokenizer matters: rank correlation of the excess with that of a reference
trained alike whose tokenizer is the policy's.

    python tests/benchmarks/other_tokenizer.py STEPS [DIRECTORY]

Three references are trained by transformers on as many bytes each: one with the policy's tokenizer,
the same from another seed (which shows what chance alone does), and one with another tokenizer.

Without DIRECTORY they are small Llamas, trained from scratch on this Python's documentation
strings; the policy's tokenizer is a sentencepiece BPE, the other one a byte-level BPE, and the
policy was trained on source code.  All score docstrings of held-out modules.

With the DIRECTORY of a run of examples/experiments/smollm2.yaml they are its pretrained model,
which is the policy, too, tuned on its clean corpus; all score its held-out prose.  The other
tokenizer has the first 65% of the model's merges, so that all of its tokens are the model's.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import sentencepiece
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_slm.corpus.tokenizers.alignment import align
from megatron_slm.corpus.tokenizers.token_bytes import TokenBytes
from megatron_slm.corpus.tokenizers.tokenizer_file import open_tokenizer
from megatron_slm.jobs.outside.hugging_face import HuggingFaceModel
from megatron_slm.jobs.outside.passages import ByText, ModelTokenizer, Passage
from real_text import docstrings

VOCABULARY = 2000  # of small models
HELD_OUT = "argparse difflib inspect statistics tarfile typing".split()
LEFT_OUT = {*HELD_OUT, "this", "antigravity"}
MERGES = 0.65

Texts = list[str]


@dataclass
class Setup:
    """What is compared."""

    clean: Texts
    """What references are trained on."""
    held_out: Texts
    """What is scored."""
    own: Callable[[str], list[int]]
    """The policy's tokenizer, with the end of a document."""
    other: Callable[[str], list[int]]
    """The other one."""
    own_file: Path
    other_file: Path
    start: Callable[[], LlamaForCausalLM]
    """Makes the model that training starts from."""
    policy: Path
    rate: float
    """Learning rate."""
    decay: float
    """Weight decay."""
    length: int
    """Tokens of a sample."""
    batch: int
    """Samples of a step."""
    before: tuple[int, int]
    """The token before a document, with each tokenizer."""
    pretrained: bool
    """Whether the model is; it is then tuned in bf16 at a constant rate."""


def train(setup: Setup, encoded: list[list[int]], seed: int, steps: int, directory: Path) -> None:
    """Train a model on documents' tokens in random order, and save it."""
    torch.manual_seed(seed)
    stream = torch.tensor([token for ids in encoded for token in ids])
    model = setup.start().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), setup.rate, betas=(0.9, 0.95), weight_decay=setup.decay
    )
    schedule: torch.optim.lr_scheduler.LRScheduler
    if setup.pretrained:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    else:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setup.rate, steps)
    for step in range(steps):
        starts = torch.randint(0, len(stream) - setup.length, (setup.batch,))
        batch = torch.stack([stream[start : start + setup.length] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.pretrained):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"  {directory.name} step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(directory)


def tokenizers(texts: list[str], directory: Path) -> tuple[Any, Tokenizer]:
    """Train both tokenizers on the same texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_prefix=str(directory / "own"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "own.model"))
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=other, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory / "other tokenizer")
    return own, other


def small(steps: int, directory: Path) -> Setup:
    """Train tokenizers, and a policy on source code."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path.stem for path in library.glob("*.py") if path.stem not in LEFT_OUT)
    clean = docstrings(modules)
    code = [(library / f"{name}.py").read_text(encoding="utf-8") for name in modules[::6]]
    own, other = tokenizers(clean + code, directory)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    setup = Setup(
        clean,
        [text for text in docstrings(HELD_OUT) if len(text) > 80],
        lambda text: [*own.encode(text), 2],
        lambda text: [*other.encode(text).ids, 1],
        directory / "own.model",
        directory / "other tokenizer",
        lambda: LlamaForCausalLM(config),
        directory / "policy",
        rate=2e-3,
        decay=0.01,
        length=128,
        batch=16,
        before=(1, 0),
        pretrained=False,
    )
    train(setup, [[setup.before[0], *setup.own(text)] for text in code], 0, steps, setup.policy)
    return setup


def pretrained(study: Path, directory: Path) -> Setup:
    """Take the model and the texts of a study, and cut its tokenizer's merges."""
    stages = study / "stages"
    policy = stages / "model" / "hf"
    own = Tokenizer.from_file(str(policy / "tokenizer.json"))
    content = json.loads(own.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[: int(len(merges) * MERGES)]
    other = Tokenizer.from_str(json.dumps(content))
    special = json.loads((policy / "tokenizer_config.json").read_text())
    bos, eos = special["bos_token"], special["eos_token"]
    fast = PreTrainedTokenizerFast(tokenizer_object=other, bos_token=bos, eos_token=eos)
    fast.save_pretrained(directory / "other tokenizer")
    end = own.token_to_id(eos)

    def texts(name: str) -> Texts:
        lines = (stages / "corpora" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    return Setup(
        texts("clean"),
        texts("short"),
        lambda text: [*own.encode(text, add_special_tokens=False).ids, end],
        lambda text: [*other.encode(text, add_special_tokens=False).ids, end],
        policy / "tokenizer.json",
        directory / "other tokenizer",
        lambda: LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32),
        policy,
        rate=1e-4,
        decay=0.1,
        length=256,
        batch=8,
        before=(end, end),
        pretrained=True,
    )


def main(steps: int, study: Path | None) -> None:
    """Print the correlations."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        setup = pretrained(study, directory) if study else small(steps, directory)
        with_own, with_other = (
            [[before, *encode(text)] for text in setup.clean]
            for before, encode in zip(setup.before, (setup.own, setup.other), strict=True)
        )
        # As many bytes for each: with the other tokenizer, more or fewer steps by its tokens.
        parts = [sum(map(len, each)) for each in (with_own, with_other)]
        train(setup, with_own, 1, steps, directory / "reference")
        train(setup, with_own, 2, steps, directory / "seed")
        train(setup, with_other, 1, round(steps * parts[1] / parts[0]), directory / "other")
        pieces = TokenBytes(open_tokenizer(str(setup.own_file)))
        ids = [np.array(setup.own(text)) for text in setup.held_out]
        places = {"policy": setup.policy}
        places |= {name: directory / name for name in ("reference", "seed")}
        passages = [Passage(each, setup.before[0]) for each in ids]
        losses = {
            name: np.concatenate(model(where).losses(passages)) for name, where in places.items()
        }
        theirs = ModelTokenizer(open_tokenizer(str(setup.other_file)))
        texts = ByText(model(directory / "other"), pieces, int(ids[0][-1]), theirs, 1024)
        losses["other"] = np.concatenate(texts.losses(ids, ["a document"] * len(ids)))
        aligned = np.concatenate([_one_to_one(pieces, theirs, each) for each in ids])
    print(f"{len(aligned):,} tokens, {aligned.mean():.1%} of them in both tokenizations")
    for name, each in losses.items():
        print(f"{name:10} mean loss {each.mean():.3f}")
    excess = losses["policy"] - losses["reference"]
    for name in ("seed", "other"):
        another = losses["policy"] - losses[name]
        for what, where in (("aligned", aligned), ("all", aligned | True)):
            of_excess = spearmanr(excess[where], another[where]).statistic
            of_losses = spearmanr(losses["reference"][where], losses[name][where]).statistic
            print(f"{name:6} {what:8} excess {of_excess:.4f}, reference losses {of_losses:.4f}")
        best = [np.argsort(-each)[: len(each) * 6 // 10] for each in (excess, another)]
        print(
            f"{name:6} of the top 60%, {len(np.intersect1d(*best)) / len(best[0]):.1%} are the same"
        )


def model(directory: Path) -> HuggingFaceModel:
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    return HuggingFaceModel(str(directory), "float32", vocabulary, 8192, 1024)


def _one_to_one(pieces: TokenBytes, theirs: ModelTokenizer, ids: Any) -> Any:
    text = pieces.text(ids)
    found, spans = theirs.encode(text.characters)
    alignment = align(text.ends[~text.special], theirs.ends(text, found, spans))
    both = np.ones(len(ids), bool)  # the end of a document, too
    both[~text.special] = alignment.partners >= 0
    return both


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
