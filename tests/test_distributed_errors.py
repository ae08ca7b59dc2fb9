"""What goes wrong on one rank is an error on every rank, soon, and says what; memory and traffic keep their promise."""

from __future__ import annotations

import time
from collections.abc import Iterator

import forests
import pytest
import torch
from distributed_ranks import (
    Case,
    Ranks,
    absent,
    bad_call,
    die,
    disagree,
    explained,
    largest_key_blocks,
    scatter_and_gather,
)

from tree_attn.distributed import CostModel
from tree_attn.distributed._ulysses import split_heads

MODES = ("ring", "ulysses")


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


class TestDisagreement:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("what", "named"),
        [
            ("mask", "the mask's checksum is "),
            ("heads", "q's shape is (..., 4, 8) on ranks 0, 2, 3, (..., 8, 8) on rank 1"),
            ("dtype", "dtype is torch.float64 on ranks 0, 2, 3, torch.float32 on rank 1"),
            ("size", "the mask's number of tokens is 15 on ranks 0, 2, 3, 16 on rank 1"),
            ("value_dim", "v's shape is (..., 2, 8) on ranks 0, 2, 3, (..., 2, 4) on rank 1"),
            ("softcap", "softcap is 0.0 on ranks 0, 2, 3, 2.0 on rank 1"),
            ("sinks", "sinks is not given on ranks 0, 2, 3, given on rank 1"),
            ("return_lse", "return_lse is False on ranks 0, 2, 3, True on rank 1"),
            ("window", "window is None on ranks 0, 2, 3, 3 on rank 1"),
            ("mode", "mode is "),
            ("gradient", "what needs a gradient is nothing on ranks 0, 2, 3, q on rank 1"),
        ],
    )
    def test_every_rank_names_the_difference(self, four: Ranks, what: str, named: str, mode: str) -> None:
        for answer in four.run(disagree, mode, what):
            assert isinstance(answer, ValueError)
            assert named in str(answer)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_error_of_one_rank_is_told_on_all(self, four: Ranks, mode: str) -> None:
        answers = four.run(disagree, mode, "tokens")
        for rank, answer in enumerate(answers):
            assert isinstance(answer, ValueError if rank == 1 else RuntimeError)
            assert "q has shape (" in str(answer)
            assert "mask.shard(4)[1]" in str(answer)

    def test_ranks_go_on_after_an_error(self, four: Ranks) -> None:
        four.run(disagree, "ring", "mask")
        assert four.run(disagree, "ring", "nothing") == [None] * 4


class TestArguments:
    def test_unknown_mode(self, four: Ranks) -> None:
        for answer in four.run(bad_call, mode="star"):
            assert isinstance(answer, ValueError)
            assert "auto, ring, ulysses" in str(answer)

    def test_mesh_of_another_type(self, four: Ranks) -> None:
        for answer in four.run(bad_call, over="cuda"):
            assert isinstance(answer, TypeError)
            assert "DeviceMesh" in str(answer)

    def test_ring_refuses_a_backend_without_gradients_by_part(self, four: Ranks) -> None:
        for answer in four.run(bad_call, mode="ring", backend="flex"):
            assert type(answer).__name__ == "BackendUnavailable"
            assert "part by part" in str(answer)

    @pytest.mark.parametrize("options", [{"window": 0}, {"softcap": -1.0}, {"scale": float("nan")}])
    def test_options_are_checked_as_in_tree_attention(self, four: Ranks, options: dict[str, float]) -> None:
        for answer in four.run(bad_call, **options):
            assert isinstance(answer, ValueError)
            assert next(iter(options)) in str(answer)


class TestKilledRank:
    @pytest.mark.parametrize("mode", MODES)
    def test_the_others_get_an_error_within_the_timeout(self, mode: str) -> None:
        timeout = 20
        ranks = Ranks(3, timeout=timeout)
        try:
            begin = time.perf_counter()
            *others, killed = ranks.run(die, mode)
            assert time.perf_counter() - begin < 3 * timeout  # one for each thing that may be waited for
        finally:
            ranks.close()
        assert killed is None
        assert all(isinstance(answer, RuntimeError) for answer in others)


