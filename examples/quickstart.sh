#!/usr/bin/env bash
# Selective Language Modeling on real text, from nothing to a table, in minutes and without a GPU:
#
#   bash examples/quickstart.sh [directory, default runs/quickstart]
#
#   corpora      prose (clean), source files (noisy) and held-out prose (target) of this Python
#   reference    a small GPT trained on the clean corpus
#   clm, slm, random   the same GPT from the same start on the noisy corpus: all tokens; the 60% whose
#                loss exceeds the reference's the most; 60% at random
#   table        all of them on the target domain
#   report       a page to look at: curves, the comparison, and which tokens are selected
#
# The recipe is examples/experiments/quick.yaml.  Stopped, it goes on with the same command.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
runs="${1:-$root/runs/quickstart}"
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
use_environment analysis
python "$root/tools/run_experiment.py" "$root/examples/experiments/quick.yaml" \
    --output "$runs" --jobs 2
slm="$runs/runs/slm-seed1"
python "$root/tools/token_dynamics.py" classify "$slm/checkpoints/dump" --dynamics "$slm/dynamics" \
    > "$slm/dynamics.txt"
echo
python "$root/tools/report.py" "$runs"
echo "> open it in a browser: which way of choosing tokens ended lowest and what that cost, the curves," \
    "and every token of a few samples with what was learnt of it"
