#!/usr/bin/env bash
# Fine-tune on tool-integrated solutions (ToRA: reasoning, programs and their outputs), as the paper
# did with its mathematical models on 69k of them.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   DATA        data/tora.jsonl, one conversation a line:
#               {"messages": [{"role": "user", "content": "<s>Question: ...\n\nSolution:\n"},
#                             {"role": "assistant", "content": "...</s>"}]}
#               Contents are joined as they are, so they include the special tokens; all tokens count.
#   HF          rho-math-1b-v0.1: the model in Hugging Face's format, for its tokenizer
#   BASE        checkpoints/rho-math-1b: the same model, from tools/convert_checkpoint.py import, or
#               SAVE of a recipe
#   SAVE        checkpoints/tora-1b: its checkpoints; a run that was stopped goes on from them
#   SAMPLES     69000: conversations of an epoch
#   EPOCHS      3
#   LR          2e-5
#   BATCH       128: conversations of a global batch
#   MICRO_BATCH 2
#   SEQUENCE    2048: longer conversations are cut
#   TP          1: tensor-parallel size; 2 for 7B
#   NODES       1: nodes of 8 GPUs
#
# The paper's: data and number of samples.  Ours: epochs, learning rate, batch.  The model's shape
# comes from BASE.  Megatron's SFT dataset needs: pip install 'megatron-slm[sft]'.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${NODES:=1}"
# shellcheck source=examples/launch.sh
source "$(dirname "$slm_recipe")/launch.sh"

: "${DATA:=data/tora.jsonl}" "${HF:=rho-math-1b-v0.1}" "${BASE:=checkpoints/rho-math-1b}"
: "${SAVE:=checkpoints/tora-1b}" "${SAMPLES:=69000}" "${EPOCHS:=3}" "${LR:=2e-5}" "${BATCH:=128}"
: "${MICRO_BATCH:=2}" "${SEQUENCE:=2048}" "${TP:=1}"
INPUTS="$DATA $HF $BASE" # read by launch.sh's checks

TRAINING=(
    --tensor-model-parallel-size "$TP" --use-distributed-optimizer
    --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce --overlap-param-gather --bf16
    --seq-length "$SEQUENCE" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$BATCH"
    --train-samples "$((SAMPLES * EPOCHS))" --lr "$LR" --min-lr 0 --lr-decay-style cosine
    --lr-warmup-fraction 0.03 --weight-decay 0 --clip-grad 1.0
)
if [ "$TP" -gt 1 ]; then TRAINING+=(--sequence-parallel); fi
FILES=(
    --use-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args
    --pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE"
    --sft --sft-tokenizer-prompt-format identity --tokenizer-type SFTTokenizer
    --tokenizer-model "$HF" --train-data-path "$DATA" --valid-data-path "$DATA"
    --eval-interval 500 --eval-iters 1 --save-interval 500 --exit-signal-handler --log-interval 10
    --tensorboard-dir "$SAVE/tensorboard" --distributed-timeout-minutes 30
)
launch "${TRAINING[@]}" "${FILES[@]}"
