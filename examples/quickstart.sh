#!/usr/bin/env bash
# Compare Selective Language Modeling with its controls on real text, from nothing, in minutes and
# without a GPU:
#
#   bash examples/quickstart.sh [DIRECTORY]      default: runs/quickstart
#
#   corpora      prose (clean), source files (noisy) and held-out prose (target) of this Python
#   reference    a small GPT, trained on the clean corpus
#   clm, slm, random   the same GPT, trained from the same start on the noisy corpus: on all tokens,
#                on the 60% whose loss exceeds the reference's the most, and on 60% at random
#   table        the loss of each on the target, and what it cost
#   report       a page with curves, the comparison, and which tokens are selected
#
# The recipe is examples/experiments/quick.yaml.  If it is stopped, the same command continues.
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
echo "> open it in a browser: it shows which way of choosing tokens ended lowest, what each cost," \
    "the curves, and every token of a few samples with what was learned of it"
