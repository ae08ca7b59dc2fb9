"""The flex backend against torch.compile(flex_attention) with create_block_mask, on one GPU.

    python ci/bench_flex_gpu.py [HEADS,KV_HEADS,HEAD_DIM]

Prints milliseconds (medians) and the ratio ours / theirs: forward and backward, which may be at most 1.10, and both
what is made once per mask, the TreeMask and the block lists, which may each be at most 0.10; exits 1 otherwise. Both
sides run in one process, so both meet the workloads' numbers of tokens in the same order: the first compiles for its
number, the second for any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from triton.testing import do_bench

from tree_attn import TreeMask, tree_attention
from tree_attn._backends.flex import tile_lists
from tree_attn.cli.workloads import WORKLOADS, Nodes, tree_mask


def time(function: Callable[[], object]) -> float:
    return do_bench(function, warmup=50, rep=200, return_mode="median")


def forward_and_backward(attend: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        forward = time(attend)
    out = attend()
    grad = torch.randn_like(out)

    def backward() -> None:
        for x in leaves:
            x.grad = None
        out.backward(grad, retain_graph=True)

    return forward, time(backward)


def measure(nodes: Nodes, heads: int, kv_heads: int, head_dim: int) -> Iterator[tuple[str, float, float]]:
    """For forward, backward, mask and lists: milliseconds of ours and of theirs."""
    mask = tree_mask(nodes, "cuda")
    tokens = mask.total
    # The arrays that trees usually come as: depth-first index of each token's node, and the last one below it.
    count = torch.tensor([n for _, n in nodes], device="cuda")
    start = torch.repeat_interleave(torch.arange(len(count), device="cuda", dtype=torch.int32), count)
    end = start[(mask.subtree_end - 1).long()]
    leaves = [
        torch.randn(tokens, h, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (row >= key) & (start[row] <= end[key])

    def their_mask() -> BlockMask:
        return create_block_mask(visible, None, None, tokens, tokens, device="cuda", _compile=True)

    theirs = torch.compile(flex_attention)
    lists = their_mask()

    def attend_theirs() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in leaves)
        return theirs(q, k, v, block_mask=lists, enable_gqa=True)

    def attend_ours() -> Tensor:
        q, k, v = leaves
        return tree_attention(q, k, v, mask, backend="flex")

    torch.testing.assert_close(attend_ours(), attend_theirs()[0].transpose(0, 1), rtol=2e-2, atol=2e-2)
    ours = forward_and_backward(attend_ours, leaves)
    for what, our_time, their_time in zip(
        ("forward", "backward"), ours, forward_and_backward(attend_theirs, leaves), strict=True
    ):
        yield what, our_time, their_time
    their_time = time(their_mask)
    yield "mask", time(lambda: TreeMask.from_dfs(start, end)), their_time
    yield "lists", time(lambda: tile_lists(mask.ranges())), their_time


def main() -> int:
    heads, kv_heads, head_dim = map(int, (sys.argv[1] if len(sys.argv) > 1 else "32,8,128").split(","))
    torch._functorch.config.donated_buffer = False  # the same graph is run backward many times
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {heads}/{kv_heads} heads of {head_dim}, bfloat16"
    )
    failed = False
    for name, tree in WORKLOADS.items():
        print(f"{name:26s}", end="", flush=True)
        for what, ours, theirs in measure(tree(), heads, kv_heads, head_dim):
            bound = 1.10 if what in ("forward", "backward") else 0.10
            bad = ours > bound * theirs
            failed |= bad
            print(
                f"  {what} {ours:.3f} / {theirs:.3f} ms = {ours / theirs:.3f}{' TOO SLOW' if bad else ''}",
                end="",
                flush=True,
            )
        print()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
