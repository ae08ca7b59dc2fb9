"""Packing keeps every sequence, shares exactly the common prefixes, and trains like the sequences run alone.

The tree is compared with a dictionary trie, the training with each sequence by itself in float64.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections import UserList

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tree_attn import TreeMask, tree_attention
from tree_attn._logprobs import next_token_log_probs
from tree_attn.packing import PackedBatch, pack, plan

BRANCHES = ["gather", "fork"]
VOCAB = 5

# Few different tokens and short sequences: sharing, duplicates and prefixes of others come up all the time.
sequence = st.lists(st.integers(0, 2), min_size=1, max_size=7)
sequences = st.lists(sequence, min_size=1, max_size=8)
bounded = settings(deadline=None, max_examples=200, derandomize=True)


# -- the tree ----------------------------------------------------------------------------------------------------------


def keys_of(tokens: list[int], branch: str) -> list:
    """What a token must agree on to be shared: itself, and with fork the next one too."""
    return tokens if branch == "gather" else list(zip(tokens, [*tokens[1:], "end"], strict=True))


def trie(seqs: list[list[int]], branch: str) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """(ids, depth, parent, positions for each sequence) by a dictionary for each token, children in order of insertion."""
    root: dict = {}
    for tokens in seqs:
        node = root
        for key in keys_of(tokens, branch):
            node = node.setdefault(key, {})
    ids, depths, parents = [], [], []
    where: dict[tuple, int] = {}

    def visit(node: dict, path: tuple, parent: int) -> None:
        for key, child in node.items():
            position = where[(*path, key)] = len(ids)
            ids.append(key if branch == "gather" else key[0])
            depths.append(len(path))
            parents.append(parent)
            visit(child, (*path, key), position)

    visit(root, (), -1)
    index = []
    for tokens in seqs:
        keys = keys_of(tokens, branch)
        index.append([where[tuple(keys[: t + 1])] for t in range(len(keys))])
    return ids, depths, parents, index


def check_against_trie(seqs: list[list[int]], branch: str) -> None:
    batch = pack(seqs, branch=branch)
    ids, depths, parents, index = trie(seqs, branch)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == depths
    assert batch.parent.tolist() == parents
    assert [positions.tolist() for positions in batch.token_index] == index
    assert batch.mask == TreeMask.from_token_parents(parents, validate=True)


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(seqs=sequences)
def test_the_packed_tree_is_the_trie_of_the_sequences(branch, seqs):
    check_against_trie(seqs, branch)


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_pair_of_short_binary_sequences_packs_like_the_trie(branch):
    """Exhaustive: both orders of all pairs of sequences of up to 4 tokens out of two."""
    short = [list(tokens) for n in range(1, 5) for tokens in itertools.product([0, 1], repeat=n)]
    for pair in itertools.product(short, repeat=2):
        check_against_trie(list(pair), branch)


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(seqs=sequences)
def test_a_token_sees_exactly_its_own_path(branch, seqs):
    batch = pack(seqs, branch=branch)
    dense = batch.mask.dense()
    for positions in batch.token_index:
        for t, position in enumerate(positions.tolist()):
            assert dense[position].nonzero().flatten().tolist() == positions[: t + 1].tolist()


@pytest.mark.parametrize("width", [1, 2**7, 2**8, 2**16 + 1, 2**31, 2**40, 2**63 - 3])
def test_token_ids_of_any_size_are_told_apart(width):
    seqs = [[7, width, 1], [7, width + 1, 1], [7, width, 2], [7, width + 2]]
    for branch in BRANCHES:
        check_against_trie(seqs, branch)


def test_siblings_come_in_the_order_of_the_input():
    assert pack([[9, 5], [1, 2], [9, 3], [4]]).input_ids.tolist() == [9, 5, 3, 1, 2, 4]


def test_gather_shares_the_branch_point_and_fork_does_not():
    seqs = [[1, 2, 3], [1, 2, 4], [1, 2]]
    assert pack(seqs, branch="gather").input_ids.tolist() == [1, 2, 3, 4]
    assert pack(seqs, branch="fork").input_ids.tolist() == [1, 2, 3, 2, 4, 2]


@pytest.mark.parametrize("branch", BRANCHES)
def test_identical_sequences_are_merged_completely(branch):
    batch = pack([[3, 4, 5]] * 4, branch=branch)
    assert batch.input_ids.tolist() == [3, 4, 5]
    assert [index.tolist() for index in batch.token_index] == [[0, 1, 2]] * 4
    assert batch.loss_weights.tolist() == [4.0, 4.0]


# -- labels and weights ------------------------------------------------------------------------------------------------


@st.composite
def masked_sequences(draw):
    seqs = draw(sequences)
    return seqs, [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in seqs]


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


# -- training equals the sequences run alone -------------------------------------------------------------------------


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
        losses = F.cross_entropy(model.alone(tokens)[:-1], torch.tensor(tokens[1:]), reduction="none")
        alone = alone + weight * (losses * torch.tensor(mask[1:])).sum()
    logits = model.packed(batch)
    assert_same_training(model, batch.loss(logits), alone)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_with_duplicates_and_prefixes_of_others_equal_those_run_alone(branch):
    seqs = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4], [1, 2, 0, 4], [3], [2, 2, 2], [1, 2]]
    model = TinyModel()
    batch = pack(seqs, branch=branch)
    alone = sum(F.cross_entropy(model.alone(s)[:-1], torch.tensor(s[1:]), reduction="sum") for s in seqs)
    assert_same_training(model, batch.loss(model.packed(batch)), alone)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_three_arrays_give_the_loss_in_one_line_of_torch(branch):
    seqs = [[1, 2, 3, 4], [1, 2], [1, 2, 0, 4]]
    batch = pack(seqs, branch=branch, loss_mask=[[0, 0, 1, 1], [1, 1], [0, 0, 1, 1]])
    logits = TinyModel().packed(batch)
    by_hand = (batch.loss_weights * F.cross_entropy(logits[batch.logit_index], batch.labels, reduction="none")).sum()
    torch.testing.assert_close(batch.loss(logits), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.loss(logits[None]), by_hand, rtol=1e-12, atol=0)


def test_fork_labels_for_every_position_give_the_same_loss():
    batch = pack([[1, 2, 3, 4], [1, 2], [1, 2, 0, 4]], branch="fork")
    logits = TinyModel().packed(batch)
    labels, weights = batch.token_labels()
    torch.testing.assert_close(
        (weights * F.cross_entropy(logits, labels, reduction="none")).sum(), batch.loss(logits), rtol=1e-12, atol=0
    )


def test_weights_of_one_over_targets_give_the_mean_of_each_sequence():
    seqs = [[1, 2, 3, 4], [1, 2, 0]]
    batch = pack(seqs, sequence_weights=[1 / 3, 1 / 2])
    model = TinyModel()
    alone = sum(F.cross_entropy(model.alone(s)[:-1], torch.tensor(s[1:])) for s in seqs)
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


# -- back to sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(seqs=sequences)
def test_gathered_input_ids_are_the_sequences(branch, seqs):
    batch = pack(seqs, branch=branch)
    assert [ids.tolist() for ids in batch.gather(batch.input_ids)] == seqs
    assert [batch.input_ids[index].tolist() for index in batch.token_index] == seqs
    assert [positions.tolist() for positions in batch.gather(batch.position_ids)] == [list(range(len(s))) for s in seqs]


def test_the_gradient_of_a_gathered_shared_token_is_the_sum_of_its_sequences():
    batch = pack([[1, 2], [1, 3]])
    values = torch.zeros(3, 2, requires_grad=True)
    first, second = batch.gather(values)
    (2 * first.sum() + 3 * second.sum()).backward()
    assert values.grad.tolist() == [[5.0, 5.0], [2.0, 2.0], [3.0, 3.0]]


def test_unpack_takes_outputs_apart_in_their_nesting():
    batch = pack([[1, 2], [1, 3], [4]])
    hidden = torch.arange(8.0).view(4, 2)
    outputs = batch.unpack({"hidden": hidden, "states": [batch.input_ids, None], "pair": (hidden, hidden)})
    assert len(outputs) == 3
    assert outputs[1]["hidden"].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert outputs[1]["states"][0].tolist() == [1, 3]
    assert outputs[1]["states"][1] is None
    assert isinstance(outputs[1]["pair"], tuple)
    assert outputs[2]["pair"][1].tolist() == [[6.0, 7.0]]
    assert [ids.tolist() for ids in batch.unpack(batch.input_ids)] == [[1, 2], [1, 3], [4]]
    assert batch.unpack({}) == [{}, {}, {}]
    with pytest.raises(TypeError, match="outputs hold a float"):
        batch.unpack({"loss": 0.5})


@pytest.mark.parametrize("values", [torch.zeros(()), torch.zeros(3), torch.zeros(1, 2)])
def test_values_of_another_number_of_tokens_are_an_error(values):
    with pytest.raises(ValueError, match=r"give \(2, \.\.\.\)"):
        pack([[1, 2]]).gather(values)


def test_the_summary_counts_tokens_and_pairs():
    summary = pack([[1, 2, 3], [1, 2, 4, 5], [7]]).summary()
    assert (summary.sequences, summary.trees) == (3, 2)
    assert (summary.tokens_before, summary.tokens_after) == (8, 6)
    assert (summary.pairs_before, summary.pairs_after) == (6 + 10 + 1, 1 + 2 + 3 + 3 + 4 + 1)
    assert summary.token_saving == pytest.approx(1 / 4)
    assert summary.pair_saving == pytest.approx(3 / 17)
    assert "3 sequences in 2 trees" in str(summary)
    assert "25.0% saved, 1.33x less in linear layers" in str(summary)


@bounded
@given(seqs=sequences)
def test_pairs_after_packing_are_those_of_the_mask(seqs):
    batch = pack(seqs)
    assert batch.summary().pairs_after == int(batch.mask.dense().sum())


def test_the_repr_says_what_was_packed():
    text = repr(pack([[1, 2, 3], [1, 2, 4]]))
    assert text == (
        "PackedBatch(2 sequences of 6 tokens in 4 packed tokens (1.50x fewer), branch='gather', device='cpu')"
    )


def test_to_moves_every_tensor_and_keeps_the_values():
    batch = pack([[1, 2, 3], [1, 2, 4]])
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) == 7
    assert all(t.device.type == "meta" for t in [*tensors, moved.mask.subtree_end, *moved.token_index])
    assert (moved.lengths, moved.branch, moved.num_tokens) == (batch.lengths, "gather", 4)
    same = batch.to("cpu")
    assert torch.equal(same.labels, batch.labels)
    assert same.mask == batch.mask


def test_a_batch_survives_a_worker_process():
    batch = pack([[1, 2, 3], [1, 2, 4]])
    logits = torch.randn(4, VOCAB)
    loaded = pickle.loads(pickle.dumps(batch))
    assert loaded.loss(logits) == batch.loss(logits)


# -- what goes in ------------------------------------------------------------------------------------------------------


def test_lists_arrays_and_tensors_of_any_integer_dtype_mix():
    tokens = [1, 2, 3, 250]
    read_only = np.array(tokens)
    read_only.flags.writeable = False
    kinds = [
        tokens,
        tuple(tokens),
        UserList(tokens),
        [np.int64(t) for t in tokens],
        [torch.tensor(t) for t in tokens],
        np.array(tokens[::-1])[::-1],
        read_only,
        torch.tensor([[t, 0] for t in tokens])[:, 0],  # strided
        *(
            np.array(tokens, dtype=dtype)
            for dtype in ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
        ),
        *(torch.tensor(tokens, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)),
    ]
    batch = pack(kinds)
    assert batch.input_ids.tolist() == tokens
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.flat_index.dtype == torch.int64
    assert [index.tolist() for index in batch.token_index] == [[0, 1, 2, 3]] * len(kinds)
    assert pack([range(3), [0, 1, 5]]).input_ids.tolist() == [0, 1, 2, 5]
    assert pack(s for s in [[1], [2]]).input_ids.tolist() == [1, 2]


def test_packing_does_not_keep_or_change_the_memory_of_its_input():
    tokens = torch.tensor([1, 2, 3])
    batch = pack([tokens])
    tokens.fill_(0)
    assert batch.input_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "sequences is empty; give at least one"),
        ([[1], []], ValueError, r"sequences\[1\] is empty"),
        ([[1], torch.empty(0, dtype=torch.int64)], ValueError, r"sequences\[1\] is empty"),
        ([[1, 2], [3, 1.5]], TypeError, r"sequences\[1\]\[1\] is float 1.5; give integers"),
        ([[1, True]], TypeError, r"sequences\[0\]\[1\] is bool True; give integers"),
        ([["a"]], TypeError, r"sequences\[0\]\[0\] is str"),
        ([[None]], TypeError, r"sequences\[0\]\[0\] is NoneType"),
        ([[[1, 2]]], TypeError, r"sequences\[0\]\[0\] is list"),
        ([[torch.tensor(1.0)]], TypeError, r"sequences\[0\]\[0\] is Tensor"),
        ([[2**70]], ValueError, r"sequences\[0\] holds an integer beyond 64 bits"),
        ([torch.tensor([1.0])], TypeError, r"sequences\[0\] holds torch.float32; give integers"),
        ([torch.tensor([True])], TypeError, r"sequences\[0\] holds torch.bool"),
        ([torch.tensor([1j])], TypeError, r"sequences\[0\] holds torch.complex64"),
        ([np.array([1.0])], TypeError, r"sequences\[0\] holds torch.float64"),
        ([np.array([True])], TypeError, r"sequences\[0\] holds torch.bool"),
        ([np.array(["a"])], TypeError, r"sequences\[0\] is an array of <U1"),
        ([np.array([1, None])], TypeError, r"sequences\[0\] is an array of object"),
        ([[1], torch.ones(2, 3, dtype=torch.int64)], ValueError, r"sequences\[1\] has shape \(2, 3\); give one dim"),
        ([torch.tensor(3)], ValueError, r"sequences\[0\] has shape \(\)"),
        ([[1, 2], [3, -1]], ValueError, r"sequences\[1\]\[1\] is -1; token ids are 0 or more"),
        ([np.array([2**64 - 1], dtype=np.uint64)], ValueError, r"sequences\[0\]\[0\] is -1"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "sequences is one Tensor; give a list"),
        (np.ones((2, 3), dtype=int), TypeError, "sequences is one ndarray; give a list"),
        ([1, 2, 3], TypeError, r"sequences\[0\] is int 1; give a list"),
        (5, TypeError, "sequences is int 5"),
        ("text", TypeError, "sequences is str"),
        (["text"], TypeError, r"sequences\[0\] is str; .*list\(text.encode\(\)\)"),
        ([b"text"], TypeError, r"sequences\[0\] is bytes; .*list\(text.encode\(\)\)"),
        ([{1, 2}], TypeError, r"sequences\[0\] is set"),
    ],
)
def test_input_that_is_no_list_of_integer_sequences_is_a_clear_error(bad, error, message):
    for call in (pack, lambda sequences: plan(sequences, 100)):
        with pytest.raises(error, match=message):
            call(bad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_mask": [[1, 1, 1]]}, ValueError, "loss_mask has 1 entries for 2 sequences"),
        ({"loss_mask": [[1, 1], [1, 1]]}, ValueError, r"loss_mask\[0\] has 2 entries and sequences\[0\] has 3 tokens"),
        ({"loss_mask": [[1, 1, 0.5], [1, 1]]}, TypeError, r"loss_mask\[0\]\[2\] is float 0.5"),
        ({"loss_mask": [[1, 1, 2], [1, 1]]}, ValueError, r"loss_mask\[0\]\[2\] is 2; give True"),
        ({"loss_mask": [torch.ones(3), [1, 1]]}, TypeError, r"loss_mask\[0\] holds torch.float32"),
        ({"loss_mask": torch.ones(2, 3)}, TypeError, "loss_mask is one Tensor"),
        ({"loss_mask": [[], [1, 1]]}, ValueError, r"loss_mask\[0\] has 0 entries"),
        ({"labels": [[1, 2, 3]]}, ValueError, "labels has 1 entries for 2 sequences"),
        ({"labels": [[1, 2, 3], [1]]}, ValueError, r"labels\[1\] has 1 entries and sequences\[1\] has 2 tokens"),
        (
            {"labels": [[-100, 2, 3], [2, -100]]},
            ValueError,
            r"labels\[1\]\[0\] is 2 and sequences\[1\]\[0\] is 1; .* not s",
        ),
        ({"labels": [[1.0, 2, 3], [1, 2]]}, TypeError, r"labels\[0\]\[0\] is float 1.0"),
        ({"sequence_weights": [1.0]}, ValueError, r"shape \(1,\); give \(2,\)"),
        ({"sequence_weights": [1.0, math.nan]}, ValueError, r"sequence_weights\[1\] is nan"),
        ({"branch": "both"}, ValueError, 'branch is \'both\'; give "gather" or "fork"'),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0; give at least 1"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens is 2.5; give an integer"),
        ({"max_tokens": True}, TypeError, "max_tokens is True"),
        ({"max_tokens": 2}, ValueError, r"3 unique tokens, more than max_tokens=2; plan\(sequences, 2\)"),
    ],
)
def test_arguments_that_do_not_fit_the_sequences_are_a_clear_error(arguments, error, message):
    with pytest.raises(error, match=message):
        pack([[1, 2, 3], [1, 2]], **arguments)


def test_loss_masks_may_be_bools_integers_arrays_or_tensors():
    masks = [
        [False, False, True],
        (0, 0, 1),
        np.array([False, False, True]),
        torch.tensor([0, 0, 1], dtype=torch.uint8),
    ]
    batch = pack([[1, 2, 3]] * 5, loss_mask=[*masks, torch.tensor([False, False, True])])
    assert (batch.logit_index.tolist(), batch.labels.tolist(), batch.loss_weights.tolist()) == ([1], [3], [5.0])


# -- plan --------------------------------------------------------------------------------------------------------------


def cost(seqs: list[list[int]], members: list[int], branch: str) -> int:
    return len(trie([seqs[i] for i in members], branch)[0])


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(seqs=sequences, spare=st.integers(0, 12))
def test_every_sequence_is_planned_once_and_every_batch_fits(branch, seqs, spare):
    budget = max(map(len, seqs)) + spare
    batches = plan(seqs, budget, branch=branch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(seqs)))
    assert batches == sorted(sorted(batch) for batch in batches)
    for members in batches:
        packed = pack([seqs[i] for i in members], branch=branch, max_tokens=budget)
        assert packed.num_tokens == cost(seqs, members, branch) <= budget


@pytest.mark.parametrize("branch", BRANCHES)
@bounded
@given(seqs=sequences, spare=st.integers(0, 12))
def test_relatives_stay_together_when_their_tree_fits(branch, seqs, spare):
    budget = max(map(len, seqs)) + spare
    batch_of = {i: b for b, members in enumerate(plan(seqs, budget, branch=branch)) for i in members}
    trees: dict = {}
    for i, tokens in enumerate(seqs):
        trees.setdefault(keys_of(tokens, branch)[0], []).append(i)
    for members in trees.values():
        if cost(seqs, members, branch) <= budget:
            assert len({batch_of[i] for i in members}) == 1


def test_a_tree_too_large_is_cut_where_the_fewest_tokens_are_repeated():
    # Two branches of 2 leaves each below token 1: cutting between the branches repeats one token, inside them four.
    seqs = [[1, 2, 2, 2, 3], [1, 5, 5, 5, 6], [1, 2, 2, 2, 4], [1, 5, 5, 5, 7]]
    assert plan(seqs, 6) == [[0, 2], [1, 3]]
    # With room for three leaves a greedy cut would take the third one along and repeat its branch.
    assert plan(seqs, 10) == [[0, 2], [1, 3]]
    assert plan(seqs, 11) == [[0, 1, 2, 3]]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seqs=st.lists(sequence, min_size=1, max_size=6), spare=st.integers(0, 8))
def test_cuts_repeat_as_few_tokens_as_any_cut_of_the_packed_order(seqs, spare):
    seqs = [[9, *tokens] for tokens in seqs]  # one tree
    budget = max(map(len, seqs)) + spare
    position = {i: index.tolist() for i, index in enumerate(pack(seqs).token_index)}
    order = sorted(range(len(seqs)), key=lambda i: (position[i], i))

    def total(runs: list[list[int]]) -> float:
        costs = [cost(seqs, run, "gather") for run in runs]
        return sum(costs) if max(costs) <= budget else math.inf

    best = math.inf
    for bits in itertools.product([False, True], repeat=len(order) - 1):
        edges = [0, *(j + 1 for j, cut in enumerate(bits) if cut), len(order)]
        best = min(best, total([order[a:b] for a, b in itertools.pairwise(edges)]))
    assert total(plan(seqs, budget)) <= best


def test_small_trees_fill_batches():
    seqs = [[i] * 3 for i in range(10)]
    batches = plan(seqs, 9)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]


def test_a_sequence_longer_than_the_budget_is_a_clear_error():
    with pytest.raises(ValueError, match=r"sequences\[1\] has 4 tokens, more than max_tokens=3; .* never divided"):
        plan([[1], [1, 2, 3, 4]], 3)


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (-5, ValueError), (3.0, TypeError), (None, TypeError)])
def test_a_budget_that_is_no_positive_integer_is_an_error(budget, error):
    with pytest.raises(error, match="max_tokens is"):
        plan([[1]], budget)
