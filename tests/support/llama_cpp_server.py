"""A small Llama as a GGUF file, and llama-cpp-python's server of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import MODEL
from megatron_slm.model.conversion.tokenizer_files import copy_tokenizer

HEADS, POSITIONS = 2, 1024
KINDS = {
    "is_unknown": gguf.TokenType.UNKNOWN,
    "is_control": gguf.TokenType.CONTROL,
    "is_byte": gguf.TokenType.BYTE,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


def gguf_model(directory: Path, beginning: bool) -> Path:
    """Write a model of random weights for transformers, and as model.gguf for llama.cpp.

    Args:
        beginning: whether llama.cpp puts the token for the beginning of a text before it.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=pieces.get_piece_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    copy_tokenizer(MODEL, directory)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, pieces, beginning)
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns neighboring channels
            rows, columns = values.shape
            values = values.view(HEADS, 2, rows // HEADS // 2, columns).transpose(1, 2)
            values = values.reshape(rows, columns)
        renamed = name
        for theirs, own in NAMES.items():
            renamed = renamed.replace(theirs, own)
        writer.add_tensor(renamed, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory


def _add_tokenizer(writer: Any, pieces: Any, beginning: bool) -> None:
    size = range(pieces.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(at).encode() for at in size])
    writer.add_token_scores([pieces.get_score(at) for at in size])
    writer.add_token_types(
        [
            next((kind for name, kind in KINDS.items() if getattr(pieces, name)(at)), 1)
            for at in size
        ]
    )
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(beginning)
    writer.add_add_space_prefix(True)


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """Run the server while the block lasts; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --n_ctx {POSITIONS + 8} --logits_all true"
    options += " --n_threads 1 --n_threads_batch 1"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), *options.split()]
    with (
        (model.parent / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}/v1/models", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def _wait(url: str, process: Any) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise AssertionError("the server did not start")
