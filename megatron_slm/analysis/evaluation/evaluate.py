"""Evaluate a checkpoint few-shot with lm-eval (EleutherAI's Language Model Evaluation Harness).

    1. A Megatron checkpoint is exported to a Hugging Face directory (megatron_slm/model).
    2. All tasks are loaded before the first one runs, so that a wrong name shows at once.
    3. lm-eval runs each task on transformers' model and returns its scores.

Under torchrun, each GPU of a node answers a part of the questions; the first rank gets the scores.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Annotated, Any

import msgspec
import torch

from megatron_slm.analysis.evaluation.benchmarks import Benchmark
from megatron_slm.errors import UserError
from megatron_slm.files import is_leftover, read_json, temporary
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.tokenizer_files import SETTINGS, has_tokenizer
from megatron_slm.model.torch_dist import TRACKER, iteration_directory

FEW_SHOT_SEED = 1234  # lm-eval's default
SHARD_BYTES = 5 * 10**9

Dimension = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Sizes(msgspec.Struct):
    """The sizes in a config.json that decide how much memory transformers allocates before it reads
    any weights; the limits keep a damaged file from exhausting it."""

    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    hidden_size: Dimension | None = None
    intermediate_size: Dimension | None = None
    vocab_size: Dimension | None = None


@dataclass(frozen=True)
class BenchmarkScore:
    """The value of one metric on one task."""

    benchmark: Benchmark
    """The benchmark that was asked for."""

    task: str
    """lm-eval's name of the benchmark, or of one of its tasks if lm-eval does not average them."""

    shots: int | None
    """Examples before a question; None if the tasks of a group differ in it."""

    samples: int
    """Number of questions."""

    metric: str
    """lm-eval's name of the metric, with its filter."""

    value: float
    """The value as lm-eval gives it; accuracies are between 0 and 1."""

    stderr: float | None
    """Standard error of the value; None where lm-eval gives none."""


