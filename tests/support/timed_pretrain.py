"""megatron_slm.pretrain, and the processor time of each step, in seconds, in timed.json."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_slm import pretrain

train = pretrain._pretrain


def train_timed(args: Namespace) -> None:
    from megatron.training import training

    step, seconds = training.train_step, []

    def step_timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        result = step(*args, **kwargs)
        seconds.append(time.process_time() - begin)
        return result

    training.train_step = step_timed
    train(args)
    Path("timed.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    pretrain._pretrain = train_timed
    pretrain.main()
