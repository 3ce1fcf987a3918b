#!/usr/bin/env bash
# Llama-2-70B on mathematics: the 7B recipe at the size where memory decides.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model: of this size, or a smaller one
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      tokens read in all
#   RATIO       token selection ratio
#   LR          peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps
#
# The paper stops at 7B.  Tokens, ratio, batch and schedule are its 7B model's; the learning rate
# is ours, half of it, as Llama 2 halves its own.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=32}" "${DATA:=data/openwebmath_text_document}"
: "${BASE:=checkpoints/llama-2-70b}" "${REFERENCE:=checkpoints/reference-math-70b}"
: "${SAVE:=checkpoints/slm-math-70b}" "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=1e-5}"
: "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=250}"
SEQUENCE=4096
MODEL=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --group-query-attention --num-query-groups 8 --kv-channels 128 --max-position-embeddings 4096
    --rotary-base 10000 --make-vocab-size-divisible-by 32
)
LAYOUT=(--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 5)
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
