"""Random attention problems over the whole table of the CUDA kernels, and what their results are held to.

A result is compared with float64. How far off it may be is not a chosen number: it is the error of the same computation
with the roundings that every 16-bit attention kernel makes (probabilities and score gradients rounded to 16 bits before
they are multiplied, sums in float32, results rounded once), see :func:`rounded`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tree_attn._operator import attend
from tree_attn.mask import RowRanges, TreeMask, _bounds
from tree_attn.registry import Options

CLASSES = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
LAYOUTS = ("contiguous", "heads first", "fused", "misaligned")
_EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


@dataclass(frozen=True)
class Case:
    """One attention problem, made from its seed alone."""

    seed: int
    dtype: torch.dtype
    parents: list[int]
    lengths: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    options: Options
    sinks: bool = False
    grad_lse: bool = False
    rectangular: bool = False
    layout: str = "contiguous"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    ranges: RowRanges
    options: Options
    grad_out: Tensor
    grad_lse: Tensor | None


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_sinks: Tensor | None


# -- problems --------------------------------------------------------------------------------------------------------


def random_forest(rng: random.Random, tokens: int) -> tuple[list[int], list[int]]:
    """Parents and lengths of a forest of ``tokens`` tokens: from one chain to thousands of small branches."""
    longest = rng.choice((1, 3, 20, 100, tokens))
    new_root, climb = rng.choice((0.0, 0.05, 0.3)), rng.choice((0.1, 0.5, 0.9))
    parents: list[int] = []
    lengths: list[int] = []
    path: list[int] = []  # nodes from the root to the last one
    while tokens:
        if path and rng.random() < new_root:
            path = []
        while path and len(path) > 1 and rng.random() < climb:
            path.pop()
        parents.append(path[-1] if path else -1)
        lengths.append(min(rng.randint(1, longest), tokens))
        tokens -= lengths[-1]
        path.append(len(parents) - 1)
    return parents, lengths


def random_case(seed: int) -> Case:
    """A problem drawn from the whole table; small, so that thousands take minutes."""
    rng = random.Random(seed)
    head_dim, value_dim = rng.choice(CLASSES)
    if rng.random() < 0.5:
        head_dim = value_dim = 8 * rng.randint(1, 32)
    if rng.random() < 0.2:
        value_dim = 8 * rng.randint(1, 32)
    kv_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 8))
    tokens = rng.choice(_EDGES) if rng.random() < 0.3 else rng.randint(1, 400)
    if rng.random() < 0.05:  # a few that take many tiles
        kv_heads, group, tokens = 1, rng.choice((1, 2)), rng.randint(400, 1600)
    options = Options(
        scale=rng.choice((head_dim**-0.5, head_dim**-0.5, 0.03, 0.3)),
        softcap=rng.choice((0.0, 0.0, 0.0, 5.0, 30.0)),
        window=rng.choice((None, None, None, 1, rng.randint(1, tokens), 10**6)),
        deterministic=rng.random() < 0.3,
    )
    parents, lengths = random_forest(rng, tokens)
    return Case(
        seed,
        rng.choice((torch.float16, torch.bfloat16)),
        parents,
        lengths,
        kv_heads * group,
        kv_heads,
        head_dim,
        value_dim,
        options,
        sinks=rng.random() < 0.25,
        grad_lse=rng.random() < 0.25,
        rectangular=rng.random() < 0.25,
        layout=rng.choice(LAYOUTS),
    )


def make_inputs(case: Case, device: str = "cuda") -> Inputs:
    """The tensors of a case."""
    mask = TreeMask.from_nodes(case.parents, case.lengths, device=device)
    generator = torch.Generator(device).manual_seed(case.seed)
    ranges = rectangle(mask, case.seed) if case.rectangular else mask.ranges()
    rows, keys = ranges.q_depth.shape[0], ranges.k_depth.shape[0]

    def tensor(tokens: int, heads: int, dim: int, layout: str = case.layout) -> Tensor:
        return random_tensor(generator, tokens, heads, dim, case.dtype, layout)

    return Inputs(
        tensor(rows, case.heads, case.head_dim),
        tensor(keys, case.kv_heads, case.head_dim),
        tensor(keys, case.kv_heads, case.value_dim),
        torch.randn(case.heads, device=device, generator=generator) if case.sinks else None,
        ranges,
        case.options,
        tensor(rows, case.heads, case.value_dim),
        torch.randn(case.heads, rows, device=device, generator=generator) if case.grad_lse else None,
    )


def random_tensor(
    generator: torch.Generator, tokens: int, heads: int, dim: int, dtype: torch.dtype, layout: str = "contiguous"
) -> Tensor:
    """Normal numbers ``(tokens, heads, dim)``, laid out in memory in one of ``LAYOUTS``."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=generator.device, generator=generator, dtype=torch.float32).to(dtype)

    if layout == "heads first":
        return randn(heads, tokens, dim).transpose(0, 1)
    if layout == "fused":  # a slice of a larger projection
        return randn(tokens, heads + 2, dim + 8)[:, 1:-1, 8:]
    if layout == "misaligned":
        return randn(tokens * heads * dim + 1)[1:].view(tokens, heads, dim)
    return randn(tokens, heads, dim)


