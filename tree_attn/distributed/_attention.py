"""``tree_attention_cp`` and ``explain_cp``: the checks, the agreement of the ranks, and the choice of the mode."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tree_attn import registry
from tree_attn._operator import make_request
from tree_attn.attention import _autocast, _check
from tree_attn.distributed._agree import agree, mask_checksum, require_tokens
from tree_attn.distributed._cost import CostModel, Explanation, Shapes
from tree_attn.distributed._cost import explain as estimate
from tree_attn.distributed._plan import ring_plan
from tree_attn.distributed._ring import ring_attention, ring_backend
from tree_attn.distributed._tokens import group_of
from tree_attn.distributed._ulysses import split_heads, ulysses_attention
from tree_attn.mask import TreeMask
from tree_attn.registry import Backend, Options

Mode = Literal["auto", "ring", "ulysses"]
MODES = ("auto", "ring", "ulysses")


@torch.compiler.disable
def tree_attention_cp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    mesh: DeviceMesh,
    *,
    mode: Mode = "auto",
    scale: float | None = None,
    softcap: float = 0,
    window: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    cost: CostModel | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`tree_attn.tree_attention` with the tokens split over the ranks of ``mesh``, differentiable.

    Rank r of n holds the rows ``mask.shard(n)[r]`` of q, k, v and of the result (``scatter_tokens`` takes them). Every
    rank makes the same call, and runs the backward pass if any does.

    Args:
        q, k, v: this rank's tokens, ``(tokens, heads, head_dim)``, ``(tokens, kv_heads, head_dim)``,
            ``(tokens, kv_heads, value_dim)``; a rank may have none.
        mask: the whole mask, the same on every rank.
        mesh: one dimension of a DeviceMesh.
        mode: ``ring``: keys travel to the ranks that see them, and no rank ever holds all of them. ``ulysses``: an
            all-to-all gives each rank all tokens of some heads; with fewer heads than ranks, some ranks idle.
            ``auto``: the faster by a model of the machine, see :func:`explain_cp`.
        scale, softcap, window, deterministic, return_lse: as in ``tree_attention``.
        sinks: ``(heads,)``, the same on every rank. Its gradient is this rank's part: sum it over the ranks, as the
            gradient of any parameter that they share.
        backend: force a backend by name. ``ring`` runs those with gradients part by part: not ``flex``.
        cost: the machine that ``auto`` reckons with.
        validate: let the ranks compare mask, shapes and options first, in one small all-gather that a GPU waits for.
            Without it a disagreement ends in an error of the process group, or its timeout.

    Returns:
        ``out (tokens, heads, value_dim)`` of this rank, and with ``return_lse`` also ``lse (heads, tokens)``.

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``tree_attention``; tokens that are not this rank's; an unknown
            mode.
        ValueError: ranks that disagree, on every rank, with what differs.
        RuntimeError: another rank failed (what and why is said), or torch.distributed lost one.

    Example:
        >>> mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("cp",))
        >>> q, k, v = (scatter_tokens(x, mask, mesh) for x in (q, k, v))
        >>> out = tree_attention_cp(q, k, v, mask, mesh)
    """
    group = group_of(mesh)
    device = q.device if isinstance(q, Tensor) else torch.device(mesh.device_type)
    call, error = None, None
    try:
        q, k, v = _autocast(q, k, v)
        options = _check_local(q, k, v, mask, group, (scale, softcap, window, sinks, deterministic))
        chosen = _mode(q, k, v, mask, group.size(), mode, cost)
        ring = _backend(q, k, v, mask, sinks, options, chosen, backend, group)
        call = options, chosen, ring
    except (TypeError, ValueError, RuntimeError) as failure:  # told to the other ranks, then raised
        if not validate:
            raise
        error = failure
    if validate:
        facts = None if call is None else _facts(q, k, v, mask, sinks, call[0], call[1], return_lse)
        agree(group, device, facts, error)
    options, chosen, ring = cast("tuple[Options, str, Backend]", call)
    if chosen == "ring":
        plan = ring_plan(mask, group.size(), group.rank(), options.window)
        out, lse = ring_attention(q, k, v, sinks, plan, options, ring, group)
        return (out, lse) if return_lse else out
    return ulysses_attention(q, k, v, sinks, mask, options, backend, group, return_lse)


