"""Mixes: from a recipe and real datasets to what training is given, with exact shares in tokens.

    recipe (YAML)       budget: 80_000_000_000     tokens to train on
                        sources:
                          - {name: web, domain: web, ratio: 6, data: slimpajama_text_document}
                          - {name: code, ratio: 3, data: [a_text_document, b_text_document]}
                        max_epochs: 1              of any source; more is an error (default: 1)
    PREFIX.data-args.txt   weights and datasets, for --data-args-path
    PREFIX.manifest.json   what they are, with hashes of files and tokenizers, which ties a run to
                           its data

The budget is divided by the ratios without a remainder, and each share by the tokens of its
datasets; the weights are the tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.data.manifest import (
    manifest_of_pair,
    manifest_path,
    write_data_args,
    write_manifest,
)
from megatron_slm.data.progress import say
from megatron_slm.data.verify import (
    check_quickly,
    pairs_of,
    shard_outputs,
    whole_manifest,
)
from megatron_slm.errors import UserError
from megatron_slm.files import sha256_of


@dataclass(frozen=True)
class Source:
    """A line of a recipe."""

    name: str
    ratio: Fraction
    data: tuple[str, ...]
    domain: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe file.  budget: tokens."""

    path: str
    budget: int
    sources: tuple[Source, ...]
    max_epochs: float


@dataclass(frozen=True)
class Share:
    """tokens: to be drawn from the source; available: in its datasets, by prefix."""

    source: Source
    tokens: int
    available: dict[str, int]

    @property
    def epochs(self) -> float:
        """How often each token is drawn, on average."""
        return self.tokens / sum(self.available.values())

    @property
    def weights(self) -> dict[str, int]:
        """Tokens to be drawn from each dataset."""
        sizes = list(self.available.values())
        return dict(zip(self.available, apportion(self.tokens, sizes), strict=True))


def apportion(total: int, ratios: Sequence[Fraction | int]) -> list[int]:
    """Whole numbers in these ratios that add up to total: rounded down, the rest by the largest
    remainders, the first of equal ones before."""
    whole = sum(ratios, Fraction(0))
    exact = [total * Fraction(ratio) / whole for ratio in ratios]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: found[at] - exact[at])
    for at in by_remainder[: total - sum(found)]:
        found[at] += 1
    return found


