"""Attention by blocks of rows: each block takes only the keys that some row of it sees, so work and memory both follow
the tree. Runs on any device, for any float dtype and every option; the backward computes the scores again, by block.

``sdpa_blocks`` and ``sdpa_paths`` say what the blocks are, ``sdpa_kernels`` computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tree_attn._backends.sdpa_kernels import accumulator, fused_kernel, prepare
from tree_attn.mask import RowRanges
from tree_attn.registry import Backend, Options, Request


class SdpaBackend(Backend):
    name = "sdpa"
    priority = 100

    def supports(self, request: Request) -> list[str]:
        return []

    def detail(self, request: Request) -> str:
        fused = fused_kernel(
            request.device, request.dtype, request.head_dim, request.value_dim, request.softcap, request.deterministic
        )
        return f"by blocks of rows, on {'matrix products' if fused is None else 'fused kernels of torch'}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        kernel, blocks = prepare(q, k, v, mask, options)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulator(q.dtype))
        for block in blocks:
            rows = block.rows
            if block.n_keys:
                kernel.forward(block, q[rows], k, v, out[rows], lse[:, rows])
            else:
                out[rows], lse[:, rows] = 0, float("-inf")
            if sinks is not None:
                out[rows] *= _share(lse[:, rows], sinks)
        return out, lse

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
        kernel, blocks = prepare(q, k, v, mask, options, grad_lse)
        acc = accumulator(q.dtype)
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=acc), v.new_zeros(v.shape, dtype=acc)
        grad_sinks = q.new_zeros(q.shape[1], dtype=acc)
        for block in blocks:
            rows = block.rows
            if not block.n_keys:
                grad_q[rows] = 0
                continue
            grad, lse_block = grad_out[rows], lse[:, rows]
            if sinks is not None:
                share = _share(lse_block, sinks)
                delta = (grad.to(acc) * out[rows].to(acc)).sum(-1)
                grad_sinks -= (delta * (1 - share[..., 0])).sum(0)
                grad = (grad * share).to(q.dtype)  # the gradient of softmax without a sink
            if mask.row_begin is not None:  # rows that see nothing get weights of exp(score - inf) = 0
                lse_block = lse_block.masked_fill(lse_block == float("-inf"), float("inf"))
            kernel.backward(
                block,
                grad,
                None if grad_lse is None else grad_lse[:, rows],
                q[rows],
                k,
                v,
                out[rows],
                lse_block,
                (grad_q[rows], grad_k, grad_v),
            )
        grads = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
        return *grads, None if sinks is None else grad_sinks.to(sinks.dtype)


def _share(lse: Tensor, sinks: Tensor) -> Tensor:
    """``(rows, heads, 1)``: the share of the softmax that the sink leaves to the keys, from ``lse (heads, rows)``."""
    seen = lse.clamp(min=torch.finfo(lse.dtype).min)  # not -inf less -inf
    return torch.sigmoid(seen - sinks.to(lse.dtype)[:, None]).T[..., None]
