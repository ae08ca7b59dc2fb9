"""Blocks of rows for the ``sdpa`` backend: where to cut, which keys some row of a block sees, and its element mask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tree_attn._backends.sdpa_plan import Block, to_device
from tree_attn.mask import RowRanges

# Rows between two places where a block may end. Finer places follow the tree closer and cost the host more time.
CUT = 64
# Work of taking one more key into a block (gathering it, adding its gradient back), in scores of one head.
KEY_COST = 16
# Element masks of a plan are kept for the calls to come if all its blocks together have no more scores than this: one
# number for each score at most, so 64 MiB in float32.
MOST_SCORES_KEPT = 2**24


class Limits(NamedTuple):
    """What a device wants of a block of rows. Scores are counted for one head: rows times keys."""

    rows: int  # most rows in a block
    scores: int  # most scores in a block, which bounds memory; a block of CUT rows may exceed it
    overhead: int  # what one more block costs, in scores


@dataclass(frozen=True)
class RowBlock(Block):
    """Rows and the keys that some of them see: first those that all of them see, then the partial ones."""

    n_full: int  # so many keys at the front need no mask
    row: Tensor  # int32 (rows, 1): the position of each row
    row_begin: Tensor  # int32 (partial keys,)
    row_end: Tensor
    q_depth: Tensor | None  # int32 (rows, 1), with a window
    k_depth: Tensor | None  # int32 (partial keys,)
    window: int
    blind: bool  # some row may see nothing
    kept: dict[tuple[bool, torch.dtype], Tensor] | None  # biases made before, where they may be kept

    def bias(self, every_key: bool, dtype: torch.dtype) -> Tensor:
        """``(rows, partial keys)``, or ``(rows, keys)`` with ``every_key``: what to add to the scores, -inf where the
        row does not see the key and else 0. Not to be written to."""
        if self.kept is None:
            return self._bias(every_key, dtype)
        if (every_key, dtype) not in self.kept:
            self.kept[every_key, dtype] = self._bias(every_key, dtype)
        return self.kept[every_key, dtype]

    def _bias(self, every_key: bool, dtype: torch.dtype) -> Tensor:
        hidden = (self.row < self.row_begin) | (self.row >= self.row_end)
        if self.q_depth is not None and self.k_depth is not None:
            hidden |= self.q_depth - self.k_depth >= self.window
        n_full = self.n_full if every_key else 0
        bias = torch.zeros(len(self.row), n_full + hidden.shape[1], dtype=dtype, device=self.row.device)
        bias[:, n_full:].masked_fill_(hidden, float("-inf"))
        return bias


def row_blocks(mask: RowRanges, rows: int, window: int | None, limits: Limits) -> list[RowBlock]:
    """The blocks of a mask with ``rows`` rows. Synchronises once."""
    device, n_keys = mask.row_end.device, mask.row_end.shape[0]
    begin, end, q_depth, k_depth = _on_host(mask, window)
    cuts = _cuts(begin, end, rows, window, limits)

    index = torch.arange(n_keys, dtype=torch.int32)
    blocks: list[tuple[Tensor, Tensor]] = []  # the keys that every row sees, and those that some do
    for q0, q1 in pairwise(cuts):
        reach = min(q1, n_keys) if mask.row_begin is None else n_keys  # no row sees a key after it
        b, e = begin[:reach], end[:reach]
        needed = (b < q1) & (e > q0)
        full = (b <= q0) & (e >= q1)
        if window is not None:
            depth = q_depth[q0:q1]
            needed &= depth.amin() - k_depth[:reach] < window
            full &= depth.amax() - k_depth[:reach] < window
        blocks.append((index[:reach][full], index[:reach][needed & ~full]))

    together = [_range(torch.cat(keys)) for keys in blocks]
    # One transfer: the keys of the blocks that gather them, then the partial keys of every block.
    gathered = [torch.cat(keys) for keys, where in zip(blocks, together, strict=True) if where is None]
    partial = [keys[1] for keys in blocks]
    lists = to_device(torch.cat([*gathered, *partial, index[:0]]), device)
    sizes = [len(x) for x in gathered]
    gather = iter(lists[: sum(sizes)].split(sizes))
    partial_keys = lists[sum(sizes) :]
    split = [len(x) for x in partial]
    partial_begin = (partial_keys if mask.row_begin is None else mask.row_begin[partial_keys]).split(split)
    partial_end = mask.row_end[partial_keys].split(split)
    partial_depth = None if window is None else mask.k_depth[partial_keys].split(split)
    row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    n_scores = sum((q1 - q0) * sum(map(len, keys)) for (q0, q1), keys in zip(pairwise(cuts), blocks, strict=True))
    keep = n_scores <= MOST_SCORES_KEPT
    return [
        RowBlock(
            begin=q0,
            end=q1,
            keys=next(gather) if where is None else where,
            n_keys=len(full) + len(rest),
            n_full=len(full),
            row=row[q0:q1],
            row_begin=partial_begin[i],
            row_end=partial_end[i],
            q_depth=None if window is None else mask.q_depth[q0:q1, None],
            k_depth=None if partial_depth is None else partial_depth[i],
            window=window or 0,
            blind=mask.row_begin is not None and not len(full),
            kept={} if keep else None,
        )
        for i, ((q0, q1), (full, rest), where) in enumerate(zip(pairwise(cuts), blocks, together, strict=True))
    ]


def _range(keys: Tensor) -> slice | None:
    """The slice that holds exactly these keys in this order, if there is one."""
    if len(keys) and not bool((keys[1:] - keys[:-1] == 1).all()):
        return None
    start = int(keys[0]) if len(keys) else 0
    return slice(start, start + len(keys))


def _on_host(mask: RowRanges, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``row_begin, row_end, q_depth, k_depth`` on the CPU, by one transfer; depths are empty without a window."""
    none = mask.row_end[:0]
    parts = [
        none if mask.row_begin is None else mask.row_begin,
        mask.row_end,
        *((none, none) if window is None else (mask.q_depth, mask.k_depth)),
    ]
    begin, end, q_depth, k_depth = torch.cat(parts).cpu().split([len(p) for p in parts])
    if mask.row_begin is None:
        begin = torch.arange(len(end), dtype=torch.int32)
    return begin, end, q_depth, k_depth


