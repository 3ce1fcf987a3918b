"""Fill a score cache by document with the losses of a model outside Megatron.

Every rank takes each n-th shard and leaves out those that are there, without waiting for others, so
ranks need no connection and a job that was killed can continue with another number of them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_slm.corpus.tokenizers.alignment import Floats
from megatron_slm.corpus.tokenizers.token_bytes import TokenBytes
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile, open_tokenizer
from megatron_slm.data.score_cache import missing_shards
from megatron_slm.entry import check_alone
from megatron_slm.errors import UserError, say
from megatron_slm.jobs.outside.documents import (
    DatasetDocuments,
    RunTokenizer,
    begin_cache,
    missing_of,
    open_documents,
    open_run_tokenizer,
    shard_span,
    write_values,
)
from megatron_slm.jobs.outside.passages import (
    SPARED,
    ByText,
    ModelTokenizer,
    Passage,
    Scorer,
)

BATCHES = 16  # that documents are sorted by length for
BY_BYTES = "by bytes, 1"  # which rule brings losses to other tokens

# Returns the losses of a dataset's tokens from one position to another.
Score = Callable[[DatasetDocuments, int, int], Floats]


def score_with_model(args: Namespace) -> None:
    """Run the job.

    Raises:
        UserError: the input is wrong, the model cannot be had, or a loss is NaN or infinite.
    """
    rank, ranks = _rank_of()
    tokenizer = open_run_tokenizer(args)
    datasets = open_documents(args.data_path, tokenizer)
    file = _model_tokenizer(args, tokenizer)
    own = None if tokenizer.model is None else TokenBytes(open_tokenizer(tokenizer.model))
    theirs = None if own is None or file is None else ModelTokenizer(file)
    by_text = own is not None and theirs is not None and not theirs.is_of(own)
    scorer, reference = _scorer(args, tokenizer, file, by_text)
    if own is not None and theirs is not None and (by_text or scorer.takes_text):
        reference |= {"tokenizer": theirs.file.sha256, "tokens": BY_BYTES}
        texts = ByText(scorer, own, tokenizer.eod, theirs, args.seq_length)
        score, counts = _by_text(texts, args), texts.counts
    else:
        score, counts = _by_window(scorer, tokenizer, args.seq_length), None
    manifest = begin_cache(args, datasets, tokenizer, reference)
    directory = Path(args.slm_reference_cache)
    shards = [(name, each) for name in manifest.sections for each in range(manifest.shards(name))]
    missing = set(missing_shards(directory, manifest))
    mine = [shard for shard in shards[rank::ranks] if shard in missing]
    say(f"> {len(shards) - len(missing)} of {len(shards)} shards are there")
    for documents, shard in missing_of(tqdm(mine, unit="shard", disable=rank > 0), datasets):
        span = shard_span(manifest, documents.name, shard, documents.tokens)
        values = score(documents, *span).astype(np.float32)
        write_values(directory, manifest, documents, shard, values, tokenizer.eod)
    if counts is not None and counts.tokens:
        part = counts.one_to_one / counts.tokens
        print(
            f"> rank {rank}: {part:.2%} of {counts.tokens:,} tokens with text are the model's, "
            f"too; {counts.filled:,} tokens have their document's mean",
            flush=True,
        )
    if not missing_shards(directory, manifest):
        print(f"> {directory} is complete", flush=True)


def _rank_of() -> tuple[int, int]:
    """Return this process's rank, and how many there are, as torchrun says."""
    check_alone()
    said = os.getenv("RANK", "0"), os.getenv("WORLD_SIZE", "1")
    rank, ranks = (int(each) if each.isdecimal() else -1 for each in said)
    if not 0 <= rank < ranks:
        raise UserError(
            f"RANK={said[0]} and WORLD_SIZE={said[1]} in the environment are not a rank and the "
            "number of ranks"
        )
    return rank, ranks


def _model_tokenizer(args: Namespace, tokenizer: RunTokenizer) -> TokenizerFile | None:
    """Open the model's tokenizer; None if the run's tokens are mere numbers."""
    if tokenizer.model is None and args.server is None:
        return None
    try:
        return open_tokenizer(args.model_tokenizer or args.model)
    except UserError as error:
        raise UserError(str(error).replace("--tokenizer-model", "--model-tokenizer")) from error


def _scorer(
    args: Namespace, tokenizer: RunTokenizer, file: TokenizerFile | None, by_text: bool
) -> tuple[Scorer, dict[str, str]]:
    """Open the model, and return it with what tells it from others."""
    if args.server is not None and file is not None:
        from megatron_slm.jobs.outside.server import CompletionsServer

        server = CompletionsServer(
            args.server, args.server_model, ModelTokenizer(file), args.concurrency, args.timeout
        )
        if tokenizer.model is None and server.takes_text:
            raise UserError(f"--server {args.server} takes text, which NullTokenizer does not have")
        if server.takes_text and args.seq_length <= 2 * SPARED:
            raise UserError(
                f"--seq-length {args.seq_length} must be above {2 * SPARED} with --server "
                f"{args.server}, which takes text alone"
            )
        return server, {"server model": server.model}
    from megatron_slm.jobs.outside.hugging_face import HuggingFaceModel, fingerprint

    known = fingerprint(args.model) | {"computed in": args.dtype}
    vocabulary = file.vocab_size if by_text and file is not None else tokenizer.vocabulary
    model = HuggingFaceModel(args.model, args.dtype, vocabulary, args.batch_tokens, args.seq_length)
    return model, known


def _by_window(scorer: Scorer, tokenizer: RunTokenizer, length: int) -> Score:
    """Score a dataset's tokens themselves, in windows as tools/score_reference.py cuts them."""

    def score(documents: DatasetDocuments, start: int, stop: int) -> Floats:
        passages = []
        for first in range(start, stop, length):
            own = documents.stream[max(first - 1, 0) : min(first + length, stop)].astype(np.int64)
            before, ids = (int(own[0]), own[1:]) if first else (tokenizer.eod, own)
            document = documents.overlapping(first, first + 1).start
            place = f"{documents.name} from its token {first:,} on, in document {document}"
            strange = own[(own < 0) | (own >= tokenizer.vocabulary)]
            if strange.size:
                raise UserError(
                    f"{place}: the token {strange[0]} is none of the tokenizer's "
                    f"{tokenizer.vocabulary}; tools/verify_dataset.py tells more"
                )
            passages.append(Passage(ids, before, place=place))
        return np.concatenate(scorer.losses(passages))

    return score


def _by_text(texts: ByText, args: Namespace) -> Score:
    """Score the documents that a shard has tokens of, whole, and take its part of them.

    A document that stands in two shards is scored for both, since another rank may have the other.
    """

    def score(documents: DatasetDocuments, start: int, stop: int) -> Floats:
        found = []
        for group in _groups(documents, documents.overlapping(start, stop), args.batch_tokens):
            places = [f"document {number} of {documents.name}" for number in group]
            found += texts.losses([documents.ids(number) for number in group], places)
        first = int(documents.starts[documents.overlapping(start, stop).start])
        return np.concatenate(found)[start - first : stop - first]

    return score


def _groups(documents: DatasetDocuments, numbers: range, batch_tokens: int) -> list[list[int]]:
    """Cut documents, given by number, into groups of about BATCHES batches."""
    groups: list[list[int]] = [[]]
    size = 0
    for number in numbers:
        groups[-1].append(number)
        size += int(documents.index.lengths[number])
        if size > BATCHES * batch_tokens:
            groups.append([])
            size = 0
    return groups
