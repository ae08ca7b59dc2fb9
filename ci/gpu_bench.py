"""The kernels' speed on tree workloads beside torch's own attention, from one run on one GPU.

    python ci/gpu_bench.py [--peers portable,hopper,flex,sdpa,fa2] [--workloads grpo4k_16x1k,...] [--json FILE]

TFLOP/s count the visible pairs alone: 4 * head_dim operations a pair and query head forward, 10 * head_dim backward. So
time spent on masked pairs counts against a peer. Every output is compared with float64 on some rows.

    portable, hopper   this project's kernels
    flex               torch.compile(flex_attention) with a block mask, made outside the clock
    sdpa               scaled_dot_product_attention with a dense mask, made outside the clock
    fa2                torch's own FlashAttention-2, which is causal: on causal16k alone
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tree_attn import TreeMask, registry, tree_attention

PEERS = ("portable", "hopper", "fa2", "flex", "sdpa")
Nodes = list[tuple[int, int]]  # (parent or -1, tokens), depth-first


def star(prompt: int, leaves: int, length: int) -> Nodes:
    return [(-1, prompt)] + [(0, length)] * leaves


def agent(seed: int, total: int) -> Nodes:
    """A rollout tree that branches into two to four at every turn, turns of 128 to 1024 tokens."""
    rng = random.Random(seed)
    nodes: Nodes = []
    used = 0

    def grow(parent: int, depth: int) -> None:
        nonlocal used
        if used >= total:
            return
        length, me = min(rng.randint(128, 1024), total - used), len(nodes)
        nodes.append((parent, length))
        used += length
        for _ in range(rng.randint(2, 4) if depth < 6 else 0):
            grow(me, depth + 1)

    while used < total:
        grow(0 if nodes else -1, 1 if nodes else 0)
    return nodes


def forest(tree: Nodes, count: int) -> Nodes:
    return [(parent + i * len(tree) if parent >= 0 else -1, n) for i in range(count) for parent, n in tree]


WORKLOADS = {
    "causal16k": lambda: [(-1, 16384)],
    "grpo4k_16x1k": lambda: star(4096, 16, 1024),
    "dpo_8x(1k+2x512)": lambda: forest(star(1024, 2, 512), 8),
    "agent32k": lambda: agent(7, 32768),
    "mcts_512+256x120": lambda: star(512, 256, 120),
    "rag24k+8x1k": lambda: star(24576, 8, 1024),
}


# -- peers: from q, k, v and the mask a function that computes out ---------------------------------------------------


def _first(x: Tensor) -> Tensor:
    """(tokens, heads, dim) as torch's (1, heads, tokens, dim)."""
    return x.transpose(0, 1)[None]


def _tree_attn(path: str, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Callable[[], Tensor]:
    os.environ["TREE_ATTN_CUDA_PATH"] = path
    registry.reset()  # whether that path is there is asked again
    return lambda: tree_attention(q, k, v, mask, backend="cuda")


def _fa2(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Callable[[], Tensor]:
    if mask.visible_pairs() != mask.total * (mask.total + 1) // 2:
        raise NotImplementedError("causal attention is not this tree's")

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(_first(q), _first(k), _first(v), is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Callable[[], Tensor]:
    dense = mask.dense()
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))

    def run() -> Tensor:
        return scaled_dot_product_attention(_first(q), _first(k), _first(v), attn_mask=dense)[0].transpose(0, 1)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end = mask.subtree_end

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row < end[key])

    blocks = create_block_mask(sees, None, None, mask.total, mask.total, device="cuda", _compile=True)
    compiled: Any = torch.compile(flex_attention)

    def run() -> Tensor:
        return compiled(_first(q), _first(k), _first(v), block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return run


def prepare(peer: str, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Callable[[], Tensor]:
    if peer in ("portable", "hopper"):
        return _tree_attn(peer, q, k, v, mask)
    return {"fa2": _fa2, "sdpa": _sdpa, "flex": _flex}[peer](q, k, v, mask)


# -- measuring -------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Median time on the GPU, with the L2 cache emptied before every run."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    run()
    times: list[float] = []
    while sum(times) < 1e3 * seconds or len(times) < 5:
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def ceiling() -> float:
    """TFLOP/s of a product of 8192 x 8192 matrices, what no attention can exceed."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / 1e9 / milliseconds(lambda: a @ b)


def error(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, out: Tensor) -> float:
    """Relative error of some rows against float64."""
    rows = torch.randint(mask.total, (8,), generator=torch.Generator().manual_seed(0)).cuda()
    keys = torch.arange(mask.total, device="cuda")
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k.double().repeat_interleave(group, 1))
    scores = (scores * q.shape[2] ** -0.5).masked_fill(~mask.ranges().visible(rows, keys), float("-inf"))
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(group, 1))
    return float((out[rows].double() - want).norm() / want.norm())


def measure(peer: str, workload: str, heads: int, kv_heads: int, head_dim: int) -> dict[str, object]:
    nodes = WORKLOADS[workload]()
    mask = TreeMask.from_nodes([p for p, _ in nodes], [n for _, n in nodes], device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = leaves = tuple(
        torch.randn(mask.total, h, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    run = prepare(peer, q, k, v, mask)
    out = run()
    grad = torch.randn_like(out)
    found = error(q.detach(), k.detach(), v.detach(), mask, out.detach())
    with torch.no_grad():
        forward = milliseconds(run)
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    work = mask.visible_pairs() * heads * head_dim / 1e9  # per millisecond, in TFLOP/s
    return {
        "peer": peer,
        "workload": workload,
        "tokens": mask.total,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": 4 * work / forward,
        "backward_tflops": 10 * work / backward,
        "error": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels on tree workloads.")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--heads", default="32,8,128", help="query heads, key/value heads, head dim")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    heads = [int(n) for n in given.heads.split(",")]
    torch._functorch.config.donated_buffer = False  # flex: the same graph is run backward many times
    matmul = ceiling()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matrix product {matmul:.0f} TFLOP/s", flush=True)
    rows = []
    for workload in given.workloads.split(","):
        for peer in given.peers.split(","):
            try:
                row = measure(peer, workload, *heads)
                print(
                    f"{workload:18s} {peer:9s} forward {row['forward_ms']:8.3f} ms {row['forward_tflops']:4.0f} TFLOP/s"
                    f"  backward {row['backward_ms']:8.3f} ms {row['backward_tflops']:4.0f} TFLOP/s"
                    f"  error {row['error']:.1e}",
                    flush=True,
                )
            except (RuntimeError, NotImplementedError) as problem:  # a peer that cannot run is a finding
                row = {"peer": peer, "workload": workload, "why_not": " ".join(str(problem).split())[:200]}
                print(f"{workload:18s} {peer:9s} {row['why_not']}", flush=True)
            rows.append(row)
            torch.cuda.empty_cache()
    if given.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "matmul_tflops": matmul}
        given.json.write_text(json.dumps({**machine, "heads": heads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
