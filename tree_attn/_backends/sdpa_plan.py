"""What a plan of the ``sdpa`` backend is made of, and where plans are kept.

A plan is a list of blocks in row order. It is made on the host with one synchronisation and kept for as long as the
mask lives: every layer, forward and backward, uses the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tree_attn.mask import RowRanges


@dataclass(frozen=True)
class Block:
    """Rows ``[begin, end)`` and the keys they take."""

    begin: int
    end: int
    keys: slice | Tensor  # positions of the keys: a slice where they lie together, else int32 (n_keys,)
    n_keys: int

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)

    def take(self, x: Tensor) -> Tensor:
        """The block's keys of ``(keys, kv_heads, dim)``."""
        return x[self.keys] if isinstance(self.keys, slice) else x.index_select(0, self.keys)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add what belongs to the block's keys to ``total (keys, kv_heads, dim)``."""
        if isinstance(self.keys, slice):
            total[self.keys] += part
        else:
            total.index_add_(0, self.keys, part)


Plan = TypeVar("Plan", bound=Sequence[Block] | None)

_kept = WeakTensorKeyDictionary()  # row_end -> [(what the plan was made for, the other tensors, plan), ...]
_KEPT_PER_MASK = 4


def keep(mask: RowRanges, made_for: Hashable, make: Callable[[], Plan]) -> Plan:
    """The plan of a mask: kept from an earlier call, or made.

    Raises:
        RuntimeError: while a CUDA graph is captured, because a replay would not look at the mask again.
    """
    if mask.row_end.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the sdpa backend reads the mask on the host, so a CUDA graph would replay the tree it was captured with; "
            "choose another backend for CUDA graphs"
        )
    others = (mask.row_begin, mask.q_depth, mask.k_depth)
    made_for = (made_for, *(_version(t) for t in (mask.row_end, *others)))
    kept = _kept.setdefault(mask.row_end, [])
    for known_for, known_others, plan in kept:
        if known_for == made_for and all(a is b for a, b in zip(known_others, others, strict=True)):
            return plan
    plan = make()
    kept.append((made_for, others, plan))
    del kept[:-_KEPT_PER_MASK]
    return plan


def _version(tensor: Tensor | None) -> int:
    """Changes when the tensor is written to; inference tensors do not count their writes."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def to_device(lists: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, without waiting for what the device has still to do."""
    if device.type == "cuda" and len(lists):
        lists = lists.pin_memory()
    return lists.to(device, non_blocking=True)
