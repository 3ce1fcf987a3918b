#!/usr/bin/env bash
# TinyLlama-1.1B on mathematics, as the paper trained Rho-Math-1B: 15B tokens of OpenWebMath, 60%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, a blend (weight prefix weight prefix ...), or a
#               mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model, trained by train_reference_math.sh
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
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
SIZE=1b
: "${DATA:=data/openwebmath_text_document}" "${REFERENCE:=checkpoints/reference-math-1b}"
: "${SAVE:=checkpoints/slm-math-1b}" "${TOKENS:=15000000000}" "${RATIO:=0.6}" "${LR:=8e-5}"
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
