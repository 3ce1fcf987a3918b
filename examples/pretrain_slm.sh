# Sourced by the pretrain_slm_*.sh recipes, which set the variables and the model: what they share.
#
# The paper's: the cosine and the batch of a million tokens.  Ours, since the paper does not say:
# warm-up, final learning rate, weight decay, beta2.

# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"
: "${TOKENIZER:=tokenizer.model}"
INPUTS="$TOKENIZER $BASE $REFERENCE" # read by launch.sh's checks

# shellcheck disable=SC2206
shared=(
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16
    --seq-length "$SEQUENCE" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$BATCH"
    --train-samples "$((TOKENS / SEQUENCE))" --lr "$LR" --min-lr 0 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --slm-token-ratio "$RATIO" --slm-reference-load "$REFERENCE"
    --data-path $DATA --split 998,2,0 --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER" --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE"
    --save-interval "$SAVE_EVERY" --exit-signal-handler --eval-interval 500 --eval-iters 20
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
launch "${MODEL[@]}" "${LAYOUT[@]}" "${shared[@]}"
