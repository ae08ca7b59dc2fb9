"""The tree arguments of a model or kernel call, and the mask they mean, derived once however many layers ask."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tree_attn.mask import TreeMask

T = TypeVar("T")

START_Q, END_K = "tree_dfs_order_start_q", "tree_dfs_order_end_k"

# -- once a step, not once a layer -----------------------------------------------------------------------------------

_kept = WeakTensorKeyDictionary()  # first tensor -> [(kind, versions, weak references to the others, result), ...]
_KEPT_PER_TENSOR = 8


def once(kind: Hashable, tensors: tuple[Tensor | None, ...], build: Callable[[], T]) -> T:
    """``build()``, or what it gave for the same tensors before; forgotten when the first of them dies or changes.

    Every layer of a model gets the same tensors, so all of them, and the recomputation of activation checkpointing,
    share one result. Traced code builds anew: a compiler merges equal computations by itself.
    """
    if torch.compiler.is_compiling():
        return build()
    key, *others = tensors
    assert key is not None
    versions = tuple(_version(t) for t in tensors)
    entries = _kept.setdefault(key, [])
    for known_kind, known_versions, known_others, result in entries:
        if known_kind == kind and known_versions == versions:
            alive = (None if ref is None else ref() for ref in known_others)
            # A reference to a dead tensor is None too, and then never equals the tensor that is asked for.
            if all(a is b for a, b in zip(alive, others, strict=True)):
                return result
    # Results outlive this call, so they must be plain tensors also when the call runs in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        result = build()
    entries.append((kind, versions, tuple(None if t is None else weakref.ref(t) for t in others), result))
    del entries[:-_KEPT_PER_TENSOR]
    return result


def _version(tensor: Tensor | None) -> int:
    """Changes when the tensor is written to; inference tensors do not count their writes."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


# -- from arguments to a mask ----------------------------------------------------------------------------------------


