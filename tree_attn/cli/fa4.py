"""FlashAttention-4 on a tree: a mask_mod over the tree's row ranges, and torch's block lists in FA4's form.

Importing this needs the package flash-attn-4. The mask_mod is compiled by cutlass from its source, so it is a function
of this module and without annotations.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from flash_attn.cute import flash_attn_func, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


@cute.jit
def _sees(batch, head, row, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    row_end = utils.scalar_to_ssa(aux_tensors[0][key[0]], cutlass.Int32)
    return (key <= row) & (row < row_end)


def on_chain() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention, q ``(tokens, heads, dim)``, k and v ``(tokens, kv_heads, dim)``."""
    return lambda q, k, v: flash_attn_func(q[None], k[None], v[None], causal=True)[0][0]


def on_tree(subtree_end: Tensor, blocks: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention on the tree that ``blocks`` was made from; tensors as in :func:`on_chain`."""
    of_rows = _lists(blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices, blocks)
    of_keys = _lists(blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices, blocks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(
            q[None],
            k[None],
            v[None],
            mask_mod=_sees,
            aux_tensors=[subtree_end],
            block_sparse_tensors=of_rows,
            block_sparse_tensors_bwd=of_keys,
            pack_gqa=False,  # packed rows are other rows than those of the lists
        )
        return out[0][0]

    return attend


def _lists(
    counts: Tensor | None,
    indices: Tensor | None,
    full_counts: Tensor | None,
    full_indices: Tensor | None,
    blocks: BlockMask,
) -> BlockSparseTensorsTorch:
    return BlockSparseTensorsTorch(
        mask_block_cnt=counts,
        mask_block_idx=indices,
        full_block_cnt=full_counts,
        full_block_idx=full_indices,
        block_size=blocks.BLOCK_SIZE,
    )
