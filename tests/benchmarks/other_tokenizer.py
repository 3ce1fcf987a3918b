"""How much a reference's tokenizer matters: rank correlation of the excess with that of a reference
trained alike whose tokenizer is the policy's.

    python tests/benchmarks/other_tokenizer.py [STEPS]

Small Llamas, trained by transformers on this Python's documentation strings for as many bytes each:
a reference with the policy's tokenizer (sentencepiece BPE), the same from another seed (which shows
what chance alone does), and one with a byte-level BPE.  The policy was trained on source code.  All
score docstrings of held-out modules.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
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

VOCABULARY, LENGTH, BATCH = 2000, 128, 16
HELD_OUT = "argparse difflib inspect statistics tarfile typing".split()
LEFT_OUT = {*HELD_OUT, "this", "antigravity"}


def train(encoded: list[list[int]], seed: int, steps: int, directory: Path) -> None:
    """Train a small model on documents' tokens in random order, and save it.

    The windows of a step hold as large a part of the text whatever the tokenizer.
    """
    torch.manual_seed(seed)
    stream = torch.tensor([token for ids in encoded for token in ids])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,))
        batch = torch.stack([stream[start : start + LENGTH] for start in starts])
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
    fast.save_pretrained(directory / "other")
    return own, other


def main(steps: int) -> None:
    """Print the correlations."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path.stem for path in library.glob("*.py") if path.stem not in LEFT_OUT)
    clean = docstrings(modules)
    code = [(library / f"{name}.py").read_text(encoding="utf-8") for name in modules[::6]]
    held_out = [text for text in docstrings(HELD_OUT) if len(text) > 80]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        own, other = tokenizers(clean + code, directory)
        with_own, with_other = (
            [[1, *own.encode(text), 2] for text in clean],
            [[0, *other.encode(text).ids, 1] for text in clean],
        )
        # As many bytes for each: with the other tokenizer, more or fewer steps by its tokens.
        parts = [sum(map(len, each)) for each in (with_own, with_other)]
        train([[1, *own.encode(text), 2] for text in code], 0, steps, directory / "policy")
        train(with_own, 1, steps, directory / "reference")
        train(with_own, 2, steps, directory / "seed")
        train(with_other, 1, round(steps * parts[1] / parts[0]), directory / "other")
        pieces = TokenBytes(open_tokenizer(str(directory / "own.model")))
        ids = [np.array([*own.encode(text), 2]) for text in held_out]
        losses = {
            name: np.concatenate(model(directory / name).losses([Passage(each, 1) for each in ids]))
            for name in ("policy", "reference", "seed")
        }
        theirs = ModelTokenizer(open_tokenizer(str(directory / "other")))
        texts = ByText(model(directory / "other"), pieces, 2, theirs, 1024)
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
    return HuggingFaceModel(str(directory), "float32", VOCABULARY, 8192, 1024)


def _one_to_one(pieces: TokenBytes, theirs: ModelTokenizer, ids: Any) -> Any:
    text = pieces.text(ids)
    found, spans = theirs.encode(text.characters)
    alignment = align(text.ends[~text.special], theirs.ends(text, found, spans))
    both = np.ones(len(ids), bool)  # the end of a document, too
    both[~text.special] = alignment.partners >= 0
    return both


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1500)
