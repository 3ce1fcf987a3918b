#!/usr/bin/env bash
# Lint, type-check and test:  bash tests/run.sh [pytest arguments]
# Makes or reuses .venv by itself.  Needs no GPU; 2 cores and 8 GB of memory are enough.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
use_environment dev

ruff check .
ruff format --check .
mypy
# A file of tests at a time on each core.
python -m pytest --numprocesses 2 --dist loadfile "$@"
