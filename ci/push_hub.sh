#!/usr/bin/env bash
# Assembles the Hub kernel from the libraries in a folder of wheels, and uploads it. Extra arguments go to wheels.hub.
#
#   ci/push_hub.sh org/tree-attn dist --dry-run
#
# By hand: log in with "hf auth login". In a workflow: the Hub knows it as a trusted publisher, and no token is stored.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: ci/push_hub.sh ORG/NAME DIST [--dry-run]"
repository=${1:?$usage}
dist=${2:?$usage}
export HF_OIDC_RESOURCE=kernels/$repository # what the workflow's identity is exchanged for; of no account elsewhere
exec "${PYTHON:-python3}" -m wheels.hub "$dist" --output build/hub --push "$repository" "${@:3}"
