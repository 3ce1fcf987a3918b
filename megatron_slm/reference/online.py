"""Score with a reference model that is a frozen replica on the policy's own ranks.

The replica is cut like the policy (into the same tensor, pipeline, context and sequence parallel
groups, but without virtual stages), and scores a step's micro-batches in one forward-only pipeline
pass.  Its losses are computed from the last hidden states, chunk by chunk and without logits in
memory (loss/chunked.py); if the policy has the dense head, so does the reference, since their
losses are compared.

Memory: its weights, 2 bytes a parameter in bf16 (4 in float32), divided by TP x PP, or two layers
of them if they stream from the host (offload.py); and, while it runs, the activations of one layer
for one scoring batch.  Time: a forward pass, which is a third of the policy's step for a reference
of the policy's size.  It has no gradient buffers, no optimizer state and no dropout, and draws no
random numbers, neither when it is built nor when it runs.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.loss import Scoring, all_losses
from megatron_slm.model.checkpoint_table import other_weights, read_checkpoint_table
from megatron_slm.model.documents import activation_shape, by_sample
from megatron_slm.model.hybrid_pattern import layers_of
from megatron_slm.model.model_config import build_stage
from megatron_slm.reference import Reference, Scored
from megatron_slm.reference.checkpoint import UNSUPPORTED_MODELS, ReferenceCheckpoint
from megatron_slm.reference.fp8 import check_fp8
from megatron_slm.reference.layout import check_layout
from megatron_slm.reference.loading import load_parts
from megatron_slm.reference.offload import StreamedLayers


class OnlineReference(Reference):
    """A frozen model, and the pass that scores with it."""

    def __init__(self, model: torch.nn.Module, arguments: Namespace, scoring: Scoring) -> None:
        """Take a model, whose vocabulary may be padded differently than the policy's.

        Args:
            model: the model, from build_model(), with its weights.
            arguments: its arguments, from reference_arguments().
            scoring: what to compute.
        """
        self.model = model
        self.scoring = scoring
        self.arguments = arguments
        self.micro_batch_size = arguments.slm_reference_micro_batch_size
        self.streamed = (
            StreamedLayers(unwrapped(model)) if arguments.slm_reference_offload else None
        )

    @torch.no_grad()
    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> list[Scored]:
        """Score in one pass.  Collective over the pipeline, tensor- and context-parallel ranks."""
        joined = _joined(self.micro_batch_size, micro_batch_size, count)
        samples = micro_batch_size * joined

        def forward_step(
            data_iterator: Iterator[Any], model: torch.nn.Module
        ) -> tuple[Tensor, Callable[..., Tensor]]:
            first, *others = [next(data_iterator) for _ in range(joined)]
            output = model(
                **first.model_inputs(self.arguments, *others),
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
        if self.streamed is not None:
            self.streamed.begin()
        scored = schedule(
            forward_step_func=forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=count // joined,
            **activation_shape(self.arguments, self.arguments.seq_length, samples),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self.streamed is not None:
            self.streamed.end()
        length = self.arguments.seq_length // self.arguments.context_parallel_size
        parts = [
            part for values in scored for part in by_sample(values, length).chunk(joined, dim=-2)
        ]
        return [tuple(part) if self.scoring.entropies else (part, None) for part in parts]


def frozen_reference(
    checkpoint: ReferenceCheckpoint,
    arguments: Namespace,
    scoring: Scoring,
    layer_spec: Callable[..., Any] | None,
) -> OnlineReference:
    """Build a reference, and load its weights from a checkpoint, resharding them.

    Args:
        checkpoint: where the weights are.
        arguments: the reference's arguments, from reference_arguments().
        scoring: what to compute.
        layer_spec: as for model_config.
    """
    model = build_model(arguments, layer_spec)
    load_weights(model, checkpoint, arguments)
    return OnlineReference(model, arguments, scoring)


def _joined(wanted: int | None, micro_batch_size: int, count: int) -> int:
    """Return how many of `count` micro-batches to score at once.

    That is as many as make up `wanted` samples, or fewer if these do not divide `count`.
    """
    return math.gcd(max(1, (wanted or 0) // micro_batch_size), count)


def frozen_arguments(arguments: Namespace) -> Namespace:
    """Return the policy's arguments, changed for a frozen replica."""
    own = copy(arguments)
    own.attention_dropout = own.hidden_dropout = 0.0
    own.perform_initialization = False
    if own.num_experts:
        # It routes without learning anything, and drops no tokens: what is lost of one that is
        # dropped would depend on the samples that it is scored with.
        own.moe_router_load_balancing_type, own.moe_aux_loss_coeff = "none", 0.0
        own.moe_z_loss_coeff = own.moe_expert_capacity_factor = None
        own.moe_pad_expert_input_to_capacity = own.moe_shared_expert_overlap = False
    # The policy may have these, but a reference is known not to.
    for name in UNSUPPORTED_MODELS:
        setattr(own, name, None)
    own.multi_latent_attention = False
    own.mtp_num_layers = None  # what they predict is not scored
    # The reference has one model chunk on each stage, whatever the layout of the policy's layers.
    own.virtual_pipeline_model_parallel_size = None
    own.num_layers_per_virtual_pipeline_stage = None
    own.microbatch_group_size_per_vp_stage = 1
    own.pipeline_model_parallel_layout = None
    own.decoder_first_pipeline_num_layers = own.decoder_last_pipeline_num_layers = None
    own.account_for_embedding_in_pipeline_split = own.account_for_loss_in_pipeline_split = False
    own.overlap_p2p_comm = False
    own.overlap_p2p_comm_warmup_flush = False
    # With its own precision it is a fixed function; delayed scales would depend on the policy.
    own.fp8 = "e4m3" if own.slm_reference_fp8 else None
    own.fp8_recipe = "tensorwise"
    own.fp4 = own.te_precision_config_file = None
    own.fp8_param_gather = own.fp4_param_gather = False
    if own.fp8 is None or not own.num_experts:  # which Megatron would refuse
        own.moe_router_padding_for_fp8 = own.moe_router_padding_for_quantization = False
    own.disable_parameter_transpose_cache = True  # keep no copies in fp8 besides the weights
    if own.slm_reference_offload:
        own.use_cpu_initialization = True  # the weights never lie on the device as a whole
    # These have buffers and hooks made for the policy's sizes, or registered once a process.
    own.tp_comm_overlap = own.fine_grained_activation_offloading = False
    own.cpu_offloading = own.init_model_with_meta_device = False
    own.cpu_offloading_num_layers = 0
    # Without a backward, there is nothing to accumulate, to recompute or to capture.
    own.gradient_accumulation_fusion = own.bias_gelu_fusion = False
    own.recompute_granularity = own.recompute_method = own.recompute_num_layers = None
    own.moe_layer_recompute, own.recompute_modules = False, None
    own.distribute_saved_activations = False
    own.cuda_graph_impl = "none"
    return own