def _cuts(begin: Tensor, end: Tensor, rows: int, window: int | None, limits: Limits) -> list[int]:
    """Rows at which blocks begin, and at last the number of rows: the cheapest way through the places where a block may
    begin, by dynamic programming. A block costs its scores, its keys and the overhead."""
    if rows == 0:
        return [0]
    counts = torch.stack([torch.bincount(x.long().clamp(0, rows), minlength=rows + 1) for x in (begin, end)])
    begun, ended = counts.cumsum(1)
    begun = torch.cat([begun.new_zeros(1), begun[:-1]])
    # begun[r]: keys that some row before r sees; ended[r]: keys that no row from r on sees. Of every CUT rows take the
    # one across which the fewest keys reach: the row after a leaf, where there is one.
    reach = (begun - ended)[:rows]
    padded = torch.cat([reach, reach.new_full((-rows % CUT,), len(end) + 1)]).view(-1, CUT)
    places = [*(padded.argmin(1) + torch.arange(0, rows, CUT)).tolist(), rows]
    places[0] = 0
    keys_begun, keys_ended = begun[places].tolist(), ended[places].tolist()

    cost = [0.0] * len(places)
    before = [0] * len(places)
    for j in range(1, len(places)):
        cheapest = float("inf")
        for i in range(j - 1, -1, -1):
            height = places[j] - places[i]
            keys = keys_begun[j] - keys_ended[i]
            if window is not None:
                keys = min(keys, window + height)
            if i < j - 1 and (height > limits.rows or height * keys > limits.scores):
                break
            total = cost[i] + (height + KEY_COST) * keys + limits.overhead
            if total < cheapest:
                cheapest, before[j] = total, i
        cost[j] = cheapest
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    return [places[i] for i in reversed(cuts)]
