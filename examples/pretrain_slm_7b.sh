#!/usr/bin/env bash
# Mistral-7B on mathematics, as the paper trained Rho-Math-7B: 15B tokens of OpenWebMath, 70%.
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
: "${NODES:=4}" "${DATA:=data/openwebmath_text_document}"
: "${BASE:=checkpoints/mistral-7b}" "${REFERENCE:=checkpoints/reference-math-7b}"
: "${SAVE:=checkpoints/slm-math-7b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=2e-5}"
: "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=500}"
SEQUENCE=4096
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128
    --max-position-embeddings 32768 --rotary-base 10000 --window-size "(4095,0)"
)
LAYOUT=(--tensor-model-parallel-size 2 --sequence-parallel)
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
