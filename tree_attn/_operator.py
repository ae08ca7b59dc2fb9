"""The differentiable operator: picks the backend for checked arguments and connects it with autograd.

Eager calls run the chosen backend straight from an autograd function. Traced calls (``torch.compile``, fake tensors,
dispatch modes, tensor subclasses) go through one opaque operator, ``tree_attn::attention``, which picks the backend
when it runs. What ``use_backend`` forces is part of a trace, under a guard: so the backward pass runs the same
backend, and one that must itself be traced to be fast (flex) can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.utils._python_dispatch as python_dispatch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from tree_attn import registry
from tree_attn.mask import RowRanges
from tree_attn.registry import Backend, Options, Request

OP_NAMESPACE = "tree_attn"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: RowRanges,
    options: Options,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` for any rectangular mask; arguments already checked."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    forced = backend or registry.forced_in_thread()
    if torch.compiler.is_compiling():
        device, dtype, *dims, softcap, window, with_sinks, deterministic, rectangular = make_request(
            q, k, v, sinks, ranges, options
        )
        sizes = [len([0] * n) for n in dims]  # a list makes torch.compile specialise on a symbolic size
        traced = _traced_backend(
            registry.generation, forced, device, dtype, *sizes, softcap, window, with_sinks, deterministic, rectangular
        )
        if traced is None:
            return _op(q, k, v, sinks, *ranges, *_flat(options), forced)
        return _without_autocast(registry._backends[traced].attend, q, k, v, sinks, ranges, options)
    request = make_request(q, k, v, sinks, ranges, options)
    chosen = registry.select(request, forced or registry.forced_in_environment())
    if chosen.traced:
        return _without_autocast(chosen.attend, q, k, v, sinks, ranges, options)
    if not _is_plain(q, k, v):
        chosen = _ThroughOperator(forced)
    if torch._C._are_functorch_transforms_active():
        return _TransformedAttention.apply(q, k, v, sinks, chosen, ranges, options)
    # A tensor kept from inside a transform that is over: a wrapper, which has no memory that a kernel could be given.
    q, k, v = unwrap_if_dead(q), unwrap_if_dead(k), unwrap_if_dead(v)
    sinks = None if sinks is None else unwrap_if_dead(sinks)
    if _is_recorded(q, k, v, sinks):
        return _Attention.record(q, k, v, sinks, chosen, ranges, options)
    return _forward(q, k, v, sinks, chosen, ranges, options)


# -- choosing --------------------------------------------------------------------------------------------------------


def make_request(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ranges: RowRanges, options: Options) -> Request:
    _, heads, head_dim = q.shape
    _, kv_heads, value_dim = v.shape
    return Request(
        q.device,
        q.dtype,
        heads,
        kv_heads,
        head_dim,
        value_dim,
        not not options.softcap,  # noqa: SIM208  a bool also where torch.compile holds a symbol
        options.window is not None,
        sinks is not None,
        options.deterministic,
        ranges.row_begin is not None,
    )


def _traced_backend(generation: str, name: str | None, *request: object) -> str | None:
    """The name of the chosen backend if it must be traced, None if the operator should choose when it runs."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # The operator has no rules for them; some would drop derivatives without a word.
        raise NotImplementedError(
            "tree_attention cannot be compiled inside a torch.func transform or forward-mode differentiation; "
            "call the transform outside torch.compile"
        )
    chosen = registry.select(Request(*request), name or registry.forced_in_environment())  # type: ignore[arg-type]
    return chosen.name if chosen.traced else None


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which takes a second.
_traced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_enabled(device: torch.device) -> bool:
    # The first question takes a tenth of the time of the others.
    any_device = torch._C._is_any_autocast_enabled()
    return any_device and device.type != "meta" and torch.is_autocast_enabled(device.type)


