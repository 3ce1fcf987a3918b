#!/usr/bin/env bash
# The general reference, as the paper trained it: the policy's base model on 1.9 billion tokens of
# instructions and answers, three times, by causal language modeling.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   SIZE        1b (the paper's), 7b, 13b, 70b, qwen3-8b, llama3-8b, qwen3-30b-a3b or mixtral-8x7b: of
#               the policy
#   DATA        data/general-reference.data-args.txt: examples/mixes/general-reference-1.9b.yaml
#               as tools/build_mix.py wrote it; or the prefix of a tokenized corpus, or a blend
#               (weight prefix weight prefix ...)
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the policy's base model, from tools/convert_checkpoint.py import
#   SAVE        checkpoints/reference-general-SIZE: its checkpoints; a run that was stopped goes on
#               from them; REFERENCE of a policy's run
#   TOKENS      1900000000: tokens of an epoch
#   EPOCHS      3
#   LR          5e-5 for 1b, else 1e-5: peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   SEQUENCE    tokens of a sequence; documents are packed
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps from a checkpoint to the next
#   NODES       nodes of 8 GPUs
#
# NODES, BASE, BATCH, SEQUENCE, MICRO_BATCH and SAVE_EVERY have training.sh's values for the size,
# and so has TOKENIZER for qwen3-8b and llama3-8b.
#
# The paper's: tokens, epochs, peak learning rate and length, cosine; of the corpus, Tulu-v2 and
# OpenHermes-2.5.  Ours: batch, warm-up, minimum, weight decay, beta2, and all of 13B and 70B.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${SIZE:=1b}" "${DATA:=data/general-reference.data-args.txt}" "${TOKENS:=1900000000}"
: "${SAVE:=checkpoints/reference-general-$SIZE}"
# shellcheck source=examples/train_reference.sh
source "$(dirname "$slm_recipe")/train_reference.sh"
