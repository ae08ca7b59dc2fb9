"""Which rank takes which tokens: pieces of the depth-first order, equal in visible pairs.

A rank that takes the rows ``[a, b)`` needs from others exactly the ancestors of row a: a key before a that some row of
the piece sees has a subtree that reaches beyond a. So a cut costs ``depth[a]`` keys, and the cheapest place for it,
near the one that balance asks for, is where the depth is least: that also keeps subtrees together.

One piece a rank balances the pairs of any tree, but not the tokens: of a single long sequence, the first rank would
take far more tokens than the last. Only then ranks take several smaller pieces, light ones with heavy ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tree_attn.mask import TreeMask

Pieces = list[list[tuple[int, int]]]  # for each rank its [begin, end) ranges of packed positions, ascending

# The share of a rank, over the mean, that is as good as equal: in pairs, which are the time of attention, and in
# tokens, which are memory and the time of every other layer.
MOST_PAIRS = 1.03
MOST_TOKENS = 2.0
_MOST_PIECES = 32  # of one rank
_SLACK = 0.01  # how far, in shares of a rank, a cut may move to a place where fewer keys cross it

_kept: dict[int, dict[Hashable, Any]] = {}


def once_per_mask(mask: TreeMask, key: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` returned for this mask and key: made at the first call, kept for as long as the mask lives.

    A change of the mask's tensors in place, which masks do not support, goes unseen.
    """
    if id(mask) not in _kept:
        _kept[id(mask)] = {}
        weakref.finalize(mask, _kept.pop, id(mask), None)
    kept = _kept[id(mask)]
    if key not in kept:
        kept[key] = make()
    return kept[key]


def shard(mask: TreeMask, world_size: int) -> tuple[Tensor, ...]:
    """For each rank the ascending int64 positions that it takes, on the device of the mask; kept with the mask.

    Raises:
        TypeError: world_size is not an integer.
        ValueError: world_size is below 1.
    """

    def make() -> tuple[Tensor, ...]:
        return tuple(
            torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in rank)]).to(mask.device)
            for rank in pieces(mask, world_size)
        )

    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise TypeError(f"world_size is {type(world_size).__name__}; give the number of ranks as an integer")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; give at least 1 rank")
    return once_per_mask(mask, ("shard", world_size), make)


def pieces(mask: TreeMask, world_size: int) -> Pieces:
    """The pieces of every rank, made at the first call; empty for a rank that gets no token. Synchronises once."""
    return once_per_mask(mask, ("pieces", world_size), lambda: _pieces(mask.depth.cpu(), world_size))


def pairs_of(mask: TreeMask, world_size: int) -> Tensor:
    """int64 ``(world_size,)``: visible pairs that each rank computes."""
    sums = _prefix_sums(mask.depth.cpu())
    return torch.tensor([sum(int(sums[b] - sums[a]) for a, b in rank) for rank in pieces(mask, world_size)])


def _pieces(depth: Tensor, world_size: int) -> Pieces:
    sums = _prefix_sums(depth)
    best, best_badness = _contiguous(depth, sums, world_size), float("inf")
    count = 1
    while count <= _MOST_PIECES:
        plan = best if count == 1 else _alternating(depth, sums, world_size, count)
        badness = _badness(plan, sums)
        if badness < best_badness:
            best, best_badness = plan, badness
        if badness <= 1.0 or count * world_size >= len(depth):
            break
        count *= 2
    return best


def _prefix_sums(depth: Tensor) -> Tensor:
    """int64 ``(tokens + 1,)``: visible pairs of the rows before each position."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), (depth.long() + 1).cumsum(0)])


def _badness(plan: Pieces, sums: Tensor) -> float:
    """At most 1 when the largest shares of pairs and of tokens are as good as equal."""
    total = len(sums) - 1
    if total == 0:
        return 0.0
    pairs = max(sum(int(sums[b] - sums[a]) for a, b in rank) for rank in plan) * len(plan) / int(sums[-1])
    tokens = max(sum(b - a for a, b in rank) for rank in plan) * len(plan) / total
    return max(pairs / MOST_PAIRS, tokens / MOST_TOKENS)


def _contiguous(depth: Tensor, sums: Tensor, world_size: int) -> Pieces:
    """One piece a rank, cut where the pairs are equal."""
    cuts = _cuts(depth, sums, world_size)
    return [[(a, b)] if b > a else [] for a, b in pairwise(cuts)]


def _alternating(depth: Tensor, sums: Tensor, world_size: int, count: int) -> Pieces:
    """``count`` pieces a rank, equal in tokens, handed out by weight: forth and back over the ranks."""
    tokens = torch.arange(len(sums), dtype=torch.int64)
    cuts = _cuts(depth, tokens, world_size * count)
    parts = [(a, b) for a, b in pairwise(cuts) if b > a]
    parts.sort(key=lambda part: (int(sums[part[0]] - sums[part[1]]), part))  # heaviest first
    plan: Pieces = [[] for _ in range(world_size)]
    for i, part in enumerate(parts):
        turn, place = divmod(i, world_size)
        plan[place if turn % 2 == 0 else world_size - 1 - place].append(part)
    return [_joined(sorted(rank)) for rank in plan]


def _joined(rank: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for a, b in rank:
        if joined and joined[-1][1] == a:
            joined[-1] = joined[-1][0], b
        else:
            joined.append((a, b))
    return joined


def _cuts(depth: Tensor, sums: Tensor, parts: int) -> list[int]:
    """``parts + 1`` positions, ascending: between them ``sums`` grows by the same, give or take the slack."""
    n, sums = len(depth), sums.double()  # exact below 2**53 pairs
    share = float(sums[-1]) / parts
    targets = torch.arange(1, parts, dtype=torch.float64) * share
    nearest = torch.searchsorted(sums, targets)
    nearest -= (targets - sums[nearest - 1] < sums[nearest] - targets).long() if n else 0
    low = torch.searchsorted(sums, targets - _SLACK * share)
    high = torch.searchsorted(sums, targets + _SLACK * share, right=True)
    cuts = [0]
    for at, first, stop in zip(nearest.tolist(), low.tolist(), high.tolist(), strict=True):
        stop = min(stop, n)
        if stop > first:
            at = first + int(depth[first:stop].argmin())
        cuts.append(min(max(at, cuts[-1]), n))
    return [*cuts, n]