def reference_arguments(checkpoint: ReferenceCheckpoint, arguments: Namespace) -> Namespace:
    """Return the policy's arguments, changed for a frozen replica of the reference's architecture.

    Args:
        checkpoint: the reference's checkpoint.
        arguments: the policy's arguments.

    Raises:
        UserError: the reference cannot be cut as the policy is.
    """
    own = copy(arguments)
    own.num_experts = own.hybrid_layer_pattern = None  # unless the reference has its own
    for name, value in checkpoint.architecture().items():
        setattr(own, name, value)
    own = frozen_arguments(own)
    if own.hybrid_layer_pattern is not None:
        own.hybrid_layer_pattern = layers_of(own.hybrid_layer_pattern)  # whatever its own stages
        own.num_layers = len(own.hybrid_layer_pattern)
    if not own.num_experts:
        own.expert_model_parallel_size = 1
        own.moe_ffn_hidden_size = own.moe_shared_expert_intermediate_size = None
        own.moe_layer_freq, own.moe_router_enable_expert_bias = 1, False
    where = f"the reference in {checkpoint.directory}"
    check_layout(own, where)
    if (
        own.position_embedding_type == "learned_absolute"
        and own.max_position_embeddings < own.seq_length
    ):
        raise UserError(
            f"{where} has {own.max_position_embeddings} learned positions, fewer than "
            f"--seq-length {own.seq_length}: take shorter sequences, or another reference"
        )
    try:
        core_transformer_config_from_args(own)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{where} does not fit this run's arguments: {error}") from error
    check_fp8(own, where)
    return own


