"""Packing keeps every sequence, shares exactly the common prefixes and takes results apart; bad input is an error.

The tree is compared with a dictionary trie.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections import UserList

import numpy as np
import pytest
import torch
from hypothesis import given
from packing_trie import BRANCHES, bounded, sequences, trie
from torch import Tensor

from tree_attn import TreeMask
from tree_attn.packing import pack, plan

# -- the tree ----------------------------------------------------------------------------------------------------------


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
    """Exhaustive: both orders of all pairs of sequences of up to 3 tokens out of two."""
    short = [list(tokens) for n in range(1, 4) for tokens in itertools.product([0, 1], repeat=n)]
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
    logits = torch.randn(4, 5)
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
