"""Training on a packed batch equals training on the sequences run alone: labels, weights, loss and log-probabilities.

A small causal model in float64, tree against each sequence by itself.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_trie import BRANCHES, bounded, masked_sequences, sequences, trie
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tree_attn import TreeMask, tree_attention
from tree_attn._logprobs import next_token_log_probs
from tree_attn.packing import PackedBatch, pack

VOCAB = 5


# -- labels and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(case=masked_sequences())
def test_each_supervised_pair_of_position_and_next_token_occurs_once_with_its_count(branch, case):
    seqs, masks = case
    batch = pack(seqs, loss_mask=masks, branch=branch)
    expected: dict[tuple[int, int], int] = {}
    index = trie(seqs, branch)[3]
    for tokens, mask, positions in zip(seqs, masks, index, strict=True):
        for t in range(1, len(tokens)):
            if mask[t]:
                edge = (positions[t - 1], tokens[t])
                expected[edge] = expected.get(edge, 0) + 1
    edges = list(zip(batch.logit_index.tolist(), batch.labels.tolist(), strict=True))
    assert len(set(edges)) == len(edges)
    assert dict(zip(edges, batch.loss_weights.tolist(), strict=True)) == expected
    if branch == "fork":
        assert len(set(batch.logit_index.tolist())) == len(edges)  # one label at every position


def test_the_first_token_of_every_branch_is_supervised():
    batch = pack([[1, 2], [1, 3], [1, 4]])
    assert batch.logit_index.tolist() == [0, 0, 0]
    assert batch.labels.tolist() == [2, 3, 4]


def test_labels_of_minus_100_are_a_loss_mask():
    seqs = [[1, 2, 3], [1, 2, 4]]
    by_labels = pack(seqs, labels=[[-100, 2, 3], [-100, -100, 4]])
    by_mask = pack(seqs, loss_mask=[[1, 1, 1], [0, 0, 1]])
    for field in ("logit_index", "labels", "loss_weights"):
        assert torch.equal(getattr(by_labels, field), getattr(by_mask, field))
    assert by_labels.loss_weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_first_token_of_a_sequence_is_never_a_target(branch):
    batch = pack([[1, 2], [1, 2, 3], [3, 1]], loss_mask=[[1, 0], [1, 0, 0], [1, 0]], branch=branch)
    assert batch.logit_index.tolist() == []


def test_labels_and_loss_mask_together_need_both():
    batch = pack([[1, 2, 3]], labels=[[1, 2, -100]], loss_mask=[[True, False, True]])
    assert batch.logit_index.numel() == 0


def test_fork_gives_one_label_for_each_position():
    batch = pack([[1, 2, 3], [1, 2, 4]], loss_mask=[[0, 0, 1], [0, 1, 1]], branch="fork")
    labels, weights = batch.token_labels()
    assert batch.input_ids.tolist() == [1, 2, 3, 2, 4]
    assert labels.tolist() == [2, 3, -100, 4, -100]
    assert weights.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match='branch="fork"'):
        pack([[1, 2, 3], [1, 2, 4]]).token_labels()


# -- training equals the sequences run alone ---------------------------------------------------------------------------


class TinyModel(nn.Module):
    """Embedding of token and depth, one layer of grouped-query tree attention, head. Float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.depth = nn.Embedding(VOCAB, 8), nn.Embedding(16, 8)
        self.qkv, self.head = nn.Linear(8, 16), nn.Linear(8, VOCAB)
        self.double()

    def forward(self, ids: Tensor, position_ids: Tensor, mask: TreeMask) -> Tensor:
        x = self.token(ids) + self.depth(position_ids)
        q, k, v = self.qkv(x).split([8, 4, 4], dim=-1)
        out = tree_attention(q.unflatten(1, (2, 4)), k.unflatten(1, (1, 4)), v.unflatten(1, (1, 4)), mask)
        return self.head(x + out.flatten(1))

    def alone(self, tokens: list[int]) -> Tensor:
        """(len, vocab) logits of one sequence by itself."""
        mask = TreeMask.from_nodes([-1], [len(tokens)])
        return self(torch.tensor(tokens), torch.arange(len(tokens)), mask)

    def packed(self, batch: PackedBatch) -> Tensor:
        return self(batch.input_ids, batch.position_ids, batch.mask)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(loss, list(self.parameters()), materialize_grads=True)
        return list(grads)