def mask_from_arguments(
    rows: int,
    tokens: int,
    device: torch.device,
    *,
    tree_mask: TreeMask | None = None,
    start_q: Tensor | None = None,
    end_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> TreeMask | None:
    """The mask over ``rows * tokens`` tokens that the arguments say, or None when there are none.

    Args:
        rows, tokens: shape of the batch; a batch of several rows is read row after row.
        device: where the mask is needed.
        tree_mask: a mask over all of them.
        start_q, end_k: depth-first indices, integers of shape ``(rows, tokens)`` or flat.
        cu_seqlens_q, cu_seqlens_k: offsets of packed sequences in the flattened batch; alone, plain causal packing.

    Raises:
        TypeError: ``tree_mask`` is no :class:`TreeMask`.
        ValueError: half of a pair, two ways of saying a mask at once, other numbers of tokens, or no tree.
    """
    total = rows * tokens
    if tree_mask is not None:
        if not isinstance(tree_mask, TreeMask):
            raise TypeError(f"tree_mask is {type(tree_mask).__name__}; give a tree_attn.TreeMask")
        if start_q is not None or end_k is not None:
            raise ValueError(f"both tree_mask and {START_Q} / {END_K} are given; give one of them")
        if tree_mask.total != total:
            raise ValueError(f"tree_mask is for {tree_mask.total} tokens and the batch has {rows} x {tokens}")
        return tree_mask if tree_mask.device == device else tree_mask.to(device)
    if (start_q is None) != (end_k is None):
        given, missing = (START_Q, END_K) if end_k is None else (END_K, START_Q)
        raise ValueError(f"{given} is given without {missing}; a tree needs both")
    if cu_seqlens_k is not None and cu_seqlens_q is None:
        raise ValueError("the offsets of the keys (cu_seqlens_k) are given without those of the queries; give both")
    if start_q is None or end_k is None:
        if cu_seqlens_q is None:
            return None
        return once(
            ("packed", total, device),
            (cu_seqlens_q, cu_seqlens_k),
            lambda: _packed(total, _same_offsets(cu_seqlens_q, cu_seqlens_k), device),
        )

    for name, indices in ((START_Q, start_q), (END_K, end_k)):
        if not isinstance(indices, Tensor):
            raise TypeError(f"{name} is {type(indices).__name__}; give a tensor of integers, one for each token")

    def build() -> TreeMask:
        start, end = _flat(START_Q, start_q, rows, tokens), _flat(END_K, end_k, rows, tokens)
        offsets = _same_offsets(cu_seqlens_q, cu_seqlens_k)
        if offsets is None and rows > 1:
            offsets = torch.arange(0, total + 1, tokens, device=start.device)
        mask = TreeMask.from_dfs(start, end, offsets, validate=not torch.compiler.is_compiling())
        return mask if mask.device == device else mask.to(device)

    return once(("dfs", rows, tokens, device), (start_q, end_k, cu_seqlens_q, cu_seqlens_k), build)


def mask_from_keywords(rows: int, tokens: int, device: torch.device, keywords: Mapping[str, Any]) -> TreeMask | None:
    """:func:`mask_from_arguments` of the keywords that transformers hands from the model call to every layer."""
    return mask_from_arguments(
        rows,
        tokens,
        device,
        tree_mask=keywords.get("tree_mask"),
        start_q=keywords.get(START_Q),
        end_k=keywords.get(END_K),
        cu_seqlens_q=keywords.get("cu_seq_lens_q"),
        cu_seqlens_k=keywords.get("cu_seq_lens_k"),
    )


def _flat(name: str, indices: Tensor, rows: int, tokens: int) -> Tensor:
    if indices.numel() != rows * tokens:
        raise ValueError(f"{name} has shape {tuple(indices.shape)} and the batch has {rows} x {tokens} tokens")
    return indices.flatten()


def _same_offsets(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor | None:
    """The offsets, once it is sure that queries and keys share them."""
    if cu_seqlens_q is None or cu_seqlens_k is None or cu_seqlens_q is cu_seqlens_k:
        return cu_seqlens_q
    if not torch.compiler.is_compiling() and not torch.equal(cu_seqlens_q, cu_seqlens_k.to(cu_seqlens_q.device)):
        raise ValueError(
            "the offsets of queries and keys (cu_seqlens_q, cu_seqlens_k) differ; tree attention is over the tokens of "
            "one pass, so give the same offsets twice"
        )
    return cu_seqlens_q


def _packed(total: int, cu_seqlens: Tensor | None, device: torch.device) -> TreeMask:
    node = torch.zeros(total, dtype=torch.int32, device=device)  # one node a sequence
    assert cu_seqlens is not None
    return TreeMask.from_dfs(node, node, cu_seqlens.to(device), validate=not torch.compiler.is_compiling())


def mask_from_padding(visible: Tensor) -> TreeMask:
    """Plain causal attention in every row of bool ``visible (rows, tokens)``; tokens that are False are seen by none
    but themselves."""
    rows, tokens = visible.shape
    index = torch.arange(rows * tokens, device=visible.device)
    row_end = (index // max(tokens, 1) + 1) * tokens
    subtree_end = torch.where(visible.flatten(), row_end, index + 1)
    return TreeMask._from_subtree_end(subtree_end.to(torch.int32))


def mask_from_segments(segment: Tensor) -> TreeMask:
    """Plain causal attention inside every run of equal ``segment (rows, tokens)``, integers that never decrease along a
    row."""
    rows, tokens = segment.shape
    first = segment.new_ones(rows, tokens, dtype=torch.bool)
    first[:, 1:] = segment[:, 1:] != segment[:, :-1]
    run = first.flatten().cumsum(0)
    subtree_end = torch.searchsorted(run, run, right=True, out_int32=True)
    return TreeMask._from_subtree_end(subtree_end)


# -- versions --------------------------------------------------------------------------------------------------------


def warn_untested(package: str, version: str, oldest: tuple[int, int], newest: tuple[int, int]) -> None:
    """Warn when ``version`` is not within ``oldest`` to ``newest``, (major, minor) each."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not oldest <= found <= newest:
        low, high = (".".join(map(str, v)) for v in (oldest, newest))
        warnings.warn(
            f"tree_attn is tested with {package} {low} to {high}; found {version}. "
            "Check the numbers of one step before you train.",
            stacklevel=3,
        )
