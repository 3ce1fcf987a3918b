#!/usr/bin/env bash
# Llama-2-70B on mathematics: the 7B recipe at the size where memory decides.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        data/openwebmath_text_document: prefix of the tokenized corpus, or a blend
#               (weight prefix weight prefix ...), or a mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        checkpoints/llama-2-70b: the base model, from tools/convert_checkpoint.py import
#   REFERENCE   checkpoints/reference-math-70b: the reference, of this size or a smaller one
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        checkpoints/slm-math-70b: its checkpoints; a run that was stopped goes on from them
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.7: token selection ratio
#   LR          1e-5: peak learning rate
#   BATCH       256: sequences of a global batch, a million tokens
#   SEQUENCE    4096: tokens of a sequence
#   MICRO_BATCH 1: sequences of a micro-batch
#   SAVE_EVERY  250: steps from a checkpoint to the next
#   NODES       32: nodes of 8 GPUs
#
# The paper stops at 7B.  Tokens, ratio, batch and schedule are its 7B model's; the learning rate
# is ours, half of it, as Llama 2 halves its own.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
SIZE=70b
: "${DATA:=data/openwebmath_text_document}" "${REFERENCE:=checkpoints/reference-math-70b}"
: "${SAVE:=checkpoints/slm-math-70b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=1e-5}"
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
