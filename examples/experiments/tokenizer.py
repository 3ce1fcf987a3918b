"""Train a sentencepiece BPE with byte fallback:  tokenizer.py MODEL VOCABULARY CORPUS.jsonl ...

It learns from the first CHARACTERS of each corpus, so that all have the same weight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megatron_slm.errors import exit_on_user_error
from megatron_slm.files import writing

CHARACTERS = 1_500_000


def lines(corpora: list[str]) -> Iterator[str]:
    """Yield the lines at the beginning of each corpus, up to CHARACTERS characters."""
    for corpus in corpora:
        left = CHARACTERS
        with Path(corpus).open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                yield from text.splitlines()
                left -= len(text)
                if left <= 0:
                    break


def main(model: str, vocabulary: int, corpora: list[str]) -> None:
    """Train the tokenizer, and write its model.

    Args:
        model: path of the model to write.
        vocabulary: number of tokens.
        corpora: paths of jsonl files.
    """
    Path(model).parent.mkdir(parents=True, exist_ok=True)
    with writing(Path(model)) as unfinished, unfinished.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(corpora),
            model_writer=file,
            vocab_size=vocabulary,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
