"""Turn a recipe and datasets into the blend that training is given, with exact shares in tokens.

    recipe (YAML)       budget: 80_000_000_000     tokens to train on
                        sources:
                          - {name: web, domain: web, ratio: 6, data: slimpajama_text_document}
                          - {name: code, ratio: 3, data: [a_text_document, b_text_document]}
                        max_epochs: 1              more of any source is an error (default: 1)
    PREFIX.data-args.txt   weights and datasets, for --data-args-path
    PREFIX.manifest.json   hashes of the datasets' files and tokenizers, to identify a run's data

The budget is divided in the ratios without a remainder, and each share in proportion to the tokens
of its datasets.  A dataset's weight is the number of tokens to draw from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta

from megatron_slm.corpus.indexed.verify import pairs_of
from megatron_slm.corpus.progress import announce
from megatron_slm.corpus.reading.input_files import Identity, identity_of
from megatron_slm.data.dataset_check import check_quickly
from megatron_slm.data.manifest import (
    encode_manifest,
    is_mix,
    manifest_of_pair,
    manifest_path,
    write_data_args,
)
from megatron_slm.data.manifest_types import (
    MixedDataset,
    MixedSource,
    MixManifest,
    PairManifest,
)
from megatron_slm.errors import UserError
from megatron_slm.files import alone_at, read_yaml, sha256_of, writing

_Text = Annotated[str, Meta(min_length=1, pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+$")]
LARGEST_RATIO = 10**15  # larger ones, also by their exponents, would exhaust memory


Texts = Annotated[list[_Text], Meta(min_length=1)]


class SourceEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A source as a recipe file has it.

    A ratio may be text, since YAML reads 1/3 and 1e3 as strings.
    """

    name: _Text | int
    data: str | list[str]  # checked as Texts later, since msgspec 0.22 frees such a union twice
    ratio: (
        Annotated[int, Meta(gt=0, le=LARGEST_RATIO)]
        | Annotated[float, Meta(gt=0, le=LARGEST_RATIO)]
        | Annotated[str, Meta(pattern=r"^[0-9]{1,15}([./][0-9]{1,15})?([eE][+-]?[0-9]{1,2})?$")]
    ) = 1
    domain: _Text | None = None


class MixFile(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a recipe file."""

    budget: Annotated[int, Meta(gt=0, le=10**18)]
    sources: Annotated[list[SourceEntry], Meta(min_length=1)]
    max_epochs: Annotated[float, Meta(gt=0)] = 1


@dataclass(frozen=True)
class MixSource:
    """A source of a recipe, checked."""

    name: str
    ratio: Fraction
    data: tuple[str, ...]
    domain: str | None = None


@dataclass(frozen=True)
class Mix:
    """A recipe, checked."""

    path: str
    """Path of its file."""
    budget: int
    """Number of tokens to train on."""
    sources: tuple[MixSource, ...]
    """What the tokens come from."""
    max_epochs: float
    """How often the tokens of any source may be drawn."""


@dataclass(frozen=True)
class Share:
    """A source's share of the budget."""

    source: MixSource
    """The source."""
    tokens: int
    """Number of tokens to draw from it."""
    available: dict[str, int]
    """Number of tokens in each of its datasets, by prefix."""

    @property
    def epochs(self) -> float:
        """How often each token of the source is drawn, on average."""
        return self.tokens / sum(self.available.values())

    @property
    def weights(self) -> dict[str, int]:
        """Number of tokens to draw from each dataset, by prefix."""
        sizes = list(self.available.values())
        return dict(zip(self.available, apportion(self.tokens, sizes), strict=True))


def apportion(total: int, ratios: Sequence[Fraction | int]) -> list[int]:
    """Divide a total into whole numbers in these ratios.

    Each is rounded down, and what is left goes to those with the largest remainders; among equal
    ones, to the first.
    """
    whole = sum(ratios, Fraction(0))
    exact = [total * Fraction(ratio) / whole for ratio in ratios]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: found[at] - exact[at])
    for at in by_remainder[: total - sum(found)]:
        found[at] += 1
    return found


def read_mix(path: str) -> Mix:
    """Read a recipe.

    Raises:
        UserError: there is no such file, or it is not a recipe; the message names the source.
    """
    content = read_yaml(Path(path), MixFile)
    sources = tuple(_source(path, at, entry) for at, entry in enumerate(content.sources))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sources have the same name")
    return Mix(path, content.budget, sources, content.max_epochs)


def _source(path: str, at: int, entry: SourceEntry) -> MixSource:
    try:
        ratio = Fraction(str(entry.ratio))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} cannot be read: {entry.ratio!r} is no number - at `$.sources[{at}].ratio`"
        ) from error
    if ratio <= 0:
        raise UserError(f"{path}: the ratio of {entry.name} is not above 0")
    try:
        data = msgspec.convert(entry.data if isinstance(entry.data, list) else [entry.data], Texts)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} cannot be read: {error} of `$.sources[{at}].data`") from error
    return MixSource(str(entry.name), ratio, tuple(data), entry.domain)


