# Make or reuse .venv at the repository's root and activate it:
#
#   source tools/environment.sh && use_environment [extra of setup.py]
#
#   use_environment             with torch from PyPI
#   use_environment cuda        and Transformer Engine, and with an nvcc Apex, both built against it
#   use_environment container   in NVIDIA's PyTorch container, with the image's torch, Transformer
#                               Engine and Apex, of which nothing is replaced
#
# Installs this package in place with its dependencies, and again only when setup.py has changed.
# PYTHON names an interpreter to use instead of the first suitable one.

APEX="git+https://github.com/NVIDIA/apex@4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49" # 25.09

use_environment() {
    local extra="${1:-}" root python candidate wanted stamp install
    local needs="venv ensurepip" options=() hint="apt install python3.12-venv, conda create -n slm \
python=3.12, or pyenv install 3.12"
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [ "$extra" = container ]; then
        needs="venv pip torch transformer_engine" options=(--system-site-packages --without-pip)
        hint="NVIDIA's PyTorch container"
    fi
    if [ ! -x "$root/.venv/bin/python" ]; then
        for candidate in ${PYTHON:-python3.12 python3.13 python3 python}; do
            # shellcheck disable=SC2086
            if (cd "$root" && "$candidate" -c 'import sys; from importlib.util import find_spec
sys.exit(not ((3, 12) <= sys.version_info < (3, 14) and all(map(find_spec, sys.argv[1:]))))' $needs) \
                2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "${python:-}" ]; then
            echo "error: megatron-slm needs Python 3.12 or 3.13 with its modules $needs, and none of" \
                "${PYTHON:-python3.12 python3.13 python3 python} is that. Install one, for example:" \
                "$hint; or name it: PYTHON=/path/to/python3.12 bash ..." >&2
            return 2
        fi
        echo "> making .venv with $(cd "$root" && "$python" --version)"
        (cd "$root" && "$python" -m venv "${options[@]}" .venv) || return 1
    elif [ "$extra" = container ] &&
        ! grep -q '^include-system-site-packages = true' "$root/.venv/pyvenv.cfg"; then
        echo "error: $root/.venv has packages of its own, not the image's: remove it first" >&2
        return 2
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
    wanted="$extra $(cksum < "$root/setup.py")"
    stamp="$root/.venv/installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        install=(python -m pip install --quiet --disable-pip-version-check)
        if [ "$extra" = container ]; then
            echo "> installing megatron-slm and what the image lacks into .venv"
            # Where a dependency would replace one of these, pip fails.
            python -m pip list --format=freeze --disable-pip-version-check |
                grep -iE '^(torch|transformer[-_]engine|apex|(pytorch-)?triton|flash)' \
                    > "$root/.venv/image.txt"
            "${install[@]}" --constraint "$root/.venv/image.txt" --editable "$root" || return 1
            # The image's torchrun would start the image's Python.
            printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' \
                "$root/.venv/bin/python" > "$root/.venv/bin/torchrun"
            chmod +x "$root/.venv/bin/torchrun"
        else
            echo "> installing megatron-slm and what it needs into .venv (torch and CUDA: 5 GB)"
            if [ "$extra" = cuda ]; then # what is built, is built against the torch that is there
                "${install[@]}" --editable "$root" ninja || return 1
                install+=(--no-build-isolation)
            fi
            "${install[@]}" --editable "$root${extra:+[$extra]}" || return 1
            if [ "$extra" = cuda ] && command -v nvcc > /dev/null; then
                echo "> building Apex, which takes a while"
                APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${install[@]}" "$APEX" || return 1
            fi
        fi
        echo "$wanted" > "$stamp"
    fi
}
