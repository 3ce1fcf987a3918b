"""The reference model as a frozen replica on the policy's own ranks.

It is cut like the policy (same tensor, pipeline, context and sequence parallel groups, no virtual
stages) and scores a step's micro-batches in one forward-only pipeline pass:

    hidden states -> token losses chunk by chunk (loss/chunked.py), no logits in memory

It costs 2 bytes a parameter in bf16 (4 in float32), divided by TP x PP, and a forward: a third of
the policy's step when it is of the policy's size.  It has no gradient buffers, no optimizer state
and no dropout, and draws no random number, neither when built nor when run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.loss import Scoring, all_losses
from megatron_slm.model.gpt_config import gpt_config
from megatron_slm.reference.checkpoint import UNSUPPORTED, ReferenceCheckpoint


class OnlineReference:
    """A frozen GPT and the pass that scores with it.

    Args:
        checkpoint: where its weights are, resharded as they load.
        arguments: its own, from reference_arguments().
        scoring: what is wanted.  Padding of the vocabulary is left out of the reference's softmax,
            so that it does not matter how much of it the checkpoint has.
        layer_spec: layers of a (GPTModelConfig, vp_stage), None for Megatron's choice.
    """

    def __init__(
        self,
        checkpoint: ReferenceCheckpoint,
        arguments: Namespace,
        scoring: Scoring,
        layer_spec: Callable[..., Any] | None,
    ) -> None:
        self.scoring = scoring
        self.seq_length = arguments.seq_length
        # An embedding of learned positions draws its weights whatever it is told.
        with torch.random.fork_rng(devices=[]):
            self.model = _build(arguments, layer_spec)
        _load(self.model, checkpoint)

    @torch.no_grad()
    def score(self, micro_batches: Iterator[Any], count: int, micro_batch_size: int) -> list[Any]:
        """Read `count` micro-batches and set reference_losses (and reference_entropies), float32
        [b, s/c], where the last pipeline stage is.  Collective over the pipeline, tensor- and
        context-parallel ranks."""
        read: list[Any] = []

        def forward_step(
            data_iterator: Iterator[Any], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Tensor]]:
            batch = next(data_iterator)
            read.append(batch)
            output = model(
                **batch.model_inputs(),
                output_processor=all_losses,
                output_processor_context=self.scoring,
            )
            return output, lambda scored, non_loss_data: scored

        pipelined = mpu.get_pipeline_model_parallel_world_size() > 1
        schedule = (
            forward_backward_pipelining_without_interleaving
            if pipelined
            else forward_backward_no_pipelining
        )
        scored = schedule(
            forward_step_func=forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=count,
            seq_length=self.seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if mpu.is_pipeline_last_stage():
            for batch, values in zip(read, scored, strict=True):
                if self.scoring.entropies:
                    batch.reference_losses, batch.reference_entropies = values
                else:
                    batch.reference_losses = values
        return read


def reference_arguments(checkpoint: ReferenceCheckpoint, arguments: Namespace) -> Namespace:
    """The policy's arguments with the reference's architecture.

    Raises:
        UserError: the reference cannot be cut as the policy is.
    """
    own = copy(arguments)
    for name, value in checkpoint.architecture().items():
        setattr(own, name, value)
    own.attention_dropout = own.hidden_dropout = 0.0
    own.perform_initialization = False
    for name in UNSUPPORTED:  # what the reference is known not to have, though the policy may
        setattr(own, name, None)
    own.multi_latent_attention = False
    # The reference has one model chunk per stage, whatever layout the policy's layers have.
    own.virtual_pipeline_model_parallel_size = None
    own.num_layers_per_virtual_pipeline_stage = None
    own.microbatch_group_size_per_vp_stage = 1
    own.pipeline_model_parallel_layout = None
    own.decoder_first_pipeline_num_layers = own.decoder_last_pipeline_num_layers = None
    own.account_for_embedding_in_pipeline_split = own.account_for_loss_in_pipeline_split = False
    own.overlap_p2p_comm = False
    own.overlap_p2p_comm_warmup_flush = False
    # Its own precision, so that it is a fixed function: scales of fp8 would be the policy's.
    own.fp8 = own.fp4 = own.te_precision_config_file = None
    own.fp8_param_gather = own.fp4_param_gather = False
    # Buffers and hooks that are made for the policy's sizes, or registered once a process.
    own.tp_comm_overlap = own.fine_grained_activation_offloading = False
    own.cpu_offloading = own.init_model_with_meta_device = False
    own.cpu_offloading_num_layers = 0
    # Nothing to accumulate, to recompute or to capture in a pass without a backward.
    own.gradient_accumulation_fusion = own.bias_gelu_fusion = False
    own.recompute_granularity = own.recompute_method = own.recompute_num_layers = None
    own.distribute_saved_activations = False
    own.cuda_graph_impl = "none"
    where = f"the reference in {checkpoint.directory}"
    for what, value, name, size in (
        ("layers", own.num_layers, "pipeline", own.pipeline_model_parallel_size),
        ("attention heads", own.num_attention_heads, "tensor", own.tensor_model_parallel_size),
        ("feed-forward units", own.ffn_hidden_size, "tensor", own.tensor_model_parallel_size),
    ):
        if value % size:
            raise UserError(
                f"{where} has {value} {what}, which {name}-model-parallel size {size} does not "
                "divide; the reference runs on the policy's ranks, cut as the policy is"
            )
    if (
        own.position_embedding_type == "learned_absolute"
        and own.max_position_embeddings < own.seq_length
    ):
        raise UserError(
            f"{where} has {own.max_position_embeddings} learned positions, fewer than "
            f"--seq-length {own.seq_length}"
        )
    try:
        core_transformer_config_from_args(own)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{where} does not fit this run's arguments: {error}") from error
    return own


def _build(arguments: Namespace, layer_spec: Callable[..., Any] | None) -> torch.nn.Module:
    config = core_transformer_config_from_args(arguments)
    settings = gpt_config(arguments, layer_spec, config)
    settings.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model: torch.nn.Module = GPTModelBuilder(settings).build_model(
        groups,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    )
    model.requires_grad_(False)
    model.cuda(torch.cuda.current_device())
    if arguments.fp16 or arguments.bf16:
        model = Float16Module(config, model)
    return model.eval()


def _load(model: torch.nn.Module, checkpoint: ReferenceCheckpoint) -> None:
    """Load weights alone, each rank its part, from a checkpoint of any layout."""
    inner = model.module if isinstance(model, Float16Module) else model
    assert isinstance(inner, GPTModel)
    directory = str(checkpoint.directory)
    everywhere: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, directory)
    if len(set(everywhere)) > 1:
        raise UserError(
            f"ranks found different reference checkpoints, {sorted(set(everywhere))}: name one "
            "with --slm-reference-ckpt-step"
        )
    print_rank_0(f"> loading the reference model from {directory}")
    metadata = dist_checkpointing.load_content_metadata(directory) or {}
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    # Extra states are those of fp8, which layers have or lack with Transformer Engine's version.
    wanted = {
        name: tensor
        for name, tensor in inner.sharded_state_dict(metadata=metadata).items()
        if not name.endswith("_extra_state")
    }
    loaded = dist_checkpointing.load({"reference": wanted}, directory)["reference"]
    missing, unexpected = inner.load_state_dict(loaded, strict=False)
    if unexpected or any(not name.endswith("_extra_state") for name in missing):
        raise RuntimeError(f"reference {directory}: missing {missing}, unexpected {unexpected}")
