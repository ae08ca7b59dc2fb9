"""Losses and log-probabilities of a packed batch whose tokens, and so the logits, are split over ranks.

A token is predicted by the logits of the token before it on its path, which may be another rank's. Those logits stay
where they are: a rank takes the log-probabilities of what its own rows predict, and only these numbers travel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from tree_attn._logprobs import next_token_log_probs
from tree_attn.distributed._tokens import group_of
from tree_attn.packing import PackedBatch


def local_loss(batch: PackedBatch, logits: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of ``batch.loss``; the parts of all ranks add up to it. No communication.

    Args:
        batch: the whole batch.
        logits: ``(tokens, vocab)`` or ``(1, tokens, vocab)`` of this rank, floating point.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 on a rank that predicts no target.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: logits of another number of tokens.

    Example:
        >>> loss = local_loss(batch, model(**model_inputs(batch, mesh)).logits, mesh)
    """
    logits = _check_logits(batch, logits, mesh)
    rows, here = _local_rows(batch, batch.logit_index, mesh)
    log_probs = next_token_log_probs(logits, rows, batch.labels[here])
    return -(log_probs * batch.loss_weights[here]).sum()


def log_probs(batch: PackedBatch, logits: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """``batch.log_probs`` from each rank's logits, on every rank: the log-probabilities of each sequence's tokens.

    One all-reduce of a number a token. Differentiable: a rank's gradient is that of its own logits, summed over what
    every rank did with the result. So a loss that all ranks compute alike counts once for each rank; divide it by the
    number of ranks, or let each rank take the loss of some of the sequences. All ranks run the backward pass.

    Args:
        batch: the whole batch.
        logits: ``(tokens, vocab)`` or ``(1, tokens, vocab)`` of this rank, floating point.

    Returns:
        A list in input order; entry i is ``(lengths[i] - 1,)``, of token 1, 2, ... of sequence i, float32 (float64 for
        float64 logits).

    Raises:
        TypeError: logits that are not floating point.
        ValueError: logits of another number of tokens.

    Example:
        >>> new = log_probs(batch, logits, mesh)
        >>> loss = sum(policy_loss(x, old, a) for x, old, a in zip(new, olds, advantages)) / mesh.size()
    """
    logits = _check_logits(batch, logits, mesh)
    position, row, token = batch._edges
    rows, here = _local_rows(batch, row, mesh)
    found = next_token_log_probs(logits, rows, token[here])
    per_token = found.new_zeros(batch.num_tokens).index_copy(0, position[here], found)
    drop = slice(1, None) if batch.branch == "gather" else slice(0, -1)  # which token an edge is kept at: see _edges
    return [values[drop] for values in batch.gather(_Sum.apply(per_token, group_of(mesh)))]


def _check_logits(batch: PackedBatch, logits: Tensor, mesh: DeviceMesh) -> Tensor:
    group = group_of(mesh)
    count = len(batch.mask.shard(group.size())[group.rank()])
    rows = logits[0] if logits.dim() == 3 and logits.shape[0] == 1 else logits
    if rows.dim() != 2 or rows.shape[0] != count:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; give ({count}, vocab), this rank's tokens")
    if not rows.is_floating_point():
        raise TypeError(f"logits are {rows.dtype}; give a floating point tensor")
    return rows


def _local_rows(batch: PackedBatch, positions: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Which of the packed positions are this rank's, as rows of its logits; and their indices in ``positions``."""
    group = group_of(mesh)
    mine = batch.mask.shard(group.size())[group.rank()].to(batch.device)
    local = torch.full((batch.num_tokens,), -1, dtype=torch.int64, device=batch.device)
    local[mine] = torch.arange(len(mine), device=batch.device)
    rows = local[positions]
    here = (rows >= 0).nonzero().flatten()
    return rows[here], here


class _Sum(torch.autograd.Function):
    """The sum over ranks, on all of them; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
