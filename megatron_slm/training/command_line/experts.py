"""Refuse options of mixtures of experts that selective language modeling cannot honour.

Its passes without training (ranking, dumps, reference, validation) must draw no random numbers and
change no state, and its ranking must see the model that is then trained.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_slm.errors import UserError
from megatron_slm.model.routing import OTHER_ROUTING, balancing_of

UNSUPPORTED = {
    "moe_input_jitter_eps": (
        "--moe-input-jitter-eps",
        "it draws random numbers in passes that are not training",
    ),
    "moe_router_force_load_balancing": (
        "--moe-router-force-load-balancing",
        "it routes at random, in passes that are not training too",
    ),
    "moe_router_force_biased": (
        "--moe-router-force-biased",
        "it routes at random, in passes that are not training too",
    ),
    "moe_enable_routing_replay": (
        "--moe-enable-routing-replay",
        "the passes that are not training would be recorded too",
    ),
    "moe_paged_stash": ("--moe-paged-stash", "its buffers are made for training passes alone"),
    "moe_use_upcycling": (
        "--moe-use-upcycling",
        "the model is not the checkpoint's: write the experts' checkpoint with Megatron first",
    ),
}
"""By the argument's name: the flag, and the reason."""


def has_auxiliary_losses(args: Namespace) -> bool:
    """Return whether a run's routers have losses of their own."""
    balancing = args.moe_aux_loss_coeff
    coefficients = balancing if isinstance(balancing, list) else [balancing]
    return bool(args.num_experts) and (any(coefficients) or bool(args.moe_z_loss_coeff))


def check_experts(args: Namespace) -> None:
    """Refuse what cannot be honoured of the options for mixtures of experts.

    Args:
        args: the arguments as parsed, or after Megatron's validation.

    Raises:
        UserError: an option cannot be used; the message names it and the reason.
    """
    if not args.num_experts:
        return
    for name, (flag, why) in UNSUPPORTED.items():
        if getattr(args, name, None):
            raise UserError(f"{flag} cannot be used with selective language modeling: {why}")
    for kind in balancing_of(args):
        if kind in OTHER_ROUTING:
            raise UserError(
                f"--moe-router-load-balancing-type {kind} cannot be used with selective language "
                f"modeling: it {OTHER_ROUTING[kind]}"
            )
    if args.slm_scope == "document" and has_auxiliary_losses(args):
        raise UserError(
            "--slm-scope document cannot be used with auxiliary losses of experts: how many tokens "
            "it selects is not known before the first backward pass; take another scope, or "
            "balance the experts by --moe-router-enable-expert-bias alone"
        )
    if args.moe_token_dispatcher_type == "flex":
        raise UserError(
            "--moe-token-dispatcher-type flex cannot be used with selective language modeling: its "
            "buffers are made for one model, and the reference is another; take alltoall"
        )
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise UserError(
            "--num-experts with --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} needs --sequence-parallel"
        )
    experts, size = args.num_experts, args.expert_model_parallel_size
    if size > 1 and experts % size:
        raise UserError(
            f"--num-experts {experts} is not a multiple of --expert-model-parallel-size {size}"
        )
