"""A pad token that is another special token as well, in Megatron's own datasets."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_slm.training.tokenizer import record_tokenizer

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4, "b": 5, "<odd>": 6}
TEXT = [1, 4, 5, 6, 4, 2, 1, 5, 4]


def tokenizer_with(tmp_path: Path, pad: str | None, unk: str = "<unk>") -> Any:
    """Megatron's, of a Hugging Face directory."""
    Tokenizer(WordLevel(WORDS, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unk, "pad_token": pad}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tmp_path), metadata_path={"library": "huggingface"}
    )


def arguments(**also: Any) -> Namespace:
    given = {"tokenizer_type": "HuggingFaceTokenizer", "rank": 0, "sft": False}
    return Namespace(**given | {"allow_ambiguous_pad_tokens": False} | also)


def sample(tokenizer: Any, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the first sample that Megatron makes of the text."""
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=numpy.uint16)
    builder.add_document(torch.tensor(TEXT), [len(TEXT)])
    builder.finalize(str(tmp_path / "text.idx"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=len(TEXT) - 1,
        blend=([str(tmp_path / "text")], None),
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    dataset = GPTDataset(
        IndexedDataset(str(tmp_path / "text")),
        str(tmp_path / "text"),
        numpy.arange(1, dtype=numpy.int32),
        1,
        Split.train,
        config,
    )
    found: dict[str, torch.Tensor] = dataset[0]
    return found


@pytest.mark.parametrize(
    ("pad", "unk", "said"),
    [
        ("<s>", "<unk>", "pad token '<s>' (id 1) is its bos token too: it is read as text"),
        ("<odd>", "<odd>", "pad token '<odd>' (id 6) is its unk token too: it is read as text"),
        ("</s>", "<unk>", None),  # Megatron sees to it, and warns
        ("<pad>", "<unk>", None),
        (None, "<unk>", None),
    ],
)
def test_no_token_of_the_text_is_lost(
    pad: str | None,
    unk: str,
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tokenizer_with(tmp_path, pad, unk)
    args = arguments()
    record_tokenizer(args, tokenizer)
    message = capsys.readouterr().err
    assert said in message if said else not message
    found = sample(tokenizer, tmp_path)
    assert found["tokens"].tolist() == TEXT[:-1]
    assert found["labels"].tolist() == TEXT[1:]
    assert found["loss_mask"].tolist() == [1.0] * (len(TEXT) - 1)
    assert args.slm_special_ids == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None if pad is None else WORDS[pad],
    }


def test_megatron_alone_loses_it(tmp_path: Path) -> None:
    """What the test above would see."""
    found = sample(tokenizer_with(tmp_path, "<s>"), tmp_path)
    assert found["tokens"].tolist() == [0 if token == 1 else token for token in TEXT[:-1]]
    assert found["loss_mask"].tolist() == [float(token != 1) for token in TEXT[1:]]


def test_what_cannot_be_mended_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's SFT dataset does its own masking; an option asks for it."""
    tokenizer = tokenizer_with(tmp_path, "</s>")
    record_tokenizer(arguments(sft=True), tokenizer)
    assert "'</s>' (id 2) is its eos and eod token too: Megatron's SFT" in capsys.readouterr().err
    record_tokenizer(arguments(allow_ambiguous_pad_tokens=True), tokenizer)
    assert "with --allow-ambiguous-pad-tokens it is fed as token 0" in capsys.readouterr().err
    record_tokenizer(arguments(allow_ambiguous_pad_tokens=True, rank=1), tokenizer)
    assert not capsys.readouterr().err
