#!/usr/bin/env bash
# Mixtral-8x7B on mathematics: the 7B recipe with a mixture of experts, of which a token passes 12.9
# of 46.7 billion parameters.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        data/openwebmath_text_document: prefix of the tokenized corpus, or a blend
#               (weight prefix weight prefix ...), or a mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        checkpoints/mixtral-8x7b: the base model, from tools/convert_checkpoint.py import
#   REFERENCE   checkpoints/reference-math-mixtral-8x7b: the reference, by train_reference_math.sh with
#               SIZE=mixtral-8x7b
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        checkpoints/slm-math-mixtral-8x7b: its checkpoints; a run that was stopped goes on
#               from them
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.7: token selection ratio
#   LR          2e-5: peak learning rate
#   BATCH       256: sequences of a global batch, a million tokens
#   SEQUENCE    4096: tokens of a sequence
#   MICRO_BATCH 1: sequences of a micro-batch
#   SAVE_EVERY  500: steps from a checkpoint to the next
#   NODES       8: nodes of 8 GPUs
#
# The paper has no such model.  Tokens, ratio, batch, schedule and learning rate are its 7B model's.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
SIZE=mixtral-8x7b
: "${DATA:=data/openwebmath_text_document}" "${REFERENCE:=checkpoints/reference-math-mixtral-8x7b}"
: "${SAVE:=checkpoints/slm-math-mixtral-8x7b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=2e-5}"
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
