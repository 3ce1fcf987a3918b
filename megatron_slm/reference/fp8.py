"""Check that a reference computing in fp8 has sizes that Transformer Engine can multiply."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection

from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_slm.errors import UserError


def check_fp8(arguments: Namespace, where: str) -> None:
    """Check a reference's sizes if it is to compute in fp8.

    Args:
        arguments: the reference's own arguments.
        where: how errors name the model.

    Raises:
        UserError: as check_fp8_sizes does.
    """
    if arguments.fp8:
        size = arguments.micro_batch_size
        batches = {size, arguments.eval_micro_batch_size or size}
        tokens = [batch * arguments.seq_length for batch in batches]
        check_fp8_sizes(core_transformer_config_from_args(arguments), tokens, where)


def check_fp8_sizes(config: TransformerConfig, tokens: Collection[int], where: str) -> None:
    """Check that Transformer Engine can multiply each rank's part of a model in fp8.

    It multiplies matrices whose rows are a multiple of 8 and whose columns are a multiple of 16:
    inputs, [tokens, input features], and weights, [output features, input features].

    Args:
        config: the model's configuration.
        tokens: tokens of whole micro-batches, of each size that occurs.
        where: how errors name the model.

    Raises:
        UserError: it cannot; the message names the size that does not fit.
    """
    tensor = config.tensor_model_parallel_size
    pieces = config.context_parallel_size * (tensor if config.sequence_parallel else 1)
    assert config.kv_channels is not None and config.num_query_groups is not None
    queries = config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    for what, number, unit in (
        *(("tokens of a micro-batch", count // pieces, 8) for count in tokens),
        ("hidden features", config.hidden_size, 16),
        ("features of queries", queries // tensor, 16),
        ("features of queries, keys and values", (queries + 2 * keys) // tensor, 8),
        ("feed-forward units", config.ffn_hidden_size // tensor, 16),
    ):
        if number % unit:
            raise UserError(
                f"--slm-reference-fp8: {where} has {number} {what} on a rank, and Transformer "
                f"Engine multiplies only multiples of {unit} in fp8: leave --slm-reference-fp8 out"
            )
