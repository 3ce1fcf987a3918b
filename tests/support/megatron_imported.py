"""Imported once by the process that ranks are forked from: most of the time of a short run."""

# ruff: noqa: F401

from __future__ import annotations

import warnings

from megatron_slm import cpu_platform

cpu_platform.install()

with warnings.catch_warnings(action="ignore"):
    import megatron.core.tokenizers.text
    import megatron.training.arguments
    import megatron.training.training
    import tensorboard.summary.writer.record_writer
    import torch.utils.tensorboard
    import wandb

    import megatron_slm.entry
    import megatron_slm.jobs.scoring
    import megatron_slm.selective
