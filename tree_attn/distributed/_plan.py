"""What travels in ``ring``, from the mask alone: so sender and receiver agree without a word.

In step t a rank gets keys from the rank t before it and sends keys to the rank t after it: only those that some row of
the receiver sees, straight from their owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tree_attn.distributed._shard import Pieces, once_per_mask, pieces, shard
from tree_attn.mask import RowRanges, TreeMask


@dataclass(frozen=True)
class Step:
    """One exchange of a rank, and the attention on what arrived.

    Attributes:
        source: the rank whose keys arrive.
        target: the rank that gets keys of this one.
        sent: int64, which of this rank's keys ``target`` gets.
        n_received: how many keys arrive.
        rows: the rows that see some of them.
        ranges: the mask of those rows and the keys that arrive.
    """

    source: int
    target: int
    sent: Tensor
    n_received: int
    rows: slice
    ranges: RowRanges


@dataclass(frozen=True)
class RingPlan:
    """The exchanges of one rank: ``own`` is the mask of its rows and its own keys."""

    own: RowRanges
    steps: tuple[Step, ...]


def ring_plan(mask: TreeMask, world_size: int, rank: int, window: int | None = None) -> RingPlan:
    """The plan of ``rank``; kept with the mask."""
    key = ("ring", world_size, rank, window)
    return once_per_mask(mask, key, lambda: _ring_plan(mask, world_size, rank, window))


def _ring_plan(mask: TreeMask, world_size: int, rank: int, window: int | None) -> RingPlan:
    end, depth = mask.subtree_end.cpu(), mask.depth.cpu()  # many small questions: one transfer, then on the host
    positions = [p.cpu() for p in shard(mask, world_size)]
    mine = positions[rank]
    steps = []
    for t in range(1, world_size):
        source, target = (rank - t) % world_size, (rank + t) % world_size
        sent, _, _ = _seen(mine, positions[target], end, depth, window)
        received, begin, stop = _seen(positions[source], mine, end, depth, window)
        rows = slice(int(begin.min()), int(stop.max())) if len(received) else slice(0, 0)
        ranges = RowRanges.of(
            (begin - rows.start).to(torch.int32),
            (stop - rows.start).to(torch.int32),
            depth[mine[rows]],
            depth[positions[source][received]],
        )
        steps.append(Step(source, target, sent.to(mask.device), len(received), rows, _to(ranges, mask.device)))
    local_end = torch.searchsorted(mine, end[mine].long()).to(torch.int32)
    if window is None:
        # The rows of a rank are a forest of their own, so the faster form for a mask over its own tokens applies.
        own = TreeMask._from_subtree_end(local_end).ranges()
    else:
        own = RowRanges.of(torch.arange(len(mine), dtype=torch.int32), local_end, depth[mine], depth[mine])
    return RingPlan(_to(own, mask.device), tuple(steps))


def _to(ranges: RowRanges, device: torch.device) -> RowRanges:
    return RowRanges(*(None if t is None else t.to(device) for t in ranges))  # type: ignore[arg-type]


def _seen(keys: Tensor, rows: Tensor, end: Tensor, depth: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``keys`` that some of ``rows`` sees, as indices, with their ranges of rows; both are positions."""
    begin, stop = torch.searchsorted(rows, keys), torch.searchsorted(rows, end[keys].long())
    seen = begin < stop
    if window is not None and bool(seen.any()):
        nearest = _range_min(depth[rows].long(), begin[seen], stop[seen])
        seen[seen.clone()] = nearest - depth[keys[seen]] < window
    seen = seen.nonzero().flatten()
    return seen, begin[seen], stop[seen]


def _range_min(values: Tensor, begin: Tensor, stop: Tensor) -> Tensor:
    """The least of ``values[begin:stop]`` for each range, none empty: two overlapping powers of two cover it."""
    level = (stop - begin).double().log2().long()
    least = torch.empty_like(begin)
    table, width = values, 1
    for i in range(int(level.max()) + 1):
        at = level == i
        least[at] = table[begin[at]].minimum(table[stop[at] - width])
        if len(table) > width:
            table = table[:-width].minimum(table[width:])
        width *= 2
    return least


# -- how much travels ------------------------------------------------------------------------------------------------


def traffic(mask: TreeMask, world_size: int) -> Tensor:
    """int64 ``(world_size, world_size)``: keys that each rank (first index) sends to each other one, without a window.

    From nodes and pieces, so that a plan for many ranks takes no work a token and rank.
    """
    return once_per_mask(mask, ("traffic", world_size), lambda: _traffic(mask, pieces(mask, world_size)))


def _traffic(mask: TreeMask, plan: Pieces) -> Tensor:
    end = mask.subtree_end.cpu()
    first = torch.cat([torch.ones(min(1, len(end)), dtype=torch.bool), end[1:] != end[:-1]]).nonzero().flatten()
    node_end = end[first].long()
    node_stop = torch.cat([first[1:], torch.full((min(1, len(end)),), len(end))])
    part_begin, part_end, owner = (
        torch.tensor(x, dtype=torch.int64)
        for x in (
            [a for rank in plan for a, _ in rank],
            [b for rank in plan for _, b in rank],
            [r for r, rank in enumerate(plan) for _ in rank],
        )
    )
    sent = torch.zeros(len(plan), len(plan), dtype=torch.int64)
    for r, rank in enumerate(plan):
        # The ancestors of the first row of each piece: whole nodes, and the beginning of the node that the row is in.
        stop = first.clone()
        for a, _ in rank:
            inside = int(torch.searchsorted(first, a))
            above = node_end[:inside] > a
            stop[:inside] = torch.where(above, node_stop[:inside].clamp(max=a).maximum(stop[:inside]), stop[:inside])
        needed = stop > first
        overlap = stop[needed, None].minimum(part_end) - first[needed, None].maximum(part_begin)
        sent[:, r].index_add_(0, owner, overlap.clamp(min=0).sum(0))
        sent[r, r] = 0
    return sent
