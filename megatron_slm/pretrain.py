"""Selective Language Modeling pretraining: torchrun ... -m megatron_slm.pretrain [arguments]

Takes all arguments of Megatron's GPT pretraining and the group "selective language modeling".
With --slm-token-ratio 1 and no reference it is causal language modeling, which is how reference
models are trained.
"""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import cache, partial

import torch

from megatron_slm.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, check it, and train."""
    first_rank = int(os.getenv("RANK", "0")) == 0
    if not first_rank:
        warnings.filterwarnings("ignore")
    cpu = not torch.cuda.is_available()
    if cpu:
        from megatron_slm import platform

        if first_rank:
            print("> no CUDA device found: running on the CPU platform (gloo)", flush=True)
        platform.install()
    run(cpu)


def run(cpu: bool) -> None:
    """Do what the command line says; `cpu` if the CPU platform is installed."""
    with exit_on_user_error():
        _pretrain(_parse_arguments(cpu))


def extra_arguments(cpu: bool) -> Callable[[ArgumentParser], ArgumentParser]:
    """Megatron's `extra_args_provider`; `cpu` if the CPU platform is installed."""
    from megatron_slm.training.arguments import add_arguments
    from megatron_slm.training.checkpoint_arguments import take_from_checkpoint

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        add_arguments(parser)
        if cpu:
            from megatron_slm import platform

            parser.set_defaults(**platform.ARGUMENT_DEFAULTS)
        take_from_checkpoint(parser)
        return parser

    return add_all


def _parse_arguments(cpu: bool) -> Namespace:
    from megatron.training.arguments import parse_and_validate_args

    args: Namespace = parse_and_validate_args(
        extra_args_provider=extra_arguments(cpu),
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
    return args


def _pretrain(args: Namespace) -> None:
    # Megatron may be imported only when the platform is installed.
    from megatron.core.enums import ModelType
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.training import get_tokenizer, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_slm.loss import Scoring
    from megatron_slm.model.gpt_config import gpt_config
    from megatron_slm.model.layer_spec import plain_block_spec
    from megatron_slm.reference.online import OnlineReference, reference_arguments
    from megatron_slm.training import datasets, report, seam
    from megatron_slm.training.arguments import open_reference, validate_arguments
    from megatron_slm.training.resumed import check_same_reference, saved_arguments
    from megatron_slm.training.settings import settings_from_arguments
    from megatron_slm.training.step import SelectiveStep
    from megatron_slm.training.tokenizer import check_tokenizer, record_tokenizer

    validate_arguments(args)
    settings = settings_from_arguments(args)
    checkpoint = open_reference(args)
    record_tokenizer(args, get_tokenizer())
    layer_spec = None if HAVE_TE else plain_block_spec
    saved = cache(partial(saved_arguments, args))  # known when the policy has been loaded
    build_reference = None
    if checkpoint is not None:
        check_tokenizer(args, checkpoint)
        own_args = reference_arguments(checkpoint, args)
        scoring = Scoring(args.slm_vocab_size, entropies=args.slm_score == "reference-entropy")

        def build_reference() -> OnlineReference:
            check_same_reference(args, saved())
            return OnlineReference(checkpoint, own_args, scoring, layer_spec)

    datasets.use_prebuilt_helpers()
    step = SelectiveStep(
        settings, build_reference, lambda: getattr(saved(), "slm_carried_threshold", None)
    )
    seam.install(step.run)
    report.install()

    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config(args, layer_spec)),
        datasets.train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        step.forward_step,
    )


if __name__ == "__main__":
    main()
