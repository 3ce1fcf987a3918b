"""A sentencepiece model as the tokenizer.json that transformers reads.

Transformers 5 orders a .model's merges by the ids of their pieces, which is not the order of their
scores in every model (Mistral's runs of spaces), and then gives other ids than training read.  Here
the merges are in the order in which sentencepiece takes them, and what comes out is compared.
"""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPACE = "▁"
# What tokenizers disagree on: spaces in front, between and behind, bytes, other scripts, ligatures.
SAMPLES = [
    "Not all tokens are what you need: 3.14 + 2 = 5.14",
    " a  b   c    d     e      f       g        h ",
    "\n\tdef f(x):\n        return {x}  # naïve 東京 🎲\r\n\n    ▁x\x00\u200b ﬁ ½",
]


def write_tokenizer_json(model: Path, directory: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json.

    Returns:
        False, and nothing is written, for another kind than Llama's, which encodes byte pairs of
        the text as it is, with a space in front.
    """
    pieces = SentencePieceProcessor()
    try:
        pieces.Load(str(model))
    except (OSError, RuntimeError):
        return False
    tokenizer = _as_tokenizer(pieces)
    if any(pieces.encode(text) != tokenizer.encode(text).ids for text in SAMPLES):
        return False
    tokenizer.save(str(directory / "tokenizer.json"))
    named = (("bos", pieces.bos_id()), ("eos", pieces.eos_id()), ("unk", pieces.unk_id()))
    config: dict[str, object] = {
        f"{name}_token": pieces.id_to_piece(at) for name, at in named if at >= 0
    }
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


def _as_tokenizer(pieces: SentencePieceProcessor) -> Tokenizer:
    names = [pieces.id_to_piece(at) for at in range(pieces.vocab_size())]
    special = [at for at in range(len(names)) if pieces.is_control(at) or pieces.is_unknown(at)]
    ids = {name: at for at, name in enumerate(names)}
    plain = {
        name: at
        for at, name in enumerate(names)
        if not pieces.is_byte(at) and not pieces.is_unused(at) and at not in special
    }
    merges = sorted(
        (-pieces.get_score(at), at, cut, name[:cut], name[cut:])
        for name, at in plain.items()
        for cut in range(1, len(name))
        if name[:cut] in plain and name[cut:] in plain
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[merge[3:] for merge in merges],
            unk_token=names[pieces.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(names[at], special=True, normalized=False) for at in special]
    )
    return tokenizer