class TestAbsentRank:
    @pytest.mark.parametrize(("mode", "what"), [("ring", "forward"), ("ulysses", "backward")])
    def test_who_waits_for_it_gets_an_error_within_the_timeout(self, mode: str, what: str) -> None:
        timeout = 10
        ranks = Ranks(2, timeout=timeout)
        try:
            assert ranks.run(absent, mode, "nothing") == [None, None]
            begin = time.perf_counter()
            waiting, gone = ranks.run(absent, mode, what)
            assert time.perf_counter() - begin < 2 * timeout
        finally:
            ranks.close()
        assert gone is None
        assert isinstance(waiting, RuntimeError)


class TestMemoryAndTraffic:
    def test_no_rank_holds_all_keys(self, four: Ranks) -> None:
        case = Case(([-1, *[0] * 20], [40, *[30] * 20]))
        tokens = sum(case.forest[1])
        for largest, arrived, _, own in four.run(largest_key_blocks, case):
            assert largest <= own <= 2 * tokens / 4
            assert arrived <= 0.6 * (tokens - own)  # of an all-gather

    def test_who_owns_a_prompt_sends_it_to_two_of_three_ranks(self, four: Ranks) -> None:
        case = Case(([-1, *[0] * 200], [300, *[20] * 200]))
        measured = four.run(largest_key_blocks, case)
        assert [arrived for _, arrived, _, _ in measured] == [0, 300, 300, 300]
        assert [left for _, _, left, _ in measured] == [600, 0, 300, 0]

    def test_gather_undoes_scatter(self, four: Ranks) -> None:
        case = Case(forests.SHAPES["two levels across tiles"])
        mask, whole = case.mask(), case.tensors()[0][0]
        for where, (same, grad) in zip(mask.shard(4), four.run(scatter_and_gather, case), strict=True):
            assert same
            torch.testing.assert_close(grad, whole[where])


class TestAuto:
    def test_ring_where_little_is_shared(self, four: Ranks) -> None:
        said = four.run(explained, Case(([-1] * 8, [64] * 8)), cost=CostModel(tflops=1e-3))
        assert len(set(said)) == 1  # all ranks choose alike
        assert "-> ring" in said[0]

    def test_ring_where_heads_are_fewer_than_ranks(self, four: Ranks) -> None:
        assert (
            "-> ring" in four.run(explained, Case(([-1], [256]), heads=1, kv_heads=1), cost=CostModel(tflops=1e-3))[0]
        )

    def test_ulysses_where_one_sequence_crosses_and_starting_messages_is_slow(self, four: Ranks) -> None:
        cost = CostModel(latency=1.0)
        assert "-> ulysses" in four.run(explained, Case(([-1], [256])), cost=cost)[0]

    def test_the_chosen_mode_can_be_asked_for(self, four: Ranks) -> None:
        said = four.run(explained, Case(([-1], [64])), mode="ulysses")[0]
        assert "-> ulysses" in said
        assert "mode='ulysses' was asked for" in said

    @pytest.mark.parametrize("values", [{"tflops": 0}, {"bandwidth": -1}, {"latency": -1}])
    def test_a_machine_that_cannot_be(self, values: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="above 0"):
            CostModel(**values)


class TestHeads:
    @pytest.mark.parametrize("heads", [(32, 8), (8, 1), (6, 2), (7, 7), (12, 4)])
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
    def test_every_head_on_one_rank_with_its_key_head(self, heads: tuple[int, int], world_size: int) -> None:
        split = split_heads(*heads, world_size)
        assert [h for part in split for h in range(part.begin, part.end)] == list(range(heads[0]))
        for part in split:
            read = {h // (heads[0] // heads[1]) for h in range(part.begin, part.end)}
            assert read == set(range(part.kv_begin, part.kv_end))
