#!/usr/bin/env bash
# TinyLlama-1.1B on mathematics, as the paper trained Rho-Math-1B: 15B tokens of OpenWebMath, 60%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   its tokenizer: a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model, trained by train_reference_math.sh
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.6: token selection ratio
#   LR          8e-5
#   BATCH       512: sequences of a global batch, a million tokens
#   MICRO_BATCH 8
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=1}"
# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"

: "${DATA:=data/openwebmath_text_document}" "${TOKENIZER:=tokenizer.model}"
: "${BASE:=checkpoints/tinyllama}" "${REFERENCE:=checkpoints/reference-math-1b}" "${SAVE:=checkpoints/slm-math-1b}"
: "${TOKENS:=15000000000}" "${RATIO:=0.6}" "${LR:=8e-5}" "${BATCH:=512}" "${MICRO_BATCH:=8}"
INPUTS="$TOKENIZER $BASE $REFERENCE" # read by launch.sh's checks

MODEL=(
    --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32
    --group-query-attention --num-query-groups 4 --kv-channels 64 --max-position-embeddings 2048
    --rotary-base 10000
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0
)
LAYOUT=(
    --tensor-model-parallel-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
TRAINING=(
    --bf16 --seq-length 2048 --micro-batch-size "$MICRO_BATCH" --global-batch-size "$BATCH"
    --train-samples "$((TOKENS / 2048))" --lr "$LR" --min-lr 0 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --slm-token-ratio "$RATIO" --slm-reference-load "$REFERENCE"
)
# shellcheck disable=SC2206
FILES=(
    --data-path $DATA --split 998,2,0 --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER" --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE"
    --save-interval 1000 --exit-signal-handler --eval-interval 500 --eval-iters 20
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
launch "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${FILES[@]}"
