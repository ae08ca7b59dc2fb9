"""Who sends which rank's keys to whom, and in which order: from the mask alone, so that all ranks find the same.

A rank's rows see keys of other ranks; what they see travels in waves, each of some rounds of messages. There are two
ways, and the mask decides which is shorter:

    direct   wave t is one round: every rank sends to the rank t after it. Best where each rank owns as much that others
             see as every other rank does: a long sequence.
    relay    a rank's keys go down a binomial tree of the ranks that see some of them, all ranks' trees at once: so the
             owner of a prompt sends it to log2(ranks) others instead of to all, and these pass it on. It is cheap in
             depth-first order: a key that a later rank sees is seen by the ranks between too. A rank gets and passes on
             what its own rows see and nothing else; of the rest, the next one above it in the tree takes care. A wave
             takes as many owners as fit into a rank's memory beside its own keys.

Where a rank owns too much for one wave, its keys travel in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tree_attn.distributed._shard import Pieces, once_per_mask, pieces
from tree_attn.mask import TreeMask

# A wave may bring twice a rank's fair share of tokens, or this many (64 MiB at 8 heads of 128 numbers of 16 bits): many
# ranks would otherwise need many waves of next to nothing. But at most a quarter of all: two waves may be under way.
_SMALL_WAVE = 16384
# Attention on the first wave's keys together with a rank's own saves a merge of out, which takes memory bandwidth for
# each of its rows; but then nothing hides the wave. By bytes, a merge of 4 rows costs as much as the wait for a key (at
# 3 TB/s, 50 GB/s, 32/8 heads); ranks wait where that takes at most half of what it saves.
_JOIN_ROWS = 8
# What starting a message costs, in keys that could have travelled meanwhile: 20 us at 50 GB/s and 4 KiB a key.
_KEYS_A_MESSAGE = 244


class Hop(NamedTuple):
    """Keys of a tree that ``target`` gets from ``source`` in one round of a wave: those that both see (the owner all),
    without those that one of ``nearer`` sees, which sends them itself."""

    round: int
    source: int
    target: int
    nearer: tuple[int, ...]
    tree: Tree


class Tree(NamedTuple):
    """The owner's keys at the packed positions ``[begin, end)``, and who gets them: ``ranks`` are the owner, then those
    who see some of them, by their distance from it."""

    ranks: tuple[int, ...]
    begin: int
    end: int

    @property
    def owner(self) -> int:
        return self.ranks[0]


Wave = tuple[Tree, ...]


@dataclass(frozen=True)
class Schedule:
    """All messages of all ranks.

    Attributes:
        relayed: whether keys are passed on.
        joined: whether ranks wait for the first wave and compute with it and their own keys at once.
        waves: the trees of each.
        rounds: for each wave, of each round the most keys that one rank sends or receives.
        sent: int64 ``(ranks,)``, keys in all waves.
        seen: int64 ``(ranks, ranks)``: keys of each rank (first) that some row of each other rank sees, and receives.
    """

    relayed: bool
    joined: bool
    waves: tuple[Wave, ...]
    rounds: tuple[tuple[int, ...], ...]
    sent: Tensor
    seen: Tensor


def schedule(mask: TreeMask, world_size: int) -> Schedule:
    """Made at the first call, kept with the mask."""
    return once_per_mask(mask, ("schedule", world_size), lambda: _schedule(mask, world_size))


def _schedule(mask: TreeMask, world_size: int) -> Schedule:
    limit = most_keys_of_a_wave(mask.total, world_size)
    parts = _parts(mask, pieces(mask, world_size), limit)
    seen = torch.zeros(world_size, world_size, dtype=torch.int64)
    for part in parts:
        seen[part.tree.owner] += part.seen
    shifts, of_shifts = _shifts(parts, world_size)
    groups = tuple(_waves(parts, limit))
    of_relays = tuple(_loads(group, world_size) for group in groups)
    relayed = _length(of_relays) < _length(of_shifts)
    waves = tuple(tuple(part.tree for part in group) for group in groups) if relayed else shifts
    rounds = of_relays if relayed else of_shifts
    sent = seen.sum(1)
    if relayed:
        sent.zero_()
        for part in parts:
            sent.index_add_(0, part.source, part.keys)
    joined = bool(waves) and _JOIN_ROWS * world_size * sum(rounds[0]) <= mask.total
    return Schedule(relayed, joined, waves, rounds, sent, seen)


def most_keys_of_a_wave(tokens: int, world_size: int) -> int:
    """That a rank may receive."""
    return max(min(max(2 * tokens // world_size, _SMALL_WAVE), tokens // 4), 1)


def hops_of(tree: Tree, rank: int) -> Iterator[Hop]:
    """Those of a rank. Member i's path to the owner is i with one low bit after the other cleared, and the longer the
    step that it takes, the earlier the round."""
    ranks = tree.ranks
    if rank not in ranks:
        return
    me, depth = ranks.index(rank), (len(ranks) - 1).bit_length()
    below = range(me + 1, min(me + (me & -me), len(ranks)) if me else len(ranks))
    for member, source in [*((me, above) for above in _path(me)), *((member, me) for member in below)]:
        path = _path(member)
        nearer = tuple(ranks[i] for i in path[: path.index(source)])
        yield Hop(depth - (member & -member).bit_length(), ranks[source], ranks[member], nearer, tree)


def _path(member: int) -> list[int]:
    path = []
    while member:
        member &= member - 1
        path.append(member)
    return path


def _length(rounds: tuple[tuple[int, ...], ...]) -> int:
    """The time of all waves, if every round waits for its slowest rank; in keys."""
    return sum(most + _KEYS_A_MESSAGE for wave in rounds for most in wave)


# -- how many keys: from nodes and pieces, so that a plan for many ranks takes no work a token and rank ----------------


class Part(NamedTuple):
    """Some of an owner's keys: how many each rank sees, int64 ``(ranks,)``, and the messages that its tree takes, int64
    ``(messages,)`` each."""

    tree: Tree
    seen: Tensor
    round: Tensor
    source: Tensor
    target: Tensor
    keys: Tensor


def _shifts(parts: list[Part], world_size: int) -> tuple[tuple[Wave, ...], tuple[tuple[int, ...], ...]]:
    """The waves, with the most keys that a rank sends in each."""
    turns: list[list[Part]] = []  # an owner's first part, its second, ...
    for part in parts:
        taken = sum(turn[-1].tree.owner == part.tree.owner for turn in turns)
        if taken == len(turns):
            turns.append([])
        turns[taken].append(part)
    waves, rounds = [], []
    counts = [[part.seen.tolist() for part in turn] for turn in turns]
    for t in range(1, world_size):
        for turn, of_turn in zip(turns, counts, strict=True):
            trees, most = [], 0
            for part, seen in zip(turn, of_turn, strict=True):
                tree = part.tree
                target = (tree.owner + t) % world_size
                if seen[target]:
                    trees.append(Tree((tree.owner, target), tree.begin, tree.end))
                    most = max(most, seen[target])
            if trees:
                waves.append(tuple(trees))
                rounds.append((most,))
    return tuple(waves), tuple(rounds)


def _waves(parts: list[Part], limit: int) -> Iterator[list[Part]]:
    """Parts, in turn, in waves in which no rank receives more than ``limit`` keys."""
    wave: list[Part] = []
    held = torch.zeros(0)
    for part in parts:
        if wave and int((held + part.seen).max()) > limit:
            yield wave
            wave = []
        held = held + part.seen if wave else part.seen
        wave.append(part)
    if wave:
        yield wave


def _loads(wave: list[Part], world_size: int) -> tuple[int, ...]:
    """For each round the most keys that one rank sends or receives."""
    moment, source, target, keys = (torch.cat(x) for x in zip(*(part[2:] for part in wave), strict=True))
    loads = torch.zeros(2, int(moment.max()) + 1, world_size, dtype=torch.int64)
    for load, rank in zip(loads, (source, target), strict=True):
        load.index_put_((moment, rank), keys, accumulate=True)
    return tuple(loads.amax((0, 2)).tolist())


def _parts(mask: TreeMask, plan: Pieces, limit: int) -> list[Part]:
    """The keys of every rank, as far as others see them, in parts of which nobody sees more than ``limit``."""
    end = mask.subtree_end.cpu()
    n, ranks = len(end), len(plan)
    first = torch.cat([torch.ones(min(1, n), dtype=torch.bool), end[1:] != end[:-1]]).nonzero().flatten()
    node_end = end[first].long()
    node_stop = torch.cat([first[1:], torch.full((min(1, n),), n)])
    begins = torch.tensor([a for rank in plan for a, _ in rank], dtype=torch.int64)
    rank_of = torch.tensor([r for r, rank in enumerate(plan) for _ in rank], dtype=torch.int64)
    parts = []
    for owner, mine in enumerate(plan):
        inside = torch.zeros(len(first), dtype=torch.bool)
        for a, b in mine:
            inside |= (first < b) & (node_stop > a)
        begin, stop, last = first[inside, None], node_stop[inside, None], node_end[inside, None]
        # (nodes of the owner, pieces): how far into the node a piece sees, which is as far as it lies before the piece.
        reach = torch.where((begin < begins) & (begins < last), stop.minimum(begins), begin)
        of_rank = begin.repeat(1, ranks).scatter_reduce(1, rank_of.expand_as(reach), reach, "amax")
        of_rank[:, owner] = begin[:, 0]
        most = int(_overlap(begin, of_rank, mine).max()) if ranks else 0
        for cut in [mine] if most <= limit else _chunks(mine, limit):
            seen = _overlap(begin, of_rank, cut)
            others = (r for r in ((owner + t) % ranks for t in range(1, ranks)) if seen[r])
            tree = Tree((owner, *others), cut[0][0] if cut else 0, cut[-1][1] if cut else 0)
            if len(tree.ranks) > 1:
                reached = of_rank[:, tree.ranks]
                reached[:, 0] = n  # the owner has them all
                parts.append(Part(tree, seen, *_messages(torch.tensor(tree.ranks), begin, reached, cut)))
    return parts


def _chunks(ranges: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """The positions in the ranges, in turn, ``most`` at a time."""
    chunk: list[tuple[int, int]] = []
    free = most
    for a, b in ranges:
        while a < b:
            stop = min(b, a + free)
            chunk.append((a, stop))
            free -= stop - a
            a = stop
            if not free:
                yield chunk
                chunk, free = [], most
    if chunk:
        yield chunk


def _messages(
    tree: Tensor, begin: Tensor, reach: Tensor, ranges: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last fields of a ``Part``. ``reach (nodes, members)`` is how far into each node a member sees."""
    member = torch.arange(1, len(tree))
    depth = (len(tree) - 1).bit_length()
    moment = torch.tensor([depth - (i & -i).bit_length() for i in range(1, len(tree))], dtype=torch.int64)
    wanted, got = reach[:, 1:], begin.expand(len(begin), len(member))
    source = member
    found: list[list[Tensor]] = [[], [], [], []]
    for _ in range(depth):  # up the path of each member
        source = source & (source - 1)
        up_to = wanted.minimum(reach[:, source])
        keys = _overlap(got, up_to, ranges)
        some = keys > 0
        for column, x in zip(found, (moment, tree[source], tree[member], keys), strict=True):
            column.append(x[some])
        got = got.maximum(up_to)
    moment, source, target, keys = map(torch.cat, found)
    return moment, source, target, keys


def _overlap(begin: Tensor, stop: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """How many positions of ``[begin, stop)``, summed over rows, are in the ranges."""
    total = torch.zeros(stop.shape[1], dtype=torch.int64)
    for a, b in ranges:
        total += (stop.clamp(max=b) - begin.clamp(min=a)).clamp(min=0).sum(0)
    return total
