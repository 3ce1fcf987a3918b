# Make or reuse .venv at the repository's root and activate it:
#
#   source tools/environment.sh && use_environment [extra of setup.py]
#
# Installs this package in place with its dependencies, and again only when setup.py has changed.
# PYTHON names an interpreter to use instead of the first suitable one.

use_environment() {
    local extra="${1:-}" root python candidate wanted stamp install
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [ ! -x "$root/.venv/bin/python" ]; then
        for candidate in ${PYTHON:-python3.12 python3.13 python3 python}; do
            if (cd "$root" && "$candidate" -c \
                'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 14))') \
                2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "${python:-}" ]; then
            echo "error: megatron-slm needs Python 3.12 or 3.13 with its venv module, and none of" \
                "${PYTHON:-python3.12 python3.13 python3 python} is that. Install one, for example:" \
                "apt install python3.12-venv, conda create -n slm python=3.12, or pyenv install 3.12;" \
                "or name it: PYTHON=/path/to/python3.12 bash ..." >&2
            return 2
        fi
        echo "> making .venv with $(cd "$root" && "$python" --version)"
        (cd "$root" && "$python" -m venv .venv) || return 1
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
    wanted="$extra $(cksum < "$root/setup.py")"
    stamp="$root/.venv/installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "> installing megatron-slm and what it needs into .venv (torch and CUDA: 5 GB)"
        install=(pip install --quiet --disable-pip-version-check)
        if [ "$extra" = cuda ]; then # Transformer Engine is built against the torch that is there
            "${install[@]}" --editable "$root" || return 1
            install+=(--no-build-isolation)
        fi
        "${install[@]}" --editable "$root${extra:+[$extra]}" || return 1
        echo "$wanted" > "$stamp"
    fi
}
