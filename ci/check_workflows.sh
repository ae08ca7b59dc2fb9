#!/usr/bin/env bash
# Checks the workflows, the scripts they call and the build of wheels in containers, as far as that goes without running them.
# Needs ci/workflow_tools.txt in the Python that $PYTHON names (python3); asks no network. actionlint is used where it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH

echo "== schemas"
"$python" -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
"$python" -m check_jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
schema=$("$python" -c 'import cibuildwheel; print(cibuildwheel.__path__[0])')/resources/cibuildwheel.schema.json
"$python" -c 'import json, tomllib; print(json.dumps(tomllib.load(open("pyproject.toml", "rb"))["tool"]["cibuildwheel"]))' |
    "$python" -m check_jsonschema --schemafile "$schema" -

echo "== what each platform of the matrix would build"
for machine in $("$python" -m wheels.jobs machines); do
    found=$("$python" -m cibuildwheel --print-build-identifiers --platform linux --archs "$machine")
    echo "$found"
    [[ $found =~ ^cp3[0-9]+-manylinux_$machine$ ]] || { echo "not one build for $machine" >&2; exit 1; }
done

echo "== security: findings above informational"
zizmor --offline --no-progress --quiet --min-severity low .github

echo "== scripts"
# SC2154: what "wheels.matrix show" assigns is read by eval; "set -u" ends a script that lacks one of them.
shellcheck --external-sources --severity warning --exclude SC2154 ci/*.sh ci/demo ci/test .ci/run

if command -v actionlint > /dev/null; then
    echo "== actionlint"
    actionlint -ignore 'reusable workflow call "\$/' # newer than actionlint 1.7.12
fi
