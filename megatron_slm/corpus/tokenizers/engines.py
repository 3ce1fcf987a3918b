"""Load engines that turn texts into token ids, and choose among them.

Each kind of tokenizer has a reference engine: the library that defines its ids.  A faster one is
used only if it gives the same ids as the reference on a sample of the corpus and on what is easy to
get wrong: white space, other scripts, and the tokenizer's own special tokens as text.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile
from megatron_slm.errors import UserError

# A function from texts to the ids of all texts [n] and the number of ids of each text [texts].
Encode = Callable[[list[str]], tuple[NDArray[Any], NDArray[np.int64]]]
Load = Callable[[TokenizerFile, bool], Encode]

PROBES = (
    "",
    " ",
    "\n",
    "  two  spaces \n\n\t tab\r\n end ",
    "naïve e\u0301 東京 한국어 עברית 🎲👩‍👩‍👧 \u2028\u00a0\ufeff\u200b\x00\x1f",
    "3.14159 + 2 = 5.14159\n\tdef f(x): return {x!r}  # ###",
    "▁ <0x0A> ▁▁ [INST] <|im_start|> <s></s>",
)


@dataclass(frozen=True)
class EngineChoice:
    """The engine that was chosen."""

    name: str
    """Name of the engine."""
    encode: Encode
    """Its function from texts to ids."""
    why: str
    """Why it was chosen, for people."""


def encode_lists(encode: Callable[[list[str]], Sequence[Sequence[int]]]) -> Encode:
    """Adapt an engine's function that returns a list of ids for each text."""

    def encode_flat(texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        found = encode(texts)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        flat = np.fromiter(chain.from_iterable(found), np.int64, int(lengths.sum()))
        return flat, lengths

    return encode_flat


def load_sentencepiece(file: TokenizerFile, special: bool) -> Encode:
    """Load sentencepiece, which always reads special tokens as text, whatever `special` says."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.content)
    return encode_lists(lambda texts: pieces.encode(texts, num_threads=1))


def load_hugging_face(file: TokenizerFile, special: bool) -> Encode:
    """Load Hugging Face's tokenizers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(file.content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special
    return encode_lists(
        lambda texts: [
            found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
    )


def load_mistral(file: TokenizerFile, special: bool) -> Encode:
    """Load mistral-common, which uses tiktoken."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(file.path)
    return encode_lists(
        lambda texts: [tokenizer.encode(text, bos=False, eos=False) for text in texts]
    )


def load_kitoken(file: TokenizerFile, special: bool) -> Encode:
    """Load Kitoken."""
    from kitoken import Kitoken

    read = {
        "sentencepiece": Kitoken.from_sentencepiece,
        "hugging-face": Kitoken.from_tokenizers,
        "tekken": Kitoken.from_tekken,
    }[file.kind]
    tokenizer = read(file.content)
    return encode_lists(lambda texts: tokenizer.encode_all(texts, special))


def load_gigatoken(file: TokenizerFile, special: bool) -> Encode:
    """Load Gigatoken, without the added tokens that should not match in text: those it has always
    do."""
    import awkward
    from gigatoken import Tokenizer
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    if file.kind == "sentencepiece":
        definition = json.loads(sentencepiece_to_tokenizer_json(file.content))
    else:
        definition = json.loads(file.content)
    if not special:
        definition["added_tokens"] = [
            token for token in definition["added_tokens"] if not token["special"]
        ]
    definition |= {"post_processor": None, "truncation": None, "padding": None}
    tokenizer = Tokenizer.from_json(json.dumps(definition, ensure_ascii=False))

    def encode(texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        found = tokenizer.encode_batch(texts, parallel=False)
        return awkward.to_numpy(awkward.flatten(found)), awkward.to_numpy(awkward.num(found))

    return encode


# For each kind, the fastest engine is first and the reference is last.
ENGINES: dict[str, dict[str, Load]] = {
    "sentencepiece": {
        "gigatoken": load_gigatoken,
        "kitoken": load_kitoken,
        "sentencepiece": load_sentencepiece,
    },
    "hugging-face": {
        "gigatoken": load_gigatoken,
        "kitoken": load_kitoken,
        "hf": load_hugging_face,
    },
    "tekken": {"kitoken": load_kitoken, "mistral": load_mistral},
}
PACKAGES = {"hf": "tokenizers", "mistral": "mistral-common"}


def engine_names() -> list[str]:
    """Return the names of all engines, for a command line."""
    return list(dict.fromkeys(chain.from_iterable(ENGINES.values())))


def check_engine(name: str, file: TokenizerFile, special: bool) -> None:
    """Refuse an engine that cannot do what is asked, before hours of work.

    Args:
        name: name of an engine, or auto.
        file: the tokenizer.
        special: whether special tokens in text become their ids, not the ids of their letters.

    Raises:
        UserError: the engine does not support this kind of tokenizer, or is not installed.
    """
    if name not in ("auto", *ENGINES[file.kind]):
        raise UserError(f"--engine {name} cannot read {file.path}, a {file.kind} tokenizer")
    if special and file.kind != "hugging-face":
        raise UserError(
            f"--special-tokens-in-text ids: {file.kind} always reads them as text; only a Hugging "
            "Face tokenizer has the choice"
        )
    package = PACKAGES.get(name, name)
    if name != "auto" and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UserError(f"--engine {name} is not installed: pip install {package}")


def load_engine(name: str, file: TokenizerFile, special: bool) -> Encode:
    """Return an engine's function from texts to ids.

    Raises:
        UserError: the engine cannot do what is asked (check_engine).
    """
    check_engine(name, file, special)
    return ENGINES[file.kind][name](file, special)


def choose_engine(
    wanted: str, file: TokenizerFile, special: bool, sample: list[str]
) -> EngineChoice:
    """Choose the engine: the one that is wanted, or for `auto` the fastest that is exact.

    Args:
        wanted: name of an engine, or auto.
        file: the tokenizer.
        special: whether special tokens in text become their ids, not the ids of their letters.
        sample: documents of the corpus to compare engines on; without any text in them, `auto`
            chooses the reference.

    Raises:
        UserError: the engine that is wanted gives other ids than the reference.
    """
    names = list(ENGINES[file.kind])
    reference = names[-1]
    check_engine(wanted, file, special)
    exact = load_engine(reference, file, special)
    if wanted == "auto" and not any(sample):
        why = "no document at the beginnings of the input to compare others on"
        return EngineChoice(reference, exact, f"{version(reference)}, the reference: {why}")
    texts = [*PROBES, *(f"a{token}b {token}" for token in file.special_tokens), *sample]
    passed_over: list[str] = []
    others = [name for name in names[:-1] if wanted in ("auto", name)]
    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(
            exact, texts if others else []
        )  # runs while the next engine is loaded
        for name in others:
            try:
                encode = load_engine(name, file, special)
                fault = differs(encode, texts, expected.result())
            except Exception as error:  # whatever it is, another engine may work
                fault = str(error) or type(error).__name__
            if fault is None:
                same = f"the same ids as {reference} on {len(sample)} documents of this corpus"
                return EngineChoice(name, encode, f"{version(name)}: {same}{_besides(passed_over)}")
            if wanted != "auto":
                raise UserError(f"--engine {name}: {fault}; take another, or auto")
            passed_over.append(f"not {name}: {fault}")
    return EngineChoice(
        reference, exact, f"{version(reference)}, the reference{_besides(passed_over)}"
    )


def differs(encode: Encode, texts: list[str], expected: tuple[Any, Any]) -> str | None:
    """Say which text an engine encodes differently from what is expected; None if there is none."""
    ids, lengths = encode(texts)
    if np.array_equal(ids, expected[0]) and np.array_equal(lengths, expected[1]):
        return None
    ours, theirs = (
        np.split(flat, np.cumsum(lengths)[:-1]) for flat, lengths in ((ids, lengths), expected)
    )
    wrong = next(
        text
        for text, mine, right in zip(texts, ours, theirs, strict=True)
        if not np.array_equal(mine, right)
    )
    return f"other ids for {wrong[:40]!r}"


def version(engine: str) -> str:
    """Return the name and version of an engine's package."""
    package = PACKAGES.get(engine, engine)
    return f"{package} {importlib.metadata.version(package)}"


def _besides(passed_over: list[str]) -> str:
    return "".join(f"; {reason}" for reason in passed_over)


def surround(
    ids: NDArray[Any], lengths: NDArray[np.int64], before: tuple[int, ...], after: tuple[int, ...]
) -> NDArray[Any]:
    """Put the same ids around each document.

    Args:
        ids: [n], the ids of all documents, one after the other.
        lengths: number of ids of each document.
        before: ids to put before each document.
        after: ids to put after each document.

    Returns:
        [n + documents * (before + after)], the ids of all documents.
    """
    ends = np.cumsum(lengths + len(before) + len(after))
    starts = ends - lengths - len(before) - len(after)
    result = np.empty(ids.size + len(lengths) * (len(before) + len(after)), ids.dtype)
    own = np.ones(result.size, bool)
    places = [starts + at for at in range(len(before))]
    places += [ends - len(after) + at for at in range(len(after))]
    for place, token in zip(places, (*before, *after), strict=True):
        result[place] = token
        own[place] = False
    result[own] = ids
    return result
