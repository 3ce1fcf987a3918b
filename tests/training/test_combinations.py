"""Ordinary command lines that Megatron refuses by a traceback, late, or by hanging: one line with
the remedy, exit code 2, on every rank, before the first step."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs import LLAMA, REFERENCE, write_dataset
from launch import REPOSITORY, SUPPORT, launch, pretrain
from real_text import docstrings

RUN = f"""
    {" ".join([*REFERENCE, *LLAMA])} --tokenizer-type NullTokenizer --vocab-size 257
    --seq-length 64 --micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3
    --eval-interval 2 --eval-iters 1 --log-interval 1 --num-workers 0
"""
DATA = "--data-path a --split 90,10,0"


@dataclass(frozen=True)
class Case:
    """extra: arguments beside RUN.  said: what the refusal says.  data: in the place of DATA.
    without: the package without which it is refused."""

    extra: str
    said: str
    data: str = DATA
    without: str | None = None


def of(data: str, said: str, extra: str = "") -> Case:
    return Case(extra, said, data)


# Messages with a place in brackets are Megatron's own, in one line.
CASES = {
    # Data.
    "blend of a file without a split": of("--data-args-path blend.txt", "--split"),
    "two sources": of(f"{DATA} --data-args-path blend.txt", "name the data twice"),
    "a source and one of a split": of(f"{DATA} --train-data-path a", "name the data twice"),
    "parts of their own and a split": of(
        "--train-data-path a --valid-data-path a --split 90,10,0", "leave --split out"
    ),
    "no validation part": of("--data-path a --split 100,0,0", "--eval-iters 0 for none"),
    "no validation data": of("--train-data-path a", "--eval-iters 0 for none"),
    "no training data": of(
        "--valid-data-path a", "lacks --data-path (or --data-args-path, --train-data-path"
    ),
    "no training part": of("--data-path a --split 0,100,0", "there is no training data"),
    "a split that is none": of("--data-path a --split most", "such as 969,30,1"),
    "few documents": of("--data-path few", "few has 9 documents, of which --split 969,30,1 leaves"),
    "few documents in a blend": of("--data-path 1 few 1 a", "few has 9 documents"),
    "few documents, nothing drawn": of(
        "--data-path few", "the validation part none", "--eval-iters 0"
    ),
    "splits of a file that is none": of("--per-split-data-args-path blend.txt", "blend.txt"),
    "splits of a file without one": of("--per-split-data-args-path partial.json", "`valid`"),
    "a loader of one's own": Case("--dataloader-type external", "--dataloader-type external"),
    # Validation.
    "full validation alone": Case("--full-validation", "needs --multiple-validation-sets"),
    "sets alone": Case("--multiple-validation-sets", "needs --full-validation"),
    "names alone": Case("--validation-set-names x", "needs --multiple-validation-sets"),
    "too many names": of(
        "--train-data-path a --valid-data-path a",
        "2 names, for 1 validation set",
        "--full-validation --multiple-validation-sets --validation-set-names x y",
    ),
    "full validation by stages": of(
        "--train-data-path a --valid-data-path a",
        "--eval-micro-batch-size 1",
        "--full-validation --multiple-validation-sets --pipeline-model-parallel-size 2",
    ),
    "full validation and a test part": of(
        "--data-path a --split 90,9,1",
        "Megatron fails at the end of the run where there is test data",
        "--full-validation --multiple-validation-sets",
    ),
    "validation never": Case("--eval-interval 0", "--eval-interval 0: it must be 1 or more"),
    "validation of less than nothing": Case("--eval-iters -1", "--eval-iters -1"),
    # Saving and loading.
    "checkpoints never": Case("--save saved", "--save-interval"),
    "checkpoints into a file": Case("--save a.bin --save-interval 2", "is not a directory"),
    "a Hugging Face directory to go on from": Case("--load hf", "import --hf hf --save"),
    "a Hugging Face directory to start from": Case("--pretrained-checkpoint hf", "import --hf hf"),
    "a Hugging Face reference": Case(
        "--slm-token-ratio 0.6 --slm-reference-load hf", "--slm-reference-load hf has a Hugging"
    ),
    "a checkpoint that has to be there": Case(
        "--load absent --exit-on-missing-checkpoint", "--load absent: there is no checkpoint"
    ),
    "local checkpoints": Case(
        "--non-persistent-ckpt-type local",
        "nvidia_resiliency_ext is required for local",
        without="nvidia_resiliency_ext",
    ),
    # What we refuse comes before what Megatron would say of it.
    "Megatron's FSDP": Case("--use-megatron-fsdp", "--use-megatron-fsdp cannot be used with sel"),
    "torch's FSDP": Case("--use-torch-fsdp2", "--use-torch-fsdp2 cannot be used with selective"),
    "checkpoints of FSDP": Case("--ckpt-format torch_dcp", "torch_dcp is that of FSDP"),
    "checkpoints of Megatron's FSDP": Case("--ckpt-format fsdp_dtensor", "is that of FSDP"),
    "reinforcement learning": Case(
        "--perform-rl-step --rl-generation-lag 1", "--perform-rl-step cannot be used with selective"
    ),
    "YAML": Case("--yaml-cfg run.yaml", "give arguments on the command line"),
    "CUDA graphs": Case("--cuda-graph-impl full_iteration", "number of selected tokens is not"),
    "shards of weights": Case("--tensor-parallel-num-weight-shards 2", "weight is gathered only"),
    # Packages.
    "recomputed norms": Case(
        "--recompute-granularity selective --recompute-modules core_attn layernorm",
        "--recompute-modules layernorm needs Transformer Engine",
        without="transformer_engine",
    ),
    "instances of the distributed optimizer": Case(
        "--num-distributed-optimizer-instances 2", "needs the package einops", without="einops"
    ),
    "context parallelism in two levels": Case(
        "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2",
        "needs the package einops",
        without="einops",
    ),
    "an optimizer of a package": Case(
        "--optimizer muon",
        "needs the package emerging-optimizers",
        without="emerging_optimizers",
    ),
    "storage of a package": Case(
        "--enable-msc", "pip install multi-storage-client", without="multistorageclient"
    ),
    "attention of another spec": Case("--attention-backend local", "leave it out"),
    "wandb without a place": Case("--wandb-project x", "--wandb-save-dir or --save"),
    # Sizes.
    "a distributed optimizer of SGD": Case(
        "--use-distributed-optimizer --optimizer sgd", "cannot hold the state of --optimizer sgd"
    ),
    "a sequence that context ranks do not share": Case(
        "--seq-length 62 --context-parallel-size 2", "take a multiple of 4, twice that size"
    ),
    "a sequence that tensor ranks do not share": Case(
        "--seq-length 62 --tensor-model-parallel-size 2 --sequence-parallel "
        "--context-parallel-size 2",
        "take a multiple of 4 (--tensor-model-parallel-size x",
    ),
    "a batch that ranks do not share": Case(
        "--micro-batch-size 3", "is not a multiple of --micro-batch-size 3 x 4 data-parallel"
    ),
    "a batch that virtual stages do not share": Case(
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--global-batch-size 12",
        "makes 3 micro-batches of each data-parallel rank",
    ),
    "groups of unequal heads": Case(
        "--group-query-attention --num-query-groups 4", "is not a multiple of --num-query-groups 4"
    ),
    "heads of odd size": Case("--kv-channels 7", "heads of 7 channels"),
    "no tokens": Case("--seq-length 0", "--seq-length 0: it must be 1 or more"),
    "no log": Case("--log-interval 0", "--log-interval 0: it must be 1 or more"),
    "no vocabulary": Case("--make-vocab-size-divisible-by 0", "it must be 1 or more"),
    "phases of iterations": Case("--phase-transition-iterations 2", "needs --train-samples"),
    # Experts.
    "experts over ranks, none there": Case("--expert-model-parallel-size 2", "num_experts must be"),
    "experts that do not divide": Case(
        "--num-experts 3 --expert-model-parallel-size 2",
        "--num-experts 3 is not a multiple of --expert-model-parallel-size 2",
    ),
    "experts over tensor-parallel ranks": Case(
        "--num-experts 4 --tensor-model-parallel-size 2", "needs --sequence-parallel"
    ),
    "experts with noise": Case(
        "--num-experts 4 --moe-input-jitter-eps 0.1", "it draws random numbers in passes"
    ),
    "experts balanced otherwise": Case(
        "--num-experts 4 --moe-router-load-balancing-type sinkhorn",
        "routes otherwise in evaluation",
    ),
    "experts by another dispatcher": Case(
        "--num-experts 4 --moe-token-dispatcher-type flex", "take alltoall"
    ),
    # Megatron's words, or its source where it has none.
    "two lengths": Case("--train-samples 12", "expected iteration-based training (megatron/train"),
    "a rate below the least": Case("--min-lr 1", "assert args.min_lr <= args.lr (megatron/train"),
    "two precisions": Case("--fp16 --bf16", "assert not args.bf16 (megatron/training/arguments.py"),
    "an option of the past": Case("--batch-size 2", "use --micro-batch-size instead (megatron/"),
    "recomputing without a method": Case(
        "--recompute-granularity full", 'recompute_method must be "block" or "uniform" (megatron/'
    ),
    "no such tokenizer": Case(
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model absent.model", "absent.model"
    ),
}


HERE = {
    name: case for name, case in CASES.items() if not case.without or not find_spec(case.without)
}


def _make_inputs(directory: Path) -> None:
    texts = docstrings(["argparse"])
    write_dataset(directory / "a", texts)
    write_dataset(directory / "few", texts[:9])
    (directory / "blend.txt").write_text("0.5 a 0.5 a")
    (directory / "partial.json").write_text('{"train": ["a"]}')
    (directory / "run.yaml").write_text("language_model: {}\n")
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text("{}")
    (directory / "hf" / "model.safetensors").touch()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("combinations")
    _make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def refusals(inputs: Path) -> dict[str, list[tuple[int, str]]]:
    """Exit code and output of two ranks of every case."""
    commands = {name: f"{RUN} {case.data} {case.extra}".split() for name, case in HERE.items()}
    (inputs / "commands.json").write_text(json.dumps(commands))
    launch(1, [str(SUPPORT / "refused_commands.py")], inputs, fresh_threads=1)
    return json.loads((inputs / "refusals.json").read_text())


@pytest.mark.parametrize("case", HERE)
def test_refused(case: str, refusals: dict[str, list[tuple[int, str]]]) -> None:
    for code, output in refusals[case]:
        assert code == 2, output[-3000:]
        errors = re.findall(r"^error: (.*)", output, re.MULTILINE)
        assert len(errors) == 1
        assert CASES[case].said in errors[0]
        assert "Traceback" not in output


def test_refused_by_megatron_while_it_builds(inputs: Path) -> None:
    """A schedule of the learning rate that is first looked at when the model has been built."""
    extra = f"{DATA} --lr-warmup-iters 5 --lr-decay-style cosine"
    run = pretrain(1, f"{RUN} {extra}".split(), inputs, check=False, timeout=120)
    assert run.codes == [2]
    (line,) = re.findall(r"^error: (.*)", run.outputs[0], re.MULTILINE)
    assert "assert self.lr_warmup_steps < self.lr_decay_steps" in line
    assert "megatron/core/optimizer_param_scheduler.py" in line
    assert "Traceback" not in run.outputs[0]


def test_scoring_does_not_wait_for_an_empty_part(
    inputs: Path, request: pytest.FixtureRequest
) -> None:
    reference = request.getfixturevalue("untied").reference
    command = [str(REPOSITORY / "tools" / "score_reference.py"), *RUN.split()]
    command += f"--data-path {inputs / 'few'} --slm-reference-load {reference}".split()
    command += ["--slm-reference-cache", "cache"]
    run = launch(1, command, inputs / "score", check=False, timeout=120)
    assert run.codes == [2]
    assert "has 9 documents, of which --split 969,30,1" in run.outputs[0]