def rectangle(mask: TreeMask, seed: int) -> RowRanges:
    """Some rows of a square mask against some of its keys; rows that see nothing are among them."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def some() -> Tensor:
        chosen = torch.rand(mask.total, generator=generator) < 0.2 + 0.8 * torch.rand((), generator=generator)
        chosen[torch.randint(mask.total, (1,), generator=generator)] = True  # empty inputs have a test of their own
        return chosen.nonzero().flatten().to(mask.device)

    rows, keys = some(), some()
    begin = torch.searchsorted(rows, keys, out_int32=True)
    end = torch.searchsorted(rows, mask.subtree_end[keys].long(), out_int32=True)
    q_depth, k_depth = mask.depth[rows], mask.depth[keys]
    return RowRanges(begin, end, q_depth, k_depth, _bounds(begin), _bounds(end), _bounds(q_depth), _bounds(k_depth))


# -- results ---------------------------------------------------------------------------------------------------------


def run(inputs: Inputs, backend: str) -> Results:
    """Forward and backward on a backend, through autograd."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    sinks = None if inputs.sinks is None else inputs.sinks.detach().requires_grad_()
    out, lse = attend(*leaves, sinks, inputs.ranges, inputs.options, backend)
    wanted = leaves if sinks is None else [*leaves, sinks]
    if inputs.grad_lse is None:
        grads = torch.autograd.grad(out, wanted, inputs.grad_out)
    else:
        grads = torch.autograd.grad((out, lse), wanted, (inputs.grad_out, inputs.grad_lse))
    return Results(out.detach(), lse.detach(), *grads[:3], grads[3] if sinks is not None else None)


def exact(inputs: Inputs) -> Results:
    """The same numbers in float64."""
    wide = (None if x is None else x.double() for x in (*inputs[:4], *inputs[6:]))
    q, k, v, sinks, grad_out, grad_lse = wide
    return run(Inputs(q, k, v, sinks, inputs.ranges, inputs.options, grad_out, grad_lse), "reference")


