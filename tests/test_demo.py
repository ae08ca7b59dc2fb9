"""The demo's comparison is real: the tree trains the same model as its paths, and a wrong tree is told apart."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tree_attn import tree_attention
from tree_attn.cli import compare as module
from tree_attn.cli.compare import FLOAT32_BOUND, advantage_weights, compare, largest_difference
from tree_attn.cli.model import SmallTransformer, rotate
from tree_attn.rollouts import Rollout, read_rollouts


@pytest.fixture(scope="module")
def some():
    """Three rollouts of each of three tasks."""
    rollouts = read_rollouts()
    return [r for group in ("sql-returning", "code-clock", "maze") for r in rollouts if r.group == group][::3][:9]


@pytest.fixture(scope="module")
def found(some):
    return compare(some, steps=2)


def causal_over_everything(q, k, v, mask):
    """What a stack does that drops the tree: every token sees all before it, other branches too."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


class TestTreeTrainsTheSameModel:
    def test_no_gradient_differs_by_the_bound_after_two_steps(self, found):
        assert found.gradient_bound == FLOAT32_BOUND == 1e-5
        assert 0 < found.gradient_difference < 1e-5
        assert found.same

    def test_losses_agree_and_fall(self, found):
        assert found.loss_tree == pytest.approx(found.loss_paths, rel=1e-5)
        assert found.loss_tree[1] < found.loss_tree[0]

    def test_tokens_and_pairs_are_those_of_the_sequences_and_of_their_prefixes(self, some, found):
        prefixes = {hash(r.tokens[: i + 1]) for r in some for i in range(len(r.tokens))}
        assert found.tokens_paths == sum(len(r.tokens) for r in some)
        assert found.tokens_tree == len(prefixes)
        assert found.pairs_paths == sum(n * (n + 1) // 2 for n in (len(r.tokens) for r in some))
        assert found.pairs_tree < found.pairs_paths

    def test_several_batches_add_up_to_one(self, some, found):
        longest = max(len(r.tokens) for r in some)
        split = compare(some, steps=1, max_tokens=longest)
        assert split.batches > 1
        assert split.same
        assert split.loss_tree[0] == pytest.approx(found.loss_tree[0], rel=1e-6)

    def test_low_precision_is_no_worse_than_its_own_rounding(self, some):
        found = compare(some[:3], steps=1, dtype="bfloat16")
        assert 1e-4 < found.gradient_difference < found.gradient_bound < 0.1
        assert found.same


class TestWrongTreeIsToldApart:
    def test_attention_that_forgets_the_tree(self, some, monkeypatch):
        monkeypatch.setattr(module, "tree_attention", causal_over_everything)
        found = compare(some[:4], steps=1)
        assert found.gradient_difference > 100 * FLOAT32_BOUND
        assert not found.same

    def test_positions_that_count_packed_tokens(self, some, monkeypatch):
        original = SmallTransformer.forward

        def packed_positions(self, input_ids, position_ids, attend):
            return original(self, input_ids, torch.arange(len(input_ids)), attend)

        monkeypatch.setattr(SmallTransformer, "forward", packed_positions)
        assert not compare(some[:4], steps=1).same

    def test_gradient_that_is_not_a_number(self, some, monkeypatch):
        monkeypatch.setattr(
            module, "tree_attention", lambda q, k, v, mask: tree_attention(q, k, v, mask) * float("nan")
        )
        found = compare(some[:2], steps=1)
        assert math.isnan(found.gradient_difference)
        assert not found.same

    def test_one_wrong_parameter_among_many(self):
        a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        for model in (a, b):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        assert largest_difference(a, b) == 0
        a.bias.grad[2] += 0.5
        assert largest_difference(a, b) == pytest.approx(0.5 / 2)  # the norm of four ones is 2


class TestInput:
    def test_token_ids_of_a_large_vocabulary_without_group_or_reward(self):
        found = compare([Rollout((9, 150000, 7, 7)), Rollout((9, 150000, 8))], steps=1)
        assert found.same
        assert (found.tokens_paths, found.tokens_tree) == (7, 5)
        assert found.loss_paths[0] < 10  # of 4 ids, not of 150001

    def test_weight_is_the_exponential_of_the_advantage_in_its_group(self):
        rollouts = [
            Rollout((1,), group="a", reward=1.0),
            Rollout((1,), group="a", reward=0.0),
            Rollout((1,), group="b", reward=5.0),
            Rollout((1,)),
        ]
        assert advantage_weights(rollouts) == pytest.approx([math.exp(0.5), math.exp(-0.5), 1, 1])

    def test_loss_spans_choose_what_is_learned(self):
        tokens = (1, 2, 3, 4, 5, 6)
        whole = compare([Rollout(tokens)], steps=1)
        last = compare([Rollout(tokens, loss_spans=((5, 6),))], steps=1)
        assert last.same
        assert last.loss_tree[0] != pytest.approx(whole.loss_tree[0], rel=1e-3)

    def test_nothing_to_learn_is_an_error(self):
        with pytest.raises(ValueError, match="no rollout has a token to learn"):
            compare([Rollout((1, 2), loss_spans=((0, 1),))])
        with pytest.raises(ValueError, match="steps is 0"):
            compare([Rollout((1, 2))], steps=0)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        return float((rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum())

    # The angles are float32: their error grows with the position, 1e-7 times it.
    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
