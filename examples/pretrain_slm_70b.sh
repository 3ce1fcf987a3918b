#!/usr/bin/env bash
# Llama-2-70B on mathematics: the 7B recipe at the size where memory decides.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, a blend (weight prefix weight prefix ...), or a
#               mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model: of this size, or a smaller one
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      tokens read in all
#   RATIO       token selection ratio
#   LR          peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   SEQUENCE    tokens of a sequence
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps
#
# NODES, BASE, BATCH, SEQUENCE, MICRO_BATCH and SAVE_EVERY have training.sh's values for the size.
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
