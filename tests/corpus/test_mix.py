"""tools/build_mix.py: exact shares, and what Megatron's own blend draws of them."""

from __future__ import annotations

import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import MODEL, Result, preprocess, run_tool, texts, write_jsonl
from gpt_datasets import gpt_config
from megatron_slm.corpus.mixing.mix import apportion, read_mix
from megatron_slm.corpus.reading.chat import chat_renderer
from small_disk import full_disk

MIXES = Path(__file__).parents[2] / "examples" / "mixes"
RATIOS = {"web": 6, "code": 3, "math": 1}


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, int]:
    """Tokens of three datasets of very different sizes; the largest is a set of shards."""
    found = texts()
    sizes = {}
    for name, part, more in (
        ("web", found * 2, ("--no-merge", "--shard-size", "100K")),
        ("code", found, ()),
        ("math", found[::7], ()),
    ):
        source = write_jsonl(tmp_path / f"{name}.jsonl", part)
        preprocess(source, tmp_path / name, "--append-eod", "--domain", name, *more)
        manifest = json.loads((tmp_path / f"{name}_text_document.manifest.json").read_text())
        sizes[name] = manifest["counts"]["tokens"]
    return sizes


def write_recipe(directory: Path, budget: object, **changes: object) -> Path:
    sources = [
        {"name": name, "domain": name, "ratio": ratio, "data": f"{name}_text_document"}
        for name, ratio in RATIOS.items()
    ]
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"budget": budget, "sources": sources} | changes))
    return path


def build(directory: Path, recipe: Path, *more: object) -> Result:
    arguments = (recipe, "--data-root", directory, "--output-prefix", directory / "mix", *more)
    return run_tool("build_mix", *arguments)


