"""The trees that everything here is measured on: ``tree-attn bench`` and the benchmarks in ``ci/``.

``WORKLOADS`` has the sizes of training on a GPU, ``SMALL_WORKLOADS`` the same kinds of trees for a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from tree_attn.mask import TreeMask

Nodes = list[tuple[int, int]]  # (parent or -1, tokens), depth-first


def star(prompt: int, leaves: int, length: int) -> Nodes:
    """One prompt with many responses of one length."""
    return [(-1, prompt)] + [(0, length)] * leaves


def forest(tree: Nodes, count: int) -> Nodes:
    """A tree several times."""
    return [(parent + i * len(tree) if parent >= 0 else -1, n) for i in range(count) for parent, n in tree]


def rollout_tree(seed: int, total: int, turn: tuple[int, int], branches: tuple[int, int], depth: int) -> Nodes:
    """An agent's rollouts: random turns, each with a number of branches in ``branches``, until ``total`` tokens.

    Args:
        turn: fewest and most tokens of a turn; the last one is cut to fit.
        depth: turns at this depth are leaves; a root has depth 0.
    """
    rng = random.Random(seed)
    nodes: Nodes = []
    used = 0

    def grow(parent: int, level: int) -> None:
        nonlocal used
        if used >= total:
            return
        length, me = min(rng.randint(*turn), total - used), len(nodes)
        nodes.append((parent, length))
        used += length
        for _ in range(rng.randint(*branches) if level < depth else 0):
            grow(me, level + 1)

    while used < total:
        grow(0 if nodes else -1, 1 if nodes else 0)
    return nodes


WORKLOADS: dict[str, Callable[[], Nodes]] = {
    "causal16k": lambda: [(-1, 16384)],
    "grpo4k_16x1k": lambda: star(4096, 16, 1024),
    "dpo_8x(1k+2x512)": lambda: forest(star(1024, 2, 512), 8),
    "agent32k": lambda: rollout_tree(7, 32768, (128, 1024), (2, 4), 6),
    "mcts_512+256x120": lambda: star(512, 256, 120),
    "rag24k+8x1k": lambda: star(24576, 8, 1024),
}
SMALL_WORKLOADS: dict[str, Callable[[], Nodes]] = {  # 4096 tokens each
    "star": lambda: star(1024, 12, 256),
    "agent": lambda: rollout_tree(7, 4096, (32, 192), (2, 4), 6),
    "dpo": lambda: forest(star(512, 2, 256), 4),
}


def tree_mask(nodes: Nodes, device: str | torch.device = "cpu") -> TreeMask:
    """The mask of a forest of nodes."""
    return TreeMask.from_nodes([parent for parent, _ in nodes], [n for _, n in nodes], device=device)


def leaf_paths(nodes: Nodes) -> list[list[int]]:
    """Token positions of every root-to-leaf path, in depth-first order of the leaves."""
    begin, at = [], 0
    for _, length in nodes:
        begin.append(at)
        at += length
    path: list[list[int]] = []
    for (parent, length), first in zip(nodes, begin, strict=True):
        path.append((path[parent] if parent >= 0 else []) + list(range(first, first + length)))
    inner = {parent for parent, _ in nodes}
    return [path[i] for i in range(len(nodes)) if i not in inner]
