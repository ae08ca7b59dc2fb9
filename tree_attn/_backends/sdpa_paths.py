"""Batches of root paths for the ``sdpa`` backend: a tree as a list of causal sequences, which flash kernels take.

A segment is a longest run of rows in which each is the child of the one before. Its keys are the path from the root to
its last row; in them the rows of the segment are causal, aligned at the end. So no element mask is needed, at the price
of gathering each path: segments are put into batches whose gathered keys fit a workspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tree_attn._backends.sdpa_plan import Block, to_device
from tree_attn.mask import RowRanges

# Most gathered keys per row: short segments under long paths are faster as blocks of rows, which share their keys.
MOST_KEYS_PER_ROW = 64


@dataclass(frozen=True)
class PathBatch(Block):
    """Consecutive segments, and their paths one after the other as keys."""

    offsets_q: Tensor  # int32 (segments + 1,)
    offsets_k: Tensor  # int32 (segments + 1,)
    longest_q: int
    longest_k: int


def path_batches(
    mask: RowRanges, window: int | None, bytes_per_row: int, bytes_per_key: int, workspace: int
) -> list[PathBatch] | None:
    """The batches of a mask over its own tokens; None where gathering its paths costs too much. Synchronises once.

    A batch of one segment may exceed the workspace.
    """
    device, depth = mask.q_depth.device, mask.q_depth.cpu()
    rows = len(depth)
    if not rows:
        return []
    starts = torch.cat([torch.ones(1, dtype=torch.bool), depth[1:] != depth[:-1] + 1]).nonzero().flatten()
    lengths = torch.cat([starts, starts.new_full((1,), rows)]).diff()
    above = depth[starts].long()  # keys of each segment before its own rows
    if window is not None:
        above = above.clamp(max=window - 1)
    if (above + lengths).sum() > MOST_KEYS_PER_ROW * rows:
        return None
    segments = _segments(starts.tolist(), lengths.tolist(), depth[starts].tolist(), above.tolist())
    batches = _group(segments, bytes_per_row, bytes_per_key, workspace)

    # One transfer of offsets and runs; the runs are spread out to keys on the device.
    together = [_range(batch) for batch in batches]
    runs = [
        run for batch, where in zip(batches, together, strict=True) if where is None for s in batch for run in s.runs
    ]
    offsets = [_offsets(x) for batch in batches for x in ([s.rows for s in batch], [s.keys for s in batch])]
    n_offsets = sum(map(len, offsets))
    lists = torch.tensor([*chain(*offsets), *(a for a, _ in runs), *(b - a for a, b in runs)], dtype=torch.int32)
    lists = to_device(lists, device)
    offset = iter(lists[:n_offsets].split([len(x) for x in offsets]))
    run_start, run_length = lists[n_offsets:].view(2, -1)
    sizes = [sum(s.keys for s in batch) for batch, where in zip(batches, together, strict=True) if where is None]
    spread = run_start - (run_length.cumsum(0, dtype=torch.int32) - run_length)
    keys = torch.repeat_interleave(spread, run_length, output_size=sum(sizes))
    keys += torch.arange(len(keys), dtype=torch.int32, device=device)
    gather = iter(keys.split(sizes))
    return [
        PathBatch(
            begin=batch[0].runs[-1][0],
            end=batch[-1].runs[-1][1],
            keys=next(gather) if where is None else where,
            n_keys=sum(s.keys for s in batch),
            offsets_q=next(offset),
            offsets_k=next(offset),
            longest_q=max(s.rows for s in batch),
            longest_k=max(s.keys for s in batch),
        )
        for batch, where in zip(batches, together, strict=True)
    ]


class _Segment(NamedTuple):
    rows: int
    keys: int
    runs: list[tuple[int, int]]  # the path as ranges of tokens, the segment's own last


def _segments(starts: list[int], lengths: list[int], depths: list[int], aboves: list[int]) -> list[_Segment]:
    path: list[tuple[int, int]] = []  # from the root to the token before the segment
    on_path = 0
    segments = []
    for start, length, depth, above in zip(starts, lengths, depths, aboves, strict=True):
        while on_path > depth:  # leave the branches that end here
            first, stop = path.pop()
            on_path -= stop - first
            if on_path < depth:
                path.append((first, first + depth - on_path))
                on_path = depth
        path.append((start, start + length))
        on_path += length
        runs, wanted = [], above + length
        for first, stop in reversed(path):
            runs.append((max(first, stop - wanted), stop))
            wanted -= stop - first
            if wanted <= 0:
                break
        segments.append(_Segment(length, above + length, runs[::-1]))
    return segments


def _group(segments: list[_Segment], bytes_per_row: int, bytes_per_key: int, workspace: int) -> list[list[_Segment]]:
    batches: list[list[_Segment]] = []
    left = 0
    for segment in segments:
        need = segment.rows * bytes_per_row + segment.keys * bytes_per_key
        if need > left:
            batches.append([])
            left = workspace
        batches[-1].append(segment)
        left -= need
    return batches


def _range(batch: list[_Segment]) -> slice | None:
    """The tokens that the paths of a batch are, one after the other, if they lie together."""
    runs = [run for segment in batch for run in segment.runs]
    if any(a[1] != b[0] for a, b in pairwise(runs)):
        return None
    return slice(runs[0][0], runs[-1][1])


def _offsets(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]
