#!/usr/bin/env bash
# Mistral-7B on mathematics, as the paper trained Rho-Math-7B: 15B tokens of OpenWebMath, 70%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        data/openwebmath_text_document: prefix of the tokenized corpus, or a blend
#               (weight prefix weight prefix ...), or a mix's .data-args.txt from tools/build_mix.py
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        checkpoints/mistral-7b: the base model, from tools/convert_checkpoint.py import
#   REFERENCE   checkpoints/reference-math-7b: the reference, by train_reference_math.sh
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        checkpoints/slm-math-7b: its checkpoints; a run that was stopped goes on from them
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.7: token selection ratio
#   LR          2e-5: peak learning rate
#   BATCH       256: sequences of a global batch, a million tokens
#   SEQUENCE    4096: tokens of a sequence
#   MICRO_BATCH 1: sequences of a micro-batch
#   SAVE_EVERY  500: steps from a checkpoint to the next
#   NODES       4: nodes of 8 GPUs
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
SIZE=7b
: "${DATA:=data/openwebmath_text_document}" "${REFERENCE:=checkpoints/reference-math-7b}"
: "${SAVE:=checkpoints/slm-math-7b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=2e-5}"
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