def read_recipe(path: str) -> Recipe:
    """Raises: UserError: no such file, or not a recipe; what is wrong with which source."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}".replace("\n", " ")) from error
    known = {"budget", "sources", "max_epochs"}
    if not isinstance(content, dict) or not {"budget", "sources"} <= set(content) <= known:
        raise UserError(f"{path}: a recipe has budget, sources and perhaps max_epochs, no other")
    budget, listed = content["budget"], content["sources"]
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise UserError(f"{path}: budget is a whole number of tokens, not {budget!r}")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: sources is a list of at least one")
    epochs = content.get("max_epochs", 1)
    if not isinstance(epochs, int | float) or epochs <= 0:
        raise UserError(f"{path}: max_epochs is a number above 0, not {epochs!r}")
    sources = tuple(_source(path, number, entry) for number, entry in enumerate(listed, 1))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sources have the same name")
    return Recipe(path, budget, sources, epochs)


def _source(path: str, number: int, entry: Any) -> Source:
    where = f"{path}: source {number}"
    if not isinstance(entry, dict) or not {"name", "data"} <= set(entry) <= {
        *("name", "data", "ratio", "domain")
    }:
        raise UserError(f"{where}: it has name, data, and perhaps ratio and domain, no other")
    try:
        ratio = Fraction(str(entry.get("ratio", 1)))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: ratio is a number, not {entry['ratio']!r}") from error
    if ratio <= 0:
        raise UserError(f"{where}: its ratio is not above 0")
    data = entry["data"] if isinstance(entry["data"], list) else [entry["data"]]
    if not data or not all(isinstance(prefix, str) for prefix in data):
        raise UserError(f"{where}: data is the prefix of a dataset, or a list of such")
    return Source(str(entry["name"]), ratio, tuple(data), entry.get("domain"))


def build_mix(recipe: Recipe, root: Path) -> list[Share]:
    """Divide the budget.

    Args:
        root: where datasets are that the recipe names relatively.

    Raises:
        UserError: a dataset is missing or damaged, is of another domain or tokenizer, is named
            twice, or is too short for its share.
    """
    tokens = apportion(recipe.budget, [source.ratio for source in recipe.sources])
    shares, seen, tokenizers = [], set[Path](), dict[str, str]()
    for source, share in zip(recipe.sources, tokens, strict=True):
        available: dict[str, int] = {}
        for name in source.data:
            with whole_manifest(root / name):
                for prefix, manifest in pairs_of(str(root / name)):
                    if manifest is None:
                        say(f"{prefix} has no manifest: its tokenizer and domain are not checked")
                    else:
                        _check_domain(recipe, source, prefix, manifest)
                        tokenizers.setdefault(manifest["options"]["tokenizer"]["sha256"], prefix)
                    file = Path(f"{prefix}.bin").resolve()  # which a recipe can spell in many ways
                    if file in seen:
                        raise UserError(f"{recipe.path}: {prefix} is named twice")
                    seen.add(file)
                    available[prefix] = check_quickly(prefix, manifest=manifest).tokens
        shares.append(Share(source, share, available))
    if len(tokenizers) > 1:
        raise UserError(f"{recipe.path}: other tokenizers: {' and '.join(tokenizers.values())}")
    for found in shares:
        if found.epochs > recipe.max_epochs:
            raise UserError(
                f"{recipe.path}: {found.source.name} has {sum(found.available.values()):,} tokens "
                f"for a share of {found.tokens:,}, which takes {found.epochs:.2f} epochs, more "
                f"than max_epochs {recipe.max_epochs:g}; add data, or allow as many"
            )
    return shares


def _check_domain(recipe: Recipe, source: Source, prefix: str, manifest: dict[str, Any]) -> None:
    domain = manifest["options"]["domain"]
    if source.domain is not None and domain is not None and source.domain != domain:
        raise UserError(
            f"{recipe.path}: {source.name} is of domain {source.domain}, but {prefix} of {domain}"
        )


def table(recipe: Recipe, shares: Sequence[Share]) -> str:
    """For people."""
    lines = [f"{'source':16}{'domain':12}{'available':>18}{'share':>18}{'':>9}{'epochs':>8}"]
    for share in shares:
        lines.append(
            f"{share.source.name:16}{share.source.domain or '':12}"
            f"{sum(share.available.values()):18,}{share.tokens:18,}"
            f"{share.tokens / recipe.budget:9.2%}{share.epochs:8.3f}"
        )
    return "\n".join([*lines, f"{'':28}{'budget':>18}{recipe.budget:18,}"])


def write_mix(recipe: Recipe, shares: Sequence[Share], prefix: str) -> None:
    """Write PREFIX.data-args.txt and PREFIX.manifest.json.

    Raises:
        UserError: they cannot be written, or a path has a space, which Megatron would split.
    """
    weights = {path: weight for share in shares for path, weight in share.weights.items()}
    for path in weights:
        if len(path.split()) > 1:
            raise UserError(f"{path} has a space, which Megatron takes for the end of a path")
    manifest = {
        "recipe": sha256_of(Path(recipe.path)),
        "budget": recipe.budget,
        "sources": [
            {
                "name": share.source.name,
                "domain": share.source.domain,
                "tokens": share.tokens,
                "epochs": share.epochs,
                "datasets": [
                    {"path": path, "weight": weight, "available": share.available[path]}
                    | _identity(path)
                    for path, weight in share.weights.items()
                ],
            }
            for share in shares
        ],
    }
    try:
        # A list never stands beside the manifest of another.
        manifest_path(prefix).unlink(missing_ok=True)
        write_data_args(prefix, {path: weight for path, weight in weights.items() if weight})
        write_manifest(manifest_path(prefix), manifest)
    except OSError as error:
        raise UserError(f"--output-prefix {prefix}: {error.strerror}") from error


def _identity(prefix: str) -> dict[str, Any]:
    """A dataset's hashes: of its .bin those of the parts that shards made, one after the other."""
    found: dict[str, Any] = {"idx_sha256": sha256_of(Path(f"{prefix}.idx"))}
    manifest = manifest_of_pair(Path(prefix))
    if manifest is not None:
        with whole_manifest(prefix):
            found["bin_sha256"] = [output["bin"]["sha256"] for _, output in shard_outputs(manifest)]
            found["tokenizer_sha256"] = manifest["options"]["tokenizer"]["sha256"]
    return found
