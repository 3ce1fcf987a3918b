#!/usr/bin/env bash
# TinyLlama-1.1B on text, code and mathematics, as the paper trained its general model: 80B tokens of
# SlimPajama, StarCoderData and OpenWebMath, 60%.
#
# Variables (and those of launch.sh, for nodes, Slurm, containers and restarts):
#
#   SIZE        1b (the paper's), 7b, 13b, 70b, qwen3-8b or llama3-8b: of the policy
#   DATA        data/general-80b.data-args.txt: examples/mixes/general-80b.yaml as tools/build_mix.py
#               wrote it; or the prefix of a tokenized corpus, or a blend (weight prefix ...)
#   TOKENIZER   tokenizer.model: its tokenizer, a sentencepiece model file
#   BASE        the base model, from tools/convert_checkpoint.py import
#   REFERENCE   checkpoints/reference-general-SIZE: the reference, by train_reference_general.sh
#   CACHE       none: a score cache, read in place of REFERENCE
#   SCORE       0; 1 fills CACHE with REFERENCE's losses instead of training, with
#               tools/score_reference.py and the same arguments
#   SAVE        checkpoints/slm-general-SIZE: its checkpoints; a run that was stopped goes on from
#               them
#   TOKENS      80000000000: tokens read in all
#   RATIO       0.6: token selection ratio
#   LR          1e-4 for 1b, else 2e-5: peak learning rate
#   BATCH       sequences of a global batch, a million tokens
#   SEQUENCE    tokens of a sequence
#   MICRO_BATCH sequences of a micro-batch
#   SAVE_EVERY  steps from a checkpoint to the next
#   NODES       4 for 1b: nodes of 8 GPUs
#
# NODES for other sizes, BASE, BATCH, SEQUENCE, MICRO_BATCH and SAVE_EVERY have training.sh's values
# for the size, and so has TOKENIZER for qwen3-8b and llama3-8b.
#
# The paper's: data, tokens, ratio, peak learning rate, cosine, batch of a million tokens, length
# (its reference's).  Ours: warm-up, minimum, weight decay, beta2, and larger models, with the learning
# rate of its 7B model on mathematics.
set -euo pipefail
slm_recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
: "${SIZE:=1b}" "${DATA:=data/general-80b.data-args.txt}"
: "${REFERENCE:=checkpoints/reference-general-$SIZE}" "${SAVE:=checkpoints/slm-general-$SIZE}"
: "${TOKENS:=80000000000}" "${RATIO:=0.6}"
if [ "$SIZE" = 1b ]; then : "${NODES:=4}" "${LR:=1e-4}"; else : "${LR:=2e-5}"; fi
# shellcheck source=examples/pretrain_slm.sh
source "$(dirname "$slm_recipe")/pretrain_slm.sh"
