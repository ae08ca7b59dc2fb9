#!/usr/bin/env bash
# Installs torch's CPU build into the Python that $PYTHON names (python3), which is enough to build wheels and to load them.
#
#   ci/install_torch.sh            the torch whose headers wheels are built with
#   ci/install_torch.sh oldest     the oldest that wheels/matrix.toml promises
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
torch=torch==2.13.0
if [ "${1:-}" = oldest ]; then torch=$("$python" -m wheels.jobs oldest-torch); fi
# A plain "pip install torch" may bring gigabytes of CUDA libraries.
"$python" -m pip install --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch"