def _rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension, which backends may count on; other strides are theirs to read."""
    return x if x.stride(-1) == 1 else x.contiguous()


_PLAIN = Tensor, torch.nn.Parameter


def _is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """No dispatch mode or subclass that has to see an operator."""
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN
    return plain and python_dispatch._get_current_dispatch_mode() is None


def _is_recorded(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Does autograd have to know of this call? If not, the 7 us that a function of autograd costs are saved."""
    if forward_ad._current_level >= 0:
        return True
    needed = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    return needed and torch.is_grad_enabled()


def _without_autocast(method: Callable[..., Any], tensor: Tensor, *rest: Any) -> Any:
    """Call a backend outside autocast, which would round the float32 arithmetic in it."""
    if not autocast_enabled(tensor.device):
        return method(tensor, *rest)
    with torch.autocast(tensor.device.type, enabled=False):
        return method(tensor, *rest)


# -- autograd, eager -------------------------------------------------------------------------------------------------


def _forward(q, k, v, sinks, backend, ranges, options):  # type: ignore[no-untyped-def]
    out, lse = _without_autocast(backend.forward, q, k, v, sinks, ranges, options)
    return out.contiguous(), lse.contiguous()  # as the operator promises, so that code may view() in either mode


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, sinks, backend, ranges, options = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *ranges)
    ctx.backend, ctx.options = backend, options
    ctx.set_materialize_grads(False)


class _Attention(torch.autograd.Function):
    """The chosen backend as a differentiable function of q, k, v and sinks."""

    @classmethod
    def record(cls, *inputs):  # type: ignore[no-untyped-def]
        """:meth:`apply` outside torch.func's transforms, without the 3 us in which it gets ready for them."""
        return super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc]

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse, *ranges = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        grad_out = torch.zeros_like(out) if grad_out is None else _rows(grad_out)
        inputs = (grad_out, grad_lse, q, k, v, sinks, out, lse, RowRanges(*ranges), ctx.options)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            *grads, grad_sinks = _AttentionBackward.apply(ctx.backend, *inputs)
        else:  # the usual case, without the bookkeeping of a function that would only say no
            *grads, grad_sinks = _without_autocast(ctx.backend.backward, *inputs)
        return *grads, None if sinks is None else grad_sinks, None, None, None

    @staticmethod
    def jvp(ctx, *tangents) -> NoReturn:  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            "tree_attention has no forward-mode derivative; use reverse mode (backward(), torch.func.grad, vjp)"
        )


