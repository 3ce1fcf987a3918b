"""Convert Llama, Mistral, Mixtral, Qwen and Seed-OSS models between safetensors and Megatron.

    python tools/convert_checkpoint.py import --hf TinyLlama-1.1B --save base
    torchrun ... -m megatron_slm.pretrain --load base --use-checkpoint-args ... --save policy
    python tools/convert_checkpoint.py export --load policy --hf policy-hf --like TinyLlama-1.1B

Models are converted tensor by tensor, so memory stays below twice the largest tensor plus a
gigabyte.  Under torchrun the work is divided among all ranks.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_slm.errors import UserError, exit_on_user_error


def number[T: (int, float)](kind: type[T], most: T) -> Callable[[str], T]:
    """Return a function that parses an argument as a number above 0 and at most `most`."""

    def read(text: str) -> T:
        try:
            value = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ArgumentTypeError(f"{text!r} is not {what}") from error
        if not 0 < value <= most:
            raise ArgumentTypeError(f"{text} is not above 0 and at most {most}")
        return value

    return read


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hub = commands.add_parser("import", help="Hugging Face to Megatron", allow_abbrev=False)
    add = hub.add_argument
    add(
        "--hf",
        type=Path,
        required=True,
        metavar="DIR",
        help="Directory with config.json and safetensors.",
    )
    add("--save", type=Path, required=True, metavar="DIR", help="New directory, for --load.")
    add(
        "--make-vocab-size-divisible-by",
        type=number(int, 65536),
        default=128,
        metavar="N",
        help="Pad the vocabulary with zeros to a multiple of N. Default: 128, as in Megatron.",
    )
    out = commands.add_parser("export", help="Megatron to Hugging Face", allow_abbrev=False)
    add = out.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="Directory that --save wrote to.")
    add(
        "--ckpt-step", type=number(int, 10**12), metavar="N", help="Iteration. Default: the latest."
    )
    add("--hf", type=Path, required=True, metavar="DIR", help="New directory.")
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory from which to take the tokenizer and further entries of "
        "config.json, such as special tokens. Default: the tokenizer of the training run.",
    )
    add(
        "--vocab-size",
        type=number(int, 2**31 - 1),
        metavar="N",
        help="Rows of the vocabulary to keep. Default: what the checkpoint says.",
    )
    add(
        "--shard-gb",
        type=number(float, 1e6),
        default=5.0,
        metavar="GB",
        help="Largest size of a file. Default: 5.",
    )
    return parser


def convert(args: Namespace) -> None:
    """Do what the command line says.

    Raises:
        UserError: the input is wrong, or the output cannot be written.
    """
    # Imported here, so that the command line can be checked without torch.
    from megatron_slm.model.conversion.destination import this_rank
    from megatron_slm.model.conversion.export_hf import export_hugging_face
    from megatron_slm.model.conversion.import_hf import as_options, import_hugging_face
    from megatron_slm.model.torch_dist import TRACKER, iteration_directory

    first = this_rank()[0] == 0
    if args.command == "import":
        arguments = import_hugging_face(args.hf, args.save, args.make_vocab_size_divisible_by)
        if first:
            print(f"wrote {args.save}: --load {args.save} --use-checkpoint-args, or, in full,")
            print(as_options(arguments))
        return
    if (args.load / "config.json").is_file() and not (args.load / TRACKER).is_file():
        raise UserError(
            f"--load {args.load} is a Hugging Face directory; export takes a Megatron checkpoint, "
            "which import makes of such a directory"
        )
    checkpoint = iteration_directory(args.load, args.ckpt_step, "--load", "--ckpt-step")
    architecture = export_hugging_face(
        checkpoint, args.hf, args.like, args.vocab_size, int(args.shard_gb * 1e9)
    )
    if first:
        print(f"wrote {args.hf}: {replace(architecture, model_type=architecture.family)}")


def main(arguments: list[str]) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    args = build_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="megatron")
    with exit_on_user_error():
        if int(os.getenv("WORLD_SIZE", "1")) == 1:
            convert(args)
            return
        from torch import distributed

        distributed.init_process_group("gloo")
        convert(args)
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
