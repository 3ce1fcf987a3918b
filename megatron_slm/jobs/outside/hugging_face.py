"""Score passages with any causal language model that transformers can load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_slm.corpus.tokenizers.alignment import Floats
from megatron_slm.errors import UserError
from megatron_slm.jobs.outside.passages import Passage

AT_ONCE = 1 << 27  # logits in float32


class HuggingFaceModel:
    """A model in a directory, on this rank's device.

    Args:
        directory: its config.json and safetensors.
        dtype: what it computes in; auto for what its weights are in.
        vocabulary: tokens that the softmax is over; what the model has beyond them is padding.
        batch_tokens: tokens in a batch, with padding.
        length: tokens that it is to read at once.

    Raises:
        UserError: transformers cannot load it without running its code, weights are missing, or it
            has fewer tokens or positions.
    """

    takes_text = False

    def __init__(
        self, directory: str, dtype: str, vocabulary: int, batch_tokens: int, length: int
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        # The CPU platform is not installed here: transformers would take it for a GPU.
        rank = int(os.getenv("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else "cpu"
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except Exception as error:  # transformers raises whatever it finds
            said = " ".join(str(error).split())[:300]
            raise UserError(f"--model {directory} cannot be loaded: {said}") from error
        _check_weights(directory, found)
        if model.config.vocab_size < vocabulary:
            raise UserError(
                f"--model {directory} has a vocabulary of {model.config.vocab_size} tokens, its "
                f"tokenizer {vocabulary}"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and positions < length:  # GPT-2's n_positions has this name, too
            raise UserError(
                f"--model {directory} has {positions} positions (max_position_embeddings), fewer "
                f"than --seq-length {length}"
            )
        self.model = model.eval().to(self.device)
        self.directory, self.vocabulary, self.batch_tokens = directory, vocabulary, batch_tokens

    def losses(self, passages: Sequence[Passage]) -> list[Floats]:
        """Return the losses of each passage's tokens [n] in nats; NaN where there is none."""
        found: list[Floats] = [np.full(len(passage.ids), np.nan) for passage in passages]
        for batch in self._batches([passage.tokens for passage in passages]):
            rows = self._score([passages[number].tokens for number in batch])
            for number, row in zip(batch, rows, strict=True):
                found[number][len(found[number]) - len(row) :] = row
        for passage, losses in zip(passages, found, strict=True):
            passage.check(losses, f"--model {self.directory}")
        return found

    def _batches(self, tokens: list[Any]) -> Iterator[list[int]]:
        """Yield the numbers of passages of similar lengths; those of one token have no loss."""
        batch: list[int] = []
        for number in sorted(range(len(tokens)), key=lambda each: -len(tokens[each])):
            if len(tokens[number]) < 2:
                continue
            if batch and (len(batch) + 1) * len(tokens[batch[0]]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, rows: list[Any]) -> list[Floats]:
        """Return for each row of tokens the losses of all but the first."""
        length = max(map(len, rows))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.from_numpy(row)
            mask[at, : len(row)] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        # Padding stands behind the text, where nothing of a causal model sees it.
        padded = None if bool((mask[:, :-1] == 1).all()) else mask[:, :-1]
        logits = self.model(tokens[:, :-1], attention_mask=padded, use_cache=False).logits
        flat, labels = logits.flatten(0, 1), tokens[:, 1:].flatten()
        step = max(1, AT_ONCE // flat.shape[1])
        parts = [
            torch.nn.functional.cross_entropy(
                flat[start : start + step, : self.vocabulary].float(),
                labels[start : start + step],
                reduction="none",
            )
            for start in range(0, len(labels), step)
        ]
        losses = torch.cat(parts).view(len(rows), length - 1).double().cpu().numpy()
        return [losses[at, : len(row) - 1] for at, row in enumerate(rows)]


def _check_weights(directory: str, found: dict[str, Any]) -> None:
    """Check that the files have the model's weights and no others, as transformers says."""
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(each if isinstance(each, str) else each[0] for each in found[f"{kind}_keys"])
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"--model {directory} has {kind} weights for its config.json: {names[0]}{others}"
            )


def fingerprint(directory: str) -> dict[str, str]:
    """Return what tells a model from others: a hash of its settings, and of its weights' headers
    and first bytes, with their sizes.

    Raises:
        UserError: the directory has no config.json or no safetensors.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    config = Path(directory, "config.json")
    if not config.is_file() or not files:
        raise UserError(
            f"--model {directory} has no model: it needs a config.json and *.safetensors"
        )
    digest = hashlib.sha256(config.read_bytes())
    size = 0
    for file in files:
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 22))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
        size += file.stat().st_size
    return {"model": f"{size} bytes, {digest.hexdigest()[:32]}"}
