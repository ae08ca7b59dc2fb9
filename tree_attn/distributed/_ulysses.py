"""Mode ``ulysses``: an all-to-all turns "some tokens, all heads" into "all tokens, some heads" and back.

The mask stays whole and attention is the ordinary one. A rank gets the key/value heads that its query heads read: a
group that is split over several ranks sends its key/value head to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tree_attn._operator import attend
from tree_attn.distributed._exchange import all_to_all
from tree_attn.distributed._shard import once_per_mask, pieces
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


@dataclass(frozen=True)
class Tokens:
    """How many tokens each rank has, and where they lie when ranks' tokens stand one rank after the other.

    Attributes:
        counts: tokens of each rank.
        order: int64 ``(tokens,)``, the packed position of each token in order of ranks; None when that is the packed
            order itself, as it is when every rank has one piece: then nothing has to be moved.
        back: its inverse.
    """

    counts: tuple[int, ...]
    order: Tensor | None
    back: Tensor | None


def tokens_of_ranks(mask: TreeMask, world_size: int) -> Tokens:
    """Made at the first call, kept with the mask."""

    def make() -> Tokens:
        positions = mask.shard(world_size)
        counts = tuple(map(len, positions))
        ends = [0, *chain.from_iterable(chain.from_iterable(pieces(mask, world_size)))]
        if all(a <= b for a, b in pairwise(ends)):
            return Tokens(counts, None, None)
        order = torch.cat(positions)
        return Tokens(counts, order, torch.argsort(order))

    return once_per_mask(mask, ("tokens of ranks", world_size), make)


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
    tokens = tokens_of_ranks(mask, world_size)
    q_heads = [(h.begin, h.end) for h in split]
    kv_heads = [(h.kv_begin, h.kv_end) for h in split]
    full_q, full_k, full_v = _ToHeads.apply(tokens, (q_heads, kv_heads, kv_heads), group, q, k, v)
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
        return _ToTokens.apply(tokens, q_heads, group, out)[0]
    out, lse = _ToTokens.apply(tokens, q_heads, group, out, lse.T[..., None])
    return out, lse[..., 0].T


Ranges = list[tuple[int, int]]  # for each rank the heads [begin, end) that it takes


class _ToHeads(torch.autograd.Function):
    """``(my tokens, heads, dim) -> (tokens, my heads, dim)``, an exchange for each tensor, all under way at once.

    In the backward pass, heads that several ranks hold are summed.
    """

    @staticmethod
    def forward(ctx, tokens, heads, group, *tensors):  # type: ignore[no-untyped-def]
        ctx.tokens, ctx.heads, ctx.totals, ctx.group = tokens, heads, [x.shape[1] for x in tensors], group
        return _to_heads(tokens, heads, group, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *_to_tokens(ctx.tokens, ctx.heads, ctx.totals, ctx.group, grads)


class _ToTokens(torch.autograd.Function):
    """``(tokens, my heads, dim) -> (my tokens, heads, dim)``, an exchange for each tensor, all under way at once.

    One function for all of them, so that every rank takes part in every exchange whatever its loss is made of.
    """

    @staticmethod
    def forward(ctx, tokens, heads, group, *tensors):  # type: ignore[no-untyped-def]
        ctx.tokens, ctx.heads, ctx.group = tokens, heads, group
        n = len(tensors)
        return _to_tokens(tokens, (heads,) * n, (heads[-1][1],) * n, group, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, None, None, *_to_heads(ctx.tokens, (ctx.heads,) * len(grads), ctx.group, grads)


# A tensor crosses memory once on either side of the wire: the sender copies each rank's heads to its place in the
# message, and what arrives in the order of ranks is the whole tensor, moved only where packed order is another one.


def _to_heads(
    tokens: Tokens, heads: Sequence[Ranges], group: dist.ProcessGroup, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    rank, total = group.rank(), sum(tokens.counts)
    started, shapes = [], []
    for x, of_rank in zip(tensors, heads, strict=True):
        n, _, dim = x.shape
        sizes = [n * (end - begin) * dim for begin, end in of_rank]
        message = x.new_empty(sum(sizes))
        for (begin, end), part in zip(of_rank, message.split(sizes), strict=True):
            part.view(n, end - begin, dim).copy_(x[:, begin:end])
        mine = of_rank[rank][1] - of_rank[rank][0]
        started.append(all_to_all(group, message, sizes, [count * mine * dim for count in tokens.counts]))
        shapes.append((total, mine, dim))
    arrived = [transfer.wait()[0].view(shape) for transfer, shape in zip(started, shapes, strict=True)]
    return tuple(x if tokens.back is None else x.index_select(0, tokens.back) for x in arrived)


def _to_tokens(
    tokens: Tokens,
    heads: Sequence[Ranges],
    totals: Sequence[int],
    group: dist.ProcessGroup,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    n = tokens.counts[group.rank()]
    started, shapes = [], []
    for x, of_rank in zip(tensors, heads, strict=True):
        _, mine, dim = x.shape
        message = x.contiguous() if tokens.order is None else x.index_select(0, tokens.order)
        shapes.append([(n, end - begin, dim) for begin, end in of_rank])
        sizes = [count * mine * dim for count in tokens.counts]
        started.append(all_to_all(group, message.view(-1), sizes, [a * b * c for a, b, c in shapes[-1]]))
    results = []
    for x, of_rank, of_shape, total, transfer in zip(tensors, heads, shapes, totals, started, strict=True):
        received = transfer.wait()[0].split([a * b * c for a, b, c in of_shape])
        shared = sum(end - begin for begin, end in of_rank) > total  # heads of several ranks: summed in full precision
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        result = x.new_zeros(n, total, x.shape[2], dtype=wide) if shared else x.new_empty(n, total, x.shape[2])
        for (begin, end), part, shape in zip(of_rank, received, of_shape, strict=True):
            if shared:
                result[:, begin:end] += part.view(shape)
            else:
                result[:, begin:end] = part.view(shape)
        results.append(result.to(x.dtype))
    return tuple(results)
