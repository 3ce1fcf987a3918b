"""What the converter does not convert: it says why and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.conversion.safetensors_files import find_tensors
from megatron_slm.model.hugging_face_config import to_hugging_face
from megatron_slm.model.torch_dist import TorchDistReader
from random_llama import save_llama

TOOL = str(REPOSITORY / "tools" / "convert_checkpoint.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return save_llama(directory, vocab_size=131, num_hidden_layers=2, num_key_value_heads=1)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def change_tensors(
    change: Callable[[dict[str, torch.Tensor]], object],
) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def truncated(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


def no_file(directory: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


Q = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL_LLAMA3 = LLAMA3 | {"rope_theta": 10000.0, "original_max_position_embeddings": 8192}

IMPORTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (change_config(model_type="gpt2"), "model_type 'gpt2'"),
    "norms after attention": (
        change_config(model_type="olmo2"),
        "it has norms after attention and MLP in place of those before them",
    ),
    "Gemma": (change_config(model_type="gemma3_text"), "it has embeddings scaled by the root of"),
    "a type that is none": (change_config(model_type=["llama"]), "model_type ['llama']"),
    "a Qwen without biases": (
        change_config(model_type="qwen2", attention_bias=...),
        "there is no tensor model.layers.0.self_attn.q_proj.bias",
    ),
    "one expert a token": (
        change_config(model_type="mixtral", num_experts_per_tok=1),
        "one expert a token, whose weight is normed to 1",
    ),
    "more experts a token than there are": (
        change_config(model_type="mixtral", num_local_experts=2, num_experts_per_tok=3),
        "tokens go to 3 experts, and there are 2",
    ),
    "experts in no layer": (
        change_config(model_type="qwen3_moe", mlp_only_layers=[0, 1]),
        "none of its layers is a mixture of experts",
    ),
    "a shared expert of a Qwen3": (
        change_config(model_type="qwen3_moe", shared_expert_intermediate_size=20),
        "config.json: shared_expert_intermediate_size 20 is not supported, only 0",
    ),
    "a shared expert beyond a word": (
        change_config(
            model_type="qwen2_moe",
            attention_bias=...,
            shared_expert_intermediate_size=2**40,
        ),
        "- at `$.shared_expert_intermediate_size`",
    ),
    "no experts": (
        change_config(model_type="mixtral"),
        "there is no tensor model.layers.0.block_sparse_moe.gate.weight",
    ),
    "a window on some layers": (
        change_config(
            model_type="qwen2", attention_bias=..., use_sliding_window=True, max_window_layers=1
        ),
        "attention of the kinds ['full_attention', 'sliding_attention'] are not supported",
    ),
    "biases": (change_config(attention_bias=True), "attention_bias True"),
    "another activation": (change_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantized": (change_config(quantization_config={"bits": 4}), "quantization_config"),
    "another rope": (change_config(rope_parameters=YARN), "rope type 'yarn'"),
    "another rope, before transformers 5": (
        change_config(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic'",
    ),
    "another llama3 rope": (
        change_config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 4096}),
        "original_max_position_embeddings 4096",
    ),
    "a rope base between integers": (
        change_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.5}),
        "rope_theta 10000.5",
    ),
    "a rope base of true": (change_config(rope_parameters={"rope_theta": True}), "rope_theta True"),
    "a rope base without end": (
        change_config(rope_parameters={"rope_theta": math.inf}),
        "config.json cannot be read: JSON is malformed",
    ),
    "a negative rope base": (
        change_config(rope_parameters={"rope_theta": -10000.0}),
        "rope_theta -10000.0",
    ),
    "a llama3 rope that divides by nothing": (
        change_config(rope_parameters=FULL_LLAMA3 | {"factor": 0}),
        "factor 0 of the llama3 rope",
    ),
    "a llama3 rope without a factor": (
        change_config(rope_parameters=FULL_LLAMA3 | {"factor": None}),
        "factor None of the llama3 rope",
    ),
    "a llama3 rope whose factor is no number": (
        change_config(rope_parameters=FULL_LLAMA3 | {"factor": math.nan}),
        "config.json cannot be read: JSON is malformed",
    ),
    "an epsilon without end": (change_config(rms_norm_eps=math.inf), "JSON is malformed"),
    "a negative epsilon": (change_config(rms_norm_eps=-1e-5), "`$.rms_norm_eps`"),
    "no rope base": (
        change_config(rope_parameters=..., rope_theta=None),
        "rope_theta None is not supported",
    ),
    "rope parameters that are none": (
        change_config(rope_parameters=["default"]),
        "got `array` - at `$.rope_parameters`",
    ),
    "a size that is none": (change_config(hidden_size="16"), "got `str` - at `$.hidden_size`"),
    "half a layer": (
        change_config(num_hidden_layers=1.5),
        "got `float` - at `$.num_hidden_layers`",
    ),
    # Transformers 5 refuses these as well.
    "biases of null": (change_config(attention_bias=None), "attention_bias None"),
    "more biases of null": (change_config(mlp_bias=None), "mlp_bias None"),
    "a config that is a list": (
        lambda directory: (directory / "config.json").write_text('["llama"]'),
        "config.json cannot be read: Expected `object`, got `array`",
    ),
    "incomplete config": (change_config(hidden_size=...), "missing required field `hidden_size`"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "config.json"),
    "pickles": (pickled, ".bin files are pickles"),
    "truncated": (truncated, "damaged"),
    "a file missing": (no_file, "model-00001-of-00002.safetensors"),
    "a tensor missing": (change_tensors(lambda tensors: tensors.pop(Q)), Q),
    "another shape": (change_config(num_key_value_heads=2), "k_proj.weight is [8, 16]"),
    "a tensor too many": (
        change_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q][0] + 0})),
        "q_proj.bias",
    ),
    "an unsupported dtype": (
        change_tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        "dtype F8_E4M3",
    ),
    **{
        f"two dtypes of {what}": (
            change_tensors(lambda t, name=name: t.update({name: t[name].bfloat16()})),
            f"{name} has dtype torch.bfloat16, and {other} torch.float32",
        )
        for what, name, other in (
            ("queries and keys", Q.replace("q_", "k_"), Q.replace("1", "0")),
            ("gate and up", GATE.replace("gate", "up"), GATE),
            ("layers", Q, Q.replace("1", "0")),
        )
    },
}


EXPERTS = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("model_type", "block", "tensors"),
    [
        ("qwen3_moe", "mlp", (EXPERTS, "experts.0.down_proj.weight")),
        ("mixtral", "block_sparse_moe", (EXPERTS, "experts.0.w2.weight")),
        ("mixtral", "block_sparse_moe", ("model.layers.0.mlp.gate.weight", "gate.weight")),
    ],
)
def test_experts_in_two_forms(
    model_type: str, block: str, tensors: tuple[str, str], llama: Path, tmp_path: Path
) -> None:
    """Refused by both names: neither form wins over the other."""
    shutil.copytree(llama, tmp_path / "source")
    one, other = tensors[0], f"model.layers.0.{block}.{tensors[1]}"
    config = {"model_type": model_type, "num_local_experts": 2, "moe_intermediate_size": 24}
    change_config(**config, num_experts_per_tok=2)(tmp_path / "source")
    size = (2, 16, 24) if one == EXPERTS else (2, 16)
    both = {one: torch.ones(size), other: torch.zeros(size[-2:])}
    change_tensors(lambda found: found.update(both))(tmp_path / "source")
    with pytest.raises(UserError, match=f"{one}, and {other} of .* in two forms"):
        import_hugging_face(tmp_path / "source", tmp_path / "megatron", 128)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("case", IMPORTS)
def test_import_refused(case: str, llama: Path, tmp_path: Path) -> None:
    spoil, message = IMPORTS[case]
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    spoil(source)
    with pytest.raises(UserError) as refusal:
        import_hugging_face(source, tmp_path / "megatron", 128)
    assert message in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def megatron(llama: Path, tmp_path: Path) -> Path:
    import_hugging_face(llama, tmp_path / "megatron", 128)
    return tmp_path / "megatron" / "release"


def test_what_exists_is_not_overwritten(llama: Path, megatron: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        import_hugging_face(llama, megatron.parent, 128)


class RunsCode:
    """What an attacker would put into a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_pickles_are_not_run(megatron: Path, tmp_path: Path) -> None:
    """Neither the table of a checkpoint nor its arguments."""
    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(RunsCode(mark)))
    assert mark.exists()
    mark.unlink()

    torch.save({"args": RunsCode(mark)}, megatron / "common.pt")
    with pytest.raises(UserError, match="no readable arguments"):
        _ = TorchDistReader(megatron).arguments
    (megatron / ".metadata").write_bytes(pickle.dumps(RunsCode(mark)))
    with pytest.raises(UserError, match=r"wants to run pathlib.*Path\.touch|getattr"):
        TorchDistReader(megatron)
    assert not mark.exists()


