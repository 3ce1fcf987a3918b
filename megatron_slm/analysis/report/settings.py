"""Read a run's settings from the arguments that Megatron writes to TensorBoard as text.

The text may come from a stranger's run, so it is only shown as words or parsed as whole numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

MOST_DIGITS = 15
QUOTED = re.compile(r"'([^']+)'")
WEIGHT = re.compile(r"[\d.]+")
# Arguments that give a model other parameters than a Llama's.
NO_LLAMA = (
    *("multi_latent_attention", "mtp_num_layers", "hybrid_layer_pattern", "num_experts"),
    *("attention_output_gate", "experimental_attention_variant"),
)
SUFFIX = re.compile(r"_[^_]+_document$")  # what preprocessing appends to a prefix


@dataclass(frozen=True)
class RunSettings:
    """The arguments of a run."""

    texts: dict[str, str] = field(default_factory=dict)
    """Megatron's arguments as text, by name; empty if the run did not log them."""

    def text(self, name: str) -> str | None:
        """Return an argument's value; None if it has none."""
        value = self.texts.get(name)
        return None if value == "None" else value

    def number(self, name: str) -> int | None:
        """Return an argument's value if it is a whole number above 0, else None."""
        value = self.texts.get(name, "")
        if not (value.isascii() and value.isdecimal() and len(value) <= MOST_DIGITS):
            return None
        return int(value) or None

    def names(self, name: str) -> list[str]:
        """Return the names of the datasets in an argument, without weights and directories."""
        words = QUOTED.findall(self.texts.get(name, ""))
        paths = (PurePosixPath(word) for word in words if not WEIGHT.fullmatch(word))
        return [SUFFIX.sub("", path.name) for path in paths]

    @property
    def parameters(self) -> int | None:
        """Number of parameters of a Llama model; None for other models.

        The formula is that of megatron_slm.planning.parameters, which takes seconds to import.
        """
        llama = {"swiglu": "True", "normalization": "RMSNorm", "add_bias_linear": "False"}
        if any(self.texts.get(name) != value for name, value in llama.items()):
            return None
        if any(self.texts.get(name, "None") not in ("None", "False") for name in NO_LLAMA):
            return None
        sizes = [
            self.number(name)
            for name in (
                *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
                *("kv_channels", "padded_vocab_size"),
            )
        ]
        grouped = self.texts.get("group_query_attention") == "True"
        groups = self.number("num_query_groups" if grouped else "num_attention_heads")
        if groups is None or None in sizes:
            return None
        layers, hidden, ffn, heads, channels, vocabulary = (size or 0 for size in sizes)
        layer = hidden * (2 * heads * channels + 2 * groups * channels + 3 * ffn + 2)
        tables = 1 + (self.texts.get("untie_embeddings_and_output_weights") == "True")
        return layers * layer + (tables * vocabulary + 1) * hidden
