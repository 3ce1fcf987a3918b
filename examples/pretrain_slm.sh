# Sourced by the pretrain_slm_*.sh recipes: trains with selection by an online reference or by a cache
# of its losses, or runs the job that fills the cache.

EPOCHS=1
# shellcheck source=examples/training.sh
source "$(dirname "$slm_recipe")/training.sh"

: "${CACHE:=}" "${SCORE:=0}"
selection=(--slm-token-ratio "$RATIO")
if [ -n "$CACHE" ]; then selection+=(--slm-reference-cache "$CACHE"); fi
if [ -n "$CACHE" ] && [ "$SCORE" != 1 ]; then
    INPUTS+=" $CACHE"
else
    INPUTS+=" $REFERENCE"
    selection+=(--slm-reference-load "$REFERENCE")
fi
if [ "$SCORE" = 1 ]; then
    program=("$slm_root/tools/score_reference.py")
    may_be_killed=1
fi
launch "${training[@]}" "${selection[@]}"
