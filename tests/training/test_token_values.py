"""Which caches --slm-token-values takes, and what it says of the others."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from msgspec import UNSET

from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import write_shard
from megatron_slm.data.score_manifest import CacheManifest
from megatron_slm.data.scored_dataset import dataset_fingerprint
from megatron_slm.errors import UserError
from megatron_slm.training.caches import open_values

LENGTH = 8


def data(directory: Path, *names: str) -> list[str]:
    """Files that stand for datasets, of which only fingerprints are taken."""
    prefixes = [str(directory / name) for name in names]
    for prefix in prefixes:
        for kind in ("bin", "idx"):
            Path(f"{prefix}.{kind}").write_bytes(prefix.encode() + kind.encode())
    return prefixes


def write(directory: Path, prefix: str, values: str | None, tokenizer: str = "t") -> str:
    name = Path(prefix).name
    source = ScoredData(tokenizer, 100, {name: dataset_fingerprint(prefix)})
    kind = UNSET if values is None else values
    manifest = CacheManifest("document", "float32", LENGTH, 4, {name: 2}, source, {}, values=kind)
    manifest.write(directory)
    ones = np.ones((2, LENGTH))
    labels, domains = ones.astype(np.int32), np.zeros(2, np.int64)
    write_shard(directory, manifest, name, 0, ones.astype(np.float32), labels, domains)
    return str(directory)


def arguments(prefixes: list[str], *directories: str, apart: bool = False) -> Namespace:
    return Namespace(
        slm_token_values=list(directories),
        sft=False,
        mock_data=False,
        dataloader_inter_document_masking=apart,
        slm_tokenizer="t",
        slm_vocab_size=100,
        data_path=prefixes,
        data_args_path=None,
        per_split_data_args_path=None,
        train_data_path=None,
        valid_data_path=None,
        test_data_path=None,
    )


@pytest.mark.parametrize("apart", [False, True])
def test_by_kind_and_dataset(tmp_path: Path, apart: bool) -> None:
    """Values serve runs whose documents see each other and those whose do not."""
    prefixes = data(tmp_path, "web", "code")
    caches = [
        write(tmp_path / f"{kind}-{number}", prefix, kind)
        for kind in ("external", "mask")
        for number, prefix in enumerate(prefixes)
    ]
    found = open_values(arguments(prefixes, *caches, apart=apart))
    assert {kind: {*sections} for kind, sections in found.items()} == {
        "external": {"web", "code"},
        "mask": {"web", "code"},
    }
    assert not open_values(arguments(prefixes))


def test_refused(tmp_path: Path) -> None:
    prefixes = data(tmp_path, "web", "code")
    web = write(tmp_path / "values", prefixes[0], "external")
    losses = write(tmp_path / "losses", prefixes[0], None)
    other = write(tmp_path / "other", prefixes[0], "mask", tokenizer="u")
    again = write(tmp_path / "again", prefixes[0], "external")
    both = "no values of the kind external of the datasets code"
    for directories, said in {
        (web,): both,
        (losses,): f"{losses} holds losses of a reference: give it with --slm-reference-cache",
        (other,): f"the score cache {other} was made for another run: tokenizer is t here, u there",
        (web, again): "--slm-token-values: two have values of web",
        (str(tmp_path),): f"{tmp_path} is not a score cache: it has no manifest.json",
    }.items():
        with pytest.raises(UserError) as error:
            open_values(arguments(prefixes, *directories))
        assert said in str(error.value) and "\n" not in str(error.value)
    args = arguments(prefixes, web)
    args.sft = True
    with pytest.raises(UserError, match="--slm-token-values cannot be used with --sft"):
        open_values(args)
