"""Store the losses of a reference outside Megatron, with any tokenizer, for training runs.

    torchrun --nproc_per_node 8 tools/score_with_model.py --data-path PREFIX ... \
        --tokenizer-type TYPE --tokenizer-model PATH --model DIR --slm-reference-cache CACHE
    python tools/score_with_model.py --data-path PREFIX ... --tokenizer-type TYPE \
        --tokenizer-model PATH --server http://127.0.0.1:8000/v1 --model-tokenizer DIR \
        --slm-reference-cache CACHE

The first scores with a model that transformers loads, the second on a server with an
OpenAI-compatible /v1/completions (vLLM, SGLang, llama-cpp-python).  If the model has another
tokenizer than the datasets, it reads their text, and its losses are brought to their tokens by the
bytes that both share.  A job that was killed continues with the same command.  Training reads the
losses with --slm-reference-cache CACHE, as those of tools/score_reference.py --by document.
"""

from __future__ import annotations

import sys

from megatron_slm.errors import exit_on_user_error
from megatron_slm.jobs.outside.command_line import outside_arguments, scoring_parser


def main(command: list[str]) -> None:
    """Score the datasets that the command line names."""
    with exit_on_user_error("the same command goes on with what was scored"):
        args = outside_arguments(scoring_parser(__doc__), command)
        # After the command line is known to be right: this imports torch and Megatron.
        from megatron_slm.jobs.outside.score import score_with_model

        score_with_model(args)


if __name__ == "__main__":
    main(sys.argv[1:])
