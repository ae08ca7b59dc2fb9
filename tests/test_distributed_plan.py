"""What ``ring`` sends: exactly the keys that rows see, passed on by few ranks at a time, in bounded memory."""

from __future__ import annotations

import itertools
import math

import forests
import pytest
import torch
from hypothesis import given, settings

from tree_attn import TreeMask
from tree_attn.distributed import _plan, _schedule
from tree_attn.distributed._plan import RingPlan, ring_plan
from tree_attn.distributed._schedule import most_keys_of_a_wave, schedule


def carried(plans: list[RingPlan], mask: TreeMask) -> list[list[torch.Tensor]]:
    """For each rank and wave the packed positions of the keys that arrive, by doing what the plans say."""
    shards = mask.shard(len(plans))
    arrived = [[torch.full((wave.n_keys,), -1) for wave in plan.waves] for plan in plans]
    for i in range(max(len(plan.waves) for plan in plans)):
        under_way: dict[tuple[int, int], list[torch.Tensor]] = {}
        rounds = [list(plan.waves[i].rounds) for plan in plans]
        while any(rounds):  # a rank goes on as soon as what it waits for is there
            before = [len(r) for r in rounds]
            for rank, todo in enumerate(rounds):
                if not todo:
                    continue
                for send in todo[0].sends:
                    keys = torch.cat([shards[rank][send.own], arrived[rank][i][send.passed_on]])
                    assert (keys >= 0).all()  # nothing is passed on before it arrived
                    under_way.setdefault((rank, send.target), []).append(keys)
                todo[0] = _plan.Round((), todo[0].receives)
                if all(under_way.get((receive.source, rank)) for receive in todo[0].receives):
                    for receive in todo[0].receives:
                        keys = under_way[receive.source, rank].pop(0)
                        arrived[rank][i][receive.begin : receive.end] = keys
                    todo.pop(0)
            assert [len(r) for r in rounds] != before, "ranks wait for one another"
        assert not any(under_way.values())
    return arrived


def both_ways(mask: TreeMask, world_size: int, monkeypatch: pytest.MonkeyPatch) -> list[TreeMask]:
    """The mask twice: planned with messages so dear that keys are relayed where that takes fewer rounds, and free."""
    masks = []
    for price in (0, 10**6):
        monkeypatch.setattr(_schedule, "_KEYS_A_MESSAGE", price)
        masks.append(mask.to("cpu"))
        schedule(masks[-1], world_size)
    return masks


class TestPlan:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(forest=forests.forests())
    def test_a_rank_gets_the_keys_that_its_rows_see(self, forest: forests.Forest) -> None:
        dense = forests.dense(forests.token_parents(forest))
        whole = TreeMask.from_nodes(*forest)
        near = whole.depth[:, None] - whole.depth < 7
        for world_size, window in itertools.product((2, 3, 5), (None, 7)):
            seen = dense if window is None else dense & near
            with pytest.MonkeyPatch.context() as monkeypatch:
                masks = both_ways(whole, world_size, monkeypatch)
            for mask in masks:
                shards = mask.shard(world_size)
                plans = [ring_plan(mask, world_size, rank, window) for rank in range(world_size)]
                arrived = carried(plans, mask)
                for rank, plan in enumerate(plans):
                    found = torch.zeros(len(shards[rank]), mask.total, dtype=torch.int64)
                    for part in plan.parts:
                        keys = torch.cat(
                            [
                                arrived[rank][part.wave] if part.wave is not None else shards[rank][:0],
                                shards[rank] if part.own else shards[rank][:0],
                            ]
                        )
                        if part.ranges is not None:
                            rows = torch.arange(part.rows.stop - part.rows.start)
                            visible = part.ranges.visible(rows, torch.arange(len(keys)), window)
                            found[part.rows, keys] += visible.long()
                    assert torch.equal(found, seen[shards[rank]].long())  # every pair once
                    needed = seen[shards[rank]].any(0)
                    needed[shards[rank]] = False
                    got = torch.cat([shards[rank][:0], *arrived[rank]])
                    assert got.sort().values.tolist() == needed.nonzero().flatten().tolist()  # and nothing else

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(forest=forests.forests())
    def test_the_schedule_counts_what_the_plans_send(self, forest: forests.Forest) -> None:
        for world_size in (2, 5, 9):
            with pytest.MonkeyPatch.context() as monkeypatch:
                masks = both_ways(TreeMask.from_nodes(*forest), world_size, monkeypatch)
            for mask in masks:
                plan = schedule(mask, world_size)
                waves = [ring_plan(mask, world_size, rank).waves for rank in range(world_size)]
                assert [sum(wave.n_keys for wave in of_rank) for of_rank in waves] == plan.seen.sum(0).tolist()
                sent = [
                    sum(len(s.own) + len(s.passed_on) for wave in of_rank for r in wave.rounds for s in r.sends)
                    for of_rank in waves
                ]
                assert sent == plan.sent.tolist()

    def test_siblings_never_cross_the_wire(self) -> None:
        mask = TreeMask.from_nodes([-1, *[0] * 8], [100] * 9)
        # Each rank needs at most the prompt and its own branch's beginning, never another branch.
        assert int(schedule(mask, 4).seen.sum(0).max()) <= 200


class TestRelay:
    @pytest.mark.parametrize("world_size", [4, 16, 64])
    def test_a_prompt_leaves_each_rank_a_logarithm_of_times(self, world_size: int) -> None:
        mask = TreeMask.from_nodes([-1, *[0] * 2000], [1000, *[50] * 2000])
        plan = schedule(mask, world_size)
        assert plan.relayed
        assert int(plan.seen.sum(1).max()) >= (world_size - 1) * 1000  # what the owner would send itself
        assert int(plan.sent.max()) <= (1000 + 50) * math.ceil(math.log2(world_size))
        assert max(map(len, plan.rounds)) == math.ceil(math.log2(world_size))

    def test_a_sequence_goes_round_in_shifts(self) -> None:
        plan = schedule(TreeMask.from_nodes([-1], [64 * 1000]), 16)
        assert not plan.relayed
        assert [len(rounds) for rounds in plan.rounds] == [1] * 15

    @pytest.mark.parametrize("forest", [([-1], [4000]), ([-1, *[0] * 40], [2000, *[50] * 40])])
    @pytest.mark.parametrize("world_size", [4, 16])
    def test_a_wave_brings_a_bounded_share_of_the_keys(self, forest: forests.Forest, world_size: int) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            masks = both_ways(TreeMask.from_nodes(*forest), world_size, monkeypatch)
        for mask in masks:
            for rank in range(world_size):
                for wave in ring_plan(mask, world_size, rank).waves:
                    assert wave.n_keys <= most_keys_of_a_wave(mask.total, world_size)

    @pytest.mark.parametrize("world_size", [2, 3, 4, 8])
    def test_no_rank_ever_holds_all_keys_of_a_sequence(self, world_size: int) -> None:
        mask = TreeMask.from_nodes([-1], [4000])
        for rank, mine in enumerate(mask.shard(world_size)):
            sizes = [wave.n_keys for wave in ring_plan(mask, world_size, rank).waves]
            under_way = max((a + b for a, b in itertools.pairwise([*sizes, 0])), default=0)  # two at most
            assert len(mine) + under_way < 0.85 * mask.total
