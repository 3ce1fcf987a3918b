# Sourced by the recipes that train on a corpus; they set SIZE and the variables without a default
# here.  Sets up the models, and in training[] the arguments that references and policies share.
#
# The paper's: models up to 7B, lengths (its references'), cosine, the policy's batch of a million
# tokens.  Ours, since the paper does not say: larger models, warm-up, final learning rate, weight
# decay, beta2, the references' batch.

# What all models have, unless model[] says otherwise.
llama=(--position-embedding-type rope --rotary-base 10000 --normalization RMSNorm
    --norm-epsilon 1e-5 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0)
# What mixtures of experts have.  The last two need Transformer Engine: launch.sh leaves them out where
# there is none.
experts=(--moe-token-dispatcher-type alltoall --moe-router-dtype fp32 --moe-grouped-gemm
    --moe-permute-fusion)
tokenizer_type=SentencePieceTokenizer
case "$SIZE" in
1b) # TinyLlama-1.1B
    : "${NODES:=1}" "${BASE:=checkpoints/tinyllama}" "${SEQUENCE:=2048}"
    : "${BATCH:=512}" "${MICRO_BATCH:=8}" "${SAVE_EVERY:=1000}"
    model=(--num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32
        --group-query-attention --num-query-groups 4 --kv-channels 64
        --max-position-embeddings 2048)
    layout=(--tensor-model-parallel-size 1)
    ;;
7b) # Mistral-7B
    : "${NODES:=4}" "${BASE:=checkpoints/mistral-7b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=500}"
    model=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --kv-channels 128
        --max-position-embeddings 32768 --window-size "(4095,0)")
    layout=(--tensor-model-parallel-size 2 --sequence-parallel)
    ;;
13b) # Llama-2-13B
    : "${NODES:=8}" "${BASE:=checkpoints/llama-2-13b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=2}" "${SAVE_EVERY:=500}"
    model=(--num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824 --num-attention-heads 40
        --kv-channels 128 --max-position-embeddings 4096 --make-vocab-size-divisible-by 32)
    layout=(--tensor-model-parallel-size 4 --sequence-parallel)
    ;;
70b) # Llama-2-70B
    : "${NODES:=32}" "${BASE:=checkpoints/llama-2-70b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=250}"
    model=(--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
        --group-query-attention --num-query-groups 8 --kv-channels 128
        --max-position-embeddings 4096 --make-vocab-size-divisible-by 32)
    layout=(--tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4
        --num-layers-per-virtual-pipeline-stage 5)
    ;;
qwen3-8b) # Qwen3-8B-Base, whose table has 267 rows more than its tokenizer has tokens
    : "${NODES:=4}" "${BASE:=checkpoints/qwen3-8b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=2}" "${SAVE_EVERY:=500}" "${TOKENIZER:=Qwen3-8B-Base}"
    model=(--num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
        --max-position-embeddings 32768 --rotary-base 1000000 --norm-epsilon 1e-6
        --padded-vocab-size 151936 --slm-changed vocab_size)
    layout=(--tensor-model-parallel-size 2 --sequence-parallel)
    tokenizer_type=HuggingFaceTokenizer
    ;;
llama3-8b) # Llama-3.1-8B
    : "${NODES:=4}" "${BASE:=checkpoints/llama-3.1-8b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=2}" "${SAVE_EVERY:=500}" "${TOKENIZER:=Llama-3.1-8B}"
    model=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --kv-channels 128
        --max-position-embeddings 131072 --rotary-base 500000 --use-rope-scaling
        --rope-scaling-factor 8 --padded-vocab-size 128256)
    layout=(--tensor-model-parallel-size 2 --sequence-parallel)
    tokenizer_type=HuggingFaceTokenizer
    ;;
qwen3-30b-a3b) # Qwen3-30B-A3B-Base, with the rows of Qwen3-8B's table
    : "${NODES:=4}" "${BASE:=checkpoints/qwen3-30b-a3b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=500}" "${TOKENIZER:=Qwen3-30B-A3B-Base}"
    model=(--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32
        --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm
        --max-position-embeddings 32768 --rotary-base 1000000 --norm-epsilon 1e-6
        --padded-vocab-size 151936 --slm-changed vocab_size
        --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
        --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3 "${experts[@]}")
    layout=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 8)
    tokenizer_type=HuggingFaceTokenizer
    ;;
mixtral-8x7b) # Mixtral-8x7B
    : "${NODES:=8}" "${BASE:=checkpoints/mixtral-8x7b}" "${SEQUENCE:=4096}"
    : "${BATCH:=256}" "${MICRO_BATCH:=1}" "${SAVE_EVERY:=500}"
    model=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --kv-channels 128
        --max-position-embeddings 32768 --rotary-base 1000000
        --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.02 "${experts[@]}")
    layout=(--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
        --num-layers-per-virtual-pipeline-stage 4 --expert-model-parallel-size 8
        --expert-tensor-parallel-size 1)
    ;;
*)
    echo "error: SIZE $SIZE: there are 1b, 7b, 13b, 70b, qwen3-8b, llama3-8b, qwen3-30b-a3b and \
mixtral-8x7b" >&2
    exit 2
    ;;
esac
: "${TOKENIZER:=tokenizer.model}"
# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"

INPUTS="$TOKENIZER $BASE" # read by launch.sh's checks
# shellcheck disable=SC2206
data=(--data-path $DATA)
if [[ "$DATA" == *.txt ]]; then
    INPUTS+=" $DATA"
    data=(--data-args-path "$DATA")
else
    for word in $DATA; do
        [[ "$word" =~ ^[0-9.]+$ ]] || INPUTS+=" $word.idx" # a weight
    done
fi
# The split: validation data comes from the corpus, which leaves that much less of each dataset to
# train on.
training=(
    "${llama[@]}" "${model[@]}" "${layout[@]}" "${data[@]}"
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce
    --overlap-param-gather --bf16 --seq-length "$SEQUENCE" --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$BATCH"
    --train-samples "$((TOKENS * EPOCHS / SEQUENCE))" --lr "$LR" --min-lr 0
    --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --split 998,2,0 --tokenizer-type "$tokenizer_type"
    --tokenizer-model "$TOKENIZER" --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE"
    --save-interval "$SAVE_EVERY" --exit-signal-handler --eval-interval 500 --eval-iters 20
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
