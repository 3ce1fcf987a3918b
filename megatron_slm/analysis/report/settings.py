"""What a run was told, from the arguments that Megatron writes to TensorBoard as text.

They were written by whoever made the run: here they are words to show, and whole numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

MOST_DIGITS = 15
QUOTED = re.compile(r"'([^']+)'")
WEIGHT = re.compile(r"[\d.]+")
SUFFIX = re.compile(r"_[^_]+_document$")  # which preprocessing appends to a prefix


@dataclass(frozen=True)
class RunSettings:
    """Megatron's arguments by their names, as text; empty where a run has not logged them."""

    texts: dict[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """Return a value; None where there is none."""
        value = self.texts.get(name)
        return None if value == "None" else value

    def number(self, name: str) -> int | None:
        """Return a whole number above 0; None where the value is none."""
        value = self.texts.get(name, "")
        if not (value.isascii() and value.isdecimal() and len(value) <= MOST_DIGITS):
            return None
        return int(value) or None

    def names(self, name: str) -> list[str]:
        """Return the words of a list, with neither weights nor directories."""
        words = QUOTED.findall(self.texts.get(name, ""))
        paths = (PurePosixPath(word) for word in words if not WEIGHT.fullmatch(word))
        return [SUFFIX.sub("", path.name) for path in paths]

    @property
    def parameters(self) -> int | None:
        """Parameters of a Llama, as megatron_slm.planning.formulas counts them (which would import
        Megatron, and seconds with it); None for other models."""
        llama = {"swiglu": "True", "normalization": "RMSNorm", "add_bias_linear": "False"}
        if any(self.texts.get(name) != value for name, value in llama.items()):
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
        if self.text("num_experts") is not None or groups is None or None in sizes:
            return None
        layers, hidden, ffn, heads, channels, vocabulary = (size or 0 for size in sizes)
        layer = hidden * (2 * heads * channels + 2 * groups * channels + 3 * ffn + 2)
        tables = 1 + (self.texts.get("untie_embeddings_and_output_weights") == "True")
        return layers * layer + (tables * vocabulary + 1) * hidden
