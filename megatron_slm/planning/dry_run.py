"""Build one rank of a job of any size in this process, without its weights.

torch's fake process group stands in for the other ranks, and fake tensors for memory.  Building a
rank of a 70B model in a job of thousands of ranks therefore takes a second or two.  What would fail
at the start of the real job fails here: arguments that Megatron refuses, layers and heads that do
not divide evenly, and stages whose outputs are not what the schedule expects.  Where Transformer
Engine is installed, its layers are built; what passes micro-batches are the plain ones, on the CPU.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_slm.errors import UserError
from megatron_slm.model.layer_spec import plain_block_spec
from megatron_slm.model.model_config import build_stage, installed_layers
from megatron_slm.planning.launch_recipe import LaunchRecipe
from megatron_slm.planning.recipe import parse, reference_checkpoints
from megatron_slm.reference.online import frozen_arguments, reference_arguments
from megatron_slm.training.command_line.arguments import OF_PLAIN_LAYERS
from megatron_slm.training.command_line.first_check import options_in
from megatron_slm.training.settings import settings_from_arguments

# Of plain layers in Transformer Engine's place; routers in float64 do not use its kernels either.
STAND_IN = OF_PLAIN_LAYERS | {"fp8": None, "fp4": None, "moe_router_dtype": "fp64"}


@dataclass(frozen=True)
class BuiltRank:
    """What one rank of the job holds."""

    rank: int
    """The rank in the whole job."""

    position: dict[str, int]
    """Its rank in each parallel group, by the group's name."""

    chunks: int
    """Number of the policy's model chunks, one for each virtual stage."""

    policy: int
    """Number of the policy's parameters."""

    reference: int
    """Number of the references' parameters, all references together."""

    passed: bool
    """Whether a micro-batch was passed through all of it; False if there are no plain layers like
    Transformer Engine's."""


def dry_run(recipe: LaunchRecipe, rank: int, vocabulary: int) -> BuiltRank:
    """Build the policy and the references of one rank, and pass a micro-batch through each stage.

    The CPU platform must be installed.

    Args:
        recipe: the job's arguments and number of ranks.
        rank: the rank to build.
        vocabulary: number of tokens, since the tokenizer may not be available.

    Raises:
        UserError: the job does not have this rank, or would fail at its start.
    """
    if not 0 <= rank < recipe.ranks:
        raise UserError(f"rank {rank}: the recipe's job has ranks 0 to {recipe.ranks - 1}")
    args = parse(recipe, rank, vocabulary)
    # The caches that would say which values they hold need not be here.
    settings_from_arguments(args, ("external", "mask") if args.slm_token_values else ())
    args.slm_vocab_size = vocabulary
    args.perform_initialization = False
    if installed_layers() is None and "--transformer-impl" not in options_in(recipe.arguments):
        args.transformer_impl = "transformer_engine"  # the CPU platform's default is another
    with _fake_job(args), FakeTensorMode(allow_non_fake_inputs=True):
        position = _check_groups(args)
        stages = args.virtual_pipeline_model_parallel_size
        policy = [
            _build_and_pass(args, stage if stages else None, f"rank {rank}'s policy")
            for stage in range(stages or 1)
        ]
        replicas = [reference_arguments(each, args) for each in reference_checkpoints(args)]
        if args.slm_reference is not None:
            replicas.append(frozen_arguments(args))
        reference = [_build_and_pass(own, None, f"rank {rank}'s reference") for own in replicas]
    return BuiltRank(
        rank,
        position,
        chunks=stages or 1,
        policy=sum(number for number, _ in policy),
        reference=sum(number for number, _ in reference),
        passed=all(passed for _, passed in policy + reference),
    )


@contextmanager
def _fake_job(args: Namespace) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group(
        "fake", store=FakeStore(), rank=args.rank, world_size=args.world_size
    )
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        # This tracker never draws: real generators have states that fake tensors cannot read.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        yield
    finally:
        mpu.destroy_model_parallel()
        distributed.destroy_process_group()


