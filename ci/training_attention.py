"""What torch itself offers for packed sequences, as attention of a model: the other side of ci/bench_training.py.

A segment is a run of queries and the keys they meet, aligned at the end: the last query sees all keys of its segment,
the one before it all but one. A packed sequence is a segment whose keys are its own tokens; a node of a tree is one
whose keys are its whole path from the root, gathered. ``WAYS`` has the ways to compute that; ``choose`` checks and
times them, and takes the fastest.

    varlen            torch.nn.attention.varlen: FlashAttention 2 over offsets
    cudnn             scaled_dot_product_attention by cuDNN on sequences padded to multiples of 256 (where lengths are
                      equal: a view, no padding); keys must be a sequence's own, since cuDNN aligns at the beginning
    ...-repeated      the same with K and V repeated to the query heads; tried where those without do not run
    flex              torch.compile(flex_attention) with block lists made from the segments
    one by one        scaled_dot_product_attention on each segment, for any device and dtype
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

# q (tokens, heads, dim), k and v (keys, kv_heads, dim) -> (tokens, heads, dim), in the segments it was made for
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PADDING = 256
LAST_RESORT = "one by one"
BLOCK = 128


@dataclass(frozen=True)
class Segments:
    """Runs of queries and their keys, one after the other in ``q`` and in ``k``."""

    q_lengths: list[int]
    k_lengths: list[int]
    device: torch.device

    def offsets(self, lengths: Sequence[int]) -> Tensor:
        """int32 ``(segments + 1,)``."""
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)

    def visible(self) -> tuple[Tensor, Tensor]:
        """int32 first and last key that each query sees, both ``(tokens,)``."""
        q, k = self.offsets(self.q_lengths), self.offsets(self.k_lengths)
        of_token = torch.repeat_interleave(torch.tensor(self.q_lengths, device=self.device))
        index = torch.arange(sum(self.q_lengths), dtype=torch.int32, device=self.device)
        return k[of_token], k[of_token + 1] + index - q[of_token + 1]

    def run(self, attend: Attend, gathered: Tensor | None) -> Attend:
        """``attend`` after the copy of K and V to ``gathered``, int64 ``(keys,)``, if there is one."""
        if gathered is None:
            return attend
        return lambda q, k, v: attend(q, k.index_select(0, gathered), v.index_select(0, gathered))


def packed(lengths: list[int], device: torch.device) -> Segments:
    """Sequences one after the other."""
    return Segments(lengths, lengths, device)


def paths_of_nodes(parents: list[int], lengths: list[int], device: torch.device) -> tuple[Segments, Tensor]:
    """Every node of a forest (in depth-first order) and its path; and the packed positions of all paths' tokens."""
    begins = [0, *accumulate(lengths)]
    paths: list[Tensor] = []
    for parent, begin, length in zip(parents, begins, lengths, strict=False):
        own = torch.arange(begin, begin + length)
        paths.append(torch.cat([paths[parent], own]) if parent >= 0 else own)
    return Segments(lengths, [len(path) for path in paths], device), torch.cat(paths).to(device)


# -- the ways --------------------------------------------------------------------------------------------------------


def _first(x: Tensor) -> Tensor:
    """(tokens, heads, dim) as torch's (1, heads, tokens, dim)."""
    return x.transpose(0, 1)[None]


def varlen(segments: Segments) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    q_offsets, k_offsets = segments.offsets(segments.q_lengths), segments.offsets(segments.k_lengths)
    longest = max(segments.q_lengths), max(segments.k_lengths)
    # Before 2.12 there is no such argument, and fewer key/value heads are simply taken.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, q_offsets, k_offsets, *longest, window_size=(-1, 0), **grouped)
        assert isinstance(out, Tensor)  # the log-sum-exp was not asked for
        return out

    return attend


def repeated(attend: Attend) -> Attend:
    """``attend`` with as many key/value heads as query heads."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)))

    return run


def padded(segments: Segments, backend: SDPBackend) -> Attend:
    """Sequences in batches of one length, a multiple of PADDING, causal; what is padded comes after the tokens."""
    lengths = segments.q_lengths
    if lengths != segments.k_lengths:
        raise NotImplementedError("keys are not the sequences' own")
    equal = len(set(lengths)) == 1
    size = [n if equal else -(-n // PADDING) * PADDING for n in lengths]
    order = sorted(range(len(lengths)), key=size.__getitem__)
    place = dict(zip(order, accumulate((size[i] for i in order), initial=0), strict=False))
    where = torch.cat([torch.arange(place[i], place[i] + n) for i, n in enumerate(lengths)]).to(segments.device)
    batches = [(size.count(length), length) for length in sorted(set(size))]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not equal:
            q, k, v = (x.new_zeros(sum(size), *x.shape[1:]).index_copy(0, where, x) for x in (q, k, v))
        outs = []
        begin = 0
        for count, length in batches:
            rows = slice(begin, begin + count * length)
            begin = rows.stop
            # (count, heads, length, dim)
            qs, ks, vs = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out.transpose(1, 2).flatten(0, 1))
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out if equal else out.index_select(0, where)

    return attend


def flex(segments: Segments, compiled: bool = True) -> Attend:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    first, last = segments.visible()

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= first[row]) & (key <= last[row])

    needed, whole = block_pairs(segments)
    blocks = BlockMask.from_kv_blocks(
        *_lists(needed & ~whole),
        *_lists(whole),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
        seq_lengths=(len(first), sum(segments.k_lengths)),
    )
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(_first(q), _first(k), _first(v), block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return attend


def block_pairs(segments: Segments) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries needs, and which it sees whole: bool ``(query blocks, key blocks)``."""
    first, last = (_blocks(x).aminmax(dim=1) for x in segments.visible())  # each (query blocks,), lowest and highest
    begin = torch.arange(0, sum(segments.k_lengths), BLOCK, device=segments.device)
    end = begin + BLOCK - 1
    needed = (begin <= last.max[:, None]) & (end >= first.min[:, None])  # segments that follow have keys that follow
    whole = (begin >= first.max[:, None]) & (end <= last.min[:, None])
    whole[-1] &= sum(segments.q_lengths) % BLOCK == 0
    return needed, whole