@contextmanager
def hugging_face_directory(model: Path, step: int | None, like: Path | None) -> Iterator[Path]:
    """Provide a model as a Hugging Face directory: itself, or a temporary export of the Megatron
    checkpoint in it.

    Args:
        model: Hugging Face directory, or what a run's --save wrote to.
        step: iteration of a Megatron checkpoint; None for the latest.
        like: Hugging Face directory from which an export takes its tokenizer and special tokens.

    Raises:
        UserError: `model` is neither, cannot be exported, or has no tokenizer.
    """
    if (model / "config.json").is_file():
        read_json(model / "config.json", Sizes)
        _check_tokenizer(model, "copy the tokenizer's files there")
        yield model
        return
    if step is None and not (model / TRACKER).is_file():
        raise UserError(
            f"--model {model} has neither a config.json nor a {TRACKER}; give a Hugging Face "
            "directory, or what --save wrote to"
        )
    if int(os.getenv("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"--model {model}: to evaluate it on several ranks, export it first with "
            "tools/convert_checkpoint.py"
        )
    checkpoint = iteration_directory(model, step, "--model", "--ckpt-step")
    for leftover in Path(gettempdir()).glob("megatron-slm-*.partial"):
        if is_leftover(leftover):  # of an evaluation that was killed; it may have gigabytes
            shutil.rmtree(leftover, ignore_errors=True)
    suffix = temporary(Path("-export")).name  # tells the next evaluation whose it was
    with TemporaryDirectory(prefix="megatron-slm-", suffix=suffix) as directory:
        exported = Path(directory) / "hf"
        export_hugging_face(checkpoint, exported, like, None, SHARD_BYTES)
        _check_tokenizer(exported, f"name a Hugging Face directory that has {model}'s with --like")
        yield exported


def _check_tokenizer(directory: Path, remedy: str) -> None:
    """Check that a directory has a tokenizer and says how to read it.

    Without a tokenizer_config.json, transformers would read a sentencepiece model differently from
    how training did.
    """
    if not has_tokenizer(directory):
        raise UserError(f"{directory} has no tokenizer; {remedy}")
    if not any((directory / name).is_file() for name in SETTINGS):
        raise UserError(
            f"{directory} has a sentencepiece model without the tokenizer_config.json that says "
            f"how to read it; {remedy}"
        )


def load_tasks(
    wanted: Sequence[Benchmark], include: Path | None, run_code: bool
) -> dict[Benchmark, Any]:
    """Load lm-eval's tasks with their data, and set their numbers of shots.

    Args:
        wanted: benchmarks to load the tasks of.
        include: directory with tasks in YAML, which take precedence over lm-eval's of the same
            name; None for lm-eval's alone.
        run_code: allow tasks that run code written by the model.

    Raises:
        UserError: lm-eval is not installed, a name is not known, a task runs code without
            permission, or a task cannot be loaded.
    """
    manager = check_tasks(wanted, include, run_code)
    os.environ["HF_ALLOW_CODE_EVAL"] = str(int(run_code))  # read when a metric is created
    return {benchmark: _load_task(manager, benchmark, run_code) for benchmark in wanted}


def check_tasks(wanted: Sequence[Benchmark], include: Path | None, run_code: bool) -> Any:
    """Check the names of tasks without loading anything, and return lm-eval's manager of them.

    The arguments and errors are those of `load_tasks`.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install -e '.[evaluation]'")
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such directory")
    manager = _known_tasks(include)
    for benchmark in wanted:
        entry = manager.task_index.get(benchmark.name)
        if entry is None:
            near = get_close_matches(benchmark.name, manager.all_tasks)
            raise UserError(
                f"--tasks {benchmark.name}: neither lm-eval nor --include-path has a task of that "
                "name" + (f"; near it are {', '.join(near)}" if near else "")
            )
        if (entry.cfg or {}).get("unsafe_code") and not run_code:
            raise _code_refused(benchmark)  # or else lm-eval would refuse to load it
    return manager


def _code_refused(benchmark: Benchmark) -> UserError:
    return UserError(
        f"--tasks {benchmark.name} runs code that the model writes; allow it with "
        "--run-generated-code, inside a container"
    )


@lru_cache  # reading the names of lm-eval's 15,000 tasks takes seconds
def _known_tasks(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _load_task(manager: Any, benchmark: Benchmark, run_code: bool) -> Any:
    try:
        loaded = manager.load(benchmark.name)
    except Exception as error:  # a task is third-party YAML, Python and data
        raise UserError(f"--tasks {benchmark.name} cannot be loaded: {_line(error)}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise _code_refused(benchmark)
        shots = benchmark.shots if benchmark.shots is not None else task.config.num_fewshot
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(FEW_SHOT_SEED)
    return loaded


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def evaluate(
    directory: Path, tasks: dict[Benchmark, Any], batch_size: int, device: str | None
) -> Iterator[list[BenchmarkScore]]:
    """Run tasks one by one, and yield the scores of each on the first rank.

    Args:
        directory: Hugging Face model with its tokenizer.
        tasks: what `load_tasks` returned.
        batch_size: questions at a time.
        device: torch's name of the device; None for all GPUs, or the CPU if there are none.

    Raises:
        UserError: transformers cannot read the model, tensors are missing, there are more ranks
            than GPUs, or a task fails or has no score.
    """
    from lm_eval import evaluate as run
    from lm_eval.models.huggingface import HFLM

    class WholeModel(HFLM):
        AUTO_MODEL_CLASS = _Whole

    ranks, gpus = int(os.getenv("WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > max(gpus, 1):
        raise UserError(f"{ranks} ranks on {gpus} GPUs: give each its own, all in one node")
    try:
        model = WholeModel(
            pretrained=str(directory),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=batch_size,
            # A single process spreads the layers over its GPUs: a 70B model does not fit on one.
            parallelize=device is None and ranks == 1 and gpus > 1,
        )
    except UserError:
        raise
    except Exception as error:  # transformers does not validate the files
        raise UserError(f"{directory} cannot be read by transformers: {_line(error)}") from error
    for benchmark, loaded in tasks.items():
        # load_tasks has already refused tasks that run code without permission.
        try:
            results = run(model, loaded, log_samples=False, confirm_run_unsafe_code=True)
        except Exception as error:  # such as a field that the data lack
            raise UserError(f"--tasks {benchmark.name} fails in lm-eval: {_line(error)}") from error
        if results is not None:
            yield _scores(benchmark, results)


class _Whole:
    """A stand-in for transformers' class, which would initialise missing weights at random."""

    @staticmethod
    def from_pretrained(directory: str, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        model, found = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, **options
        )
        missing = sorted(found["missing_keys"])
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UserError(
                f"{directory} lacks weights of its model: {', '.join(missing[:5])}{more}; copy its "
                "files again, or export it again"
            )
        return model


def _scores(benchmark: Benchmark, results: dict[str, Any]) -> list[BenchmarkScore]:
    """Extract a benchmark's scores: its own, or those of all its tasks if lm-eval does not average
    them."""
    by_task: dict[str, dict[str, Any]] = results["results"]
    own = by_task.get(benchmark.name, {})
    names = [benchmark.name] if _metrics(own, benchmark) else list(by_task)
    shots = {config["num_fewshot"] for config in results["configs"].values()}
    found = []
    for name in names:
        result = by_task[name]
        for metric in _metrics(result, benchmark):
            if not isinstance(result[metric], int | float):
                raise UserError(f"--tasks {name}: {metric} is not a number but {result[metric]!r}")
            stderr = result.get(metric.replace(",", "_stderr,"))
            found.append(
                BenchmarkScore(
                    benchmark,
                    task=name,
                    shots=min(shots) if len(shots) == 1 else None,
                    samples=result["sample_len"],
                    metric=metric,
                    value=float(result[metric]),
                    stderr=stderr if isinstance(stderr, float) else None,  # or "N/A"
                )
            )
    if not found:
        raise UserError(f"--tasks {benchmark.name}: lm-eval gives it no score: see its metric_list")
    return found


def _metrics(result: dict[str, Any], benchmark: Benchmark) -> list[str]:
    """Return the benchmark's metric if the result has it, otherwise all metrics."""
    if benchmark.metric in result:
        return [benchmark.metric]
    return [name for name in result if "," in name and "_stderr," not in name]
