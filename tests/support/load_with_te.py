"""Load checkpoints into Megatron's Transformer Engine layers, as its --load does, and save them.

    load_with_te.py real|stand-in CHECKPOINT...

Prints "loaded CHECKPOINT" and what the layers keep, and saves what it loaded in the directory that
it runs in, as saved0, saved1 ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if sys.argv[1] == "stand-in":
    import te_stand_in

    te_stand_in.install()

from megatron_slm import cpu_platform

cpu_platform.install()

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from torch import distributed

from megatron_slm.model.torch_dist import TorchDistReader

SIZES = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups normalization"
EXPERTS = """
    moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size
    moe_shared_expert_gate
"""


def load(directory: Path, target: Path) -> None:
    reader = TorchDistReader(directory)
    saved = reader.arguments
    names = [*SIZES.split(), *(EXPERTS.split() if saved.num_experts else [])]
    config = TransformerConfig(
        **{name: getattr(saved, name) for name in names},
        num_moe_experts=saved.num_experts,
        qk_layernorm=saved.qk_layernorm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=True),
        vocab_size=saved.padded_vocab_size,
        max_sequence_length=saved.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not saved.untie_embeddings_and_output_weights,
    )
    wanted = {"model": model.sharded_state_dict()}
    model.load_state_dict(dist_checkpointing.load(wanted, str(directory))["model"], strict=True)
    for key, value in (
        ("decoder.final_layernorm.weight", model.decoder.final_layernorm.weight),
        ("embedding.word_embeddings.weight", model.embedding.word_embeddings.weight),
    ):
        torch.testing.assert_close(value.data, reader.read(key, (0,) * value.ndim, value.shape))
    print(f"loaded {directory}")
    # Extra states are tensors or bytes of some kind: what matters is that they are there and empty.
    kept = {
        name: "extra" if name.endswith("_extra_state") else list(value.shape)
        for name, value in sorted(model.state_dict().items())
    }
    print(f"kept {json.dumps(kept)}")
    target.mkdir()
    state = {"args": saved, "iteration": 1, "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(target))


if __name__ == "__main__":
    assert HAVE_TE
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    for number, name in enumerate(sys.argv[2:]):
        load(Path(name), Path(f"saved{number}"))
