"""Name all that a command line lacks at once; Megatron would ask for one option at a time."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_slm.errors import UserError
from megatron_slm.files import read_bounded

TRACKER = "latest_checkpointed_iteration.txt"
# Types of tokenizers that are read from a file.
OF_A_FILE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "SFTTokenizer",
)
# What --use-checkpoint-args takes from any checkpoint, and from one that training wrote.
OF_THE_MODEL = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
OF_TRAINING = ("seq_length", "tokenizer_type")
OF_THE_DATA = ("seq_length", "micro_batch_size", "tokenizer_type", "data")
OF_A_RUN = (*OF_THE_MODEL, *OF_THE_DATA, "length", "lr", "eval_interval", "save_interval")

# Options that stand in for a needed one, whose name in the parsed arguments they share.
STAND_INS = {
    "--encoder-num-layers": "num_layers",
    "--hybrid-layer-pattern": "num_layers",
    "--encoder-seq-length": "seq_length",
    "--data-args-path": "data",
    "--train-data-path": "data",
    "--per-split-data-args-path": "data",
    "--train-samples": "length",
    "--persistent-save-interval": "save_interval",
}


def add_needed(parser: ArgumentParser) -> None:
    """Declare those of Megatron's options that a run needs, and those that stand in for them."""
    group = parser.add_argument_group("what every run needs, of Megatron's options")
    add = group.add_argument
    add("--num-layers", type=int, metavar="N", help="Layers of the model.")
    add("--hidden-size", type=int, metavar="N", help="Width of a layer.")
    add("--num-attention-heads", type=int, metavar="N", help="Attention heads of a layer.")
    add(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="Longest sequence that the model is built for. These four can also be taken from a "
        "checkpoint: --use-checkpoint-args with --load or --pretrained-checkpoint.",
    )
    add("--seq-length", type=int, metavar="N", help="Tokens in a sample.")
    add("--micro-batch-size", type=int, metavar="N", help="Samples that a rank takes at a time.")
    add("--tokenizer-type", metavar="TYPE", help="For example SentencePieceTokenizer.")
    add("--tokenizer-model", metavar="PATH", help="File of the tokenizer; most types need one.")
    add(
        "--data-path",
        dest="data",
        nargs="*",
        metavar="PREFIX",
        help="Datasets, by the paths of their files without .bin and .idx. Or give "
        "--data-args-path, --train-data-path with --valid-data-path, --per-split-data-args-path, "
        "or --mock-data.",
    )
    add(
        "--train-iters",
        dest="length",
        type=int,
        metavar="N",
        help="Iterations to train for. Or give --train-samples.",
    )
    add("--lr", type=float, metavar="RATE", help="Highest learning rate.")
    add("--eval-interval", type=int, metavar="N", help="Iterations between validations.")
    add("--save", metavar="DIR", help="Directory for checkpoints. Without it none are kept.")
    add(
        "--save-interval",
        type=int,
        metavar="N",
        help="Iterations between checkpoints; --save needs it.",
    )
    for flag in ("--load", "--pretrained-checkpoint", "--split", "--vocab-size", "--vocab-file"):
        add(flag, help=SUPPRESS)
    for flag, name in STAND_INS.items():
        add(flag, dest=name, nargs="*" if name == "data" else None, help=SUPPRESS)
    add("--global-batch-size", help=SUPPRESS)
    for flag in ("--use-checkpoint-args", "--mock-data", "--skip-train"):
        add(flag, action="store_true", help=SUPPRESS)


def check_needed(args: Namespace, given: Collection[str], needs: Collection[str]) -> None:
    """Refuse a command line that lacks something the job needs.

    Args:
        args: values of the options that `add_needed` declares.
        given: all options on the command line.
        needs: names of the options that this job cannot do without.

    Raises:
        UserError: something is missing; the message names all of it.
    """
    if "--yaml-cfg" in given:  # it is refused when Megatron's parser reads it
        return
    missing = list(_missing(args, given, needs))
    if missing:
        raise UserError(f"the command line lacks {', '.join(missing)}; --help says what they are")


def _missing(args: Namespace, given: Collection[str], needs: Collection[str]) -> Iterator[str]:
    starts = [load for load in (args.load, args.pretrained_checkpoint) if load is not None]
    takes = args.use_checkpoint_args and "num_layers" in needs  # scoring takes no arguments from it
    trackers = [Path(load) / TRACKER for load in starts if takes]
    begun = [read_bounded(tracker).strip() for tracker in trackers if tracker.is_file()]
    if takes and "--non-persistent-ckpt-type" in given:  # the checkpoint may be in another place
        begun.append(b"")
    from_checkpoint = set(OF_THE_MODEL if takes else ())
    if any(iteration != b"release" for iteration in begun):
        from_checkpoint |= set(OF_TRAINING)
    stands_in = {
        "data": args.mock_data,
        "tokenizer_type": args.vocab_file,  # GPT-2's tokenizer is Megatron's default
        "lr": args.skip_train,
        "eval_interval": args.skip_train,
        "save_interval": args.save is None,
    }
    names = {
        "data": "--data-path (or --data-args-path, --train-data-path, --mock-data)",
        "length": "--train-iters (or --train-samples)",
        "save_interval": "--save-interval (for --save)",
    }
    for name in needs:
        if getattr(args, name) is None and not stands_in.get(name) and name not in from_checkpoint:
            yield names.get(name, f"--{name.replace('_', '-')}")
    if takes and not begun:
        where = " or ".join(starts) or "--load or --pretrained-checkpoint, which are not given"
        yield (
            f"a checkpoint for --use-checkpoint-args (there is none in {where}; "
            "tools/convert_checkpoint.py makes one of a Hugging Face model)"
        )
    if args.tokenizer_type in OF_A_FILE and args.tokenizer_model is None and not begun:
        yield f"--tokenizer-model (for {args.tokenizer_type})"
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        yield "--vocab-size (for NullTokenizer)"
    if "--data-args-path" in given and args.split is None:
        yield "--split (for --data-args-path)"
