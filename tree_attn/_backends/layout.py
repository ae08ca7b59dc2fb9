"""The layout that kernels load 16-bit tensors in."""

from __future__ import annotations

import torch
from torch import Tensor


def loadable(x: Tensor) -> Tensor:
    """``x (tokens, heads, dim)``, float16 or bfloat16, itself, or a contiguous copy when its rows are not runs of
    memory that begin at multiples of 16 bytes, or repeat each other (strides of 0, which the copy engine of Hopper
    does not take)."""
    token, head, last = x.stride()
    if last == 1 and token and head and not token % 8 and not head % 8 and not x.data_ptr() % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)
