#!/usr/bin/env bash
# Llama-2-13B on mathematics: the 7B recipe, one size up.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model: of this size, or the 1B or 7B one
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      tokens read in all
#   RATIO       token selection ratio
#   LR          peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps
#
# The paper stops at 7B.  Tokens, ratio, batch, schedule and learning rate are its 7B model's.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=8}" "${DATA:=data/openwebmath_text_document}"
: "${BASE:=checkpoints/llama-2-13b}" "${REFERENCE:=checkpoints/reference-math-13b}"
: "${SAVE:=checkpoints/slm-math-13b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=2e-5}"
: "${BATCH:=256}" "${MICRO_BATCH:=2}" "${SAVE_EVERY:=500}"
SEQUENCE=4096
MODEL=(
    --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --num-attention-heads 40
    --kv-channels 128 --max-position-embeddings 4096 --rotary-base 10000
    --make-vocab-size-divisible-by 32
)
LAYOUT=(--tensor-model-parallel-size 4 --sequence-parallel)
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
