"""Files that import and export read and that strangers made: one line that names the file, in
bounded time and memory, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.torch_dist import TorchDistReader
from random_llama import save_llama
from resident import resident

SECONDS, BYTES = 20, 1 << 30
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes longer or more memory, rather than the machine."""

    def too_long(*_: Any) -> None:
        raise TimeoutError

    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    return save_llama(directory, vocab_size=100, num_attention_heads=4, num_key_value_heads=2)


Spoil = Callable[[Path], object]


def says(**values: Any) -> Spoil:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def holds(name: str, content: str | bytes) -> Spoil:
    def write(directory: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    return write


def is_pipe(name: str) -> Spoil:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


def is_directory(name: str) -> Spoil:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return make


def shard(name: Any) -> Spoil:
    """All tensors are in a file of that name, and that of the model is gone."""

    def write(directory: Path) -> None:
        (directory / SINGLE).rename(directory / "a.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))

    return write


def shard_is(make: Callable[[str], Spoil]) -> Spoil:
    def change(directory: Path) -> None:
        shard("a.safetensors")(directory)
        make("a.safetensors")(directory)

    return change


def links(to: str) -> Callable[[str], Spoil]:
    def link(name: str) -> Spoil:
        def make(directory: Path) -> None:
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(to)

        return make

    return link


def header(length: int | None, content: str, data: bytes = b"") -> Spoil:
    size = len(content) if length is None else length
    return holds(SINGLE, size.to_bytes(8, "little") + content.encode() + data)


def tensors(data: int = 8, **given: dict[str, Any]) -> Spoil:
    """Write a file with one float32 tensor of two values, except for what is given."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entries = {EMBEDDING.replace("weight", name): entry | change for name, change in given.items()}
    return header(None, json.dumps(entries), bytes(data))


def twice_the_same_name(directory: Path) -> None:
    entry = '"{}": {{"dtype": "F32", "shape": [2], "data_offsets": [{}, {}]}}'
    both = ", ".join(entry.format(EMBEDDING, at, at + 8) for at in (0, 8))
    header(None, f"{{{both}}}", bytes(16))(directory)


DEEP = "[" * 100_000 + "]" * 100_000
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMPORTS: dict[str, tuple[str, Spoil]] = {
    "a thousand million layers": ("config.json", says(num_hidden_layers=10**9)),
    "more layers than a word counts": ("config.json", says(num_hidden_layers=10**30)),
    "minus one layer": ("config.json", says(num_hidden_layers=-1)),
    "layers of true": ("config.json", says(num_hidden_layers=True)),
    "no layers": ("config.json", says(num_hidden_layers=None)),
    "two million experts": (
        "config.json: Expected `int` <= 10000 - at `$.num_local_experts`",
        says(model_type="mixtral", num_local_experts=2_000_000),
    ),
    "as many experts as a word counts": (
        "config.json: Expected `int` <= 10000 - at `$.num_experts`",
        says(model_type="qwen3_moe", num_experts=2**31 - 1),
    ),
    "ten million experts in all layers": (
        "config.json: 10000 layers of 1000 experts each",
        says(model_type="qwen3_moe", num_experts=1000, num_hidden_layers=10_000),
    ),
    "a list of types": ("config.json", says(model_type=["llama"])),
    "a type that is an object": ("config.json", says(model_type={"llama": 1})),
    "no type": ("config.json", says(model_type=None)),
    "a hidden size of a list": ("config.json", says(hidden_size=[16])),
    "a hidden size of zero": ("config.json", says(hidden_size=0)),
    "more heads than size": ("config.json", says(num_attention_heads=64, num_key_value_heads=64)),
    "a vocabulary of 10^15": ("config.json", says(vocab_size=10**15)),
    "a vocabulary beyond its tensor": ("embed_tokens", says(vocab_size=2**31 - 1)),
    "layer types of a number": ("config.json", says(layer_types=3)),
    "rope parameters of text": ("config.json", says(rope_parameters="default")),
    "a rope base of an object": ("config.json", says(rope_parameters=ROPE | {"rope_theta": {}})),
    "a rope base of 1e300": ("config.json", says(rope_parameters=ROPE | {"rope_theta": 1e300})),
    "a rope type of a list": ("config.json", says(rope_parameters=ROPE | {"rope_type": [1]})),
    "a million letters of activation": ("config.json", says(hidden_act="a" * 10**6)),
    "a nested config": ("config.json", holds("config.json", DEEP)),
    "a config nested in a value": ("config.json", holds("config.json", f'{{"a": {DEEP}}}')),
    "a config of 30 million bytes": ("config.json", holds("config.json", "[]," * 10**7)),
    "an empty config": ("config.json", holds("config.json", "")),
    "a config of bytes": ("config.json", holds("config.json", bytes(range(256)))),
    "a config in UTF-16": ("config.json", holds("config.json", "{}".encode("utf-16"))),
    "a config that is a number": ("config.json", holds("config.json", "1e999")),
    "a config that is a pipe": ("config.json", is_pipe("config.json")),
    "a config that is a directory": ("config.json", is_directory("config.json")),
    "a config that is a device": ("config.json", links("/dev/zero")("config.json")),
    "an index of null": (INDEX, holds(INDEX, "null")),
    "an index without its map": (INDEX, holds(INDEX, '{"metadata": {}}')),
    "a map of null": (INDEX, holds(INDEX, '{"weight_map": null}')),
    "a map that is a list": (INDEX, holds(INDEX, '{"weight_map": ["a"]}')),
    "a map of numbers": (INDEX, holds(INDEX, '{"weight_map": {"a": 5}}')),
    "an empty map": (INDEX, holds(INDEX, '{"weight_map": {}}')),
    "a nested map": (INDEX, holds(INDEX, f'{{"weight_map": {DEEP}}}')),
    "an index of 20 million bytes": (INDEX, holds(INDEX, " " * 20_000_000)),
    "a file of another directory": ("../a.safetensors", shard("../a.safetensors")),
    "a file of the root": ("/etc/passwd", shard("/etc/passwd")),
    "a file without a name": ("''", shard("")),
    "a name with a zero": ("\\x00", shard("a\0.safetensors")),
    "a name of 5,000 letters": ("a" * 100, shard("a" * 5000)),
    "a file that is not there": ("b.safetensors", shard("b.safetensors")),
    "a file that is a pipe": ("a.safetensors", shard_is(is_pipe)),
    "a file that is a directory": ("a.safetensors", shard_is(is_directory)),
    "a file that is a device": ("a.safetensors", shard_is(links("/dev/zero"))),
    "a file that links to itself": ("a.safetensors", shard_is(links("a.safetensors"))),
    "a header of 2^63 bytes": (SINGLE, header(2**63, "{}")),
    "a header of 10^9 bytes": (SINGLE, header(10**9, "{}")),
    "a header beyond the file": (SINGLE, header(1000, "{}")),
    "a header of 20 million bytes": (SINGLE, header(None, "{" + " " * 20_000_000 + "}")),
    "a header that is no JSON": (SINGLE, header(None, "tensors")),
    "a nested header": (SINGLE, header(None, DEEP)),
    "a header that is a list": (SINGLE, header(None, "[]")),
    "no tensors": ("embed_tokens", header(None, "{}")),
    "an empty file": (SINGLE, holds(SINGLE, "")),
    "overlapping tensors": (SINGLE, tensors(12, a={}, b={"data_offsets": [4, 12]})),
    "a hole between tensors": (SINGLE, tensors(24, a={}, b={"data_offsets": [16, 24]})),
    "a tensor beyond the file": (SINGLE, tensors(4, weight={})),
    "bytes after the tensors": (SINGLE, tensors(80, weight={})),
    "a negative offset": (SINGLE, tensors(weight={"data_offsets": [-8, 0]})),
    "offsets in reverse": (SINGLE, tensors(weight={"data_offsets": [8, 0]})),
    "offsets of 2^64": (SINGLE, tensors(weight={"data_offsets": [0, 2**64]})),
    "a shape whose product overflows": (SINGLE, tensors(weight={"shape": [2**33, 2**33]})),
    "another shape than bytes": (SINGLE, tensors(weight={"shape": [3]})),
    "a negative shape": (SINGLE, tensors(weight={"shape": [-2]})),
    "a shape of text": (SINGLE, tensors(weight={"shape": ["2"]})),
    "no dimension": (SINGLE, tensors(weight={"shape": [], "data_offsets": [0, 4]}, data=4)),
    "a dtype that is none": (SINGLE, tensors(weight={"dtype": "F31"})),
    "doubles": (SINGLE, tensors(weight={"dtype": "F64", "shape": [1]})),
    "two tensors of one name": (SINGLE, twice_the_same_name),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_import(case: str, llama: Path, tmp_path: Path) -> None:
    named, spoil = IMPORTS[case]
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    spoil(source)
    with bounded(), pytest.raises(UserError) as refusal:
        import_hugging_face(source, tmp_path / "megatron", 128)
    message = str(refusal.value)
    assert named in message
    assert len(message) < 6000 and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


ARGUMENTS: dict[str, Any] = {
    "num_layers": (-1, 10**9, None, "1", [1], True, 2.5, ...),
    "hidden_size": (0, None, "16", ...),
    "ffn_hidden_size": (-24, None, ...),
    "num_attention_heads": (0, 3, None, "4", ...),
    "num_query_groups": (3, "2"),
    "kv_channels": (None, 3, ...),
    "max_position_embeddings": (None, "many", ...),
    "layernorm_epsilon": (-1.0, float("nan"), float("inf"), "1e-5", ...),
    "rotary_base": (float("nan"), "10000", 0, ...),
    "window_size": ("5", (1,), (1, 2, 3), (-2, 0), 7),
    "untie_embeddings_and_output_weights": ("false", None, ...),
    "vocab_size": ("100", -1, 0, 10**12, [100]),
    "slm_model_type": ("gpt", 5),
    "num_experts": (torch.ones(2), {"a": 1}, 2_000_000),
    "slm_special_ids": ("none", {"bos_token_id": "1"}),
}


def test_export_of_odd_arguments(llama: Path, tmp_path: Path) -> None:
    release = tmp_path / "megatron" / "release"
    import_hugging_face(llama, release.parent, 128)
    common = TorchDistReader(release).common_state
    wrong = []
    for name, values in ARGUMENTS.items():
        for value in values:
            arguments = vars(common["args"]) | {name: value}
            odd = common | {"args": type(common["args"])(**arguments)}
            if value is ...:
                delattr(odd["args"], name)
            torch.save(odd, release / "common.pt")
            try:
                with bounded():
                    export_hugging_face(release, tmp_path / "hf", None, None, 10**9)
                wrong.append(f"{name} {value}: exported")
            except UserError as error:
                if name not in str(error) and "heads" not in str(error):
                    wrong.append(f"{name} {value}: {error}")
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_export_of_a_table_that_promises_too_much(llama: Path, tmp_path: Path) -> None:
    """More memory than the files have bytes."""
    release = tmp_path / "megatron" / "release"
    import_hugging_face(llama, release.parent, 128)
    reader = TorchDistReader(release)
    common = reader.common_state
    common["args"].vocab_size = 10**9
    torch.save(common, release / "common.pt")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        reader.table.state_dict_metadata[name].size = torch.Size((10**9, 16))
    (release / ".metadata").write_bytes(pickle.dumps(reader.table))
    with bounded(), pytest.raises(UserError, match="is damaged: its tensors have"):
        export_hugging_face(release, tmp_path / "hf", None, None, 10**9)


LIKES: dict[str, tuple[str, Spoil]] = {
    "settings nested": ("tokenizer_config.json", holds("tokenizer_config.json", DEEP)),
    "settings of a list": ("tokenizer_config.json", holds("tokenizer_config.json", "[]")),
    "a token of a number": (
        "tokenizer_config.json",
        holds("tokenizer_config.json", '{"bos_token": 5}'),
    ),
    "a token without content": (
        "tokenizer_config.json",
        holds("tokenizer_config.json", '{"eos_token": {"id": 2}}'),
    ),
    "a tokenizer of garbage": ("tokenizer.json", holds("tokenizer.json", "garbage")),
    "a tokenizer nested": ("tokenizer.json", holds("tokenizer.json", DEEP)),
    "a tokenizer without a model": ("tokenizer.json", holds("tokenizer.json", "{}")),
    "a config that is a pipe": ("config.json", is_pipe("config.json")),
    "a config nested": ("config.json", holds("config.json", DEEP)),
}


@pytest.mark.parametrize("case", LIKES)
def test_export_with_an_odd_tokenizer(case: str, llama: Path, tmp_path: Path) -> None:
    named, spoil = LIKES[case]
    import_hugging_face(llama, tmp_path / "megatron", 128)
    like = tmp_path / "like"
    shutil.copytree(llama, like)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (like / name).write_text("{}")
    spoil(like)
    with bounded(), pytest.raises(UserError, match=named):
        export_hugging_face(tmp_path / "megatron" / "release", tmp_path / "hf", like, None, 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "megatron"]


EXPORT = ["export", "--load", "megatron", "--hf", "hf"]
IMPORT = ["import", "--hf", "hf", "--save", "megatron"]
NUMBERS = [
    *([*EXPORT, "--shard-gb", text] for text in ("nan", "inf", "0", "-1", "1e999", "five", "")),
    *([*EXPORT, "--vocab-size", text] for text in ("0", "-5", "1.5", "10000000000", "nan")),
    *([*EXPORT, "--ckpt-step", text] for text in ("-1", "1.5", "latest")),
    *(
        [*IMPORT, "--make-vocab-size-divisible-by", text]
        for text in ("0", "-128", "1.5", "nan", "100000000000")
    ),
]


def test_numbers_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main = run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"))["main"]
    for arguments in NUMBERS:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2, arguments
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"error: argument {arguments[-2]}: " in said, arguments


def test_directories_exchanged(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import of a Megatron checkpoint, export of a Hugging Face directory."""
    main = run_path(str(REPOSITORY / "tools" / "convert_checkpoint.py"))["main"]
    import_hugging_face(llama, tmp_path / "megatron", 128)
    for arguments, message in (
        (["import", "--hf", "megatron", "--save", "new"], "is a Megatron checkpoint"),
        (["import", "--hf", "megatron/release", "--save", "new"], "is a Megatron checkpoint"),
        (["export", "--load", str(llama), "--hf", "new"], "is a Hugging Face directory"),
        (["export", "--load", "megatron/release", "--hf", "new"], "there is no latest_check"),
        (["export", "--load", "megatron", "--hf", "new", "--like", "megatron"], "is a Megatron"),
        (["import", "--hf", "nowhere", "--save", "new"], "cannot read nowhere/config.json"),
    ):
        with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            main(arguments)
        assert end.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and message in said
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
