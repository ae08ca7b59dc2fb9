# Makes .venv beside the sources, with this package (editable) and the extra named in $1. Sourced by ci/demo, ci/test
# and .ci/run from the repository's root; a second run with the same pyproject.toml installs nothing.
#
#   PYTHON        the Python to use, 3.10 or newer (python3)
#   TORCH         which torch to install, when the environment has none yet (torch==2.13.0)
#   TORCH_INDEX   an index to try for it first. Where no NVIDIA driver is found that is PyTorch's index of CPU builds:
#                 a plain "pip install torch" on Linux may bring gigabytes of CUDA libraries. Empty: pip's own alone.
# shellcheck shell=bash

extra=$1
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
cpu_index=https://download.pytorch.org/whl/cpu

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "tree_attn needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3" >&2
    exit 1
fi
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
fi

up_to_date() { [ -f "$1" ] && [ "$1" -nt pyproject.toml ] && [ "$1" -nt setup.py ]; }
if ! up_to_date .venv/installed-dev && ! up_to_date ".venv/installed-$extra"; then # dev includes every other extra
    pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if [ -z "${TORCH_INDEX+set}" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
            TORCH_INDEX=$cpu_index
        fi
        if [ -z "${TORCH_INDEX:-}" ] || ! pip install --retries 1 --timeout 15 --index-url "$TORCH_INDEX" "$torch"; then
            pip install "$torch"
        fi
    fi
    pip install --editable ".[$extra]"
    touch ".venv/installed-$extra"
fi