def build_mix(recipe: Mix, root: Path) -> list[Share]:
    """Divide the budget among the sources and their datasets.

    Args:
        recipe: the recipe.
        root: base of the relative paths in the recipe.

    Raises:
        UserError: a dataset is missing or damaged, has another domain or tokenizer, is named twice,
            or a source has no tokens, or too few for its share.
    """
    tokens = apportion(recipe.budget, [source.ratio for source in recipe.sources])
    shares, seen, tokenizers = [], set[Identity](), dict[str, str]()
    for source, share in zip(recipe.sources, tokens, strict=True):
        available: dict[str, int] = {}
        for name in source.data:
            for prefix, manifest in pairs_of(str(root / name)):
                if manifest is None:
                    announce(f"{prefix} has no manifest: its tokenizer and domain are not checked")
                else:
                    _check_domain(recipe, source, prefix, manifest)
                    tokenizers.setdefault(manifest.options.tokenizer.sha256, prefix)
                found = check_quickly(prefix, manifest=manifest)
                file = identity_of(f"{prefix}.bin")  # its path can be written in many ways
                if file in seen:
                    raise UserError(f"{recipe.path}: {prefix} is named twice")
                seen.add(file)
                available[prefix] = found.tokens
        if not any(available.values()):
            raise UserError(f"{recipe.path}: {source.name} has no tokens")
        shares.append(Share(source, share, available))
    if len(tokenizers) > 1:
        raise UserError(f"{recipe.path}: other tokenizers: {' and '.join(tokenizers.values())}")
    for part in shares:
        if part.epochs > recipe.max_epochs:
            raise UserError(
                f"{recipe.path}: {part.source.name} has {sum(part.available.values()):,} tokens "
                f"for a share of {part.tokens:,}, which takes {part.epochs:.2f} epochs, more "
                f"than max_epochs {recipe.max_epochs:g}; add data, or allow as many"
            )
    return shares


def _check_domain(recipe: Mix, source: MixSource, prefix: str, manifest: PairManifest) -> None:
    domain = manifest.options.domain
    if source.domain is not None and domain is not None and source.domain != domain:
        raise UserError(
            f"{recipe.path}: {source.name} is of domain {source.domain}, but {prefix} of {domain}"
        )


def shares_table(recipe: Mix, shares: Sequence[Share]) -> str:
    """Format the shares as a table."""
    lines = [f"{'source':16}{'domain':12}{'available':>18}{'share':>18}{'':>9}{'epochs':>8}"]
    for share in shares:
        lines.append(
            f"{share.source.name:16}{share.source.domain or '':12}"
            f"{sum(share.available.values()):18,}{share.tokens:18,}"
            f"{share.tokens / recipe.budget:9.2%}{share.epochs:8.3f}"
        )
    return "\n".join([*lines, f"{'':28}{'budget':>18}{recipe.budget:18,}"])


def write_mix(recipe: Mix, shares: Sequence[Share], prefix: str) -> None:
    """Write PREFIX.data-args.txt and PREFIX.manifest.json, and create their directory if needed.

    Raises:
        UserError: they cannot be written; a path has a space, at which Megatron would split it; a
            dataset has this name; or another run is writing it.
    """
    weights = {path: weight for share in shares for path, weight in share.weights.items()}
    for path in weights:
        if len(path.split()) > 1:
            raise UserError(f"{path} has a space, which Megatron takes for the end of a path")
    manifest = MixManifest(
        recipe=sha256_of(Path(recipe.path)),
        budget=recipe.budget,
        sources=[_mixed(share) for share in shares],
    )
    final = manifest_path(prefix)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with alone_at(final, "--output-prefix"):
            if final.exists() and not is_mix(final):
                raise UserError(
                    f"--output-prefix {prefix}: a dataset has that name; choose another"
                )
            # The old ones go when there is room for both, and a list never has another's manifest.
            with writing(final) as unfinished:
                unfinished.write_bytes(encode_manifest(manifest))
                drawn = {path: weight for path, weight in weights.items() if weight}
                write_data_args(prefix, drawn, other=final)
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: {error.strerror}") from error


def _mixed(share: Share) -> MixedSource:
    """Return a share as manifests record it."""
    return MixedSource(
        name=share.source.name,
        domain=share.source.domain,
        tokens=share.tokens,
        epochs=share.epochs,
        datasets=[
            _mixed_dataset(path, weight, share.available[path])
            for path, weight in share.weights.items()
        ],
    )


def _mixed_dataset(prefix: str, weight: int, available: int) -> MixedDataset:
    manifest = manifest_of_pair(Path(prefix))
    return MixedDataset(
        path=prefix,
        weight=weight,
        available=available,
        idx_sha256=sha256_of(Path(f"{prefix}.idx")),
        bin_sha256=UNSET if manifest is None else [s.output.bin.sha256 for s in manifest.shards],
        tokenizer_sha256=UNSET if manifest is None else manifest.options.tokenizer.sha256,
    )
