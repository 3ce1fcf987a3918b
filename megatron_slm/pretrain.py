"""Selective Language Modeling pretraining: torchrun ... -m megatron_slm.pretrain [arguments]

Takes all arguments of Megatron's GPT pretraining and the group "selective language modeling".
With --slm-token-ratio 1 and no reference it is causal language modeling, which is how reference
models are trained.  --help lists that group, --help-megatron all.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial

from megatron_slm.entry import add_arguments, start
from megatron_slm.errors import say
from megatron_slm.training.first_check import TRAINING, options_in


def main() -> None:
    """Check the command line, and train."""
    start(TRAINING, _train)


def run(cpu: bool) -> None:
    """Do the same where it is known whether the CPU platform is installed."""
    start(TRAINING, _train, cpu)


def _train(cpu: bool) -> None:
    _pretrain(_parse_arguments(cpu))


def _parse_arguments(cpu: bool) -> Namespace:
    from megatron_slm.training.parsing import parse_training

    return parse_training(partial(add_arguments, cpu=cpu))


def _pretrain(args: Namespace) -> None:
    # Megatron may be imported only when the platform is installed.
    from megatron.core.enums import ModelType
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.training import get_tokenizer, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_slm.model.gpt_config import gpt_config
    from megatron_slm.model.layer_spec import plain_block_spec
    from megatron_slm.training import datasets, event_writer, report, seam
    from megatron_slm.training.arguments import validate_arguments
    from megatron_slm.training.checkpoint_arguments import check_start
    from megatron_slm.training.data_faults import data_faults
    from megatron_slm.training.dump import token_dumps
    from megatron_slm.training.idle_options import without_effect
    from megatron_slm.training.refusals import in_one_line
    from megatron_slm.training.settings import settings_from_arguments
    from megatron_slm.training.sources import open_source
    from megatron_slm.training.step import SelectiveStep
    from megatron_slm.training.tokenizer import record_tokenizer

    validate_arguments(args)
    settings = settings_from_arguments(args)
    record_tokenizer(args, get_tokenizer())
    datasets.check_files(args)
    layer_spec = None if HAVE_TE else plain_block_spec
    source = open_source(args, settings.domains, layer_spec)
    args.slm_selects = settings.selective
    for line in without_effect(args, options_in(sys.argv[1:]), HAVE_TE, settings.head):
        say(line)
    args.slm_reference_identity = None if source is None else source.identity
    saved = check_start(args)
    datasets.use_prebuilt_helpers()
    provider = datasets.DatasetProvider(None if source is None else source.caches)
    step = SelectiveStep(settings, source, token_dumps(args, settings, provider), lambda: saved)
    seam.install(step.run, step.save, step.finish)
    event_writer.install(args.tensorboard_dir)
    report.install(timed=source is not None and source.caches is None)

    with data_faults(args), in_one_line(begun=lambda: step.step is not None):
        pretrain(
            pretrain_cfg_container_from_args(args, gpt_config(args, layer_spec)),
            provider,
            ModelType.encoder_or_decoder,
            step.forward_step,
        )


if __name__ == "__main__":
    main()
