"""``tree_attention``: checks the arguments, picks the backend and makes the call differentiable.

Eager calls run the chosen backend straight from an autograd function. Traced calls (``torch.compile``, fake tensors,
dispatch modes) go through one opaque operator, ``tree_attn::attention``, which picks the backend when it
runs; only a backend that must itself be traced to be fast is picked while tracing, under a guard on the choice.
"""

from __future__ import annotations

import torch
import torch.utils._python_dispatch as python_dispatch
from torch import Tensor

from tree_attn import registry
from tree_attn.mask import GRANULE, RowRanges, TreeMask
from tree_attn.registry import Explanation, Options, Request

OP_NAMESPACE = "tree_attn"


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in which a token sees its ancestors and itself.

    ``out[i] = sum_j softmax_j(score[i, j]) v[j]`` over the j that i sees, with ``score = scale * <q[i], k[j]>``, capped
    to ``softcap * tanh(score / softcap)`` when ``softcap`` is set.

    Args:
        q: ``(tokens, heads, head_dim)``; float16, bfloat16, float32 or float64.
        k: ``(tokens, kv_heads, head_dim)``, dtype and device of ``q``; ``heads`` is a multiple of ``kv_heads``.
        v: ``(tokens, kv_heads, value_dim)``.
        mask: who sees whom, for the same number of tokens.
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        softcap: cap of the scores, 0 for none.
        window: i sees j only if ``depth[i] - depth[j] < window`` (a sliding window along the path); None for none.
        sinks: ``(heads,)`` one logit a head that joins the denominator alone, differentiable.
        deterministic: gradients are the same bits in every run.
        return_lse: also return the log of the sum of exponentials, without the sink.
        backend: force a backend by name; see :func:`tree_attn.explain`.

    Returns:
        ``out (tokens, heads, value_dim)`` in the dtype of ``q``, and with ``return_lse`` also ``lse (heads, tokens)``,
        float32 (float64 for float64 inputs), natural logarithm. Both are differentiable, once.
        Under autocast q, k and v are first cast to the autocast dtype.

    Raises:
        TypeError: an argument of the wrong type, a dtype that is not supported, or mixed dtypes.
        ValueError: shapes, devices or options that do not fit together.
        BackendUnavailable: the forced backend, or every backend, has a reason not to run; all are listed.
    """
    q, k, v = _autocast(q, k, v)
    options = _check(q, k, v, mask, scale, softcap, window, sinks, deterministic)
    out, lse = attend(q, k, v, sinks, mask.ranges(), options, backend)
    return (out, lse) if return_lse else out


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
    if torch.compiler.is_compiling():
        device, dtype, *dims, softcap, window, with_sinks, deterministic, rectangular = _request(
            q, k, v, sinks, ranges, options
        )
        sizes = [len([0] * n) for n in dims]  # a list makes torch.compile specialise on a symbolic size
        traced = _traced_backend(
            registry.generation, registry.forced(backend), device, dtype, *sizes,
            softcap, window, with_sinks, deterministic, rectangular,
        )  # fmt: skip
    elif _is_plain(q):
        chosen = registry.select(_request(q, k, v, sinks, ranges, options), registry.forced(backend))
        if not chosen.traced:
            return _Attention.apply(q, k, v, sinks, chosen, ranges, options)
        traced = chosen.name
    else:
        chosen = registry.select(_request(q, k, v, sinks, ranges, options), registry.forced(backend))
        traced = chosen.name if chosen.traced else None
    if traced is not None:
        return registry._backends[traced].attend(q, k, v, sinks, ranges, options)
    return _op(q, k, v, sinks, *ranges, *_flat(options), backend)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend :func:`tree_attention` would run for these arguments, and why each other one would not."""
    del return_lse  # accepted so that one call's arguments fit both functions
    q, k, v = _autocast(q, k, v)
    options = _check(q, k, v, mask, scale, softcap, window, sinks, deterministic)
    return registry.explain_request(_request(q, k, v, sinks, mask.ranges(), options), registry.forced(backend))