def _check_groups(args: Namespace) -> dict[str, int]:
    """Check that each parallel group has the expected ranks: those that differ from this one only
    in the group's own coordinate.

    Returns:
        This rank's position in each group.

    Raises:
        UserError: Megatron has made another group.
    """
    sizes = {
        "tp": args.tensor_model_parallel_size,
        "cp": args.context_parallel_size,
        "dp": args.data_parallel_size,
        "pp": args.pipeline_model_parallel_size,
    }
    groups = {
        "tp": mpu.get_tensor_model_parallel_group(),
        "cp": mpu.get_context_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
    }
    order = ["tp", "cp", "pp", "dp"] if args.use_tp_pp_dp_mapping else ["tp", "cp", "dp", "pp"]
    position = _check_order(args.rank, order, sizes, groups)
    if args.num_experts is None:
        return position
    split, shared = args.expert_tensor_parallel_size, args.expert_model_parallel_size
    model = sizes["tp"] * sizes["cp"] * sizes["dp"]
    sizes = {"etp": split, "ep": shared, "edp": model // (split * shared), "pp": sizes["pp"]}
    groups = {
        "etp": mpu.get_expert_tensor_parallel_group(),
        "ep": mpu.get_expert_model_parallel_group(),
        "edp": mpu.get_expert_data_parallel_group(),
        "pp": groups["pp"],
    }
    order = ["etp", "ep", "pp", "edp"] if args.use_tp_pp_dp_mapping else ["etp", "ep", "edp", "pp"]
    return position | _check_order(args.rank, order, sizes, groups)


def _check_order(
    rank: int, order: list[str], sizes: dict[str, int], groups: dict[str, Any]
) -> dict[str, int]:
    """Check groups of these names, the first of which have ranks that lie closest."""
    position, stride = {}, 1
    for name in order:
        size = sizes[name]
        position[name] = rank // stride % size
        first = rank - position[name] * stride
        expected = [first + i * stride for i in range(size)]
        found = distributed.get_process_group_ranks(groups[name])
        if found != expected:
            raise UserError(f"rank {rank}: its {name} group is {found}, not {expected}")
        stride *= size
    return position


def _build_and_pass(args: Namespace, vp_stage: int | None, what: str) -> tuple[int, bool]:
    """Build a stage, and pass a micro-batch through it.

    Returns:
        The number of its parameters, and whether a micro-batch could be passed.

    Raises:
        UserError: the stage cannot be built, or its output has the wrong shape.
    """
    virtual = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    first, last = mpu.is_pipeline_first_stage(**virtual), mpu.is_pipeline_last_stage(**virtual)
    ends: dict[str, Any] = {"first": first, "last": last, "vp_stage": vp_stage}
    try:
        model: Any = build_stage(args, installed_layers(), **ends)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{what} cannot be built: {error}") from error
    number = sum(parameter.numel() for parameter in model.parameters())
    if installed_layers() is None:
        try:
            model = build_stage(Namespace(**vars(args) | STAND_IN), plain_block_spec, **ends)
        except (AssertionError, ValueError, UserError):
            return number, False
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.forward = partial(_pass_experts, module)
    # The shape that the schedule receives from the previous stage and sends to the next.
    (between,) = get_tensor_shapes(
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=None,
        config=model.config,
        tp_group=mpu.get_tensor_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
    )
    length = args.seq_length // args.context_parallel_size
    tokens = None
    if first:
        tokens = torch.zeros(args.micro_batch_size, length, dtype=torch.int64)
    else:
        model.set_input_tensor(torch.zeros(between, dtype=model.config.params_dtype))
    columns = args.padded_vocab_size // args.tensor_model_parallel_size
    expected = (args.micro_batch_size, length, columns) if last else tuple(between)
    with torch.no_grad():
        found = tuple(model(tokens, tokens, None).shape)
    if found != expected:
        raise UserError(f"{what} returns the shape {list(found)} instead of {list(expected)}")
    return number, True


def _pass_experts(
    mixture: MoELayer, hidden: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Pass tokens through the router and each expert of a mixture, in place of its forward pass.

    How many of them an expert would see depends on weights, which a dry run does not have.

    Raises:
        UserError: a part returns the wrong shape.
    """
    tokens = hidden.flatten(0, -2)
    weights, _ = mixture.router(hidden)
    found = [expert(tokens, weights[:, 0])[0] for expert in mixture.experts.local_experts]
    if mixture.shared_experts is not None:
        found.append(mixture.shared_experts(hidden).flatten(0, -2))
    for each in found:
        if each.shape != tokens.shape:
            raise UserError(f"an expert returns {list(each.shape)} instead of {list(tokens.shape)}")
    return hidden, None