def assert_same_training(model: TinyModel, packed: Tensor, alone: Tensor) -> None:
    # Float64 sums of at most a few hundred terms in another order: about 1e-14 relative.
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(packed, alone, **close)
    for a, b in zip(model.gradients(packed), model.gradients(alone), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("branch", BRANCHES)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(case=masked_sequences(), data=st.data())
def test_supervised_gradients_equal_the_sum_over_sequences_run_alone(branch, case, data):
    seqs, masks = case
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0, -1.0]), min_size=len(seqs), max_size=len(seqs)))
    model = TinyModel()
    batch = pack(seqs, loss_mask=masks, sequence_weights=weights, branch=branch)
    alone = torch.zeros((), dtype=torch.float64) + 0 * model.head.bias.sum()
    for tokens, mask, weight in zip(seqs, masks, weights, strict=True):
        losses = cross_entropy(model.alone(tokens)[:-1], torch.tensor(tokens[1:], dtype=torch.int64), reduction="none")
        alone = alone + weight * (losses * torch.tensor(mask[1:])).sum()
    logits = model.packed(batch)
    assert_same_training(model, batch.loss(logits), alone)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_with_duplicates_and_prefixes_of_others_equal_those_run_alone(branch):
    seqs = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4], [1, 2, 0, 4], [3], [2, 2, 2], [1, 2]]
    model = TinyModel()
    batch = pack(seqs, branch=branch)
    alone = sum(
        cross_entropy(model.alone(s)[:-1], torch.tensor(s[1:], dtype=torch.int64), reduction="sum") for s in seqs
    )
    assert_same_training(model, batch.loss(model.packed(batch)), alone)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_three_arrays_give_the_loss_in_one_line_of_torch(branch):
    seqs = [[1, 2, 3, 4], [1, 2], [1, 2, 0, 4]]
    batch = pack(seqs, branch=branch, loss_mask=[[0, 0, 1, 1], [1, 1], [0, 0, 1, 1]])
    logits = TinyModel().packed(batch)
    by_hand = (batch.loss_weights * cross_entropy(logits[batch.logit_index], batch.labels, reduction="none")).sum()
    torch.testing.assert_close(batch.loss(logits), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.loss(logits[None]), by_hand, rtol=1e-12, atol=0)


def test_fork_labels_for_every_position_give_the_same_loss():
    batch = pack([[1, 2, 3, 4], [1, 2], [1, 2, 0, 4]], branch="fork")
    logits = TinyModel().packed(batch)
    labels, weights = batch.token_labels()
    torch.testing.assert_close(
        (weights * cross_entropy(logits, labels, reduction="none")).sum(), batch.loss(logits), rtol=1e-12, atol=0
    )


def test_weights_of_one_over_targets_give_the_mean_of_each_sequence():
    seqs = [[1, 2, 3, 4], [1, 2, 0]]
    batch = pack(seqs, sequence_weights=[1 / 3, 1 / 2])
    model = TinyModel()
    alone = sum(cross_entropy(model.alone(s)[:-1], torch.tensor(s[1:])) for s in seqs)
    # loss_weights are float32
    torch.testing.assert_close(batch.loss(model.packed(batch)), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("branch", BRANCHES)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(seqs=sequences, seed=st.integers(0, 1000))
def test_policy_gradients_with_an_advantage_for_each_sequence_equal_those_run_alone(branch, seqs, seed):
    model = TinyModel()
    batch = pack(seqs, branch=branch)
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(len(seqs), generator=generator, dtype=torch.float64)
    old = [torch.randn(len(s) - 1, generator=generator, dtype=torch.float64) - 2 for s in seqs]

    def clipped_objective(log_probs: list[Tensor]) -> Tensor:
        total = 0 * model.head.bias.sum()
        for new, before, advantage in zip(log_probs, old, advantages, strict=True):
            ratio = (new - before).exp()
            total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        return total

    alone = []
    for tokens in seqs:
        log_softmax = model.alone(tokens).log_softmax(-1)
        alone.append(log_softmax[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:], dtype=torch.int64)])
    packed = batch.log_probs(model.packed(batch))
    assert [tuple(values.shape) for values in packed] == [(len(s) - 1,) for s in seqs]
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert_same_training(model, clipped_objective(packed), clipped_objective(alone))


def test_sequences_without_targets_give_a_zero_loss_with_a_gradient():
    batch = pack([[1], [2]])
    logits = torch.randn(2, VOCAB, requires_grad=True)
    loss = batch.loss(logits)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert [values.shape for values in batch.log_probs(logits)] == [(0,), (0,)]


# -- log-probabilities of next tokens ----------------------------------------------------------------------------------


