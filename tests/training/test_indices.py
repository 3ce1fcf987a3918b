"""The indices that Megatron keeps of a dataset, where a full disk or a kill has cut them off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import distributed

from gpt_datasets import gpt_config
from jobs import VOCABULARY, write_dataset
from megatron_slm.errors import UserError
from megatron_slm.training.datasets import _built
from real_text import docstrings
from small_disk import full_disk


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_indices_that_are_cut_off(tmp_path: Path) -> None:
    """What a full disk leaves is removed, and what a kill leaves is named."""
    write_dataset(tmp_path / "data", docstrings(["argparse"]))
    blend, cache = ([str(tmp_path / "data")], None), tmp_path / "indices"
    config = gpt_config(64, VOCABULARY, blend=blend, path_to_cache=str(cache))

    def build() -> list[Any]:
        return _built(BlendedMegatronDatasetBuilder(GPTDataset, [500, 0, 0], lambda: True, config))

    for most in (10, 800, 3000):
        with full_disk(most), pytest.raises(UserError, match="with --data-cache-path") as error:
            build()
        assert "None" not in str(error.value) and "\n" not in str(error.value)
    whole = build()[0][499]["tokens"].tolist()
    for index in cache.glob("*.npy"):
        for size in (0, 50, index.stat().st_size - 1):
            os.truncate(index, size)
            with pytest.raises(UserError, match=rf"^{index} is damaged: remove it"):
                build()
            index.unlink()
            assert build()[0][499]["tokens"].tolist() == whole
