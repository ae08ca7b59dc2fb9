#!/usr/bin/env bash
# Builds one wheel of wheels/matrix.toml for this processor in the manylinux_2_28 image, checks it and tries it out there.
# What happens inside is in [tool.cibuildwheel] of pyproject.toml. Without containers: ci/build_wheel.sh.
#
#   ci/cibuildwheel.sh cu130 all
#
# Needs Docker and ci/workflow_tools.txt. The wheel goes to $DIST (dist), the library of the Hub kernel to $DIST/hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cuda=${1:?usage: ci/cibuildwheel.sh CUDA VARIANT, such as cu130 all}
variant=${2:-all}
python=${PYTHON:-python3}
dist=$(realpath -m "${DIST:-dist}")
row=$("$python" -m wheels.matrix show "$cuda" "$variant")
eval "$row" # cuda, label, toolkit, archs
mkdir -p "$dist/hub"

export TREE_ATTN_CUDA=1 TREE_ATTN_WHEEL=$variant CUDA_TOOLKIT=${toolkit:?} WHEEL_LABEL=${label:?}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export HUB_DIST=/host$dist/hub # cibuildwheel shows the image this machine's files under /host
"$python" -m cibuildwheel --platform linux --archs native --output-dir "$dist"

shopt -s nullglob
made=("$dist"/*"+$label-py3-none-manylinux_2_28_$(uname -m).whl")
if [ ${#made[@]} != 1 ]; then
    echo "there is no wheel labelled $label in $dist: the toolkit in the image is not CUDA $toolkit" >&2
    exit 1
fi
if [ "$variant" = all ] && [ ! -f "$dist/hub/$cuda-$(uname -m)/build.json" ]; then
    echo "the library of the Hub kernel is not in $dist/hub" >&2
    exit 1
fi
