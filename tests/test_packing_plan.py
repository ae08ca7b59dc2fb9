"""Plans keep batches under their budget of tokens and relatives together, and cut large trees where it costs least."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_trie import BRANCHES, bounded, keys_of, sequence, sequences, trie

from tree_attn.packing import pack, plan


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


def test_a_long_sequence_at_the_end_of_a_tree_leaves_the_short_ones_behind():
    seqs = [[9, 1], [9, 8, 1], [9, 8, 7, 1], [9, 8, 7, *[6] * 7]]
    assert plan(seqs, 10) == [[0, 1, 2], [3]]


def test_small_trees_fill_batches_and_large_ones_are_placed_first():
    assert [len(batch) for batch in plan([[i] * 3 for i in range(10)], 9)] == [3, 3, 3, 1]
    assert plan([[1] * 2, [2] * 2, [3] * 4, [4] * 4], 6) == [[0, 2], [1, 3]]


def test_a_sequence_longer_than_the_budget_is_a_clear_error():
    with pytest.raises(ValueError, match=r"sequences\[1\] has 4 tokens, more than max_tokens=3; .* never divided"):
        plan([[1], [1, 2, 3, 4]], 3)


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (-5, ValueError), (3.0, TypeError), (None, TypeError)])
def test_a_budget_that_is_no_positive_integer_is_an_error(budget, error):
    with pytest.raises(error, match="max_tokens is"):
        plan([[1]], budget)