def explain_cp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    mesh: DeviceMesh,
    *,
    mode: Mode = "auto",
    cost: CostModel | None = None,
    **options: Any,
) -> Explanation:
    """Which mode :func:`tree_attention_cp` would run for these arguments, and what the model says of both.

    No communication. Every other option of the call is accepted; none changes the choice.

    Raises:
        TypeError, ValueError: as ``tree_attention_cp`` on this rank.

    Example:
        >>> print(explain_cp(q, k, v, mask, mesh, cost=CostModel(tflops=400, bandwidth=100)))
    """
    group = group_of(mesh)
    names = ("scale", "softcap", "window", "sinks", "deterministic")
    unknown = set(options) - {*names, "return_lse", "backend", "validate"}
    if unknown:
        raise TypeError(f"explain_cp got {', '.join(sorted(unknown))}; it takes the options of tree_attention_cp")
    defaults = (None, 0, None, None, False)
    given = tuple(options.get(name, default) for name, default in zip(names, defaults, strict=True))
    q, k, v = _autocast(q, k, v)
    _check_local(q, k, v, mask, group, given)
    _check_mode(mode)
    return estimate(mask, group.size(), _shapes(q, k, v), mode, cost or CostModel())


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> Shapes:
    return Shapes(q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.element_size())


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; give one of {', '.join(MODES)}")


def _mode(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, world_size: int, mode: str, cost: CostModel | None) -> str:
    _check_mode(mode)
    return estimate(mask, world_size, _shapes(q, k, v), mode, cost or CostModel()).chosen if mode == "auto" else mode


def _check_local(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, group: dist.ProcessGroup, rest: tuple[Any, ...]
) -> Options:
    """The options, or the error that ``tree_attention`` gives for the same arguments, or for tokens of other ranks."""
    if isinstance(mask, TreeMask):
        for name, x in (("q", q), ("k", k), ("v", v)):
            require_tokens(name, x, mask, group.rank(), group.size())
    # The checks are about whole tensors: show them as many tokens as the mask has, without memory behind.
    total = mask.total if isinstance(mask, TreeMask) else 0
    wq, wk, wv = (x.new_empty(1, *x.shape[1:]).expand(total, *x.shape[1:]) if x.dim() else x for x in (q, k, v))
    return _check(wq, wk, wv, mask, *rest)


def _backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    sinks: Tensor | None,
    options: Options,
    mode: str,
    backend: str | None,
    group: dist.ProcessGroup,
) -> Backend | None:
    """What runs the parts of ``ring``; for ``ulysses`` the choice is the operator's, and only its error is wanted."""
    forced = registry.forced(backend)
    request = make_request(q, k, v, sinks, mask.ranges(), options)
    if mode == "ring":
        candidates = registry.backends() if forced is None else (registry._named(forced),)
        return ring_backend(candidates, request._replace(sinks=False, rectangular=True), forced)
    mine = split_heads(q.shape[1], k.shape[1], group.size())[group.rank()]
    if mine.end > mine.begin:
        registry.select(request._replace(heads=mine.end - mine.begin, kv_heads=mine.kv_run), forced)
    return None


def _facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    sinks: Tensor | None,
    options: Options,
    mode: str,
    return_lse: bool,
) -> dict[str, object]:
    """What every rank must have the same of."""
    needs = [name for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks)) if x is not None and x.requires_grad]
    return {
        "the mask's number of tokens": mask.total,
        "the mask's checksum": hex(mask_checksum(mask) % 2**64),
        "q's shape": f"(..., {q.shape[1]}, {q.shape[2]})",
        "k's shape": f"(..., {k.shape[1]}, {k.shape[2]})",
        "v's shape": f"(..., {v.shape[1]}, {v.shape[2]})",
        "dtype": str(q.dtype),
        "mode": mode,
        "scale": options.scale,
        "softcap": options.softcap,
        "window": options.window,
        "sinks": "given" if sinks is not None else "not given",
        "return_lse": bool(return_lse),
        "what needs a gradient": ", ".join(needs) if needs and torch.is_grad_enabled() else "nothing",
    }
