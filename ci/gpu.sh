#!/usr/bin/env bash
# Everything that needs a GPU: tests, sanitizers, benchmark. Writes one JSON file with commit, versions and results.
#
#   ci/gpu.sh                        all parts, in order: build tests sanitize bench
#   ci/gpu.sh tests                  one part or several; build is needed once before
#   PYTHON=python3.12 GPU_RESULTS=results ci/gpu.sh
#
# Results and logs go to $GPU_RESULTS (build/gpu), the summary to $GPU_RESULTS/gpu.json. A part that fails does not stop
# the others; the exit status is 1 if any failed. SANITIZE_CASES (14) and SANITIZE_SEED (0) size the sanitizers' sweep of
# each set of kernels, COMPUTE_SANITIZER names another compute-sanitizer than that on PATH, RACECHECK_LIBRARY a build with
# TREE_ATTN_FOR_RACECHECK (else one is made). TREE_ATTN_SWEEP_CASES (3000) and TREE_ATTN_SWEEP_SEED size that of the
# tests, BENCH_ARGS goes to ci/gpu_bench.py.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
results=${GPU_RESULTS:-build/gpu}
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

part() { # name, command...: run it, keep its log and exit status
  local name=$1 status
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$results/$name.log"
  status=${PIPESTATUS[0]}
  echo "$status" > "$results/$name.status"
  [ "$status" = 0 ] || failed+=("$name")
}

build() { part build "$python" csrc/build.py; }

tests() {
  TREE_ATTN_REQUIRE_GPU=1 TREE_ATTN_GPU_REPORT="$results/tests.json" \
    part tests "$python" -m pytest tests/gpu -m gpu -rs --durations=10 --junitxml="$results/tests.xml" ${PYTEST_ARGS:-}
}

sanitize() { # each set of kernels by itself, under each tool
  local sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer} library=${RACECHECK_LIBRARY:-} paths path tool options cases
  if ! command -v "$sanitizer" > /dev/null; then
    echo "there is no $sanitizer; it comes with the CUDA toolkit, and as nvidia-cuda-sanitizer-api from PyPI"
    failed+=(sanitize)
    return
  fi
  if ! paths=$("$python" ci/sanitize_cases.py --list); then
    echo "no set of kernels can run here, see \`tree-attn doctor\`"
    failed+=(sanitize)
    return
  fi
  # On Hopper a warp's reads are over when one of its lanes, behind __syncwarp, arrives at a barrier. racecheck counts the
  # reads of that lane alone and takes those of the others for races with the next write, so it watches kernels of which
  # all lanes arrive; the option does the same for some of its versions (CUDA 12.3 to 12.6).
  if [[ " $paths " == *" hopper "* && -z $library ]]; then
    library=$results/racecheck/libtree_attn_cuda.so
    NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -DTREE_ATTN_FOR_RACECHECK" part racecheck-build \
      "$python" csrc/build.py --folder "$results/racecheck" --output "$library"
  fi
  for path in $paths; do
    for tool in memcheck racecheck; do
      options=() cases=("$path" "${SANITIZE_CASES:-14}" "${SANITIZE_SEED:-0}")
      if [ "$tool" = racecheck ]; then
        [ "$path" = hopper ] && cases+=(--library "$library")
        if "$sanitizer" --help | grep -q racecheck-indirect-barrier-dependency; then
          options=(--racecheck-indirect-barrier-dependency yes)
        fi
      fi
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool-$path" "$sanitizer" --tool "$tool" "${options[@]}" \
        --error-exitcode 1 "$python" ci/sanitize_cases.py "${cases[@]}"
    done
  done
}

bench() {
  # shellcheck disable=SC2086  # words on purpose
  part bench "$python" ci/gpu_bench.py --json "$results/bench.json" ${BENCH_ARGS:-}
  part bench-small "$python" ci/bench_small_gpu.py --check --json "$results/bench-small.json"
}

for name in "${@:-build tests sanitize bench}"; do
  for each in $name; do
    case $each in
      build | tests | sanitize | bench) "$each" ;;
      all) build; tests; sanitize; bench ;;
      *) echo "there is no part $each; choose of: build tests sanitize bench all" >&2; exit 2 ;;
    esac
  done
done

"$python" ci/gpu_report.py "$results" || failed+=(report)
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
