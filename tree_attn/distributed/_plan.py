"""What one rank sends, receives and computes in ``ring``: its part of the schedule, with the keys by name.

Sender and receiver find the same keys in the same order from the mask, so messages carry keys and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tree_attn.distributed._schedule import Hop, Tree, hops_of, schedule
from tree_attn.distributed._shard import once_per_mask, shard
from tree_attn.mask import RowRanges, TreeMask


@dataclass(frozen=True)
class Send:
    """A message to ``target``: keys of this rank (int64 indices), then keys that arrived earlier in the wave."""

    target: int
    own: Tensor
    passed_on: Tensor


@dataclass(frozen=True)
class Receive:
    """A message from ``source``: the keys ``[begin, end)`` of those that arrive in the wave."""

    source: int
    begin: int
    end: int


@dataclass(frozen=True)
class Round:
    """Messages that travel at once."""

    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]


@dataclass(frozen=True)
class Wave:
    """Rounds, of which each may pass on what the ones before brought; ``n_keys`` arrive in all of them."""

    rounds: tuple[Round, ...]
    n_keys: int


@dataclass(frozen=True)
class Part:
    """Attention of ``rows`` on the keys of a wave, this rank's own, or both, the wave's first."""

    wave: int | None
    own: bool
    rows: slice
    ranges: RowRanges | None  # None: no row sees any of the keys


@dataclass(frozen=True)
class RingPlan:
    """What a rank does, in order: the first part has its own keys, and each wave is in one part, ascending."""

    waves: tuple[Wave, ...]
    parts: tuple[Part, ...]


def ring_plan(mask: TreeMask, world_size: int, rank: int, window: int | None = None) -> RingPlan:
    """The plan of ``rank``; kept with the mask."""
    key = ("ring", world_size, rank, window)
    return once_per_mask(mask, key, lambda: _ring_plan(mask, world_size, rank, window))


def _ring_plan(mask: TreeMask, world_size: int, rank: int, window: int | None) -> RingPlan:
    end, depth = mask.subtree_end.cpu(), mask.depth.cpu()  # many small questions: one transfer, then on the host
    positions = [p.cpu() for p in shard(mask, world_size)]
    mine, device = positions[rank], mask.device

    @functools.cache
    def seen(owner: int, by: int) -> Tensor:
        return _seen(positions[owner], positions[by], end, depth, window)

    def keys_of(hop: Hop) -> Tensor:
        """Indices into the owner's keys, ascending."""
        owner, where = hop.tree.owner, positions[hop.tree.owner]
        wanted = seen(owner, hop.target) & (where >= hop.tree.begin) & (where < hop.tree.end)
        if hop.source != owner:
            wanted &= seen(owner, hop.source)
        for rank in hop.nearer:
            wanted &= ~seen(owner, rank)
        return wanted.nonzero().flatten()

    def ranges_of(keys: Tensor, rows: Tensor) -> RowRanges:
        begin = torch.searchsorted(rows, keys).to(torch.int32)
        stop = torch.searchsorted(rows, end[keys].long()).to(torch.int32)
        # The rows of a rank are a forest of their own: without a window the form for a mask over its own tokens serves.
        if keys is rows and window is None:
            return _to(TreeMask._from_subtree_end(stop).ranges(), device)
        return _to(RowRanges.of(begin.minimum(stop), stop, depth[rows], depth[keys]), device)

    plan = schedule(mask, world_size)
    waves, arrivals = [], []
    for trees in plan.waves:
        wave, arrived = _wave(trees, rank, keys_of, device)
        waves.append(wave)
        arrivals.append(torch.cat([torch.arange(0), *(positions[owner][keys] for owner, keys in arrived)]))
    whole = slice(0, len(mine))
    parts = []
    join = plan.joined and len(arrivals[0]) > 0
    if join:
        parts.append(Part(0, True, whole, ranges_of(torch.cat([arrivals[0], mine]), mine)))
    else:
        parts.append(Part(None, True, whole, ranges_of(mine, mine)))
    for i in range(int(join), len(waves)):
        keys = arrivals[i]
        begin, stop = torch.searchsorted(mine, keys), torch.searchsorted(mine, end[keys].long())
        some = begin < stop
        if not bool(some.any()):
            parts.append(Part(i, False, slice(0, 0), None))
            continue
        rows = slice(int(begin[some].min()), int(stop[some].max()))
        parts.append(Part(i, False, rows, ranges_of(keys, mine[rows])))
    return RingPlan(tuple(waves), tuple(parts))


