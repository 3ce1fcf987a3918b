"""Write a sentencepiece model as the tokenizer.json that transformers reads.

Transformers 5 does not convert every model faithfully: it orders merges by the ids of their pieces,
which is not always the order of their scores (as in Mistral's runs of spaces), and it ignores
user-defined symbols.  Here the merges are in sentencepiece's order, and user-defined symbols are
cut out of the text before anything is merged.  Finally the written files are loaded with
transformers and compared with the model on texts that contain every such piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_slm.errors import UserError
from megatron_slm.files import LIMIT, read_bounded

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # model types in trainer_spec
PLAIN, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a piece
# What tokenizers disagree on: leading, inner and trailing spaces, bytes, other scripts, ligatures.
SAMPLES = [
    "Not all tokens are what you need: 3.14 + 2 = 5.14",
    " a  b   c    d     e      f       g        h ",
    "\n\tdef f(x):\n        return {x}  # naïve 東京 🎲\r\n\n    ▁x\x00\u200b ﬁ ½",
]


def open_sentencepiece(path: Path) -> SentencePieceProcessor | None:
    """Load a sentencepiece model, or return None for a file of another kind."""
    content = read_bounded(path, LIMIT)
    try:
        pieces = SentencePieceProcessor(model_proto=content)
        return pieces if pieces.vocab_size() > 0 else None
    except (OSError, RuntimeError):
        return None


def special_ids(pieces: SentencePieceProcessor) -> dict[str, int | None]:
    """Return the ids of bos, eos and pad for config.json; None for one that the model lacks."""
    ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
    return {f"{name}_token_id": at if at >= 0 else None for name, at in ids.items()}


def write_tokenizer_json(pieces: SentencePieceProcessor, directory: Path, name: str) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        pieces: the sentencepiece model.
        directory: where the files go.
        name: name of the model, for errors.

    Raises:
        UserError: transformers would encode some text differently from the model.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces.serialized_model_proto())
    named = special_ids(pieces) | {"unk_token_id": pieces.unk_id()}
    config: dict[str, object] = {
        key.removesuffix("_id"): pieces.id_to_piece(at)
        for key, at in named.items()
        if at is not None
    }
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is letters, as in training
    }
    try:
        definition = _as_tokenizer(model).to_str()
    except Exception as error:  # all that the library raises
        raise UserError(f"the tokenizer {name} cannot be exported: {error}; use --like") from error
    (directory / "tokenizer.json").write_text(definition)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _compare(pieces, model, directory, name)


def _compare(pieces: SentencePieceProcessor, model: Any, directory: Path, name: str) -> None:
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for text in _samples(model):
        ids = exported.encode(text, add_special_tokens=False)
        if ids != pieces.encode(text):
            raise UserError(
                f"the tokenizer {name} cannot be exported: in training {text[:80]!r} is "
                f"{pieces.encode(text)[:12]}, and would be {ids[:12]} in transformers; name a "
                "Hugging Face directory whose tokenizer reads as it does with --like"
            )


def _samples(model: Any) -> Iterator[str]:
    """Yield texts with every special and user-defined piece: alone, within text, and in a row."""
    yield from SAMPLES
    named = [piece.piece for piece in model.pieces if piece.type in (CONTROL, USER_DEFINED)]
    last = named[-1] if named else ""
    for name in named:
        yield from (name, f"the {name}fox {name} jumps\n{name}", f"{last}{name}{last}{name} {name}")
    yield from map("".join, batched(named, 50))


def _as_tokenizer(model: Any) -> Tokenizer:
    tokenizer = _unigram(model) if model.trainer_spec.model_type == UNIGRAM else _bpe(model)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec))
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in model.pieces
            if piece.type in (UNKNOWN, CONTROL)
        ]
    )
    return tokenizer


def _unigram(model: Any) -> Tokenizer:
    lowest = (
        min(piece.score for piece in model.pieces) - 1000.0
    )  # for pieces that no text is encoded as
    scores = [
        (piece.piece, piece.score if piece.type in (PLAIN, USER_DEFINED) else lowest)
        for piece in model.pieces
    ]
    return Tokenizer(
        models.Unigram(
            scores, unk_id=_unknown(model), byte_fallback=model.trainer_spec.byte_fallback
        )
    )


def _bpe(model: Any) -> Tokenizer:
    """Build a BPE tokenizer that first cuts user-defined symbols out of the text.

    No merge leads to a symbol, so a part of the text that equals a piece's name becomes that piece
    (ignore_merges).  If text is never encoded as that piece, as with "</s>", such a part is cut
    once more, after its first token.
    """
    names = [piece.piece for piece in model.pieces]
    bpe = models.BPE(
        vocab={name: at for at, name in enumerate(names)},
        merges=_merges(model),
        unk_token=names[_unknown(model)],
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if symbols:
        cuts = [re.escape(name) for name in sorted(symbols, key=len, reverse=True)]
        again = [_cut_name(bpe, name) for name in {*names} - {*symbols}]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
                for patterns in (cuts, list(filter(None, again)))
            ]
        )
        bpe.ignore_merges = True
        tokenizer.model = bpe
    return tokenizer


def _cut_name(bpe: models.BPE, name: str) -> str | None:
    """Return a pattern that matches the first token of a text which equals a piece's name; None if
    the piece is its only token."""
    end = len(name.encode()[: bpe.tokenize(name)[0].offsets[1]].decode())
    if end == len(name):
        return None
    return rf"\A{re.escape(name[:end])}(?={re.escape(name[end:])}\z)"


def _unknown(model: Any) -> int:
    return next(at for at, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _merges(model: Any) -> list[tuple[str, str]]:
    plain = {
        piece.piece: (-piece.score, at)
        for at, piece in enumerate(model.pieces)
        if piece.type == PLAIN
    }
    merges = sorted(
        (*plain[name], cut, name[:cut], name[cut:])
        for name in plain
        for cut in range(1, len(name))
        if name[:cut] in plain and name[cut:] in plain
    )
    return [(left, right) for *_, left, right in merges]


def _normalizers(spec: Any) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]