EXPORTS: dict[str, tuple[str, Any, str]] = {
    "layer norm": ("normalization", "LayerNorm", "normalization 'LayerNorm'"),
    "biases": ("add_bias_linear", True, "add_bias_linear True"),
    "learned positions": ("position_embedding_type", "learned_absolute", "learned_absolute"),
    "interpolated positions": ("rotary_seq_len_interpolation_factor", 2, "interpolation"),
    "experts without a router": ("num_experts", 8, "missing required field `moe_router_topk`"),
    "windows on some layers": ("window_attn_skip_freq", 4, "window_attn_skip_freq 4"),
    "other sizes": ("ffn_hidden_size", 32, "mlp.linear_fc1.weight is [2, 48, 16]"),
    "more layers": ("num_layers", 3, "is [2, 16]"),
    "biases of queries": (
        "add_qkv_bias",
        True,
        "has no tensor decoder.layers.self_attention.linear_qkv.bias",
    ),
    "a weight too many": (
        "untie_embeddings_and_output_weights",
        False,
        "has output_layer.weight, which is not what its arguments describe",
    ),
    "more tokens": ("vocab_size", 300, "256 rows of vocabulary"),
    "like another": ("rotary_base", 500000, "rope_theta is 500000 here and 10000 there; name"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_export_refused(
    case: str, megatron: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value, message = EXPORTS[case]
    common = TorchDistReader(megatron).common_state
    setattr(common["args"], name, value)
    torch.save(common, megatron / "common.pt")
    with pytest.raises(UserError) as refusal:
        like = llama if case == "like another" else None
        export_hugging_face(megatron, tmp_path / "hf", like, None, 10**9)
    assert message in str(refusal.value)
    assert not (tmp_path / "hf").exists()


def test_export_of_what_no_family_has() -> None:
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    both = Architecture(
        2, 64, 128, 4, 2, 16, 99, 99, tied=False, qkv_bias=True, qk_norm=True, **shape
    )
    with pytest.raises(UserError, match="no family that can be exported has all of qk_norm, qkv_b"):
        to_hugging_face(both, "float32")


@pytest.mark.parametrize("key", ["decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2"])
def test_export_of_half_a_checkpoint(key: str, megatron: Path, tmp_path: Path) -> None:
    """A tensor is not there, or its last layer."""
    table = TorchDistReader(megatron).table
    if "layers" in key:
        table.state_dict_metadata[f"{key}.weight"].chunks.pop()
    else:
        del table.state_dict_metadata[key]
    (megatron / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match=f"(has no tensor|lacks a part of) {key}"):
        export_hugging_face(megatron, tmp_path / "hf", None, None, 10**9)
    assert not (tmp_path / "hf").exists()


def test_damage_within_a_block(megatron: Path, tmp_path: Path) -> None:
    """As a disk leaves it that loses what was not synced: the size is right, zeros are in it."""
    key = "output_layer.weight"
    places = TorchDistReader(megatron).table.storage_data
    place = next(place for index, place in places.items() if index.fqn == key)
    with (megatron / place.relative_path).open("r+b") as file:
        file.seek(place.offset + place.length - 512)
        file.write(bytes(512))
    with pytest.raises(UserError, match=f"has a block of {key} that cannot be read: ") as error:
        export_hugging_face(megatron, tmp_path / "hf", None, None, 10**9)
    assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()


def test_weights_that_go_while_they_are_read(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    weight = next(iter(find_tensors(source).values()))
    weight.file.unlink()
    with pytest.raises(UserError, match=rf"^{weight.file} can no longer be read: [^\n]*$"):
        weight.read()


def test_dropout_is_said_to_be_left_out(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path / "source")
    change_config(attention_dropout=0.1)(tmp_path / "source")
    arguments = import_hugging_face(tmp_path / "source", tmp_path / "megatron", 128)
    assert arguments["attention_dropout"] == 0
    assert capsys.readouterr().err.startswith("attention_dropout 0.1 of ")


def test_command_line(llama: Path, tmp_path: Path) -> None:
    """One line, exit code 2."""
    save = ["--save", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, TOOL, "import", "--hf", str(tmp_path), *save],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot read {tmp_path / 'config.json'}")
    assert "Traceback" not in done.stderr


def test_kill_leaves_nothing_to_load(llama: Path, tmp_path: Path) -> None:
    """Killed while it writes; a second run then succeeds."""
    target = tmp_path / "megatron"
    slow = (
        "import sys, time; from pathlib import Path;"
        "from megatron_slm.model.conversion import import_hf;"
        "write = import_hf.write_checkpoint_table;"
        "import_hf.write_checkpoint_table = lambda *a: (write(*a), print('written', flush=True),"
        " time.sleep(60));"
        "import_hf.import_hugging_face(Path(sys.argv[1]), Path(sys.argv[2]), 128)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(llama), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    import_hugging_face(llama, target, 128)
    assert TorchDistReader(target / "release").arguments.num_layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
