"""Mode ``ulysses``: an all-to-all turns "some tokens, all heads" into "all tokens, some heads" and back.

The mask stays whole and attention is the ordinary one. A rank gets the key/value heads that its query heads read: a
group that is split over several ranks sends its key/value head to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tree_attn._operator import attend
from tree_attn.distributed._exchange import all_to_all
from tree_attn.mask import TreeMask
from tree_attn.registry import Options


@dataclass(frozen=True)
class Heads:
    """The heads of one rank: query heads ``[begin, end)`` and the key/value heads ``[kv_begin, kv_end)`` they read."""

    begin: int
    end: int
    kv_begin: int
    kv_end: int
    group: int  # query heads per key/value head, of the whole

    @property
    def whole_groups(self) -> bool:
        """Does every key/value head here serve the same number of query heads here?"""
        one = self.kv_end - self.kv_begin == 1
        return one or (self.begin % self.group == 0 and self.end % self.group == 0)

    @property
    def kv_run(self) -> int:
        """Key/value heads that attention runs with."""
        return self.kv_end - self.kv_begin if self.whole_groups else self.end - self.begin


def split_heads(heads: int, kv_heads: int, world_size: int) -> list[Heads]:
    """The heads of every rank: as equal as they divide, and none for ranks beyond the number of heads."""
    group = heads // kv_heads
    result = []
    for rank in range(world_size):
        begin, end = rank * heads // world_size, (rank + 1) * heads // world_size
        kv = (begin // group, (end - 1) // group + 1) if end > begin else (0, 0)
        result.append(Heads(begin, end, *kv, group))
    return result


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: TreeMask,
    options: Options,
    backend: str | None,
    group: dist.ProcessGroup,
    with_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``out`` of this rank's rows, and lse if asked for; arguments already checked and agreed on."""
    rank, world_size = group.rank(), group.size()
    split = split_heads(q.shape[1], k.shape[1], world_size)
    mine = split[rank]
    positions = mask.shard(world_size)
    q_heads = [(h.begin, h.end) for h in split]
    kv_heads = [(h.kv_begin, h.kv_end) for h in split]
    full_q, full_k, full_v = _ToHeads.apply(positions, (q_heads, kv_heads, kv_heads), group, q, k, v)
    if mine.begin == mine.end:  # no head for this rank: empty, but with a gradient, because the others wait for it
        out = full_q.sum(-1, keepdim=True) + full_k.sum(-1, keepdim=True) + full_v
        out = out if sinks is None else out + sinks[:0].sum().to(out.dtype)
        lse = out[..., 0].T.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    else:
        if not mine.whole_groups:
            index = torch.arange(mine.begin, mine.end, device=q.device) // mine.group - mine.kv_begin
            full_k, full_v = full_k.index_select(1, index), full_v.index_select(1, index)
        local_sinks = None if sinks is None else sinks[mine.begin : mine.end]
        out, lse = attend(full_q, full_k, full_v, local_sinks, mask.ranges(), options, backend)
    if not with_lse:
        return _ToTokens.apply(positions, q_heads, group, out)[0]
    out, lse = _ToTokens.apply(positions, q_heads, group, out, lse.T[..., None])
    return out, lse[..., 0].T


Ranges = list[tuple[int, int]]  # for each rank the heads [begin, end) that it takes


class _ToHeads(torch.autograd.Function):
    """``(my tokens, heads, dim) -> (tokens, my heads, dim)``, tensors of one dtype in one exchange.

    In the backward pass, heads that several ranks hold are summed.
    """

    @staticmethod
    def forward(ctx, positions, heads, group, *tensors):  # type: ignore[no-untyped-def]
        ctx.positions, ctx.heads, ctx.totals, ctx.group = positions, heads, [x.shape[1] for x in tensors], group
        return _to_heads(positions, heads, group, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *_to_tokens(ctx.positions, ctx.heads, ctx.totals, ctx.group, grads)


class _ToTokens(torch.autograd.Function):
    """``(tokens, my heads, dim) -> (my tokens, heads, dim)``, one exchange for each tensor: dtypes differ.

    One function for all of them, so that every rank takes part in every exchange whatever its loss is made of.
    """

    @staticmethod
    def forward(ctx, positions, heads, group, *tensors):  # type: ignore[no-untyped-def]
        ctx.positions, ctx.heads, ctx.group = positions, (heads,), group
        total = (heads[-1][1],)
        return tuple(_to_tokens(positions, (heads,), total, group, (x,))[0] for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *(_to_heads(ctx.positions, ctx.heads, ctx.group, (grad,))[0] for grad in grads)


def _to_heads(
    positions: Sequence[Tensor], heads: Sequence[Ranges], group: dist.ProcessGroup, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    world, rank = range(group.size()), group.rank()
    sends = [torch.cat([x[:, slice(*h[r])].reshape(-1) for x, h in zip(tensors, heads, strict=True)]) for r in world]
    mine = [(h[rank][1] - h[rank][0], x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
    sizes = [len(positions[r]) * sum(n * dim for n, dim in mine) for r in world]
    full = tuple(x.new_empty(sum(map(len, positions)), *shape) for x, shape in zip(tensors, mine, strict=True))
    for where, received in zip(positions, all_to_all(group, sends, sizes), strict=True):
        parts = received.split([len(where) * n * dim for n, dim in mine])
        for x, part in zip(full, parts, strict=True):
            x[where] = part.view(len(where), *x.shape[1:])
    return full


def _to_tokens(
    positions: Sequence[Tensor],
    heads: Sequence[Ranges],
    totals: Sequence[int],
    group: dist.ProcessGroup,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    world, n = range(group.size()), len(positions[group.rank()])
    sends = [torch.cat([x[positions[r]].reshape(-1) for x in tensors]) for r in world]
    shapes = [[(n, h[r][1] - h[r][0], x.shape[2]) for x, h in zip(tensors, heads, strict=True)] for r in world]
    sizes = [[a * b * c for a, b, c in of_rank] for of_rank in shapes]
    accumulator = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    sums = [x.new_zeros(n, total, x.shape[2], dtype=accumulator) for x, total in zip(tensors, totals, strict=True)]
    for r, received in enumerate(all_to_all(group, sends, [sum(s) for s in sizes])):
        for total, h, part, shape in zip(sums, heads, received.split(sizes[r]), shapes[r], strict=True):
            total[:, slice(*h[r])] += part.view(shape)
    return tuple(total.to(x.dtype) for total, x in zip(sums, tensors, strict=True))
