#!/usr/bin/env bash
# Mistral-7B on mathematics, as the paper trained Rho-Math-7B: 15B tokens of OpenWebMath, 70%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        prefix of the tokenized corpus, or a blend: weight prefix weight prefix ...
#   TOKENIZER   its tokenizer: a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   the reference model, trained by train_reference_math.sh
#   SAVE        where checkpoints go, and where a run that was stopped goes on from
#   TOKENS      15000000000: tokens read in all
#   RATIO       0.7: token selection ratio
#   LR          2e-5
#   BATCH       256: sequences of a global batch, a million tokens
#   MICRO_BATCH 1
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=4}"
# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"

: "${DATA:=data/openwebmath_text_document}" "${TOKENIZER:=tokenizer.model}"
: "${BASE:=checkpoints/mistral-7b}" "${REFERENCE:=checkpoints/reference-math-7b}" "${SAVE:=checkpoints/slm-math-7b}"
: "${TOKENS:=15000000000}" "${RATIO:=0.7}" "${LR:=2e-5}" "${BATCH:=256}" "${MICRO_BATCH:=1}"
INPUTS="$TOKENIZER $BASE $REFERENCE" # read by launch.sh's checks

MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128
    --max-position-embeddings 32768 --rotary-base 10000 --window-size "(4095,0)"
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0
)
LAYOUT=(
    --tensor-model-parallel-size 2 --sequence-parallel
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
    --save-interval 500 --exit-signal-handler --eval-interval 500 --eval-iters 20
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
launch "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${FILES[@]}"
