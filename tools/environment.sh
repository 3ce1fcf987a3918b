# Make or reuse .venv at the repository's root and activate it:
#
#   source tools/environment.sh && use_environment [extra of setup.py]
#
#   use_environment             with torch from PyPI
#   use_environment cuda        and Transformer Engine, whose torch part is built against it: that
#                               takes a C++ compiler, CUDA's headers, and minutes of all cores
#   use_environment cuda apex   and Apex, of which only the fused gradient of the output layer's
#                               weight is of use beside Transformer Engine: git, nvcc, half an hour
#   use_environment container   in NVIDIA's PyTorch container, with the image's torch, Transformer
#                               Engine and Apex, of which nothing is replaced
#
# Installs this package in place with its dependencies, and again only when setup.py has changed.
# Without a GPU it takes a torch for the CPU, if pip's index offers one, and saves gigabytes.
# PYTHON names an interpreter to use instead of the first suitable one.

APEX="git+https://github.com/NVIDIA/apex@4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49" # 25.09

# Says what pip is at, a line that changes on a terminal, and now and then elsewhere.
_show_pip() {
    local line status started=$SECONDS told=$SECONDS packages=0 what="looking for packages" words
    while true; do
        status=0
        IFS= read -r -t 1 line || status=$?
        [ "$status" = 0 ] || [ "$status" -gt 128 ] || break # the end; above 128: no line yet
        read -ra words <<< "$line"
        case "${words[0]:-}" in
            Collecting)
                packages=$((packages + 1))
                what="package $packages: ${words[1]}"
                ;;
            Downloading | Using) what="package $packages: ${line#"${line%%[![:space:]]*}"}" ;;
            Installing) what="unpacking $packages packages, which takes a while" ;;
            Building | Preparing) what="$line" ;;
        esac
        if [ -t 2 ]; then
            line="  $((SECONDS - started)) s  $what"
            printf '\r\033[K%s' "${line:0:${COLUMNS:-80}-1}" >&2
        elif [ $((SECONDS - told)) -ge 20 ]; then
            told=$SECONDS
            echo "  $((SECONDS - started)) s  $what" >&2
        fi
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
}

# pip install ARGUMENTS, with what it says in a log, and the end of that where it fails.
_install() {
    local log="$VIRTUAL_ENV/install.log" status
    python -m pip install --no-compile --disable-pip-version-check "$@" 2>&1 | tee "$log" | _show_pip
    status="${PIPESTATUS[0]}"
    [ "$status" = 0 ] || {
        tail -n 15 "$log" >&2
        echo "error: pip could not install all of this; $log has all it said" >&2
    }
    return "$status"
}

# The newest torch for the CPU that pip's index or links offer within setup.py's range, if there is no
# GPU and no torch yet; nothing else.
_cpu_torch() {
    if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || command -v nvidia-smi > /dev/null ||
        python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("torch"))'; then
        return
    fi
    python -m pip index versions torch --disable-pip-version-check --retries 1 --timeout 15 \
        2> /dev/null | python -c '
import re, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version
text = re.search(r"\"(torch\b[^\"]*)\"", open(sys.argv[1]).read())[1]
wanted = Requirement(text).specifier
offered = map(Version, re.findall(r"[0-9][\w.]*\+cpu(?![\w.])", sys.stdin.read()))
fit = sorted(each for each in offered if each in wanted)
print(*(f"torch=={each}" for each in fit[-1:]))
' "$1/setup.py" 2> /dev/null || true
}

# Where CUDA's headers are, with those that only the toolkit has: torch's own wheels lack crt/.
_cuda_headers() {
    local nvcc home="${CUDA_HOME:-}"
    if [ -z "$home" ] && nvcc="$(command -v nvcc)"; then
        home="$(dirname "$(dirname "$(readlink -f "$nvcc")")")"
    fi
    home="${home:-/usr/local/cuda}"
    [ ! -e "$home/include/crt/host_defines.h" ] || echo "$home/include"
}

# What building takes, before gigabytes are installed; all of what is missing at once.
_check_build() {
    local missing=()
    command -v "${CXX:-c++}" > /dev/null ||
        missing+=("a C++ compiler (${CXX:-c++}): apt install g++")
    [ -n "$(_cuda_headers)" ] ||
        missing+=("CUDA's headers (crt/host_defines.h): apt install cuda-crt-13-0 from NVIDIA's \
repository, or a toolkit with CUDA_HOME set to it")
    if [ "$1" = apex ]; then
        command -v git > /dev/null || missing+=("git, for Apex: apt install git")
        command -v nvcc > /dev/null ||
            missing+=("nvcc, for Apex: apt install cuda-nvcc-13-0, or put the toolkit's on PATH")
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        echo "error: Transformer Engine cannot be built here without" \
            "$(printf '; %s' "${missing[@]}" | cut -c3-)" >&2
        return 2
    fi
}

use_environment() {
    local extra="${1:-}" apex="${2:-}" root python candidate wanted stamp torch
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
    wanted="$extra $apex $(cksum < "$root/setup.py")"
    stamp="$root/.venv/installed${extra:+-$extra}"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ "$extra" = container ]; then
            echo "> installing megatron-slm and what the image lacks into .venv"
            # Where a dependency would replace one of these, pip fails.
            python -m pip list --format=freeze --disable-pip-version-check |
                grep -iE '^(torch|transformer[-_]engine|apex|(pytorch-)?triton|flash)' \
                    > "$root/.venv/image.txt"
            _install --constraint "$root/.venv/image.txt" --editable "$root" || return 1
            # The image's torchrun would start the image's Python.
            printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' \
                "$root/.venv/bin/python" > "$root/.venv/bin/torchrun"
            chmod +x "$root/.venv/bin/torchrun"
        elif [ "$extra" = cuda ]; then # what is built, is built against the torch that is there
            _check_build "$apex" || return 2
            echo "> installing megatron-slm and what it needs into .venv (torch and CUDA: 5 GB)"
            _install --editable "$root" ninja packaging pybind11 setuptools wheel || return 1
            echo "> building Transformer Engine's torch part, which takes minutes"
            # Headers: those of torch's wheels, and of the toolkit what they lack.  NCCL's expert
            # parallelism needs more of both, and is of use to mixtures of experts alone.
            CPATH="$(_cuda_headers)${CPATH:+:$CPATH}" NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
                NVTE_WITH_NCCL_EP=0 \
                _install --no-build-isolation --editable "$root[cuda]" || return 1
            if [ "$apex" = apex ]; then
                echo "> building Apex, which takes half an hour"
                APEX_CPP_EXT=1 APEX_CUDA_EXT=1 _install --no-build-isolation "$APEX" || return 1
            fi
        else
            torch="$(_cpu_torch "$root")"
            if [ -n "$torch" ]; then
                echo "> installing $torch into .venv: there is no GPU here"
                _install "$torch" || {
                    echo "> going on with the torch that setup.py asks for" >&2
                    torch=""
                }
            fi
            echo "> installing megatron-slm and what it needs into .venv" \
                "$([ -n "$torch" ] || echo "(torch and CUDA: 5 GB)")"
            _install --editable "$root${extra:+[$extra]}" || return 1
        fi
        # On all cores, where pip takes one for as long as it takes to unpack.
        echo "> compiling what is installed"
        python -m compileall -q -j 0 "$root/.venv/lib/" > /dev/null 2>&1 || true # some are templates
        echo "$wanted" > "$stamp"
    fi
}
