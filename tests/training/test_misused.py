"""Scripts that leave out a call say which, and a run that is made longer says how."""

from __future__ import annotations

from argparse import Namespace
from unittest.mock import Mock

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm import SelectiveTraining
from megatron_slm.errors import UserError
from megatron_slm.training.command_line.refusals import in_one_line


def test_a_parser_without_our_options() -> None:
    with pytest.raises(UserError, match="extra_args_provider=add_slm_arguments"):
        SelectiveTraining(Namespace(num_layers=2))


def test_a_step_that_has_not_begun() -> None:
    slm = SelectiveTraining.__new__(SelectiveTraining)
    slm.step = Mock(step=None)
    with pytest.raises(UserError, match=r"call slm\.install\(\) before"):
        slm.forward_step(None, Mock())


def test_a_longer_run() -> None:
    schedule = (0.0, 1.0, 0.0, 0, 6, "linear", 0.0, 0.0, 6, "constant")
    scheduler = OptimizerParamScheduler(
        Mock(param_groups=[]), *schedule, use_checkpoint_opt_param_scheduler=False
    )
    saved = scheduler.state_dict() | {"lr_decay_steps": 4}
    says = r"do not match \(megatron/core/.*\); .* give --override-opt-param-scheduler"
    with pytest.raises(UserError, match=says), in_one_line():
        scheduler.load_state_dict(saved)
