"""Hugging Face to Megatron and back, against transformers."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)

from launch import REPOSITORY, Run, launch, pretrain
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.hugging_face_config import from_hugging_face

TOOL = str(REPOSITORY / "tools" / "convert_checkpoint.py")
VOCABULARY = 32003
SEQUENCE = 48
MICRO_BATCHES = 2  # a step
# Head size is not hidden / heads for Mistral; heads, groups and vocabulary divide by nothing handy.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000,
    "factor": 32.0,  # that of Llama 3.2
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass
class Model:
    """hf: as transformers saved it.  megatron: what import made of it.
    options: Megatron's, as import printed them.
    """

    hf: Path
    megatron: Path
    options: list[str]


def tool(*arguments: object, ranks: int = 1, directory: Path, check: bool = True) -> Run:
    command = [TOOL, *[str(argument) for argument in arguments]]
    return launch(ranks, command, directory, check=check)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Make a Mistral with a window, in several files; a Llama with multi-head attention, Llama
    3.2's rope and tied embeddings, and a config.json as they have on the Hub; a tied Qwen2, whose
    window is not used; a Qwen3; and mixtures of experts of three kinds, two of which have layers
    without."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    mistral = MistralConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=10,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    llama = LlamaConfig(
        **SHAPE | {"num_key_value_heads": None},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3,
    )
    qwen2 = Qwen2Config(**SHAPE, tie_word_embeddings=True, sliding_window=10)
    qwen3 = Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False)
    mixtral = MixtralConfig(**SHAPE, head_dim=16, num_local_experts=4)
    qwen2_moe = Qwen2MoeConfig(
        **SHAPE, **EXPERTS, shared_expert_intermediate_size=56, mlp_only_layers=[1]
    )
    qwen3_moe = Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0]
    )
    made = {}
    for config in (mistral, llama, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe):
        name, model = config.model_type, AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms begin as ones, and biases as zeros: no matter where
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        hf, megatron = directory / name, directory / f"{name}-megatron"
        model.save_pretrained(hf, max_shard_size="2MB")
        if name == "llama":
            as_transformers_4(hf / "config.json")
        (hf / "tokenizer.model").write_bytes(b"a tokenizer")
        run = tool("import", "--hf", hf, "--save", megatron, ranks=2, directory=directory / "run")
        options = next(line for line in run.outputs[0].splitlines() if line.startswith("--"))
        made[name] = Model(hf, megatron, shlex.split(options))
    return made


def as_transformers_4(file: Path) -> None:
    """Write a config.json of transformers 5 as its older versions did."""
    config = json.loads(file.read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config |= {"num_key_value_heads": None, "torch_dtype": config.pop("dtype")}
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an indexed dataset of random tokens, including the last of the vocabulary."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("tokens") / "random"
    generator = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(20):
        document = torch.randint(VOCABULARY, (400,), generator=generator)
        document[::7] = VOCABULARY - 1
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_megatron(
    start: list[str], layout: str, tokens: Path, directory: Path, *, ranks: int, extra: str = ""
) -> Run:
    """Two steps of causal language modeling, or of what `extra` says, from a checkpoint."""
    common = f"""
        --seq-length {SEQUENCE} --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}
        --data-path {tokens} --split 80,20,0 --num-workers 0 --micro-batch-size 1
        --global-batch-size {MICRO_BATCHES} --train-iters 2 --lr 1e-2 --lr-decay-style constant
        --eval-iters 1 --eval-interval 1000 --log-interval 1 --slm-head dense --save saved
        --save-interval 1
    """
    arguments = [*start, *common.split(), *layout.split(), *extra.split()]
    return pretrain(ranks, arguments, directory, module="recorded_logits")


def recorded(run: Run, model: Path | PreTrainedModel, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of a step, Megatron's logits and transformers'; of two data-parallel ranks that share
    the experts, the first's."""
    ranks = [torch.load(file) for file in sorted((run.directory / "logits").iterdir())]
    labels_of = [rank["labels"][0] for rank in ranks if rank["labels"]]
    data_parallel = 1 if all(torch.equal(labels_of[0], one) for one in labels_of) else 2
    ranks = ranks[: len(ranks) // data_parallel]
    count = MICRO_BATCHES // data_parallel
    mine = slice(step * count, (step + 1) * count)
    tokens = next(torch.cat(rank["tokens"][mine]) for rank in ranks if rank["tokens"])
    labels = next(torch.cat(rank["labels"][mine]) for rank in ranks if rank["labels"])
    shards = [torch.cat(rank["logits"][mine]) for rank in ranks if rank["logits"]]
    logits = torch.cat(shards, dim=-1)
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    return labels, logits[..., :VOCABULARY], expected


LAYOUTS = {
    "mistral tp2": ("mistral", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "mistral pp2 vpp2": (
        "mistral",
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "llama tp2 pp2": (
        "llama",
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    "qwen2 tp2 pp2": (
        "qwen2",
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    "qwen3 tp2": ("qwen3", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "qwen3 pp2 vpp2": (
        "qwen3",
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "mixtral ep2": ("mixtral", 2, "--expert-model-parallel-size 2"),
    "qwen2_moe tp2 ep2": (
        "qwen2_moe",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
    "qwen3_moe pp2": ("qwen3_moe", 2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_logits_after_import_and_export(
    case: str, models: dict[str, Model], tokens: Path, tmp_path: Path
) -> None:
    """Megatron's first step has the imported model's logits, its second those of the model that
    was saved between, exported."""
    name, ranks, layout = LAYOUTS[case]
    model = models[name]
    said = model.options if name == "qwen2_moe" else ["--use-checkpoint-args"]
    start = ["--load", str(model.megatron), "--finetune", *said]
    run = run_megatron(start, layout, tokens, tmp_path, ranks=ranks)
    _, logits, expected = recorded(run, model.hf, step=0)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    tool(
        *["export", "--load", tmp_path / "saved", "--ckpt-step", 1, "--hf", tmp_path / "hf"],
        *["--like", model.hf, "--shard-gb", 0.002],
        ranks=2,
        directory=tmp_path / "export",
    )
    _, logits, expected = recorded(run, tmp_path / "hf", step=1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    _, before, _ = recorded(run, model.hf, step=0)
    assert (logits - before).abs().max() > 0.1
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"a tokenizer"


def test_converted_reference(models: dict[str, Model], tokens: Path, tmp_path: Path) -> None:
    """A converted model of the other family scores a converted policy's tokens; the policy's
    options are as printed, without --use-checkpoint-args and without --finetune."""
    model, reference = models["mistral"], models["llama"]
    run = run_megatron(
        ["--load", str(model.megatron), *model.options],
        "",
        tokens,
        tmp_path,
        ranks=1,
        extra=f"--slm-reference-load {reference.megatron} --slm-token-ratio 0.6",
    )
    _, logits, expected = recorded(run, model.hf, step=0)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    labels, _, expected = recorded(run, reference.hf, step=0)
    loss = cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert run.scalars("reference loss")[1] == pytest.approx(loss.item(), rel=1e-5)


ROUND_TRIPS = [
    *[("mistral", 1), ("mistral", 2), ("llama", 1), ("llama", 2), ("qwen2", 2), ("qwen3", 1)],
    *[("mixtral", 2), ("qwen2_moe", 1), ("qwen3_moe", 1)],
]


@pytest.mark.parametrize(("name", "ranks"), ROUND_TRIPS)
def test_round_trip_is_exact(
    name: str, ranks: int, models: dict[str, Model], tmp_path: Path
) -> None:
    model = models[name]
    tool(
        *["export", "--load", model.megatron, "--hf", tmp_path / "hf", "--like", model.hf],
        ranks=ranks,
        directory=tmp_path / "run",
    )
    expected = {k: v for file in model.hf.glob("*.safetensors") for k, v in load_file(file).items()}
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    assert config_of(tmp_path / "hf") == config_of(model.hf)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_fused_experts(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    """As transformers 5 holds them; they are exported as it writes them by itself."""
    model = AutoModelForCausalLM.from_pretrained(models[name].hf)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert "model.layers.2.mlp.experts.gate_up_proj" in fused
    import_hugging_face(tmp_path / "fused", tmp_path / "megatron", 128)
    export_hugging_face(tmp_path / "megatron" / "release", tmp_path / "hf", None, None, 10**9)
    expected = {
        k: v for file in models[name].hf.glob("*.safetensors") for k, v in load_file(file).items()
    }
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def config_of(hf: Path) -> dict[str, object]:
    """As transformers completes it, without what only training from nothing needs."""
    config = AutoConfig.from_pretrained(hf).to_dict()
    return config | {"_name_or_path": None, "initializer_range": None}


ALL_LAYERS = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama 3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral": (MistralConfig, {"sliding_window": 10}),
    "mistral v0.3": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with a window": (Qwen2Config, ALL_LAYERS),
    "qwen3": (Qwen3Config, {}),
    "qwen3 with a window": (Qwen3Config, ALL_LAYERS),
    "seed-oss": (SeedOssConfig, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_stays(name: str, tmp_path: Path) -> None:
    """With --like and without, and with more positions than the original has."""
    kind, changes = FAMILIES[name]
    config = kind(**SHAPE | {"vocab_size": 131, "head_dim": 16} | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    import_hugging_face(tmp_path / "hf", tmp_path / "megatron", 128)
    original = config_of(tmp_path / "hf")
    for like in (tmp_path / "hf", None):
        target = tmp_path / f"like {like is None}"
        export_hugging_face(tmp_path / "megatron" / "release", target, like, None, 10**9)
        assert config_of(target) == original

    more = json.loads((tmp_path / "hf" / "config.json").read_text())
    more["max_position_embeddings"] *= 2
    (tmp_path / "hf" / "config.json").write_text(json.dumps(more))
    target = tmp_path / "more"
    export_hugging_face(tmp_path / "megatron" / "release", target, tmp_path / "hf", None, 10**9)
    assert config_of(target) == original


def test_rope_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    LlamaConfig(**SHAPE, rope_parameters=LLAMA3, dtype="float32").save_pretrained(tmp_path)
    new = json.loads(file.read_text())
    as_transformers_4(file)
    old = json.loads(file.read_text()) | {"num_key_value_heads": SHAPE["num_key_value_heads"]}
    assert "rope_parameters" in new.keys() - old.keys()
    assert from_hugging_face(old, "") == from_hugging_face(new, "")
    assert from_hugging_face(new, "").rope_scaling == LLAMA3["factor"]


def test_the_models_need_what_they_have(models: dict[str, Model]) -> None:
    """The tests above would see a factor that is not passed on, or a window that is ignored."""
    tokens = torch.arange(SEQUENCE)[None]
    for name, change in (
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 8.0}}),
        ("mistral", {"sliding_window": None}),
    ):
        one = AutoModelForCausalLM.from_pretrained(models[name].hf)
        other = AutoModelForCausalLM.from_pretrained(models[name].hf, **change)
        with torch.no_grad():
            assert (one(tokens).logits - other(tokens).logits).abs().max() > 1e-3, name
