"""Between whole tensors and each rank's tokens: input ids, positions and labels out, logits back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tree_attn.distributed._agree import require_tokens
from tree_attn.mask import TreeMask


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension.

    Raises:
        TypeError: not a DeviceMesh.
        ValueError: more than one dimension.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is {type(mesh).__name__}; give a DeviceMesh (torch.distributed.init_device_mesh)")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ()
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions {names}; give the one over which tokens are split, like mesh['cp']"
        )
    return mesh.get_group()


def scatter_tokens(x: Tensor, mask: TreeMask, mesh: DeviceMesh, dim: int = 0) -> Tensor:
    """This rank's tokens of ``x``, which every rank holds: ``x[mask.shard(ranks)[rank]]`` along ``dim``.

    For ``input_ids``, ``position_ids`` (``mask.depth``), weights, and labels that are aligned with the positions that
    predict them: shift labels before scattering, because the next token may be on another rank. No communication.

    Raises:
        ValueError: ``x`` does not have the mask's number of tokens along ``dim``.

    Example:
        >>> ids, positions = scatter_tokens(input_ids, mask, mesh), scatter_tokens(mask.depth, mask, mesh)
    """
    group = group_of(mesh)
    if x.dim() == 0 or x.shape[dim] != mask.total:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, and the mask has {mask.total} tokens; dimension {dim} must agree"
        )
    return x.index_select(dim, mask.shard(group.size())[group.rank()].to(x.device))


def gather_tokens(x: Tensor, mask: TreeMask, mesh: DeviceMesh, dim: int = 0) -> Tensor:
    """All tokens from each rank's share, the inverse of :func:`scatter_tokens`; every rank gets them.

    Differentiable: a rank's gradient is that of its own tokens, summed over what every rank did with them. So a loss
    that all ranks compute alike counts once for each rank; divide it by the number of ranks.

    Raises:
        ValueError: ``x`` does not have this rank's number of tokens along ``dim``.
    """
    group = group_of(mesh)
    first = x.movedim(dim, 0)
    require_tokens("x", first, mask, group.rank(), group.size())
    return _Gather.apply(first, mask, group).movedim(0, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, group):  # type: ignore[no-untyped-def]
        positions = mask.shard(group.size())
        most = max(map(len, positions))
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        everyone = [torch.empty_like(padded) for _ in positions]
        dist.all_gather(everyone, padded, group=group)
        whole = x.new_empty(mask.total, *x.shape[1:])
        for where, part in zip(positions, everyone, strict=True):
            whole[where.to(x.device)] = part[: len(where)]
        ctx.mine, ctx.group = positions[group.rank()], group
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.index_select(0, ctx.mine.to(grad.device)), None, None
