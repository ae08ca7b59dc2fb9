"""Plain softmax attention over the dense mask: slow, O(rows * keys) memory, and what every other backend is held to.

Accumulates in float32, or in float64 for float64 inputs. Everything is written out, the gradients too, so that it can
be checked against the formulas of a paper and against autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tree_attn.mask import RowRanges
from tree_attn.registry import Backend, Options, Request


class ReferenceBackend(Backend):
    name = "reference"
    priority = 0

    def supports(self, request: Request) -> list[str]:
        return []

    def detail(self, request: Request) -> str:
        return "dense, for comparison"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        scores, _, _ = _scores(q, k, mask, options)
        lse = scores.logsumexp(-1)
        p = _probabilities(scores, lse, sinks)
        out = torch.einsum("hqk,khd->qhd", p, _expand(v, q))
        return out.to(q.dtype), lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
        mask: RowRanges,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        scores, visible, slope = _scores(q, k, mask, options)
        p = _probabilities(scores, lse, sinks)
        do = _accumulate(grad_out)
        delta = (do * _accumulate(out)).sum(-1).T  # (heads, rows)

        grad_v = torch.einsum("hqk,qhd->khd", p, do)
        grad_p = torch.einsum("qhd,khd->hqk", do, _expand(v, q))
        grad_s = p * (grad_p - delta[..., None])
        if grad_lse is not None:
            grad_s = grad_s + _probabilities(scores, lse, None) * grad_lse[..., None]
        grad_s = torch.where(visible, grad_s * slope * options.scale, 0)
        grad_q = torch.einsum("hqk,khd->qhd", grad_s, _expand(k, q))
        grad_k = torch.einsum("hqk,qhd->khd", grad_s, _accumulate(q))

        grad_sinks = None
        if sinks is not None:
            p_sink = torch.exp(_accumulate(sinks)[:, None] - _with_sink(lse, sinks))
            p_sink = torch.where(lse == float("-inf"), 0, p_sink)  # rows that see nothing have nothing to weigh
            grad_sinks = -(p_sink * delta).sum(-1).to(sinks.dtype)
        return grad_q.to(q.dtype), _sum_groups(grad_k, k), _sum_groups(grad_v, v), grad_sinks


def _scores(q: Tensor, k: Tensor, mask: RowRanges, options: Options) -> tuple[Tensor, Tensor, Tensor | float]:
    """Masked scores ``(heads, rows, keys)``, the mask ``(rows, keys)``, and the derivative of the soft cap."""
    rows = torch.arange(q.shape[0], device=q.device)
    keys = torch.arange(k.shape[0], device=q.device)
    visible = mask.visible(rows, keys, options.window)
    scores = torch.einsum("qhd,khd->hqk", _accumulate(q), _expand(k, q)) * options.scale
    slope: Tensor | float = 1.0
    if options.softcap:
        t = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * t, 1 - t * t
    return scores.masked_fill(~visible, float("-inf")), visible, slope


def _with_sink(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """The log of the whole denominator, ``(heads, rows)``."""
    return lse if sinks is None else torch.logaddexp(lse, _accumulate(sinks)[:, None])


def _probabilities(scores: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """``exp(scores - log denominator)``; zero, not NaN, in rows that see nothing."""
    empty = lse == float("-inf")
    denominator = _with_sink(lse, sinks).masked_fill(empty, 0)
    return torch.exp(scores - denominator[..., None])


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _expand(x: Tensor, q: Tensor) -> Tensor:
    """Each key/value head once for every query head of its group."""
    return _accumulate(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    return grad.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
