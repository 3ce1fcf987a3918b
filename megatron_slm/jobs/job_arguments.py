"""Adapt a training run's arguments to a job that scores with a checkpoint instead of training."""

from __future__ import annotations

from argparse import Namespace

from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables

from megatron_slm.model.hybrid_pattern import layers_of
from megatron_slm.training.command_line.parsing import DEFAULTS
from megatron_slm.training.command_line.refusals import in_one_line


def settle_arguments(args: Namespace, model: Namespace) -> None:
    """Let Megatron validate the arguments and make them its own, without those of training alone.

    Args:
        args: the training run's arguments, as parsed; changed in place.
        model: the arguments of the checkpoint that scores.  They fill in what Megatron requires of
            a policy and the user left out.
    """
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(model, name))
    # This job's replicas need not divide the run's batch, nor virtual stages its layers.
    batches = {
        name: getattr(args, name) for name in ("global_batch_size", "eval_global_batch_size")
    }
    for name in (*batches, "eval_micro_batch_size"):
        setattr(args, name, None)
    args.num_layers_per_virtual_pipeline_stage = args.num_virtual_stages_per_pipeline_rank = None
    args.pipeline_model_parallel_layout = None
    if args.hybrid_layer_pattern is not None:
        args.hybrid_layer_pattern = layers_of(args.hybrid_layer_pattern)
    args.tensorboard_dir, args.wandb_project = None, ""  # this job does not write to the run's logs
    args.exit_signal_handler = False  # a killed job can be continued like any other
    with in_one_line():
        validate_args(args, DEFAULTS)
        set_global_variables(args)
    args.global_batch_size = batches["global_batch_size"]
    args.eval_global_batch_size = batches["eval_global_batch_size"] or args.global_batch_size
