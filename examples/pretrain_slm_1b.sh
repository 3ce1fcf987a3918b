#!/usr/bin/env bash
# TinyLlama-1.1B on mathematics, as the paper trained Rho-Math-1B: 15B tokens of OpenWebMath, 60%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        data/openwebmath_text_document: prefix of the tokenized corpus, or a blend
#               (weight prefix weight prefix ...), or a mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        checkpoints/tinyllama: the base model, from tools/convert_checkpoint.py import
#   REFERENCE   checkpoints/reference-math-1b: the reference, by train_reference_math.sh
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        checkpoints/slm-math-1b: its checkpoints; a run that was stopped goes on from them
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.6: token selection ratio
#   LR          8e-5: peak learning rate
#   BATCH       512: sequences of a global batch, a million tokens
#   SEQUENCE    2048: tokens of a sequence
#   MICRO_BATCH 8: sequences of a micro-batch
#   SAVE_EVERY  1000: steps from a checkpoint to the next
#   NODES       1: nodes of 8 GPUs
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
SIZE=1b
: "${DATA:=data/openwebmath_text_document}" "${REFERENCE:=checkpoints/reference-math-1b}"
: "${SAVE:=checkpoints/slm-math-1b}" "${TOKENS:=15000000000}" "${RATIO:=0.6}" "${LR:=8e-5}"
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
