"""A few small problems through one set of the CUDA kernels, forward and backward, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python ci/sanitize_cases.py hopper [CASES] [SEED]
    python ci/sanitize_cases.py --list        the sets that this build and this GPU have

Every class of head dims, both dtypes and every option comes up. Without torch's cache each tensor is an allocation of
its own, so that a read past its end is seen.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tree_attn import _kernels
from tree_attn._backends.cuda import PATH_VARIABLE, CudaBackend
from tree_attn.registry import Options, Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from gpu_cases import CLASSES, Case, make_inputs, random_case, run  # the path is set just above

PATHS = ("portable", "hopper")
MOST_TOKENS = 400  # racecheck takes a minute for what is larger


def classes(path: str) -> list[tuple[int, int]]:
    """The head dims whose forward a set of kernels has, which is also chosen for every call from here on."""
    os.environ[PATH_VARIABLE] = path
    request = Request(torch.device("cuda", 0), torch.bfloat16, 8, 2, 64, 64)
    able = CudaBackend()
    return [d for d in CLASSES if not able.supports(request._replace(head_dim=d[0], value_dim=d[1]))]


def cases(path: str, count: int, seed: int) -> list[Case]:
    dims = classes(path)
    chosen: list[Case] = []
    while len(chosen) < count:
        case, i = random_case(seed), len(chosen)
        seed += 1
        if sum(case.lengths) > MOST_TOKENS:
            continue
        head_dim, value_dim = dims[i // 2 % len(dims)]
        dtype = (torch.float16, torch.bfloat16)[i % 2]
        chosen.append(replace(case, head_dim=head_dim, value_dim=value_dim, dtype=dtype))
    # More row tiles than a GPU has processors, so that blocks take several; short trees, so that each is little work.
    chosen.append(Case(seed, torch.bfloat16, [-1] * 64, [16] * 64, 64, 16, 64, 64, Options(0.125)))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Run small problems for compute-sanitizer.")
    parser.add_argument("path", choices=PATHS, nargs="?", help="the set of kernels")
    parser.add_argument("cases", type=int, nargs="?", default=14)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--list", action="store_true", help="print the sets that can run here")
    parser.add_argument("--library", type=Path, help="run this build of the kernels instead of the installed one")
    given = parser.parse_args()
    if given.library:
        _kernels.LIBRARY = given.library.resolve()
    if given.list:
        found = [path for path in PATHS if classes(path)]
        print(*found)
        sys.exit(not found)
    if given.path is None:
        parser.error("name a set of kernels, or give --list")
    for case in (chosen := cases(given.path, given.cases, given.seed)):
        results = run(make_inputs(case), "cuda")
        for name, tensor in zip(results._fields, results, strict=True):
            if tensor is not None and name != "lse":
                assert tensor.isfinite().all(), f"{name} of {case}"
    torch.cuda.synchronize()
    print(f"{len(chosen)} cases from seed {given.seed} ran")


if __name__ == "__main__":
    main()