class _TransformedAttention(_Attention):
    """The same in the form that torch.func asks for; its bookkeeping costs 17 us a call, so plain calls go without."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def vmap(info, in_dims, *args) -> NoReturn:  # type: ignore[no-untyped-def]
        _no_vmap()


class _AttentionBackward(torch.autograd.Function):
    """The gradients as a function that says clearly what they cannot do: be derived again, or batched."""

    @staticmethod
    def forward(backend, *inputs):  # type: ignore[no-untyped-def]
        *grads, grad_sinks = _without_autocast(backend.backward, *inputs)
        return *grads, inputs[0].new_empty(0) if grad_sinks is None else grad_sinks

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *grads) -> NoReturn:  # type: ignore[no-untyped-def]
        _no_second_derivative()

    @staticmethod
    def vmap(info, in_dims, *args) -> NoReturn:  # type: ignore[no-untyped-def]
        _no_vmap()


def _no_second_derivative(*_: object) -> NoReturn:
    raise NotImplementedError(
        "tree_attention is differentiable once; it has no second derivative (create_graph=True, torch.func.hessian, "
        "a gradient penalty)"
    )


def _no_vmap(*_: object) -> NoReturn:
    raise NotImplementedError(
        "tree_attention has no vmap rule: pack the batch into one sequence and give each element a tree of its own "
        "(TreeMask.from_nodes takes a forest)"
    )


# -- operators, traced -----------------------------------------------------------------------------------------------

_RANGES = (
    "Tensor? row_begin, Tensor row_end, Tensor q_depth, Tensor k_depth, Tensor? begin_bounds, Tensor end_bounds, "
    "Tensor q_depth_bounds, Tensor k_depth_bounds"
)
_OPTIONS = "float scale, float softcap, SymInt? window, bool deterministic, str? backend"

_library = torch.library.Library(OP_NAMESPACE, "DEF")
_library.define(f"attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_RANGES}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, "
    f"Tensor lse, {_RANGES}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_op = getattr(torch.ops, OP_NAMESPACE).attention.default
_op_backward = getattr(torch.ops, OP_NAMESPACE).attention_backward.default
_N_RANGES = len(RowRanges._fields)


def _flat(options: Options) -> tuple[float, float, int | None, bool]:
    return options.scale, options.softcap, options.window, options.deterministic


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _run(q, k, v, sinks, *rest):  # type: ignore[no-untyped-def]
    ranges, options, backend = _split(rest)
    q, k, v = _rows(q), _rows(k), _rows(v)
    chosen = _select_opaque(make_request(q, k, v, sinks, ranges, options), registry.forced(backend))
    return _forward(q, k, v, sinks, chosen, ranges, options)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _run_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, *rest):  # type: ignore[no-untyped-def]
    ranges, options, backend = _split(rest)
    grad_out, q, k, v = _rows(grad_out), _rows(q), _rows(k), _rows(v)
    # Not registry.forced(): a backward pass runs in a thread of autograd's, or after the block of use_backend.
    name = backend or registry.forced_in_environment()
    chosen = _select_opaque(make_request(q, k, v, sinks, ranges, options), name)
    *grads, grad_sinks = _without_autocast(
        chosen.backward, grad_out, grad_lse, q, k, v, sinks, out, lse, ranges, options
    )
    return *(g.contiguous() for g in grads), q.new_empty(0) if grad_sinks is None else grad_sinks


class _ThroughOperator(Backend):
    """Calls the operators, for eager calls in which a dispatch mode or a subclass has to see them."""

    def __init__(self, forced: str | None) -> None:
        self.forced = forced

    def forward(self, q, k, v, sinks, mask, options):  # type: ignore[no-untyped-def]
        return _op(q, k, v, sinks, *mask, *_flat(options), self.forced)

    def backward(self, grad_out, grad_lse, q, k, v, sinks, out, lse, mask, options):  # type: ignore[no-untyped-def]
        return _op_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, *mask, *_flat(options), self.forced)


@torch.library.register_fake(f"{OP_NAMESPACE}::attention", lib=_library)
def _fake(q, k, v, sinks, *rest):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))


@torch.library.register_fake(f"{OP_NAMESPACE}::attention_backward", lib=_library)
def _fake_backward(grad_out, grad_lse, q, k, v, sinks, *rest):  # type: ignore[no-untyped-def]
    grad_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, sinks, *rest = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *rest[:_N_RANGES])
    ctx.rest = rest[_N_RANGES:]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, lse, *ranges = ctx.saved_tensors
    nothing = (None,) * (_N_RANGES + len(ctx.rest))
    if grad_out is None and grad_lse is None:
        return None, None, None, None, *nothing
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_sinks = _op_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, *ranges, *ctx.rest)
    return *grads, None if sinks is None else grad_sinks, *nothing


torch.library.register_autograd(
    f"{OP_NAMESPACE}::attention", _autograd_backward, setup_context=_setup_context, lib=_library
)


torch.library.register_autograd(f"{OP_NAMESPACE}::attention_backward", _no_second_derivative, lib=_library)


def _split(rest: tuple) -> tuple[RowRanges, Options, str | None]:
    return RowRanges(*rest[:_N_RANGES]), Options(*rest[_N_RANGES:-1]), rest[-1]


def _select_opaque(request: Request, name: str | None) -> Backend:
    chosen = registry.select(request, name)
    if chosen.traced:
        raise registry.BackendUnavailable(
            f"{chosen.name!r} was chosen after this graph was traced, and it must be chosen while tracing. Choose it "
            f"with use_backend() or the backend argument, which trace again, not with {registry.ENVIRONMENT_VARIABLE}."
        )
    return chosen
