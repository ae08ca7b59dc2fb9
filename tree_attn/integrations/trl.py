"""TRL's AsyncGRPO on prefix trees, with this library's attention in place of its gather.

>>> from tree_attn.integrations.trl import accelerate_async_grpo
>>> accelerate_async_grpo()
>>> trainer = AsyncGRPOTrainer(...)  # as before

TRL packs rollouts into tries and runs the model with ``attn_implementation="tree_fa3"``: for every segment of a trie it
gathers the keys and values of the whole path and calls FlashAttention 3. Here the tree is read from the same tensors,
once a micro-batch, and attention runs on the packed keys and values as they are. Nothing else of TRL changes, and no
kernel is downloaded, so it runs on every GPU (and CPU) that this library does.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor, nn
from transformers import AttentionInterface
from trl.experimental.async_grpo import packing

from tree_attn.integrations._arrays import once, warn_untested
from tree_attn.integrations.transformers import flash_attention_forward
from tree_attn.mask import TreeMask

OLDEST, NEWEST = (1, 16), (1, 16)
_TRL_ATTENTION = packing.tree_attention


def accelerate_async_grpo() -> None:
    """Make TRL's ``tree_fa3`` this library's attention, for models made before or after. Idempotent;
    :func:`restore_async_grpo` undoes it.

    The trainer registers ``tree_fa3`` again in its constructor, with the function its module holds: that function is
    replaced, so the order of the two calls does not matter.

    Warns:
        UserWarning: TRL is a version this was not tested with.
    """
    warn_untested("trl", trl.__version__, OLDEST, NEWEST)
    packing.tree_attention = tree_attention
    packing.register_tree_attention()


def restore_async_grpo() -> None:
    """Give TRL its own attention back."""
    packing.tree_attention = _TRL_ATTENTION
    packing.register_tree_attention()


def is_accelerated() -> bool:
    """Does ``tree_fa3`` run this library's attention?"""
    return AttentionInterface._global_mapping.get(packing.TREE_ATTENTION) is tree_attention


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    tree_max_seqlen_q: int,
    tree_max_seqlen_k: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; the arguments of TRL's function of this name.

    Args:
        query: ``(1, heads, tokens, head_dim)``; key, value ``(1, kv_heads, tokens, head_dim)``.
        attention_mask: None; TRL strips padding first.
        tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k: see :func:`mask_from_trl`.
        tree_max_seqlen_q, tree_max_seqlen_k: not needed.
        kwargs: the options of :func:`tree_attn.integrations.transformers.attention_forward`; also ``s_aux``, sinks.

    Returns:
        ``(1, tokens, heads, head_dim)`` and None.
    """
    total = query.shape[2]
    mask = once(
        ("trl", total),
        (tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k),
        lambda: mask_from_trl(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, total),
    )
    return flash_attention_forward(module, query, key, value, attention_mask, tree_mask=mask, **kwargs)


def mask_from_trl(
    tree_kv_index: Tensor, tree_cu_seqlens_q: Tensor, tree_cu_seqlens_k: Tensor, total: int | None = None
) -> TreeMask:
    """The mask of a row that TRL's ``TreeRow.pack()`` made, on the device of its tensors.

    Segment s of the row holds the tokens ``[cu_q[s], cu_q[s + 1])``, and ``kv_index[cu_k[s]:cu_k[s + 1]]`` is its path:
    the packed positions from the root to its own last token. So what stands before the segment's own tokens is the last
    token of its parent.

    Args:
        tree_kv_index: ``(K,)`` the paths of all segments end to end.
        tree_cu_seqlens_q: ``(S + 1,)`` boundaries of the segments.
        tree_cu_seqlens_k: ``(S + 1,)`` boundaries of the paths.
        total: tokens of the row, to be checked.

    Raises:
        ValueError: not such a row. The checks synchronise twice on a GPU.

    Example:
        >>> row = TreeRow()
        >>> for sample in samples:
        ...     row.add(sample)
        >>> packed = row.pack()
        >>> mask = mask_from_trl(packed["tree_kv_index"], packed["tree_cu_seqlens_q"], packed["tree_cu_seqlens_k"])
    """
    offsets, paths = tree_cu_seqlens_q.long(), tree_cu_seqlens_k.long()
    if offsets.shape != paths.shape or offsets.dim() != 1 or len(offsets) < 2 or not len(tree_kv_index):
        raise ValueError(
            f"tree_cu_seqlens_q has shape {tuple(offsets.shape)}, tree_cu_seqlens_k {tuple(paths.shape)} and "
            f"tree_kv_index {tuple(tree_kv_index.shape)}; give what TreeRow.pack() returns"
        )
    lengths, path_lengths = offsets.diff(), paths.diff()
    above = path_lengths - lengths  # tokens of the path before the segment
    before = tree_kv_index[(paths[1:] - lengths - 1).clamp(0, len(tree_kv_index) - 1)]
    parent = torch.where(above > 0, torch.searchsorted(offsets, before, right=True) - 1, -1)
    mask = TreeMask.from_nodes(parent, lengths, total=total)
    # The parents say a tree; it must also have paths of the lengths that TRL says, and children that begin where their
    # parent ends.
    right = (offsets[0] == 0) & (paths[0] == 0) & (paths[-1] == len(tree_kv_index))
    right = right & (mask.depth[offsets[1:] - 1] + 1 == path_lengths).all()
    right = right & ((parent < 0) | (before + 1 == offsets[parent + 1])).all()
    if not right:
        raise ValueError(
            "tree_kv_index, tree_cu_seqlens_q and tree_cu_seqlens_k are not the paths of a trie in depth-first order "
            f"over {mask.total} tokens, as TreeRow.pack() makes them"
        )
    return mask
