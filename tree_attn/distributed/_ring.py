"""Mode ``ring``: every rank keeps its rows; the keys and values that they see come by, a wave at a time.

Forward: the parts are merged by their lse, ``out = sum_i exp(lse_i - lse) out_i``. Backward: keys travel again instead
of being kept, and with the merged out and lse a backend's backward gives exactly the part's gradients; those of keys
travel back to their owner. While a part is computed, the keys of the next wave are on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tree_attn._operator import _without_autocast
from tree_attn.distributed._plan import RingPlan
from tree_attn.distributed._waves import Gradients, Keys
from tree_attn.registry import Backend, Options


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: RingPlan,
    options: Options,
    backend: Backend,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's rows; arguments already checked and agreed on."""
    return _Ring.apply(q, k, v, sinks, plan, options, backend, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, options, backend, group):  # type: ignore[no-untyped-def]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = _without_autocast(_forward, q, k, v, sinks, plan, options, backend, group)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.call = plan, options, backend, group
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        # A rank without a gradient still serves the others: its keys have gradients from their rows.
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        grads = _without_autocast(_backward, grad_out, grad_lse, q, k, v, sinks, out, lse, *ctx.call)
        return *grads, None, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: RingPlan,
    options: Options,
    backend: Backend,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    keys = Keys(k, v, plan, group)
    out = lse = None
    for part in plan.parts:
        part_k, part_v = keys.of(part)
        if part.ranges is None:
            continue
        part_out, part_lse = backend.forward(q[part.rows], part_k, part_v, None, part.ranges, options)
        if out is None or lse is None:  # the first part has every row
            out, lse = part_out, part_lse.contiguous()
            continue
        out = out.to(lse.dtype)  # no copy from the third part on
        # Every row sees itself, so lse is finite; a row that sees nothing of this part has weight 0 in it.
        before = lse[:, part.rows]
        out[part.rows].lerp_(part_out.to(lse.dtype), torch.sigmoid(part_lse - before).T[..., None])
        before.copy_(torch.logaddexp(before, part_lse))
    assert out is not None
    assert lse is not None
    if sinks is not None:
        out = out * _share(lse, sinks)
    return out.to(q.dtype), lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: RingPlan,
    options: Options,
    backend: Backend,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    keys = Keys(k, v, plan, group)
    grad_sinks = None
    if sinks is not None:
        share = _share(lse, sinks)
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        grad_sinks = -(delta * (1 - share[..., 0])).sum(0).to(sinks.dtype)
        grad_out = (grad_out * share).to(q.dtype)  # the gradient of softmax without a sink
    grad_q = None
    gradients = Gradients(k, v, plan, group)
    for part in plan.parts:
        part_k, part_v = keys.of(part)
        part_kv: list[Tensor] = [part_k[:0], part_v[:0]]
        if part.ranges is not None:
            rows = part.rows
            part_q, *part_kv, _ = backend.backward(
                grad_out[rows],
                None if grad_lse is None else grad_lse[:, rows].contiguous(),
                q[rows],
                part_k,
                part_v,
                None,
                out[rows],
                lse[:, rows].contiguous(),
                part.ranges,
                options,
            )
            if grad_q is None:  # the first part has every row
                grad_q = part_q
            else:
                grad_q = grad_q.to(lse.dtype)  # no copy from the third part on
                grad_q[rows] += part_q
        gradients.take(part, *part_kv)
    assert grad_q is not None
    return grad_q.to(q.dtype), *gradients.finish(), grad_sinks


def _share(lse: Tensor, sinks: Tensor) -> Tensor:
    """``(rows, heads, 1)``: the share of the softmax that the sink leaves to the keys."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).T[..., None]


def ring_backend(candidates: tuple[Backend, ...], request: Any, forced: str | None) -> Backend:
    """The best backend whose gradients can be taken part by part, which a traced one (flex) leaves to autograd.

    Raises:
        BackendUnavailable: none can run the request, or not the forced one.
    """
    from tree_attn.registry import BackendUnavailable

    reasons = []
    for backend in candidates:
        if forced in (None, backend.name):
            why = ["it is differentiated by autograd as a whole, not part by part"] if backend.traced else []
            why += backend.supports(request)
            if not why:
                return backend
            reasons.append(f"  {backend.name}: {'; '.join(why)}")
    raise BackendUnavailable("no backend can run mode='ring'; try mode='ulysses'\n" + "\n".join(reasons))
