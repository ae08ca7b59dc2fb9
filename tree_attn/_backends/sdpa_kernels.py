"""The kernels of the ``sdpa`` backend: what computes a block, and which blocks it takes.

``PathKernel`` (flash attention over root paths) on NVIDIA GPUs, ``FusedKernel`` on CPUs, both on the kernels under
``scaled_dot_product_attention``; ``MatrixKernel`` (matrix products and what stands between them) for everything else.
Keys and values are never repeated in memory for the query heads of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tree_attn._backends.layout import loadable
from tree_attn._backends.sdpa_blocks import Limits, RowBlock, row_blocks
from tree_attn._backends.sdpa_paths import PathBatch, path_batches
from tree_attn._backends.sdpa_plan import Block, keep
from tree_attn.mask import RowRanges
from tree_attn.registry import Options

# Bytes that the temporaries of one block may take, and those of the matrix products on a CPU, which live in its cache.
WORKSPACE = 512 << 20
CPU_WORKSPACE = 16 << 20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernel:
    """Computes blocks of rows. Heads are taken by as many at once as fit the workspace.

    A block has ``q (rows, heads, head_dim)``, ``k (keys, kv_heads, head_dim)``, ``v (keys, kv_heads, value_dim)``,
    ``out (rows, heads, value_dim)``, ``lse (heads, rows)``; what is computed comes with ``heads`` split into
    ``kv_heads, group``.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options):
        self.scale, self.softcap, self.window = options.scale, options.softcap, options.window
        self.dtype, self.device = q.dtype, q.device
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.dims = q.shape[2] + v.shape[2]
        self.workspace = WORKSPACE

    # -- what a kernel implements

    def plan(self, mask: RowRanges, rows: int) -> Sequence[Block] | None:
        """The blocks of a mask; None if another kernel should take it."""
        raise NotImplementedError

    def _bytes_per_head(self, rows: int, keys: int) -> int:
        """Temporaries of one key/value head and its group, forward or backward, whichever takes more."""
        raise NotImplementedError

    def _masking(self, block: Any) -> Any:
        """What all heads of a block share."""
        raise NotImplementedError

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, masking: Any) -> tuple[Tensor, Tensor]:
        """``out, lse``."""
        raise NotImplementedError

    def _backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        masking: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q, k, v``, the last two in :func:`accumulator`; ``lse`` is +inf in rows that see nothing."""
        raise NotImplementedError

    # -- what the backend calls

    def forward(self, block: Block, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write ``out`` and ``lse`` of the rows of a block; k and v hold every key."""
        k, v, masking = block.take(k), block.take(v), self._masking(block)
        out, lse = out.unflatten(1, (-1, self.group)), lse.unflatten(0, (-1, self.group))
        for h, kv in self._heads(block):
            out[:, kv], lse[kv] = self._forward(q[:, h], k[:, kv], v[:, kv], masking)

    def backward(
        self,
        block: Block,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write the gradient of q of the rows of a block, and add to those of every key and value."""
        grad_q, grad_k, grad_v = grads
        grad_q = grad_q.unflatten(1, (-1, self.group))
        k, v, masking = block.take(k), block.take(v), self._masking(block)
        for h, kv in self._heads(block):
            of_lse = None if grad_lse is None else grad_lse[h]
            grad_q[:, kv], part_k, part_v = self._backward(
                grad[:, h], of_lse, q[:, h], k[:, kv], v[:, kv], out[:, h], lse[h], masking
            )
            block.add(grad_k[:, kv], part_k)
            block.add(grad_v[:, kv], part_v)

    def _heads(self, block: Block) -> Iterator[tuple[slice, slice]]:
        """Query heads and their key/value heads, by as many as fit the workspace."""
        need = self._bytes_per_head(block.end - block.begin, block.n_keys)
        at_once = max(1, min(self.kv_heads, self.workspace // need))
        for i in range(0, self.kv_heads, at_once):
            yield slice(i * self.group, (i + at_once) * self.group), slice(i, i + at_once)


# -- blocks of rows with an element mask -----------------------------------------------------------------------------

# The most rows of a block, and the time of starting one, in multiply-adds of all heads.
_CPU_BLOCKS = 1024, 2**27
_BLOCKS = 2048, 2**32


class _BlockKernel(Kernel):
    """A kernel that takes blocks of rows."""

    def _bytes_per_score(self) -> int:
        """Temporaries that grow with rows times keys, when one key/value head is taken at once."""
        raise NotImplementedError

    def plan(self, mask: RowRanges, rows: int) -> Sequence[Block]:
        most_rows, overhead = _CPU_BLOCKS if self.device.type == "cpu" else _BLOCKS
        limits = Limits(
            rows=most_rows,
            scores=self.workspace // self._bytes_per_score(),
            overhead=overhead // (self.kv_heads * self.group * self.dims),
        )
        made_for = ("blocks", rows, self.window, limits)
        return keep(mask, made_for, lambda: row_blocks(mask, rows, self.window, limits))

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """``(rows, heads, dim)`` as ``(kv_heads, group, rows, dim)``."""
        return x.unflatten(1, (-1, self.group)).permute(1, 2, 0, 3)


class MatrixKernel(_BlockKernel):
    """For every option, dtype and device. Scores are ``(kv_heads, group * rows, keys)``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options):
        super().__init__(q, k, v, options)
        self.workspace = CPU_WORKSPACE if self.device.type == "cpu" else WORKSPACE

    def _masking(self, block: RowBlock) -> Tensor:
        return block.bias(every_key=False, dtype=self.dtype)

    def _bytes_per_score(self) -> int:
        # Scores, their gradient, the slope of the soft cap, and an operand of a product.
        return self.group * 4 * accumulator(self.dtype).itemsize

    def _bytes_per_head(self, rows: int, keys: int) -> int:
        return rows * keys * self._bytes_per_score()

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, masking: Tensor) -> tuple[Tensor, Tensor]:
        scores, _ = self._scores(self._operand(self._rows(q)), self._operand(k.transpose(0, 1)), masking)
        # Finite also where a row sees nothing: its weights are then exp(-inf) = 0.
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        lse = total.log().add_(top).view(-1, self.group, masking.shape[0])
        out = _matmul(self._operand(weights), self._operand(v.transpose(0, 1)))
        return self._split(out.div_(total.clamp_(min=torch.finfo(total.dtype).tiny))), lse

    def _backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        masking: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        acc = accumulator(self.dtype)
        delta = (grad.to(acc) * out.to(acc)).sum(-1).T
        if grad_lse is not None:
            delta = delta - grad_lse
        q, grad, k, v = (
            self._operand(x) for x in (self._rows(q), self._rows(grad), k.transpose(0, 1), v.transpose(0, 1))
        )
        scores, slope = self._scores(q, k, masking, with_slope=True)
        p = scores.sub_(lse.reshape(len(k), -1, 1)).exp_()
        grad_v = _matmul(self._operand(p).mT, grad)
        grad_s = _matmul(grad, v.mT).sub_(delta.reshape(len(k), -1, 1)).mul_(p).mul_(self.scale)
        if slope is not None:
            grad_s.mul_(slope)
        grad_s = self._operand(grad_s)
        grad_q, grad_k = _matmul(grad_s, k), _matmul(grad_s.mT, q)
        return self._split(grad_q), grad_k.transpose(0, 1), grad_v.transpose(0, 1)

    def _scores(self, q: Tensor, k: Tensor, masking: Tensor, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """Masked scores, and the derivative of the soft cap if there is one."""
        scores = _matmul(q, k.mT).mul_(self.scale)
        slope = None
        if self.softcap:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores * scores if with_slope else None
            scores.mul_(self.softcap)
        rows, keys = masking.shape
        scores.unflatten(1, (-1, rows))[..., scores.shape[-1] - keys :].add_(masking)
        return scores, slope

    def _rows(self, x: Tensor) -> Tensor:
        """``(rows, heads, dim)`` as ``(kv_heads, group * rows, dim)``."""
        return self._by_kv_head(x).flatten(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        """``(kv_heads, group * rows, dim)`` as ``(rows, kv_heads, group, dim)``."""
        return x.unflatten(1, (self.group, -1)).permute(2, 0, 1, 3)

    def _operand(self, x: Tensor) -> Tensor:
        """What a matrix product takes: half precision as it is where tensor cores add up in float32."""
        tensor_cores = self.device.type == "cuda" and torch.version.hip is None
        return x.to(self.dtype if tensor_cores else accumulator(self.dtype))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.bmm(a, b)


class FusedKernel(_BlockKernel):
    """The kernel under ``scaled_dot_product_attention`` on CPUs: scores stay in the cache."""

    def _masking(self, block: RowBlock) -> tuple[Tensor, Tensor | None]:
        """The bias, and which rows see nothing if some may: the kernel's ``lse`` does not tell."""
        bias = block.bias(every_key=True, dtype=self.dtype)
        return bias, (bias == float("-inf")).all(1) if block.blind else None

    def _bytes_per_score(self) -> int:
        return 2 * self.dtype.itemsize  # the bias, and comparisons on the way to it

    def _bytes_per_head(self, rows: int, keys: int) -> int:
        # Gradients of keys and values, for every query head and for their sum.
        return keys * self.dims * (self.group * self.dtype.itemsize + accumulator(self.dtype).itemsize)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, masking: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        bias, blind = masking
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self._by_kv_head(q), self._for_group(k), self._for_group(v), attn_mask=bias, scale=self.scale
        )
        if blind is not None:
            lse = lse.masked_fill(blind, float("-inf"))
        return out.permute(2, 0, 1, 3), lse

    def _backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        masking: tuple[Tensor, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            self._by_kv_head(grad),
            self._by_kv_head(q),
            self._for_group(k),
            self._for_group(v),
            self._by_kv_head(out),
            lse.unflatten(0, (-1, self.group)),
            0.0,
            False,
            attn_mask=masking[0],
            scale=self.scale,
        )
        acc = accumulator(self.dtype)
        per_key = (x.sum(1, dtype=acc).transpose(0, 1) for x in (grad_k, grad_v))
        return grad_q.permute(2, 0, 1, 3), *per_key

    def _by_kv_head(self, x: Tensor) -> Tensor:
        return super()._by_kv_head(_last_contiguous(x))

    def _for_group(self, x: Tensor) -> Tensor:
        """``(keys, kv_heads, dim)`` as ``(kv_heads, group, keys, dim)``, the group by a stride of zero."""
        return _last_contiguous(x).transpose(0, 1)[:, None].expand(-1, self.group, -1, -1)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


# -- root paths ------------------------------------------------------------------------------------------------------


class PathKernel(Kernel):
    """The flash kernel under ``scaled_dot_product_attention`` on NVIDIA GPUs, over the root paths of a batch."""

    def plan(self, mask: RowRanges, rows: int) -> Sequence[Block] | None:
        if mask.row_begin is not None or self.scale <= 0:  # the kernel scales after its maximum
            return None
        sizes = self._bytes_per_row(), self._bytes_per_key(), self.workspace // self.kv_heads
        return keep(mask, ("paths", self.window, sizes), lambda: path_batches(mask, self.window, *sizes))

    def _bytes_per_head(self, rows: int, keys: int) -> int:
        return rows * self._bytes_per_row() + keys * self._bytes_per_key()

    def _bytes_per_row(self) -> int:
        # Gradients of the rows, added up in float32.
        return self.group * self.dims // 2 * (4 + self.dtype.itemsize)

    def _bytes_per_key(self) -> int:
        # Keys and values gathered; their gradients for every query head, for their sum, and that in float32.
        return self.dims * ((2 + self.group) * self.dtype.itemsize + 4)

    def _masking(self, block: PathBatch) -> PathBatch:
        return block

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, masking: PathBatch) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *map(loadable, (q, k, v)), *self._shape(masking), 0.0, True, False, **self._options()
        )
        return out.unflatten(1, (-1, self.group)), lse.unflatten(0, (-1, self.group))

    def _backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        masking: PathBatch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            *map(loadable, (grad, q, k, v, out)), lse.contiguous(), *self._shape(masking), 0.0, True, seed, seed,
            **self._options(),
        )  # fmt: skip
        return grad_q.unflatten(1, (-1, self.group)), grad_k.float(), grad_v.float()

    def _shape(self, batch: PathBatch) -> tuple[Tensor, Tensor, int, int]:
        return batch.offsets_q, batch.offsets_k, batch.longest_q, batch.longest_k

    def _options(self) -> dict[str, Any]:
        # Along a path the distance in tokens is the difference in depth.
        return {"scale": self.scale, "window_size_left": None if self.window is None else self.window - 1}


# -- choosing --------------------------------------------------------------------------------------------------------


def prepare(
    q: Tensor, k: Tensor, v: Tensor, mask: RowRanges, options: Options, grad_lse: Tensor | None = None
) -> tuple[Kernel, Sequence[Block]]:
    """The kernel of one call, and its blocks."""
    dims, softcap = (q.shape[2], v.shape[2]), bool(options.softcap)
    fused = fused_kernel(q.device, q.dtype, *dims, softcap, options.deterministic)
    if fused is not None and grad_lse is None:  # the fused kernels take no gradient of lse
        kernel = fused(q, k, v, options)
        plan = kernel.plan(mask, q.shape[0])
        if plan is not None:
            return kernel, plan
    matrix = MatrixKernel(q, k, v, options)
    return matrix, matrix.plan(mask, q.shape[0])


def fused_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, softcap: bool, deterministic: bool
) -> type[Kernel] | None:
    """Which of torch's kernels serves, if one does."""
    if softcap or head_dim != value_dim:
        return None
    if device.type == "cpu":
        return FusedKernel
    flash = (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype.itemsize == 2
        and head_dim % 8 == 0
        and head_dim <= 192  # not every GPU has the backward beyond
        and not deterministic
    )
    return PathKernel if flash else None
