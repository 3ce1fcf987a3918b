"""Run tasks with the executors of datatrove (https://github.com/huggingface/datatrove).

Datatrove's ranks take the place of our processes; shards, manifests and resuming are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_slm.corpus.preprocessing.preprocess import preprocess
from megatron_slm.corpus.preprocessing.settings import PreprocessingSettings
from megatron_slm.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A step of a datatrove pipeline, which does a rank's part of a stage."""

    settings: PreprocessingSettings

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        preprocess(replace(self.settings, rank=rank, world_size=world_size))


def run_with_datatrove(
    settings: PreprocessingSettings,
    executor: str,
    tasks: int,
    logging_dir: str,
    options: dict[str, Any],
) -> None:
    """Run all stages before the merge.

    Args:
        settings: the run; `workers` is the number of cores of each task, or of all tasks together
            if the executor is local.
        executor: local, slurm or ray.
        tasks: number of ranks of a stage.
        logging_dir: directory for datatrove's logs.
        options: further options of the executor.

    Raises:
        UserError: datatrove is not installed.
    """
    new = _executor(executor)
    stages = [("tokenize", tasks)]
    if settings.dedup is not None:
        stages = [("fingerprint", tasks), ("duplicates", 1), *stages]
    previous: Any = None
    for stage, ranks in stages:
        cores, place = settings.workers, {"cpus_per_task": settings.workers}
        if executor == "local":  # its tasks share the cores
            at_a_time = min(ranks, cores)
            cores, place = cores // at_a_time, {"workers": at_a_time}
        previous = new(
            pipeline=[Stage(replace(settings, stage=stage, workers=cores))],
            tasks=ranks,
            logging_dir=f"{logging_dir}/{stage}",
            # Shards tell whether they are valid; datatrove's marks only say that a task ended.
            skip_completed=False,
            depends=previous,
            **place,
            **options,
        )
    previous.run()


def _executor(name: str) -> Callable[..., Any]:
    try:
        if name == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor

            return lambda **options: SlurmPipelineExecutor(
                job_name=options["logging_dir"].rpartition("/")[2], **options
            )
        if name == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor
        from datatrove.executor.local import LocalPipelineExecutor

        return LocalPipelineExecutor
    except ImportError as error:
        raise UserError(
            f"--executor {name}: {error}: pip install 'megatron-slm[datatrove]'"
        ) from error