def test_next_token_log_probs_pass_gradcheck():
    logits = torch.randn(4, VOCAB, dtype=torch.float64, requires_grad=True)
    rows, tokens = torch.tensor([0, 1, 1, 3]), torch.tensor([2, 0, 4, 1])
    assert torch.autograd.gradcheck(lambda x: next_token_log_probs(x, rows, tokens), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_next_token_log_probs_are_computed_in_float32_and_their_gradient_is_rounded_once(dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(6, 1000)).to(dtype).requires_grad_()
    rows, tokens = torch.tensor([0, 1, 1, 5]), torch.tensor([2, 0, 999, 1])
    grad = torch.randn(4)
    log_probs = next_token_log_probs(logits, rows, tokens)
    log_probs.backward(grad)

    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1)[rows, tokens]
    expected.backward(grad.double())
    assert log_probs.dtype == torch.float32
    # log-sum-exp of 1000 float32 terms: a few float32 roundings of values near 10
    torch.testing.assert_close(log_probs.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    # One rounding to dtype, half an eps relative; subnormal float16 entries (below 6e-5) round to steps of 6e-8.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps + 1e-5, atol=6e-8)


def test_blocks_of_rows_do_not_change_the_log_probs(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    rows, tokens = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 2, 10, 0])
    whole = next_token_log_probs(logits, rows, tokens)
    (whole_grad,) = torch.autograd.grad(whole.square().sum(), logits)
    monkeypatch.setattr("tree_attn._logprobs.BLOCK_ELEMENTS", 22)  # two rows at a time
    blocked = next_token_log_probs(logits, rows, tokens)
    (blocked_grad,) = torch.autograd.grad(blocked.square().sum(), logits)
    torch.testing.assert_close(blocked, whole, rtol=1e-15, atol=0)
    torch.testing.assert_close(blocked_grad, whole_grad, rtol=1e-14, atol=1e-16)


def test_the_backward_keeps_no_other_tensor_of_the_size_of_the_logits():
    batch = pack([[1, 2, 3], [1, 2, 4], [1, 0]])
    logits = torch.randn(batch.num_tokens, VOCAB, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [batch.loss(logits), *batch.log_probs(logits)]
    assert len(losses) == 4
    large = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
    assert large
    assert all(tensor.data_ptr() == logits.data_ptr() for tensor in large)


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    logits = torch.randn(2, 3, requires_grad=True)
    log_probs = next_token_log_probs(logits, torch.tensor([0]), torch.tensor([1]))
    (grad,) = torch.autograd.grad(log_probs.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(4,), (3, VOCAB), (2, 5, VOCAB), (5, 1, VOCAB)])
def test_logits_of_another_shape_are_an_error_that_says_the_right_one(shape):
    batch = pack([[1, 2, 3, 4, 5]])
    for method in (batch.loss, batch.log_probs):
        with pytest.raises(ValueError, match=r"give \(5, vocab\)"):
            method(torch.zeros(shape))


def test_integer_logits_are_an_error():
    with pytest.raises(TypeError, match="floating point"):
        pack([[1, 2]]).loss(torch.zeros(2, 9, dtype=torch.int64))


# -- GPU ---------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("branch", BRANCHES)
def test_sequences_on_the_gpu_give_the_same_batch_there(branch):
    seqs = [[1, 2, 3, 4], [1, 2], [1, 2, 0, 4], [3]]
    masks = [[0, 1, 1, 0], [0, 1], [0, 0, 1, 1], [1]]
    here = pack(seqs, loss_mask=masks, branch=branch)
    there = pack(
        [torch.tensor(s, device="cuda") for s in seqs],
        loss_mask=[torch.tensor(m, device="cuda", dtype=torch.bool) for m in masks],
        branch=branch,
    )
    assert there.device.type == there.mask.device.type == there.token_index[0].device.type == "cuda"
    assert pack(seqs, branch=branch, device="cuda").device.type == "cuda"
    torch.manual_seed(0)
    logits = torch.randn(here.num_tokens, VOCAB, dtype=torch.float64)
    results = []
    for batch in (here, there, here.to("cuda")):
        leaf = logits.clone().to(batch.device).requires_grad_()
        (batch.loss(leaf) + sum(values.square().sum() for values in batch.log_probs(leaf))).backward()
        results.append(leaf.grad.cpu())
    for gradient in results[1:]:
        torch.testing.assert_close(gradient, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.gpu
@needs_gpu
def test_the_loss_takes_no_memory_beyond_the_gradient_and_a_few_blocks():
    tokens, vocab = 8192, 65536
    batch = pack([torch.arange(tokens)], device="cuda")
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # 1 GiB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch.loss(logits).backward()
    blocks = 4 * 4 * 2**24  # at most four blocks of 2**24 float32 at a time
    assert torch.cuda.max_memory_allocated() - before <= logits.numel() * 2 + blocks