def test_shares_are_exact_and_drawn(tmp_path: Path, corpora: dict[str, int]) -> None:
    budget = 60_003
    recipe = write_recipe(tmp_path, budget)
    result = build(tmp_path, recipe, "--check-sequence-length", 16)
    assert result.code == 0, result.err
    words = (tmp_path / "mix.data-args.txt").read_text().split()
    weights = dict(zip(words[1::2], map(int, words[::2]), strict=True))
    assert sum(weights.values()) == budget
    web = [weight for path, weight in weights.items() if "web_shards" in path]
    assert len(web) > 2
    assert sum(web) == 36_002  # of 36001.8, 18000.9 and 6000.3
    assert weights[str(tmp_path / "code_text_document")] == 18_001
    manifest = json.loads((tmp_path / "mix.manifest.json").read_text())
    assert [source["tokens"] for source in manifest["sources"]] == [36_002, 18_001, 6_000]
    for source in manifest["sources"]:
        assert source["epochs"] == pytest.approx(source["tokens"] / corpora[source["name"]])
        assert f"{corpora[source['name']]:,}" in result.out
        drawn_of = rf"drawn: {source['name']} \S+%, [+-]\S+% of all tokens, [+-]\S+% of its own"
        assert re.search(drawn_of, result.out)

    verified = run_tool("verify_dataset", tmp_path / "mix")
    assert verified.code == 2 and "verify the datasets in" in verified.err
    drawn = shares_drawn(list(weights.items()), budget // 16)
    for name, ratio in RATIOS.items():
        share = sum(part for path, part in drawn.items() if f"/{name}" in path)
        assert abs(share - ratio / 10) < 1e-3
    before = {path: path.read_bytes() for path in tmp_path.glob("mix.*")}
    build(tmp_path, recipe)
    assert {path: path.read_bytes() for path in tmp_path.glob("mix.*")} == before


def test_manifest_has_the_hashes_of_the_data(tmp_path: Path, corpora: dict[str, int]) -> None:
    assert build(tmp_path, write_recipe(tmp_path, 1000)).code == 0
    manifest = json.loads((tmp_path / "mix.manifest.json").read_text())
    for source in manifest["sources"]:
        for dataset in source["datasets"]:
            for suffix in ("idx", "bin"):
                content = Path(f"{dataset['path']}.{suffix}").read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                assert dataset[f"{suffix}_sha256"] == (digest if suffix == "idx" else [digest])
            assert dataset["tokenizer_sha256"] == hashlib.sha256(MODEL.read_bytes()).hexdigest()


def test_a_dataset_without_a_manifest(tmp_path: Path, corpora: dict[str, int]) -> None:
    """Is said to be one, since neither tokenizer nor domain can be checked."""
    path = tmp_path / "math_text_document.manifest.json"
    path.unlink()
    result = build(tmp_path, write_recipe(tmp_path, 1000))
    assert result.code == 0
    (line,) = [line for line in result.err.splitlines() if "no manifest" in line]
    assert line.startswith(f"> {tmp_path / 'math_text_document'} has no manifest")
    path.write_text(json.dumps({"format": 1, "merged": True, "shards": []}))
    result = build(tmp_path, write_recipe(tmp_path, 1000))
    assert result.code == 2 and "Expected `array` of length >= 1 - at `$.shards`" in result.err


def shares_drawn(weights: list[tuple[str, int]], samples: int) -> dict[str, float]:
    """Parts of the samples of Megatron's blend, by the samples themselves."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    paths, parts = [path for path, _ in weights], [float(weight) for _, weight in weights]
    settings = gpt_config(16, 1000, blend=(paths, parts))
    blend, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, 0, 0], lambda: True, settings
    ).build()
    drawn = torch.tensor([int(blend[at]["dataset_id"]) for at in range(samples)])
    counts = torch.bincount(drawn, minlength=len(paths)) / samples
    return dict(zip(paths, counts.tolist(), strict=True))


def test_a_source_that_is_short(tmp_path: Path, corpora: dict[str, int]) -> None:
    """Says how many epochs it would take, and takes them if it may."""
    budget = corpora["math"] * 15
    result = build(tmp_path, write_recipe(tmp_path, budget))
    assert result.code == 2
    assert f"math has {corpora['math']:,} tokens" in result.err
    assert "which takes 1.50 epochs, more than max_epochs 1" in result.err
    assert not list(tmp_path.glob("mix.*"))
    result = build(tmp_path, write_recipe(tmp_path, budget, max_epochs=10))
    assert result.code == 0 and "1.500" in result.out


MISTAKES = {
    "no budget": ({"budget": None}, "Expected `int`, got `null` - at `$.budget`"),
    "budget in words": ({"budget": "80B"}, "Expected `int`, got `str` - at `$.budget`"),
    "unknown field": ({"sequence": 1}, "unknown field `sequence`"),
    "no sources": ({"sources": []}, "Expected `array` of length >= 1 - at `$.sources`"),
    "source without data": (
        {"sources": [{"name": "a"}]},
        "missing required field `data` - at `$.sources[0]`",
    ),
    "negative ratio": (
        {"sources": [{"name": "a", "ratio": -1, "data": "math_text_document"}]},
        "Expected `int` >= 1 - at `$.sources[0].ratio`",
    ),
    "absent data": ({"sources": [{"name": "a", "data": "absent"}]}, "cannot read"),
    "another domain": (
        {"sources": [{"name": "a", "domain": "web", "data": "math_text_document"}]},
        "but",
    ),
    "twice": (
        {
            "sources": [
                {"name": "a", "data": "math_text_document"},
                {"name": "b", "data": "math_text_document"},
            ]
        },
        "named twice",
    ),
    "twice in other words": (
        {
            "sources": [
                {"name": "a", "data": "math_text_document"},
                {"name": "b", "data": "../{directory}/math_text_document"},
            ]
        },
        "named twice",
    ),
    "no epochs": ({"max_epochs": 0}, "Expected `float` > 0.0 - at `$.max_epochs`"),
}


def test_no_room(tmp_path: Path, corpora: dict[str, int]) -> None:
    """An older mix stays, list and manifest."""
    assert build(tmp_path, write_recipe(tmp_path, 1000)).code == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("mix.*")}
    recipe = write_recipe(tmp_path, 2000)
    with full_disk(300):
        result = build(tmp_path, recipe)
        checked = build(tmp_path, recipe, "--check-sequence-length", 16)
    assert checked.code == 2 and "leave out --check-sequence-length\n" in checked.err
    assert result.code == 2 and "mix.manifest.json: File too large" in result.err
    assert {path: path.read_bytes() for path in tmp_path.glob("mix.*")} == before
    assert build(tmp_path, recipe).code == 0
    assert set(tmp_path.glob("mix.*")) == before.keys()


def test_mistakes(tmp_path: Path, corpora: dict[str, int]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for kind, (changes, message) in MISTAKES.items():
        recipe = write_recipe(tmp_path, **({"budget": 1000} | changes))
        recipe.write_text(recipe.read_text().replace("{directory}", tmp_path.name))
        result = build(tmp_path, recipe)
        assert result.code == 2 and message in result.err, kind
        assert "Traceback" not in result.err and not list(tmp_path.glob("mix.*"))
    builder = IndexedDatasetBuilder(str(tmp_path / "empty.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([]), [0])
    builder.finalize(str(tmp_path / "empty.idx"))
    recipe = write_recipe(tmp_path, 1000, sources=[{"name": "none", "data": "empty"}])
    assert f"error: {recipe}: none has no tokens\n" in build(tmp_path, recipe).err
    broken = tmp_path / "broken.yaml"
    broken.write_text("budget: [")
    assert "broken.yaml" in build(tmp_path, broken).err


@settings(deadline=None)
@given(st.integers(1, 10**12), st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_apportion(total: int, ratios: list[int]) -> None:
    """Adds up, and no part is a whole token away from its exact share."""
    found = apportion(total, ratios)
    assert sum(found) == total
    for part, ratio in zip(found, ratios, strict=True):
        assert abs(part - Fraction(total * ratio, sum(ratios))) < 1


def test_the_papers_mixes() -> None:
    general = read_mix(str(MIXES / "general-80b.yaml"))
    assert general.budget == 80 * 10**9
    assert [source.ratio for source in general.sources] == [6, 3, 1]
    budgets = {path.stem: read_mix(str(path)).budget for path in MIXES.glob("*.yaml")}
    assert budgets == {
        "general-80b": 80 * 10**9,
        "math-15b": 15 * 10**9,
        "math-reference-0.5b": 5 * 10**8,
        "general-reference-1.9b": 19 * 10**8,
    }


def test_tulus_template() -> None:
    """As in allenai/open-instruct, without the tokens that end the assistant's turns: the last of
    them is the document's, which --append-eod puts right behind the text."""
    render = chat_renderer(str(MIXES / "tulu.jinja"))
    first = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    assert render(first) == "<|system|>\nBe brief.\n<|user|>\n1 + 1?\n<|assistant|>\n2"
    second = [{"from": "human", "value": "Sure?\n\n"}, {"from": "gpt", "value": "\tYes.\n\nSure. "}]
    assert render([*first, *second]) == (
        f"{render(first)}\n<|user|>\nSure?\n<|assistant|>\nYes.\n\nSure."
    )
