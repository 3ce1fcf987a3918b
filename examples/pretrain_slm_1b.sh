#!/usr/bin/env bash
# TinyLlama-1.1B on mathematics, as the paper trained Rho-Math-1B: 15B tokens of OpenWebMath, 60%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model, trained by train_reference_math.sh
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      tokens read in all
#   RATIO       token selection ratio
#   LR          peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=1}" "${DATA:=data/openwebmath_text_document}"
: "${BASE:=checkpoints/tinyllama}" "${REFERENCE:=checkpoints/reference-math-1b}"
: "${SAVE:=checkpoints/slm-math-1b}" "${TOKENS:=15000000000}" "${RATIO:=0.6}" "${LR:=8e-5}"
: "${BATCH:=512}" "${MICRO_BATCH:=8}" "${SAVE_EVERY:=1000}"
SEQUENCE=2048
MODEL=(
    --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32
    --group-query-attention --num-query-groups 4 --kv-channels 64 --max-position-embeddings 2048
    --rotary-base 10000
)
LAYOUT=(--tensor-model-parallel-size 1)
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
