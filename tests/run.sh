#!/usr/bin/env bash
# Lint, type-check and test:  bash tests/run.sh [pytest arguments]
# Makes or reuses .venv by itself.  Needs no GPU; 2 cores and 8 GB of memory are enough.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
use_environment dev

# Reports are tested in a real browser.
install_chromium() {
    if command -v chromium > /dev/null || command -v google-chrome > /dev/null; then
        return
    fi
    echo "> installing chromium"
    if ! { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; \
        } > /dev/null 2>&1; then
        echo "> could not; tests of reports in a browser are skipped (apt install chromium)"
    fi
}
install_chromium

ruff check .
ruff format --check .
mypy
# Of a job that this may run in, the jobs that tests start must know nothing.
unset "${!SLURM_@}" "${!PET_@}" RANK WORLD_SIZE MASTER_ADDR MASTER_PORT NODES NODE_RANK NODE_ADDR
# A file of tests at a time on each core, in their order: files of few long tests are not the last.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
