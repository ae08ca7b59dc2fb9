"""What small problems cost on a GPU: host time of a call, GPU time of one short tree, and of building a mask.

    python ci/bench_small_gpu.py [--check] [--json FILE]      --check: exit 1 when a bound is exceeded

GPU times are those of a captured CUDA graph that holds the call many times, so the host has no part in them. Host times
are those of calls that nothing waits for, in rounds short enough that the GPU's queue never fills.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tree_attn import TreeMask, tree_attention
from tree_attn.cli.workloads import WORKLOADS, tree_mask

CALLS, ROUNDS = 200, 15
IN_GRAPH = 20
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Microseconds; what has no bound is measured all the same.
BOUNDS = {
    "one forward call, host": 40.0,
    "the same with gradients to record, host": 40.0,
    "forward of 2048 causal tokens, GPU": 90.0,
    "TreeMask.from_dfs of 32768 tokens, GPU": 100.0,
}


def host_microseconds(call: Callable[[], object]) -> float:
    """Time of one call as the host sees it: median of rounds, the GPU idle before each."""
    rounds = []
    for _ in range(ROUNDS + 1):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(rounds[1:])


def gpu_microseconds(call: Callable[[], object]) -> float:
    """Time of one call on the GPU: median over replays of a graph of ``IN_GRAPH`` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # libraries load, and memory is there, before the capture
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(IN_GRAPH):
            call()
    times = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * statistics.median(times[1:]) / IN_GRAPH


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.randn(tokens, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
    )


def depth_first_arrays(workload: str) -> tuple[Tensor, Tensor]:
    """What :meth:`TreeMask.from_dfs` takes, on the GPU: the node of each token, the last node of its subtree."""
    nodes = WORKLOADS[workload]()
    lengths = torch.tensor([length for _, length in nodes])
    start = torch.arange(len(nodes), dtype=torch.int32).repeat_interleave(lengths)
    end = start[(tree_mask(nodes).subtree_end - 1).long()]
    return start.cuda(), end.cuda()


def measure() -> dict[str, float]:
    found = {}

    tiny = TreeMask.from_nodes([-1, 0, 0], [40, 30, 30], device="cuda")
    q, k, v = inputs(tiny.total, 4, 2, 64)
    found["one forward call, host"] = host_microseconds(lambda: tree_attention(q, k, v, tiny, backend="cuda"))
    q.requires_grad_()
    name = "the same with gradients to record, host"
    found[name] = host_microseconds(lambda: tree_attention(q, k, v, tiny, backend="cuda"))

    chain = TreeMask.from_nodes([-1], [2048], device="cuda")
    q, k, v = leaves = inputs(chain.total, HEADS, KV_HEADS, HEAD_DIM)
    grad = torch.randn_like(q)
    name = "forward of 2048 causal tokens, GPU"
    found[name] = gpu_microseconds(lambda: tree_attention(q, k, v, chain, backend="cuda"))
    for leaf in leaves:
        leaf.requires_grad_()

    def both_ways() -> None:
        torch.autograd.grad(tree_attention(q, k, v, chain, backend="cuda"), leaves, grad)

    found["forward and backward of the same, GPU"] = gpu_microseconds(both_ways)

    arrays = depth_first_arrays("agent32k")

    def build() -> TreeMask:
        return TreeMask.from_dfs(*arrays, validate=False)

    build()  # loads the library
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        build()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found["TreeMask.from_dfs of 32768 tokens, GPU"] = gpu_microseconds(build)
    found["the same, host"] = host_microseconds(build)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Time small problems.")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bound is exceeded")
    parser.add_argument("--json", type=Path, help="also write the times here")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = []
    for name, microseconds in measure().items():
        bound = BOUNDS.get(name)
        exceeded = bound is not None and microseconds > bound
        rows.append({"what": name, "microseconds": microseconds, "bound": bound, "exceeded": exceeded})
        limit = "" if bound is None else f"  (bound {bound:.0f} us{', EXCEEDED' if exceeded else ''})"
        print(f"{name:42s} {microseconds:7.1f} us{limit}")
    if given.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        given.json.write_text(json.dumps({**machine, "rows": rows}, indent=1))
    return int(given.check and any(row["exceeded"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
