"""Check that a resumed run has in common with the run it continues what it must.

Megatron's checkpoints keep the arguments of the run that wrote them, and so what we add to these.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_slm.errors import UserError

# What --slm-changed may name besides arguments of the model.
CHANGES = ("reference", "selection")
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert")


def check_resumed(args: Namespace, common: dict[str, Any], where: str) -> None:
    """Compare a run with the one that wrote the checkpoint it resumes from.

    Args:
        args: the run's arguments, with slm_selects and slm_reference_identity.
        common: the checkpoint's common state: everything in it but tensors.
        where: how errors name the checkpoint.

    Raises:
        UserError: the model would learn something else from here on, or the optimizer's state
            cannot be loaded.
    """
    saved = common["args"]
    _check_selection(args, saved, where)
    _check_optimizer(args, saved, common.get("content_metadata") or {}, where)


def _check_selection(args: Namespace, saved: Namespace, where: str) -> None:
    before = getattr(saved, "slm_reference_identity", None)
    now = args.slm_reference_identity
    selected = getattr(saved, "slm_selects", None) or before is not None
    if selected and not args.slm_selects and "selection" not in args.slm_changed:
        raise UserError(
            f"{where} was written by a run that selected tokens, and this run would train on all "
            "tokens: give the selection's arguments again, or allow it with --slm-changed selection"
        )
    asked = args.slm_reference_ckpt_step is not None or {*CHANGES} & {*args.slm_changed}
    if before in (None, now) or asked:
        return
    if now is None:
        raise UserError(
            f"{where} was written by a run that selected tokens by the reference {before}, and "
            "this run has none: give the reference again, or allow it with --slm-changed reference"
        )
    raise UserError(
        f"{where}: the run selected tokens by the reference {before} so far, and now the reference "
        f"is {now}: give the same one, or allow another checkpoint of it by "
        "--slm-reference-ckpt-step, and any other change by --slm-changed reference"
    )


def _check_optimizer(
    args: Namespace, saved: Namespace, content: dict[str, Any], where: str
) -> None:
    """Check that the optimizer's state can be loaded into this run's layout."""
    if args.no_load_optim or getattr(saved, "no_save_optim", False):
        return
    sizes = [_sizes(each) for each in (saved, args)]
    # Megatron's other optimizers come in several parts even without experts.
    if args.optimizer not in ("adam", "sgd") and _are_apart(sizes[0]) != _are_apart(sizes[1]):
        experts, split = sizes[0]["expert"], sizes[0]["expert_tensor"]
        raise UserError(
            f"{where} has the state of several optimizers, as --optimizer {args.optimizer} has "
            f"them with --expert-model-parallel-size {experts} and --expert-tensor-parallel-size "
            f"{split}: continue with these sizes, or start the optimizer afresh with "
            "--no-load-optim"
        )
    kind = content.get("distrib_optim_sharding_type")
    if (
        not args.use_distributed_optimizer
        or kind is None
        or kind in DistributedOptimizer.checkpoint_fully_reshardable_formats
    ):
        return
    if sizes[0] != sizes[1]:
        there, here = (", ".join(f"{n} {s}" for n, s in each.items()) for each in sizes)
        raise UserError(
            f"{where} has the distributed optimizer's state for model-parallel sizes {there}, and "
            f"this run has {here}: it was saved without --dist-ckpt-optim-fully-reshardable.  "
            "Continue with the old sizes and that flag until the next checkpoint, and then with "
            "the new sizes; or start the optimizer afresh with --no-load-optim"
        )


def _sizes(args: Namespace) -> dict[str, int]:
    """Return the sizes of a run's model-parallel groups by name."""
    sizes = {name: getattr(args, f"{name}_model_parallel_size", None) or 1 for name in LAYOUT}
    of_experts = getattr(args, "expert_tensor_parallel_size", None)
    return sizes | {"expert_tensor": of_experts or sizes["tensor"]}


def _are_apart(sizes: dict[str, int]) -> bool:
    """Return whether Megatron gives the experts of a run an optimizer of their own."""
    return sizes["expert"] > 1 or sizes["expert_tensor"] != sizes["tensor"]
