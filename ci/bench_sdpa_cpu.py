"""The sdpa backend against one dense-mask ``scaled_dot_product_attention`` call, forward and backward, on this CPU.

    python ci/bench_sdpa_cpu.py [repetitions]

8 query heads, 2 key/value heads, head dim 64, float32. The dense call gets its boolean mask, and the keys and values
repeated for every head, for free. Repetitions alternate between the two, and medians are compared. Exits with 1 if a
promise is missed: at least 2x as fast on a prompt of 1024 tokens with 12 responses of 256, at most 1.15x the time on
one causal sequence of 4096.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import tree_attn

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> int:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if hasattr(os, "getloadavg"):
        print(f"load average before: {os.getloadavg()[0]:.1f} (other work slows the many small calls of ours the most)")
    star = tree_attn.TreeMask.from_nodes([-1] + [0] * 12, [1024] + [256] * 12)
    chain = tree_attn.TreeMask.from_nodes([-1], [4096])
    faster = _ratio("prompt of 1024, 12 responses of 256", star, repetitions)
    slower = 1 / _ratio("one causal sequence of 4096", chain, repetitions)
    print(f"tree: {faster:.2f}x as fast as the dense call (promised: at least 2)")
    print(f"causal: {slower:.2f}x the time of the dense call (promised: at most 1.15)")
    return 0 if faster >= 2 and slower <= 1.15 else 1


def _ratio(name: str, mask: tree_attn.TreeMask, repetitions: int) -> float:
    """Time of the dense call over time of ours."""
    runs = {"dense": _dense(mask), "sdpa": _ours(mask)}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for repetition in range(repetitions + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if repetition:  # the first warms up
                times[key].append(time.perf_counter() - start)
    median = {key: statistics.median(t) for key, t in times.items()}
    for key, t in times.items():
        print(f"{name}: {key:5s} {median[key] * 1e3:7.1f} ms (best {min(t) * 1e3:.1f}, {len(t)} repetitions)")
    return median["dense"] / median["sdpa"]


def _inputs(mask: tree_attn.TreeMask) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(mask.total, h, HEAD_DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def _dense(mask: tree_attn.TreeMask) -> Callable[[], None]:
    q, k, v, grad = (x.transpose(0, 1) for x in _inputs(mask))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    q, k, v, grad = (x[None].contiguous() for x in (q, k, v, grad))
    dense = mask.dense()
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=dense), leaves, grad)

    return run


def _ours(mask: tree_attn.TreeMask) -> Callable[[], None]:
    q, k, v, grad = _inputs(mask)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        torch.autograd.grad(tree_attn.tree_attention(q, k, v, mask, backend="sdpa"), leaves, grad)

    return run


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
