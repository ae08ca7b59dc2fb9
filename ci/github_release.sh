#!/usr/bin/env bash
# Puts the files of a release on its page at GitHub, with what CHANGELOG.md says of it.
#
#   ci/github_release.sh v0.1.0 dist sbom
#
# Needs gh, logged in (GH_TOKEN), with the tag pushed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: ci/github_release.sh TAG DIST SBOM"
tag=${1:?$usage}
dist=${2:?$usage}
sbom=${3:?$usage}
python=${PYTHON:-python3}

"$python" -m wheels.release check "$tag" "$dist" "$sbom"
notes=$("$python" -m wheels.release notes)
# A draft until it is whole: a repository may forbid to change what is published.
if ! gh release view "$tag" > /dev/null; then
    gh release create "$tag" --draft --verify-tag --title "$tag" --notes "$notes"
fi
gh release upload "$tag" --clobber "$dist"/*.whl "$dist"/*.tar.gz "$sbom"/*.cdx.json
gh release edit "$tag" --draft=false
