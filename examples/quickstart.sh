#!/usr/bin/env bash
# Selective Language Modeling on real text, from nothing to a table, in minutes and without a GPU:
#
#   bash examples/quickstart.sh [directory, default runs/quickstart]
#
#   corpora    prose (clean), source files (noisy) and held-out prose (target) of this Python
#   reference  a small GPT trained on the clean corpus
#   CLM, SLM   the same GPT from the same start on the noisy corpus: all tokens, or the 60% whose
#              loss exceeds the reference's the most
#   table      both on the target domain
#   report     a page about the SLM run: curves, and which tokens it selects
#
# Everything runs through `megatron_slm.pretrain` with Megatron's own arguments, two ranks, TP=2.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
runs="${1:-$root/runs/quickstart}"
started=$SECONDS
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
use_environment analysis

step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

if [ -e "$runs" ] && [ ! -e "$runs/quickstart" ]; then
    echo "error: $runs exists and is not of this script's making; name another directory" >&2
    exit 2
fi
rm -rf "$runs"
mkdir -p "$runs"/{data,logs,checkpoints}
touch "$runs/quickstart"
cd "$runs"
runs="$PWD"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

VOCABULARY=4096 SEQUENCE=256 BATCH=16 STEPS=100
TOKENIZER=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$runs/data/tokenizer.model")

step "corpora"
python "$root/examples/quickstart_corpora.py" data

step "tokenizer: sentencepiece, $VOCABULARY pieces"
python - <<PYTHON
import json
import sentencepiece
texts = [json.loads(line)["text"] for name in ("clean", "noisy") for line in open(f"data/{name}.jsonl")]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(line for text in texts for line in text.splitlines()),
    model_prefix="data/tokenizer", vocab_size=$VOCABULARY, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=2,
    input_sentence_size=40000, shuffle_input_sentence=True, minloglevel=2)
PYTHON

step "indexed datasets"
for corpus in clean noisy target; do
    python "$root/tools/preprocess_data.py" --input "data/$corpus.jsonl" \
        --output-prefix "data/$corpus" "${TOKENIZER[@]}" --append-eod
done

# run NAME CORPUS [arguments]: progress on the screen, everything in logs/NAME.log
run() {
    local name="$1" corpus="$2"
    shift 2
    torchrun --nproc_per_node 2 --master_port "${MASTER_PORT:-29577}" -m megatron_slm.pretrain \
        --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 \
        --seq-length $SEQUENCE --max-position-embeddings $SEQUENCE \
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear \
        --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
        --micro-batch-size 8 --global-batch-size $BATCH --train-iters $STEPS \
        --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 10 --weight-decay 0.1 \
        --train-data-path "data/${corpus}_text_document" \
        --valid-data-path data/target_text_document \
        "${TOKENIZER[@]}" --num-workers 0 --eval-iters 0 --eval-interval $STEPS --log-interval 10 \
        --tensorboard-dir "$name/tensorboard" --tensorboard-log-interval 1 \
        --log-timers-to-tensorboard "$@" 2>&1 | tee "logs/$name.log" | sed -unE \
        's|.* iteration +([0-9]+)/ +([0-9]+) .* lm loss: ([^ ]+) .*|  step \1 of \2, lm loss \3|p' ||
        {
            grep -E '^(error:|\[rank0\])' "logs/$name.log" | tail -n 20
            echo "error: the run \"$name\" failed; its whole log is $runs/logs/$name.log"
            exit 1
        } >&2
}

save() { echo "--save checkpoints/$1 --save-interval $STEPS"; }
SELECT=(--slm-token-ratio 0.6 --slm-reference-load checkpoints/reference)

step "reference: causal language modeling on the clean corpus"
run reference clean $(save reference)

step "CLM: all tokens of the noisy corpus"
run clm noisy $(save clm)

step "SLM: from the same start, 60% of the tokens of the noisy corpus"
run slm noisy $(save slm) "${SELECT[@]}" --slm-dump-interval 10 --slm-dump-dir slm/dump

step "both on the target domain"
for method in clm slm; do
    run $method-evaluation noisy --load checkpoints/$method --no-load-optim --no-load-rng \
        --skip-train --eval-iters 8 "${SELECT[@]}"
done
echo
python "$root/examples/quickstart_report.py" . $((BATCH * SEQUENCE))

step "report"
python "$root/tools/token_dynamics.py" classify slm/dump --dynamics slm/dynamics
python "$root/tools/report.py" slm -o report.html
step "done. Look at $runs/report.html"
