#!/usr/bin/env bash
# Llama-2-70B on mathematics: the 7B recipe at the size where memory decides.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   its tokenizer: a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model: of this size, or a smaller one
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.7: token selection ratio
#   LR          1e-5
#   BATCH       256: sequences of a global batch, a million tokens
#   MICRO_BATCH 1
#
# The paper stops at 7B.  Tokens, ratio, batch and schedule are its 7B model's; the learning rate is
# ours, half the 7B one, as Llama 2 has it.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=32}"
# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"

: "${DATA:=data/openwebmath_text_document}" "${TOKENIZER:=tokenizer.model}"
: "${BASE:=checkpoints/llama-2-70b}" "${REFERENCE:=checkpoints/reference-math-70b}" "${SAVE:=checkpoints/slm-math-70b}"
: "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=1e-5}" "${BATCH:=256}" "${MICRO_BATCH:=1}"
INPUTS="$TOKENIZER $BASE $REFERENCE" # read by launch.sh's checks

MODEL=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --group-query-attention --num-query-groups 8 --kv-channels 128 --max-position-embeddings 4096
    --rotary-base 10000 --make-vocab-size-divisible-by 32
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0
)
LAYOUT=(
    --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 5
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
TRAINING=(
    --bf16 --seq-length 4096 --micro-batch-size "$MICRO_BATCH" --global-batch-size "$BATCH"
    --train-samples "$((TOKENS / 4096))" --lr "$LR" --min-lr 0 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --slm-token-ratio "$RATIO" --slm-reference-load "$REFERENCE"
)
# shellcheck disable=SC2206
FILES=(
    --data-path $DATA --split 998,2,0 --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER" --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE"
    --save-interval 250 --exit-signal-handler --eval-interval 500 --eval-iters 20
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
launch "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${FILES[@]}"
