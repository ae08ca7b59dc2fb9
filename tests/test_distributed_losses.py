"""Losses and log-probabilities from split logits are those of the whole batch, and so are their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed_ranks import Ranks, losses_of

from tree_attn import pack

# Branches at several depths, a sequence that is another one's beginning, single tokens and a tree of its own.
SEQUENCES = [
    [1, 2, 3, 4, 5, 6, 7, 8],
    [1, 2, 3, 4, 9, 9, 9],
    [1, 2, 3, 4, 5, 7],
    [1, 2, 3],
    [6],
    [6, 1, 2],
    [4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
]
VOCAB = 10
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("branch", ["gather", "fork"])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1], [[3, 4]]], ids=["many", "one", "two tokens"])
def test_same_as_the_whole_batch(ranks: Ranks, sequences: list[list[int]], branch: str, dtype: torch.dtype) -> None:
    batch = pack(sequences, branch=branch)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch.num_tokens, VOCAB, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    whole = batch.log_probs(logits)
    (grad,) = torch.autograd.grad(sum((x * (i + 1)).square().sum() for i, x in enumerate(whole)), logits)
    loss = batch.loss(logits)
    (grad_loss,) = torch.autograd.grad(loss, logits)

    answers = ranks.run(losses_of, sequences, branch, logits.detach())
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert [x.dtype for x in answer["log_probs"]] == [dtype] * len(sequences)
        for got, expected in zip(answer["log_probs"], whole, strict=True):
            torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(sum(answer["loss"] for answer in answers), loss.detach(), **close)
    for where, answer in zip(batch.mask.shard(len(answers)), answers, strict=True):
        torch.testing.assert_close(answer["grad_alike"], grad[where], **close)
        torch.testing.assert_close(answer["grad_split"], grad[where], **close)
        torch.testing.assert_close(answer["grad_loss"], grad_loss[where], **close)


def test_other_logits_are_errors(ranks: Ranks) -> None:
    batch = pack(SEQUENCES)
    for answer in ranks.run(losses_of, SEQUENCES, "gather", torch.zeros(batch.num_tokens, VOCAB, 2)):
        assert isinstance(answer, ValueError)
        assert "this rank's tokens" in str(answer)
    for answer in ranks.run(losses_of, SEQUENCES, "gather", torch.zeros(batch.num_tokens, VOCAB, dtype=torch.int64)):
        assert isinstance(answer, TypeError)
        assert "floating point" in str(answer)
