#!/usr/bin/env bash
# Everything that only a GPU can show, in a quarter of an hour on one H100:
#
#   bash tests/gpu/run.sh                        on a machine with a GPU; no network is needed
#   bash tests/gpu/run.sh --device cpu --small   what of it a CPU can do, in a minute or two
#   bash tests/gpu/run.sh --only head steps      some of the checks: see tests/gpu/run.py
#
# Prints a table of figures with hardware and versions.  Exits with 1 if one is wrong, with 2 if there
# is no GPU.  Takes the Python that is active, else .venv (tools/environment.sh makes it).
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -f .venv/bin/activate ] && ! python -c 'import sys; from importlib.util import find_spec
sys.exit(not find_spec("megatron"))' 2> /dev/null; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
if [[ " $* " != *" --device cpu "* ]] &&
    ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: there is no GPU here, or torch cannot use it: --device cpu --small does what a CPU can" >&2
    exit 2
fi
export PYTHONPATH="$PWD:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec python tests/gpu/run.py "$@"
