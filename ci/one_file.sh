#!/usr/bin/env bash
# Prints NAME=FILE, for $GITHUB_OUTPUT, when a pattern was exactly one file; an error otherwise.
#
#   ci/one_file.sh sbom sbom/*.cdx.json
set -euo pipefail

name=${1:?usage: ci/one_file.sh NAME PATTERN}
shift
if [ $# != 1 ] || [ ! -f "$1" ]; then
    echo "$name must be one file; found: $*" >&2
    exit 1
fi
echo "$name=$1"
