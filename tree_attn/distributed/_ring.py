"""Mode ``ring``: every rank keeps its rows; the keys and values that they see come by, one rank's at a time.

Forward: the parts are merged by their lse, ``out = sum_i exp(lse_i - lse) out_i``. Backward: keys travel again instead
of being kept, and with the merged out and lse a backend's backward gives exactly the part's gradients; those of keys
travel back to their owner. While a part is computed, the keys of the next one are on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tree_attn._operator import _without_autocast
from tree_attn.distributed._exchange import Transfer, send_and_receive
from tree_attn.distributed._plan import RingPlan, Step
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
    keys = _Keys(k, v, plan, group)
    coming = keys.start(0)
    part, lse = backend.forward(q, k, v, None, plan.own, options)
    out, lse = part.to(lse.dtype, copy=True), lse.contiguous()
    for i, step in enumerate(plan.steps):
        here, coming = coming, keys.start(i + 1)
        block = keys.wait(here)
        if block is None:
            continue
        part, part_lse = backend.forward(q[step.rows], *block, None, step.ranges, options)
        # Every row sees itself, so lse is finite; a row that sees nothing of this part has weight 0 in it.
        before = lse[:, step.rows]
        weight = torch.sigmoid(part_lse - before)
        rows = out[step.rows]
        rows += (part - rows) * weight.T[..., None]
        lse[:, step.rows] = torch.logaddexp(before, part_lse)
    if sinks is not None:
        out *= _share(lse, sinks)
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
    keys = _Keys(k, v, plan, group)
    coming = keys.start(0)
    grad_sinks = None
    if sinks is not None:
        share = _share(lse, sinks)
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        grad_sinks = -(delta * (1 - share[..., 0])).sum(0).to(sinks.dtype)
        grad_out = (grad_out * share).to(q.dtype)  # the gradient of softmax without a sink
    grads = backend.backward(grad_out, grad_lse, q, k, v, None, out, lse, plan.own, options)
    grad_q, grad_k, grad_v = (grad.to(lse.dtype, copy=True) for grad in grads[:3])

    def add(step: Step, going_back: Transfer) -> None:
        grad_kv = going_back.wait().to(lse.dtype)
        grad_k.index_add_(0, step.sent, grad_kv[..., : k.shape[2]])
        grad_v.index_add_(0, step.sent, grad_kv[..., k.shape[2] :])

    last: tuple[Step, Transfer] | None = None
    for i, step in enumerate(plan.steps):
        here, coming = coming, keys.start(i + 1)
        block = keys.wait(here)
        part = k.new_empty(0, k.shape[1], k.shape[2] + v.shape[2])
        if block is not None:
            rows = step.rows
            of_lse = None if grad_lse is None else grad_lse[:, rows].contiguous()
            part_q, *part_kv, _ = backend.backward(
                grad_out[rows],
                of_lse,
                q[rows],
                *block,
                None,
                out[rows],
                lse[:, rows].contiguous(),
                step.ranges,
                options,
            )
            grad_q[rows] += part_q
            part = torch.cat(part_kv, -1)
        shape = len(step.sent), k.shape[1], k.shape[2] + v.shape[2]
        going_back = send_and_receive(group, part, step.source, shape, step.target)
        if last is not None:
            add(*last)
        last = step, going_back
    if last is not None:
        add(*last)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks


class _Keys:
    """Brings the keys and values of each step, side by side in one message."""

    def __init__(self, k: Tensor, v: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self.k, self.v, self.steps, self.group = k, v, plan.steps, group

    def start(self, i: int) -> Transfer | None:
        """Begin step i; None when there is none."""
        if i >= len(self.steps):
            return None
        step = self.steps[i]
        sent = torch.cat([self.k[step.sent], self.v[step.sent]], -1)
        return send_and_receive(self.group, sent, step.target, (step.n_received, *sent.shape[1:]), step.source)

    def wait(self, transfer: Transfer | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values that arrived; None when this rank sees none of them."""
        received = transfer.wait() if transfer is not None else None
        if received is None or not len(received):
            return None
        k, v = received.split([self.k.shape[2], self.v.shape[2]], -1)
        return k, v


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