def rounded(inputs: Inputs, exponent: float = 0.0) -> Results:
    """In float32 with a 16-bit kernel's roundings.

    Which way a number rounds depends on where it lies between two powers of two, and that on the running maximum of a
    tile. ``exponent`` shifts what is rounded by this power of two, for another draw of the roundings.
    """
    group = inputs.q.shape[1] // inputs.k.shape[1]
    dtype = inputs.q.dtype
    q, do = inputs.q.float().transpose(0, 1), inputs.grad_out.float().transpose(0, 1)  # (heads, rows, dim)
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (inputs.k, inputs.v))
    rows, keys = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
    options, shift = inputs.options, 2.0**exponent

    def round_(x: Tensor) -> Tensor:
        return (x * shift).to(dtype).float() / shift

    score, slope = q @ k.transpose(1, 2) * options.scale, 1.0
    if options.softcap:
        t = torch.tanh(score / options.softcap)
        score, slope = options.softcap * t, 1 - t * t
    score = score.masked_fill(~inputs.ranges.visible(rows, keys, options.window), -math.inf)
    top = score.amax(-1, keepdim=True).clamp(min=-1e30)
    p = torch.exp(score - top)
    lse = top + p.sum(-1, keepdim=True).log()
    total = lse if inputs.sinks is None else torch.logaddexp(lse, inputs.sinks.float()[:, None, None])
    total = total.masked_fill(lse == -math.inf, 0)
    out = (round_(p) @ v * torch.exp(top - total)).to(dtype)

    p = torch.exp(score - total)
    delta = (do * out.float()).sum(-1, keepdim=True)
    ds = p * (do @ v.transpose(1, 2) - delta)
    if inputs.grad_lse is not None:
        ds = ds + torch.exp(score - lse.masked_fill(lse == -math.inf, 0)) * inputs.grad_lse[..., None]
    ds = round_(ds * slope)

    def per_key(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(dtype)

    grad_q = (ds @ k * options.scale).transpose(0, 1).to(dtype)
    grad_k = per_key(ds.transpose(1, 2) @ q * options.scale)
    grad_v = per_key(round_(p).transpose(1, 2) @ do)
    return Results(out.transpose(0, 1), lse.squeeze(-1), grad_q, grad_k, grad_v, None)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of the largest entry, as a 0-d tensor."""
    largest = x.abs().amax().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(largest)))


def _float32_noise(inputs: Inputs) -> dict[str, Tensor]:
    """What is left of score gradients ``p * (<grad_out, v> - delta)`` that cancel to zero: float32 roundings."""
    q, k, v, grad_out = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    largest = v.norm(dim=-1).amax() * grad_out.norm(dim=-1).amax() * abs(inputs.options.scale)
    eps = torch.finfo(torch.float32).eps
    rows = q.shape[0] * q.shape[1] // k.shape[1]
    return {"grad_q": eps * largest * k.abs().amax(), "grad_k": eps * largest * q.abs().amax() * math.sqrt(rows)}


def excess(inputs: Inputs, results: Results) -> dict[str, Tensor]:
    """By what factor each result exceeds what it is held to; at most 1 (and no NaN) is right. 0-d tensors."""
    want = exact(inputs)
    draws = [rounded(inputs, exponent) for exponent in (0.0, 1 / 3, 2 / 3)]
    noise = _float32_noise(inputs)
    found = {}
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        truth = getattr(want, name)
        allowed = torch.stack([(getattr(draw, name).double() - truth).abs().amax() for draw in draws]).amax()
        error = (getattr(results, name).double() - truth).abs().amax()
        found[name] = error / (2 * allowed + ulp(truth, inputs.q.dtype) + noise.get(name, 0))
    # The log of a sum of float32 numbers: a few float32 roundings of the scores that go into it.
    empty = want.lse == -math.inf
    error = (results.lse.double() - want.lse).masked_fill(empty, 0).abs().amax()
    size = 1 + want.lse.masked_fill(empty, 0).abs().amax()
    found["lse"] = error / (1e-4 * size)
    found["lse of empty rows"] = ((results.lse == -math.inf) != empty).sum().double() * 2
    if inputs.sinks is not None:
        # -sum_q p_sink <grad_out, out>: the rounding of out, weighed as it enters.
        sink = inputs.sinks.double()[:, None]
        p_sink = torch.exp(sink - torch.logaddexp(want.lse, sink))
        weight = (p_sink * (inputs.grad_out.double() * want.out).abs().sum(-1).T).sum(-1)
        bound = torch.finfo(inputs.q.dtype).eps * weight + 1e-6
        found["grad_sinks"] = ((results.grad_sinks.double() - want.grad_sinks).abs() / bound).amax()
    return found


def failures(case: Case, results: Results | None = None, inputs: Inputs | None = None) -> list[str]:
    """What is wrong with the CUDA backend's results of a case, in words; empty when nothing is."""
    inputs = inputs or make_inputs(case)
    found = excess(inputs, results or run(inputs, "cuda"))
    values = torch.stack([value.double() for value in found.values()]).tolist()  # one synchronisation
    return [
        f"{name} off by {value:.2f} times what is allowed"
        for name, value in zip(found, values, strict=True)
        if not value <= 1
    ]
