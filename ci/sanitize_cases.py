"""A few small problems through the CUDA kernels, forward and backward, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python ci/sanitize_cases.py [CASES] [SEED]

Every compiled class of head dims, both dtypes and every option comes up. Without torch's cache each tensor is an
allocation of its own, so that a read past its end is seen.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from gpu_cases import CLASSES, make_inputs, random_case, run  # the path is set just above


def main() -> None:
    count, seed = (int(n) for n in (sys.argv[1:] + ["28", "0"][len(sys.argv) - 1 :])[:2])
    for i in range(count):
        case = random_case(seed + i)
        head_dim, value_dim = CLASSES[i // 2 % len(CLASSES)]
        case = replace(case, head_dim=head_dim, value_dim=value_dim, dtype=(torch.float16, torch.bfloat16)[i % 2])
        results = run(make_inputs(case), "cuda")
        for name, tensor in zip(results._fields, results, strict=True):
            if tensor is not None and name != "lse":
                assert tensor.isfinite().all(), f"{name} of {case}"
    torch.cuda.synchronize()
    print(f"{count} cases from seed {seed} ran")


if __name__ == "__main__":
    main()
