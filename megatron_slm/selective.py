"""The API: train with selective language modeling in Megatron's own `pretrain()`.

    args = parse_and_validate_args(extra_args_provider=add_slm_arguments)
    slm = SelectiveTraining(args)
    slm.install()
    pretrain(config, slm.datasets, ModelType.encoder_or_decoder, slm.forward_step)

`megatron_slm.pretrain` does just this.  docs/your-own-script.md shows how to do it in a script or
in a training loop of your own.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_slm.entry import add_arguments
from megatron_slm.errors import UserError, say
from megatron_slm.model.model_config import installed_layers, model_config
from megatron_slm.model.selected_layers import use_selected_layers
from megatron_slm.reference.checkpoint import FLAGS, ReferenceCheckpoint
from megatron_slm.training import event_writer, megatron_hooks
from megatron_slm.training.caches import open_values
from megatron_slm.training.checkpoint_arguments import check_start
from megatron_slm.training.command_line.arguments import validate_arguments
from megatron_slm.training.command_line.first_check import options_in
from megatron_slm.training.command_line.idle_options import without_effect
from megatron_slm.training.command_line.option_checks import check_options
from megatron_slm.training.command_line.parsing import check_run, check_when_parsed
from megatron_slm.training.command_line.refusals import in_one_line
from megatron_slm.training.data_faults import data_faults
from megatron_slm.training.datasets import DatasetProvider, check_files, check_named
from megatron_slm.training.dump import token_dumps
from megatron_slm.training.settings import MOST_REPORTED, settings_from_arguments
from megatron_slm.training.sources import check_batches, open_reference, open_source
from megatron_slm.training.step import SelectiveStep
from megatron_slm.training.tokenizer import record_tokenizer


def add_slm_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of selective language modeling to Megatron's parser.

    To be given to Megatron as `extra_args_provider`.  The parser then also checks a command line as
    soon as it has parsed it.
    """
    return check_when_parsed(add_arguments(parser), check_run)


class SelectiveTraining:
    """A training run with selective language modeling, ready to be handed to Megatron."""

    def __init__(self, args: Namespace, datasets: Callable[..., Any] | None = None) -> None:
        """Check all that can be checked without process groups and models.

        This includes the arguments, the tokenizer, the datasets' files, the reference or its cached
        losses, the checkpoint that the run starts from, and the directories that it writes to.

        Args:
            args: Megatron's arguments, validated and made global, as parse_and_validate_args does.
            datasets: builds datasets of the script's own, as Megatron's
                `train_valid_test_dataset_provider` does; None for those of pretrain_gpt.py.

        Raises:
            UserError: something is wrong; the message says where, and what to do.
        """
        if not hasattr(args, "slm_token_ratio"):
            raise UserError(
                "Megatron's parser lacks the options of selective language modeling: give "
                "parse_and_validate_args(extra_args_provider=add_slm_arguments)"
            )
        given = options_in(sys.argv[1:])
        check_options(args, given)
        if datasets is None:
            check_named(args)
        _check_inputs(args)
        values = open_values(args)
        settings = settings_from_arguments(args, values)
        entropies = settings.selective and "reference_entropies" in settings.selection.needs
        source = open_source(args, settings.domains, installed_layers(), entropies)
        args.slm_selects = settings.selective
        args.slm_reference_identity = None if source is None else source.identity
        for line in without_effect(args, given, HAVE_TE, settings.head):
            say(line)
        if settings.domains and not settings.reported:
            say(
                f"note: the blend has {len(settings.domains)} datasets: what is selected of each "
                f"is not logged, as it is of up to {MOST_REPORTED}"
            )
        resumed = check_start(args)
        event_writer.check_directory(args.tensorboard_dir)
        self.args = args
        self.datasets = DatasetProvider(None if source is None else source.caches, datasets, values)
        """Megatron's `train_valid_test_dataset_provider`; adds cached losses to the samples."""
        dumps = token_dumps(args, settings, self.datasets)
        self.step = SelectiveStep(settings, source, dumps, resumed)

    def install(self) -> None:
        """Wrap the symbols of Megatron that have to be wrapped for `pretrain()`, and log them.

        Must be called before `pretrain()`; a second call changes nothing.

        Raises:
            UserError: a symbol is not the one that its wrapper was written for.
        """
        step = self.step
        megatron_hooks.install_for_training(
            megatron_hooks.Run(
                run_step=step.run,
                before_save=step.save,
                after_training=step.finish,
                timed=step.computes_reference,
                events=self.args.tensorboard_dir,
            )
        )

    def model_config(self) -> Any:
        """Return Megatron's GPTModelConfig; without Transformer Engine, with plain layers."""
        config = model_config(self.args, installed_layers())
        if self.args.slm_backward == "selected":
            use_selected_layers(config)
        return config

    def forward_step(self, data_iterator: Any, model: torch.nn.Module) -> Any:
        """Pass a micro-batch through the policy: Megatron's `forward_step_func`.

        Raises:
            UserError: no step has begun.
        """
        if self.step.step is None:
            raise UserError(
                "slm.forward_step was called outside of a step: call slm.install() before "
                "pretrain(), or slm.schedule() in a loop of your own"
            )
        return self.step.forward_step(data_iterator, model)

    def schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a schedule so that it runs the reference first, for a training loop of your own.

        The loop calls the result with the schedule's arguments.  For Megatron's own loop,
        `install()` does this.
        """
        return partial(self.step.run, schedule)

    def before_save(self, iteration: int) -> None:
        """Write what has to be on the disk before the policy's checkpoint of `iteration`.

        For a training loop of your own.  Collective over all ranks.
        """
        self.step.save(iteration)

    def finish(self, iteration: int) -> None:
        """Write the last token dump, after `iteration` iterations.

        For a training loop of your own.  Collective over all ranks.
        """
        self.step.finish(iteration)

    @contextmanager
    def errors_in_one_line(self) -> Iterator[None]:
        """Turn exceptions in the block into one line if they are about arguments or data.

        To be put around `pretrain()`.

        Raises:
            UserError: Megatron refused arguments, or data could not be read.  Others pass.
        """
        begun = lambda: self.step.step is not None  # noqa: E731
        with data_faults(self.args), in_one_line(begun):
            yield


def open_for_scoring(
    args: Namespace,
    load: str,
    steps: list[int | None],
    flags: tuple[str, str] = FLAGS,
    *,
    draws: bool = True,
) -> list[tuple[ReferenceCheckpoint, Namespace]]:
    """Check the inputs of a job that scores with checkpoints, open these, and initialize Megatron.

    Args:
        args: Megatron's arguments, validated and made global.
        load: the directory of the checkpoints.
        steps: their iterations; None for the latest.
        flags: the options from which `load` and `steps` come, for errors.
        draws: whether the job draws a run's samples from the datasets.

    Returns:
        Each checkpoint, with the arguments to build its model with.

    Raises:
        UserError: bad input, which every rank finds alike.
    """
    check_batches(args)
    _check_inputs(args, draws)
    opened = [open_reference(args, load, step, flags) for step in steps]
    megatron_hooks.install_for_scoring()
    with in_one_line():
        initialize_megatron()
    return opened


def _check_inputs(args: Namespace, draws: bool = True) -> None:
    """Check validated arguments, the tokenizer, and the datasets' files."""
    validate_arguments(args)
    record_tokenizer(args, get_tokenizer())
    check_files(args, draws)
