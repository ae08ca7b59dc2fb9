"""``mask.shard``: every token on one rank, equal work, few pieces."""

from __future__ import annotations

import random

import forests
import pytest
import torch
from hypothesis import given, settings

from tree_attn import TreeMask
from tree_attn.distributed._schedule import schedule
from tree_attn.distributed._shard import pairs_of, pieces, shard


def large_tree(nodes: int, seed: int = 0) -> TreeMask:
    """A random tree whose nodes have 20 to 200 tokens and hang below one of the nodes on the path before."""
    rng = random.Random(seed)
    parents, path = [-1], [0]
    for node in range(1, nodes):
        path = path[: rng.randint(max(1, len(path) - 3), len(path))][:14]
        parents.append(path[-1])
        path.append(node)
    return TreeMask.from_nodes(parents, [rng.randint(20, 200) for _ in range(nodes)])


def balance(shares: list[int]) -> float:
    return max(shares) * len(shares) / sum(shares)


class TestShard:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(forest=forests.forests())
    def test_every_token_on_one_rank_in_order(self, forest: forests.Forest) -> None:
        mask = TreeMask.from_nodes(*forest)
        for world_size in (1, 2, 3, 7, 64):
            shards = mask.shard(world_size)
            assert len(shards) == world_size
            assert all(x.dtype == torch.int64 and bool((x.diff() > 0).all()) for x in shards)
            assert torch.cat(list(shards)).sort().values.tolist() == list(range(mask.total))

    @pytest.mark.parametrize("seed", range(3))
    def test_balance_at_64_ranks_on_more_than_2000_nodes(self, seed: int) -> None:
        mask = large_tree(2100, seed)
        pairs = mask.depth.long() + 1
        assert balance([int(pairs[x].sum()) for x in mask.shard(64)]) <= 1.05
        assert pairs_of(mask, 64).tolist() == [int(pairs[x].sum()) for x in mask.shard(64)]

    def test_a_large_tree_is_cut_into_one_piece_a_rank(self) -> None:
        assert [len(rank) for rank in pieces(large_tree(2100), 64)] == [1] * 64

    def test_one_long_sequence_is_balanced_in_tokens_too(self) -> None:
        mask = TreeMask.from_nodes([-1], [8192])
        shards = mask.shard(8)
        assert balance([len(x) for x in shards]) <= 2.0
        assert balance([int((mask.depth[x].long() + 1).sum()) for x in shards]) <= 1.03
        assert max(len(rank) for rank in pieces(mask, 8)) == 2  # a light one and a heavy one

    def test_trees_of_their_own_stay_whole(self) -> None:
        mask = TreeMask.from_nodes([p for i in range(0, 24, 3) for p in (-1, i, i)], [100, 50, 50] * 8)
        assert [x.tolist() for x in mask.shard(4)] == [list(range(400 * r, 400 * r + 400)) for r in range(4)]
        assert schedule(mask, 4).waves == ()

    def test_kept_with_the_mask_and_forgotten_with_it(self) -> None:
        from tree_attn.distributed import _shard

        mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
        assert shard(mask, 2)[0] is shard(mask, 2)[0]
        key = id(mask)
        assert key in _shard._kept
        del mask
        assert key not in _shard._kept

    @pytest.mark.parametrize("world_size", [0, -1])
    def test_no_ranks_is_an_error(self, world_size: int) -> None:
        with pytest.raises(ValueError, match="at least 1 rank"):
            TreeMask.from_nodes([-1], [3]).shard(world_size)

    @pytest.mark.parametrize("world_size", [2.0, True, "2"])
    def test_world_size_is_an_integer(self, world_size: object) -> None:
        with pytest.raises(TypeError, match="world_size is"):
            TreeMask.from_nodes([-1], [3]).shard(world_size)  # type: ignore[arg-type]
