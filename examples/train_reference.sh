# Sourced by the train_reference_*.sh recipes: the paper's schedule.

: "${EPOCHS:=3}"
if [ "$SIZE" = 1b ]; then : "${LR:=5e-5}"; else : "${LR:=1e-5}"; fi
# shellcheck source=examples/training.sh
source "$(dirname "$slm_recipe")/training.sh"
# The 0.2% of half a billion tokens that are held out for validation are one batch.
launch "${training[@]}" --eval-iters 1
