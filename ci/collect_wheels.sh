#!/usr/bin/env bash
# Fetches what the index offers from the pages of the newest releases at GitHub: an index has the older versions too.
#
#   ci/collect_wheels.sh FOLDER [RELEASES]      of the newest 8; a site on GitHub Pages may have 1 GB
#
# Needs gh, logged in (GH_TOKEN). Wheels whose label has left wheels/matrix.toml stay behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:?usage: ci/collect_wheels.sh FOLDER [RELEASES]}
limit=${2:-8}
patterns=(--pattern '*-none-any.whl' --pattern '*.tar.gz')
labels=$("${PYTHON:-python3}" -m wheels.matrix labels)
for label in $labels; do patterns+=(--pattern "*+$label-*.whl"); done

mkdir -p "$folder"
tags=$(gh release list --exclude-drafts --exclude-pre-releases --limit "$limit" --json tagName --jq '.[].tagName')
[ -n "$tags" ] || { echo "there is no release yet" >&2; exit 1; }
for tag in $tags; do gh release download "$tag" --dir "$folder" "${patterns[@]}"; done
ls -l "$folder"