def _wave(
    trees: tuple[Tree, ...], rank: int, keys_of: Callable[[Hop], Tensor], device: torch.device
) -> tuple[Wave, list[tuple[int, Tensor]]]:
    """The wave of a rank, and ``(owner, keys)`` of what arrives, in order."""
    rounds: list[Round] = []
    arrived: list[tuple[int, Tensor]] = []
    n_keys = 0
    held: dict[int, tuple[Tensor, Tensor]] = {}  # of each owner: keys, ascending, and where they are among what arrived
    hops = sorted((hop for tree in trees for hop in hops_of(tree, rank)), key=lambda hop: hop.round)
    for _, of_round in groupby(hops, key=lambda hop: hop.round):
        now = list(of_round)
        sends, receives = [], []
        for target, outgoing in _by_peer(now, "source", "target", rank):
            indices: list[list[Tensor]] = [[torch.arange(0)], [torch.arange(0)]]  # own, passed on
            for hop in outgoing:
                keys = keys_of(hop)
                owner = hop.tree.owner
                if len(keys) and owner != rank:
                    known, at = held[owner]
                    keys = at[torch.searchsorted(known, keys)]
                indices[owner != rank].append(keys)
            own, passed_on = (torch.cat(x).to(device) for x in indices)
            if len(own) + len(passed_on):
                sends.append(Send(target, own, passed_on))
        for source, incoming in _by_peer(now, "target", "source", rank):
            begin = n_keys
            for hop in incoming:
                keys = keys_of(hop)
                owner = hop.tree.owner
                known, at = held.get(owner, (keys[:0], keys[:0]))
                known, order = torch.cat([known, keys]).sort()
                held[owner] = known, torch.cat([at, torch.arange(n_keys, n_keys + len(keys))])[order]
                arrived.append((owner, keys))
                n_keys += len(keys)
            if n_keys > begin:
                receives.append(Receive(source, begin, n_keys))
        if sends or receives:
            rounds.append(Round(tuple(sends), tuple(receives)))
    return Wave(tuple(rounds), n_keys), arrived


def _by_peer(hops: list[Hop], me: str, peer: str, rank: int) -> list[tuple[int, list[Hop]]]:
    """The hops of each peer, in the order of a message: the sender's own keys, then those of others by owner."""
    mine = [hop for hop in hops if getattr(hop, me) == rank]
    mine.sort(key=lambda hop: (getattr(hop, peer), hop.tree.owner != hop.source, hop.tree.owner, hop.tree.begin))
    return [(at, list(found)) for at, found in groupby(mine, key=lambda hop: getattr(hop, peer))]


def _to(ranges: RowRanges, device: torch.device) -> RowRanges:
    return RowRanges(*(None if t is None else t.to(device) for t in ranges))  # type: ignore[arg-type]


def _seen(keys: Tensor, rows: Tensor, end: Tensor, depth: Tensor, window: int | None) -> Tensor:
    """bool ``(keys,)``: does some of ``rows`` see the key; both are positions."""
    begin, stop = torch.searchsorted(rows, keys), torch.searchsorted(rows, end[keys].long())
    seen = begin < stop
    if window is not None and bool(seen.any()):
        nearest = _range_min(depth[rows].long(), begin[seen], stop[seen])
        seen[seen.clone()] = nearest - depth[keys[seen]] < window
    return seen


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
