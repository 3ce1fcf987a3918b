"""megatron_slm.pretrain, each step of which waits for its turn: for comparisons of several runs.

The process that started it sets `turn N` in the job's store, N from 0, and then finds the processor
time of step N there, in seconds, as `took N`.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from itertools import count
from typing import Any

from torch.distributed import TCPStore

from megatron_slm import pretrain

train = pretrain._pretrain


def train_timed(args: Namespace) -> None:
    from megatron.training import training

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    step, numbers = training.train_step, count()

    def step_timed(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        store.wait([f"turn {number}"])
        begin = time.process_time()
        result = step(*args, **kwargs)
        store.set(f"took {number}", str(time.process_time() - begin))
        return result

    training.train_step = step_timed
    train(args)


if __name__ == "__main__":
    pretrain._pretrain = train_timed
    pretrain.main()
