"""Dry-run a recipe's last rank: dry_run_layers.py SCRIPT [EXTRA].

Prints whether a micro-batch was passed, the number of parameters, also of Megatron's layers and of
plain ones, and the kinds of Transformer Engine's layers.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_slm import cpu_platform

cpu_platform.install()

import pytest

from launch import REPOSITORY
from megatron_slm.errors import exit_on_user_error
from megatron_slm.planning import dry_run
from megatron_slm.planning.launch_recipe import read_launch_recipe

if __name__ == "__main__":
    script, extra = sys.argv[1], " ".join(sys.argv[2:])
    kinds: set[str] = set()
    numbers = {"megatron": 0, "plain": 0}
    build = dry_run.build_stage

    def noted(args: Any, layer_spec: Any, **kwargs: Any) -> Any:
        model = build(args, layer_spec, **kwargs)
        kinds.update(type(module).__name__ for module in model.modules())
        whose = "megatron" if layer_spec is None else "plain"
        numbers[whose] += sum(parameter.numel() for parameter in model.parameters())
        return model

    with pytest.MonkeyPatch.context() as patch, exit_on_user_error():
        patch.setattr(dry_run, "build_stage", noted)
        read = read_launch_recipe(REPOSITORY / "examples" / script, {"EXTRA": extra})
        built = dry_run.dry_run(read, read.ranks - 1, 32000)
    print("passed", built.passed)
    print("parameters", built.policy + built.reference, *numbers.values())
    print("layers", *sorted(kind for kind in kinds if kind.startswith("TE")))
