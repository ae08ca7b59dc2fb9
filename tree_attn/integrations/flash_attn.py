"""``flash_attn_varlen_func`` with the tree arrays, and a patch that gives them to code written for flash-attn.

>>> from tree_attn.integrations.flash_attn import patch_flash_attn
>>> patch_flash_attn()

After these two lines ``flash_attn.flash_attn_varlen_func`` takes ``tree_dfs_order_start_q`` and
``tree_dfs_order_end_k``, and models of transformers with ``attn_implementation="flash_attention_2"`` obey the same
keywords of a model call. Calls without them go where they went before. transformers drops keywords that it does not
know before it calls flash-attn, so a patch of flash-attn alone would leave such models silently causal: the attention
function that transformers has registered is replaced too.

The function itself needs neither package: import it from here instead of from ``flash_attn``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

from torch import Tensor

from tree_attn.attention import tree_attention
from tree_attn.integrations._arrays import END_K, START_Q, mask_from_arguments, warn_untested

OLDEST, NEWEST = (2, 8), (2, 8)  # of flash-attn
_IMPLEMENTATION = "flash_attention_2"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    tree_dfs_order_start_q: Tensor | None = None,
    tree_dfs_order_end_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attn 2's function of this name, for trees; runs on any device and dtype that :func:`tree_attention` does.

    Args:
        q: ``(tokens, heads, head_dim)``.
        k, v: ``(tokens, kv_heads, head_dim)``.
        cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)`` offsets, the same for both.
        max_seqlen_q, max_seqlen_k: not needed; any value is right.
        dropout_p: 0.
        softmax_scale: factor of the scores, ``head_dim ** -0.5`` when None.
        causal: True; a tree is causal.
        window_size: ``(left, right)``: a token sees ``left`` ancestors and itself, -1 for all; ``right`` changes
            nothing, because no token sees one that follows.
        softcap: cap of the scores, 0 for none.
        alibi_slopes, block_table: None.
        deterministic: gradients are the same bits in every run.
        return_attn_probs: return ``(out, lse, None)``, lse float32 ``(heads, tokens)``.
        tree_dfs_order_start_q, tree_dfs_order_end_k: ``(tokens,)`` depth-first indices, which may restart in each
            sequence: q sees k when both are in one sequence, ``k <= q`` and ``start_q[q] <= end_k[k]``. Without them,
            plain causal attention in every sequence.

    Returns:
        ``(tokens, heads, head_dim)``, differentiable in q, k and v.

    Raises:
        NotImplementedError: an argument that asks for what a tree does not have; it is named.
        ValueError: offsets of queries and keys that differ, or arrays that are no tree.
    """
    refused = {
        "dropout_p": (dropout_p != 0.0, f"{dropout_p}; there is no dropout, give 0.0"),
        "causal": (not causal, "False; every token sees its ancestors and itself alone, give True"),
        "alibi_slopes": (alibi_slopes is not None, "given; there is no ALiBi, give None"),
        "block_table": (block_table is not None, "given; there is no paged cache, give None"),
    }
    for name, (wrong, what) in refused.items():
        if wrong:
            raise NotImplementedError(f"tree_attn's flash_attn_varlen_func: {name} is {what}")
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size is {window_size}; give numbers of tokens, or -1 for all")
    mask = mask_from_arguments(
        1,
        q.shape[0],
        q.device,
        start_q=tree_dfs_order_start_q,
        end_k=tree_dfs_order_end_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    if mask is None:
        raise ValueError("cu_seqlens_q is None; give the offsets of the sequences, (sequences + 1,)")
    out, lse = tree_attention(
        q,
        k,
        v,
        mask,
        scale=softmax_scale,
        softcap=softcap,
        window=None if left == -1 else left + 1,
        deterministic=deterministic,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


# -- the patch -------------------------------------------------------------------------------------------------------

_undo: list[tuple[str, Callable[[], Any], Callable[[Any], None], Any, Any]] = []  # what, read, write, before, patched


def patch_flash_attn() -> None:
    """Teach flash-attn and transformers' ``flash_attention_2`` the tree arrays. Call it before other modules do
    ``from flash_attn import flash_attn_varlen_func``. Idempotent; :func:`unpatch_flash_attn` undoes it.

    Raises:
        ImportError: flash-attn is not installed.

    Warns:
        UserWarning: flash-attn or transformers is a version this was not tested with.
    """
    if _undo:
        return
    package = _flash_attn()
    warn_untested("flash_attn", getattr(package, "__version__", "unknown"), OLDEST, NEWEST)
    name = "flash_attn_varlen_func"
    patched = _function(getattr(package, name))
    for module in (package, sys.modules.get("flash_attn.flash_attn_interface")):
        if module is not None and hasattr(module, name):
            _replace(
                f"{module.__name__}.{name}",
                functools.partial(getattr, module, name),
                functools.partial(setattr, module, name),
                patched,
            )
    if importlib.util.find_spec("transformers") is not None:
        _patch_transformers()


patch_FA_tree_attn = patch_flash_attn  # noqa: N816  the name it has elsewhere


def unpatch_flash_attn() -> None:
    """Undo :func:`patch_flash_attn`; does nothing without one.

    Warns:
        UserWarning: somebody else has replaced a function in the meantime; theirs stays.
    """
    while _undo:
        what, read, write, before, patched = _undo.pop()
        if read() is patched:
            write(before)
        else:
            warnings.warn(f"{what} was replaced after patch_flash_attn(), and stays as it is", stacklevel=2)


def _flash_attn() -> ModuleType:
    found = importlib.util.find_spec("flash_attn") is not None
    package = importlib.import_module("flash_attn") if found else None
    if package is None or not hasattr(package, "flash_attn_varlen_func"):
        raise ImportError(
            "flash-attn 2 is not installed, so there is nothing to patch, and transformers refuses models with "
            'attn_implementation="flash_attention_2". Use tree_attn.integrations.transformers.register() and '
            'attn_implementation="tree_attn", or import flash_attn_varlen_func from tree_attn.integrations.flash_attn'
        )
    return package


def _replace(what: str, read: Callable[[], Any], write: Callable[[Any], None], patched: Any) -> None:
    _undo.append((what, read, write, read(), patched))
    write(patched)


def _function(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with two more keywords, in its signature too: transformers reads that."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        tree = {name: kwargs.pop(name) for name in (START_Q, END_K) if name in kwargs}
        if all(array is None for array in tree.values()):
            return original(*args, **kwargs)
        return flash_attn_varlen_func(**signature.bind(*args, **kwargs).arguments, **tree)

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (START_Q, END_K)]
    parameters = list(signature.parameters.values())
    rest = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    patched.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:rest], *more, *parameters[rest:]]
    )
    return patched


def _patch_transformers() -> None:
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from tree_attn.integrations import transformers as integration

    warn_untested("transformers", transformers.__version__, integration.OLDEST, integration.NEWEST)
    # One mapping for all models; the other holds what somebody has put over it.
    for mapping in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping):
        if _IMPLEMENTATION in mapping:
            _replace(
                f"the attention function {_IMPLEMENTATION!r} of transformers",
                functools.partial(mapping.get, _IMPLEMENTATION),
                functools.partial(_set, mapping, _IMPLEMENTATION),
                _attention_function(mapping[_IMPLEMENTATION], integration.flash_attention_forward),
            )


def _set(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    mapping[key] = value


def _attention_function(original: Callable[..., Any], for_trees: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        tree = any(kwargs.get(name) is not None for name in ("tree_mask", START_Q, END_K))
        return (for_trees if tree else original)(*args, **kwargs)

    return patched