# -- arguments -------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"q, k and v are {kinds}; give three tensors")
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(x.to(dtype) if x.dtype in _DTYPES[:3] else x for x in (q, k, v))  # type: ignore[return-value]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    scale: float | None,
    softcap: float,
    window: int | None,
    sinks: Tensor | None,
    deterministic: bool,
) -> Options:
    """The options with defaults filled in, or the error that says what is wrong with the arguments."""
    if not isinstance(mask, TreeMask):
        raise TypeError(
            f"mask is {type(mask).__name__}; build a TreeMask with TreeMask.from_nodes, from_dfs or from_token_parents"
        )
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"{shapes}: give three dimensions each, (tokens, heads, head_dim); a batch is packed into one sequence"
        )
    if q.dtype not in _DTYPES:
        raise TypeError(f"q is {q.dtype}; supported are float16, bfloat16, float32 and float64")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; give all three one dtype")
    if k.device != q.device or v.device != q.device or mask.device != q.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device}, mask on {mask.device}; put all on one device "
            f"(mask.to({str(q.device)!r}))"
        )
    tokens, heads, head_dim = q.shape
    if k.shape[0] != tokens or v.shape[0] != tokens or mask.total != tokens:
        raise ValueError(
            f"q has {tokens} tokens, k {k.shape[0]}, v {v.shape[0]}, and mask is for {mask.total}; all must agree"
        )
    kv_heads = k.shape[1]
    if v.shape[1] != kv_heads:
        raise ValueError(f"k has {kv_heads} heads and v has {v.shape[1]}; give both the same number")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; heads must be a positive multiple of kv_heads")
    if k.shape[2] != head_dim:
        raise ValueError(f"q has head_dim {head_dim} and k has {k.shape[2]}; they must agree")
    if head_dim == 0 or v.shape[2] == 0:
        raise ValueError(f"head_dim is {head_dim} and value_dim is {v.shape[2]}; both must be at least 1")
    _check_options(scale, softcap, window, deterministic)
    if sinks is not None:
        _check_sinks(sinks, q)
    return Options(
        float(head_dim) ** -0.5 if scale is None else float(scale),
        float(softcap),
        window,
        bool(deterministic),
    )


def _check_options(scale: float | None, softcap: float, window: int | None, deterministic: bool) -> None:
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {type(scale).__name__}; give a number, or None for head_dim ** -0.5")
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap is {type(softcap).__name__}; give a number, 0 for none")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; give a positive number, or 0 for none")
    if window is not None and (isinstance(window, bool) or not isinstance(window, (int, torch.SymInt))):
        raise TypeError(f"window is {type(window).__name__}; give an integer, or None for no window")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; give at least 1 (a token sees itself), or None for no window")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic is {type(deterministic).__name__}; give True or False")


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks is {type(sinks).__name__}; give a tensor of one logit a head, or None")
    if sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}; give one logit a head, ({q.shape[1]},)")
    if sinks.dtype not in _DTYPES:
        raise TypeError(f"sinks is {sinks.dtype}; give a floating-point tensor")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device} and q on {q.device}; put both on one device")


# -- choosing --------------------------------------------------------------------------------------------------------


def _request(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ranges: RowRanges, options: Options
) -> Request:
    return Request(
        q.device,
        q.dtype,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        not not options.softcap,  # a bool even where torch.compile holds the number as a symbol
        options.window is not None,
        sinks is not None,
        options.deterministic,
        ranges.row_begin is not None,
    )


@torch.compiler.assume_constant_result
def _traced_backend(generation: str, name: str | None, *request: object) -> str | None:
    """The name of the chosen backend if it must be traced, None if the operator should choose when it runs."""
    chosen = registry.select(Request(*request), name)  # type: ignore[arg-type]
    return chosen.name if chosen.traced else None


def _is_plain(q: Tensor) -> bool:
    """No dispatch mode or subclass that has to see an operator."""
    return type(q) in (Tensor, torch.nn.Parameter) and python_dispatch._get_current_dispatch_mode() is None


# -- autograd, eager -------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """The chosen backend as a differentiable function of q, k, v and sinks."""

    @staticmethod
    def forward(q, k, v, sinks, backend, ranges, options):  # type: ignore[no-untyped-def]
        return backend.forward(q, k, v, sinks, ranges, options)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        q, k, v, sinks, backend, ranges, options = inputs
        ctx.save_for_backward(q, k, v, sinks, *output, *ranges)
        ctx.backend, ctx.options = backend, options
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse, *ranges = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = ctx.backend.backward(
            grad_out, grad_lse, q, k, v, sinks, out, lse, RowRanges(*ranges), ctx.options
        )
        return *grads, None, None, None


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
    chosen = _select_opaque(q, k, v, sinks, ranges, options, backend)
    out, lse = chosen.forward(q, k, v, sinks, ranges, options)
    return out.contiguous(), lse.contiguous()


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _run_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, *rest):  # type: ignore[no-untyped-def]
    ranges, options, backend = _split(rest)
    chosen = _select_opaque(q, k, v, sinks, ranges, options, backend)
    *grads, grad_sinks = chosen.backward(grad_out, grad_lse, q, k, v, sinks, out, lse, ranges, options)
    return *(g.contiguous() for g in grads), q.new_empty(0) if grad_sinks is None else grad_sinks


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


def _split(rest: tuple) -> tuple[RowRanges, Options, str | None]:
    return RowRanges(*rest[:_N_RANGES]), Options(*rest[_N_RANGES:-1]), rest[-1]


def _select_opaque(q, k, v, sinks, ranges, options, backend):  # type: ignore[no-untyped-def]
    chosen = registry.select(_request(q, k, v, sinks, ranges, options), registry.forced(backend))
    if chosen.traced:
        raise registry.BackendUnavailable(
            f"{chosen.name!r} was chosen after this graph was traced, and it must be chosen while tracing. Choose it "
            f"with use_backend() or the backend argument, which trace again, instead of {registry.ENVIRONMENT_VARIABLE}."
        )
    return chosen