def build_model(arguments: Namespace, layer_spec: Callable[..., Any] | None) -> torch.nn.Module:
    """Build this rank's part of a frozen model, whose weights mean nothing yet.

    Args:
        arguments: the reference's arguments.
        layer_spec: as for model_config.
    """
    # An embedding of learned positions draws its weights even if it is told not to.
    with torch.random.fork_rng(devices=[]):
        model: torch.nn.Module = build_stage(
            arguments,
            layer_spec,
            first=mpu.is_pipeline_first_stage(),
            last=mpu.is_pipeline_last_stage(),
        )
    model.requires_grad_(False)
    if not arguments.slm_reference_offload:
        model.cuda(torch.cuda.current_device())
    if arguments.fp16 or arguments.bf16:
        model = Float16Module(model.config, model)
    return model.eval()


def unwrapped(model: torch.nn.Module) -> LanguageModule:
    """Return the model within Megatron's wrapper for 16 bits, if it has one."""
    inner = model.module if isinstance(model, Float16Module) else model
    assert isinstance(inner, LanguageModule)
    return inner


def load_weights(
    model: torch.nn.Module, checkpoint: ReferenceCheckpoint, arguments: Namespace
) -> None:
    """Load each rank's part of a model's weights, and only these, from a checkpoint of any layout.

    Args:
        model: the model, from build_model().
        checkpoint: where the weights are.
        arguments: the model's arguments.

    Raises:
        UserError: ranks found different checkpoints, or the checkpoint has weights that its
            arguments do not ask for.
    """
    inner = unwrapped(model)
    directory = str(checkpoint.directory)
    print_rank_0(f"> loading the reference model from {directory}")
    metadata = dist_checkpointing.load_content_metadata(directory) or {}
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    # Extra states belong to fp8; whether layers have them depends on Transformer Engine's version.
    wanted = {
        name: tensor
        for name, tensor in inner.sharded_state_dict(metadata=metadata).items()
        if not name.endswith("_extra_state")
    }
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    keys = {tensor.key for tensor in wanted.values()}
    torch.distributed.all_gather_object(everywhere, (directory, keys))
    found = sorted({place for place, _ in everywhere})
    if len(found) > 1:
        raise UserError(
            f"ranks found different reference checkpoints, {found}: name one with "
            "--slm-reference-ckpt-step"
        )
    known = set[str]().union(*(names for _, names in everywhere))
    table = read_checkpoint_table(checkpoint.directory)
    others, lacking = other_weights(table, known), sorted(known - {*table.state_dict_metadata})
    if others or lacking:
        has = [f"has {name}" for name in others[:1]] + [f"lacks {name}" for name in lacking[:1]]
        raise UserError(
            f"the reference in {directory} {' and '.join(has)}, which is not what its arguments "
            "describe: save it with the options that describe its model, and with the layers that "
            "megatron_slm.pretrain has"
        )
    loaded = load_parts({"reference": wanted}, checkpoint.directory, arguments)["reference"]
    missing, unexpected = inner.load_state_dict(loaded, strict=False)
    if unexpected or any(not name.endswith("_extra_state") for name in missing):
        raise RuntimeError(f"reference {directory}: missing {missing}, unexpected {unexpected}")