def _blocks(x: Tensor) -> Tensor:
    """``(n,)`` as ``(blocks, BLOCK)``; the last value fills up."""
    return pad(x.float()[None], (0, -len(x) % BLOCK), mode="replicate")[0].to(x.dtype).view(-1, BLOCK)


def _lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks as counts and indices, the wanted ones first, each with a batch and a head."""
    counts = wanted.sum(1, dtype=torch.int32)
    indices = wanted.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None].contiguous()


def one_by_one(segments: Segments) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        parts = (x.split(n) for x, n in ((q, segments.q_lengths), (k, segments.k_lengths), (v, segments.k_lengths)))
        outs = []
        for qs, ks, vs in zip(*parts, strict=True):
            rows, keys = len(qs), len(ks)
            mask = None if rows == keys else torch.ones(rows, keys, dtype=torch.bool, device=q.device)
            mask = mask if mask is None else mask.tril(keys - rows)
            out = scaled_dot_product_attention(
                _first(qs), _first(ks), _first(vs), attn_mask=mask, is_causal=mask is None
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


WAYS: dict[str, Callable[[Segments], Attend]] = {
    "varlen": varlen,
    "varlen-repeated": lambda segments: repeated(varlen(segments)),
    "cudnn": lambda segments: padded(segments, SDPBackend.CUDNN_ATTENTION),
    "cudnn-repeated": lambda segments: repeated(padded(segments, SDPBackend.CUDNN_ATTENTION)),
    "flex": flex,
    "one by one": one_by_one,
}


# -- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The fastest way, and of every way its milliseconds or why it was not taken."""

    name: str
    attend: Attend
    tried: dict[str, float | str]


def choose(
    ways: Sequence[str],
    segments: Segments,
    gathered: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    milliseconds: Callable[[Callable[[], object]], float],
) -> Choice:
    """Time what a layer under activation checkpointing does, two forwards and a backward, copies included.

    Args:
        ways: names in WAYS, in any order; "one by one" if none of them runs.
        gathered: packed position of every key, where keys are copies; see :func:`paths_of_nodes`.
        tensors: q, k and v to time with; k and v before they are gathered. Leaves that need gradients.
        milliseconds: times a function.

    Raises:
        RuntimeError: none of them runs.
    """
    tried: dict[str, float | str] = {}
    working: dict[str, Attend] = {}
    for name in [*ways, LAST_RESORT]:
        if (name == LAST_RESORT and working) or (name.endswith("-repeated") and name[: -len("-repeated")] in working):
            continue  # the same with more work
        try:
            attend = segments.run(WAYS[name](segments), gathered)
            out = attend(*tensors)
            wrong = error(segments, gathered, tensors, out.detach())
            if not wrong < 0.02:  # bfloat16 rounds P and the output: a few times 2**-9
                tried[name] = f"wrong, by {wrong:.1e}"
                continue
            tried[name] = milliseconds(lambda attend=attend: _as_in_training(attend, tensors))  # type: ignore[misc]
            working[name] = attend
        except Exception as problem:  # compilers and plan builders raise anything; it is a finding, and reported
            tried[name] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    if not working:
        raise RuntimeError(f"no attention runs here: {tried}")
    best = min(working, key=lambda name: tried[name])
    return Choice(best, working[best], tried)


def _as_in_training(attend: Attend, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad():
        attend(*tensors)
    out = attend(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def error(segments: Segments, gathered: Tensor | None, tensors: tuple[Tensor, Tensor, Tensor], out: Tensor) -> float:
    """Relative error of some rows against float64."""
    q, k, v = (x.detach() for x in tensors)
    if gathered is not None:
        k, v = k[gathered], v[gathered]
    first, last = segments.visible()
    rows = torch.randint(len(q), (16,), generator=torch.Generator().manual_seed(0)).tolist()
    group = q.shape[1] // k.shape[1]
    difference = norm = 0.0
    for row in [0, len(q) - 1, *rows]:
        seen = slice(int(first[row]), int(last[row]) + 1)
        keys, values = (x[seen].double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", q[row].double(), keys) * q.shape[2] ** -0.5
        want = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
        difference += float((out[row] - want).square().sum())
        norm += float(want.square().sum())
    return (difference / norm) ** 0.5
