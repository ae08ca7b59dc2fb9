"""Log-probabilities of single next tokens from ``(tokens, vocab)`` logits, without a second tensor of that size.

``cross_entropy(logits[rows], tokens)`` copies a row for every target and keeps its log-softmax; here the forward keeps
one number a row, and the backward writes the gradient of the logits block by block in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block of rows that are worked on in float32 at a time: 64 MiB.
BLOCK_ELEMENTS = 1 << 24


def next_token_log_probs(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """``log_softmax(logits, -1)[rows, tokens]``, differentiable once, in float32 (float64 for float64 logits).

    Args:
        logits: ``(N, vocab)``, floating point.
        rows: int64 ``(M,)``.
        tokens: int64 ``(M,)``. The pairs ``(rows[i], tokens[i])`` must differ from one another.
    """
    return _NextTokenLogProbs.apply(logits, rows, tokens)[0]


def _blocks(logits: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(begin, begin + size) for begin in range(0, logits.shape[0], size)]


class _NextTokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = logits.new_empty(logits.shape[0], dtype=wide)  # (N,)
        for block in _blocks(logits):
            torch.logsumexp(logits[block].to(wide), dim=-1, out=lse[block])
        return logits[rows, tokens].to(wide) - lse[rows], lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        log_probs, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*inputs, log_probs, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, tokens, log_probs, lse = ctx.saved_tensors
        row_grad = torch.zeros_like(lse).index_add_(0, rows, grad)  # (N,)
        result = torch.empty_like(logits)
        for block in _blocks(logits):
            probs = (logits[block].to(lse.dtype) - lse[block, None]).exp_()
            result[block] = probs.mul_(row_grad[block, None]).neg_()
        # The pairs differ, so each of their entries is written once, whole, and rounded once.
        result[rows, tokens] = (grad - log_probs.exp() * row_grad[rows]).to(logits.dtype)
        return result, None, None
