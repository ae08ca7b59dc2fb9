"""``tree_attention`` and ``explain``: the public calls, and the checks of their arguments."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from tree_attn import registry
from tree_attn._operator import attend, autocast_enabled, make_request
from tree_attn.mask import TreeMask
from tree_attn.registry import Explanation, Options


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0,  # an int: with dynamic=True torch.compile makes a float default a variable, and traces twice
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
        float32 (float64 for float64 inputs), natural logarithm. A row that sees nothing gives 0 and -inf.
        Both are differentiable in q, k, v and sinks, once: second derivatives, forward mode and ``vmap`` are errors.
        Under autocast q, k and v are first cast to the autocast dtype.

    Raises:
        TypeError: an argument of the wrong type, a dtype that is not supported, or mixed dtypes.
        ValueError: shapes, devices or options that do not fit together.
        BackendUnavailable: the forced backend, or every backend, has a reason not to run; all are listed.

    Example:
        >>> mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
        >>> q, k, v = torch.randn(7, 8, 64), torch.randn(7, 2, 64), torch.randn(7, 2, 64)
        >>> tree_attention(q, k, v, mask).shape
        torch.Size([7, 8, 64])
    """
    q, k, v = _autocast(q, k, v)
    options = _check(q, k, v, mask, scale, softcap, window, sinks, deterministic)
    out, lse = attend(q, k, v, sinks, mask.ranges(), options, backend)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float = 0,
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
    return registry.explain_request(make_request(q, k, v, sinks, mask.ranges(), options), registry.forced(backend))


# -- arguments -------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NO_WINDOW = 2**31 - 1  # hides nothing, and fits the int32 that depths are compared in


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"q, k and v are {kinds}; give three tensors")
    if not autocast_enabled(q.device):
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
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape  # an attribute of a tensor is made anew at every access
    dtype, device = q.dtype, q.device
    if len(q_shape) != 3 or len(k_shape) != 3 or len(v_shape) != 3:
        shapes = f"q {tuple(q_shape)}, k {tuple(k_shape)}, v {tuple(v_shape)}"
        raise ValueError(
            f"{shapes}: give three dimensions each, (tokens, heads, head_dim); a batch is packed into one sequence"
        )
    if dtype not in _DTYPES:
        raise TypeError(f"q is {dtype}; supported are float16, bfloat16, float32 and float64")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"q is {dtype}, k is {k.dtype}, v is {v.dtype}; give all three one dtype")
    if k.device != device or v.device != device or mask.device != device:
        raise ValueError(
            f"q is on {device}, k on {k.device}, v on {v.device}, mask on {mask.device}; put all on one device "
            f"(mask.to({str(device)!r}))"
        )
    tokens, heads, head_dim = q_shape
    k_tokens, kv_heads, k_dim = k_shape
    v_tokens, v_heads, value_dim = v_shape
    if k_tokens != tokens or v_tokens != tokens or mask.total != tokens:
        raise ValueError(
            f"q has {tokens} tokens, k {k_tokens}, v {v_tokens}, and mask is for {mask.total}; all must agree"
        )
    if v_heads != kv_heads:
        raise ValueError(f"k has {kv_heads} heads and v has {v_heads}; give both the same number")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; heads must be a positive multiple of kv_heads")
    if k_dim != head_dim:
        raise ValueError(f"q has head_dim {head_dim} and k has {k_dim}; they must agree")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head_dim is {head_dim} and value_dim is {value_dim}; both must be at least 1")
    _check_options(scale, softcap, window, deterministic)
    if sinks is not None:
        _check_sinks(sinks, q)
    return Options(
        float(head_dim) ** -0.5 if scale is None else float(scale),
        float(softcap),
        window if window is None or window < _NO_WINDOW else _NO_WINDOW,
        bool(deterministic),
    )


def _check_options(scale: float | None, softcap: float, window: int | None, deterministic: bool) -> None:
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {type(scale).__name__}; give a number, or None for head_dim ** -0.5")
    if scale is not None and not float("-inf") < scale < float("inf"):
        raise ValueError(f"scale is {scale}; give a finite number, or None for head_dim ** -0.5")
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
