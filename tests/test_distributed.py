"""Several ranks give what one process gives: outputs, lse and gradients, in both modes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import forests
import hypothesis.strategies as st
import pytest
import torch
from distributed_ranks import (
    Case,
    Ranks,
    Result,
    attend,
    attend_all,
    attend_relayed,
    attend_under_autocast,
    events_of_ring,
)
from hypothesis import HealthCheck, given, settings

from tree_attn import tree_attention
from tree_attn.distributed._plan import ring_plan

MODES = ("ring", "ulysses")
# Sums of at most a few hundred terms in another order; bfloat16 rounds the part that every rank contributes (2**-8).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4 * 2**-8}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def one_process(case: Case, dtype: torch.dtype | None = None) -> Result:
    """The results of one process, computed in ``dtype`` if given."""
    qkv, sinks, grad_out, grad_lse = case.tensors()
    if dtype is not None:
        qkv, sinks = [x.to(dtype) for x in qkv], None if sinks is None else sinks.to(dtype)
        grad_out, grad_lse = grad_out.to(dtype), grad_lse.to(dtype)
    leaves = [x.requires_grad_() for x in qkv] + ([] if sinks is None else [sinks.requires_grad_()])
    out, lse = tree_attention(*leaves[:3], case.mask(), sinks=sinks, return_lse=True, **case.options())
    return [out.detach(), lse.detach().T, *torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse])]


def assert_same(results: list[Result], case: Case, expected: Result | None = None) -> None:
    expected = one_process(case) if expected is None else expected
    for result in results:
        assert isinstance(result, list), result
    shards = case.mask().shard(len(results))
    for i, whole in enumerate(expected):
        if i < 5:  # of tokens
            got = torch.empty_like(whole)
            for where, result in zip(shards, results, strict=True):
                got[where] = result[i].to(whole.dtype)
        else:  # of sinks: each rank has a part
            got = sum(result[i].double() for result in results)
        forests.assert_close(got, whole, TOLERANCE[case.dtype])


cases = st.builds(
    lambda heads, **rest: Case(heads=heads[0], kv_heads=heads[1], **rest),
    forest=forests.forests(max_nodes=12, max_tokens=150),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2), (3, 1), (6, 2), (1, 1), (6, 3)]),
    value_dim=st.sampled_from([None, 4]),
    window=st.sampled_from([None, None, 1, 3, 40]),
    softcap=st.sampled_from([0.0, 1.5]),
    scale=st.sampled_from([None, 0.3, -0.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


class TestSameAsOneProcess:
    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def test_any_forest_and_options(self, ranks: Ranks, case: Case) -> None:
        answers = ranks.run(attend_all, [(case, mode) for mode in MODES])
        for answer in answers:
            assert isinstance(answer, list), answer
        for i in range(len(MODES)):
            assert_same([answer[i] for answer in answers], case)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", forests.SHAPES)
    def test_named_shapes(self, ranks: Ranks, name: str, mode: str) -> None:
        case = Case(forests.SHAPES[name], with_sinks=True)
        assert_same(ranks.run(attend, case, mode), case)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("backend", ["sdpa", "reference"])
    def test_dtypes_and_backends(self, ranks: Ranks, backend: str, dtype: torch.dtype, mode: str) -> None:
        case = Case(forests.SHAPES["two levels across tiles"], dtype=dtype, backend=backend, with_sinks=True)
        assert_same(ranks.run(attend, case, mode), case)

    @pytest.mark.parametrize("mode", [*MODES, "auto"])
    def test_fewer_tokens_than_ranks(self, ranks: Ranks, mode: str) -> None:
        case = Case(([-1], [1]))
        assert_same(ranks.run(attend, case, mode), case)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("window", [None, 30])
    @pytest.mark.parametrize("forest", [([-1], [300]), ([-1, 0, 1, 2, 2, 1, 0], [90, 40, 30, 50, 60, 40, 90])])
    def test_keys_that_are_passed_on(
        self, ranks: Ranks, forest: forests.Forest, window: int | None, dtype: torch.dtype
    ) -> None:
        if len(ranks.pipes) == 2:
            pytest.skip("two ranks have nobody to pass keys on to")
        case = Case(forest, window=window, dtype=dtype, backend="sdpa")
        assert_same(ranks.run(attend_relayed, case), case)

    @pytest.mark.parametrize("mode", MODES)
    def test_autocast_runs_in_its_dtype(self, ranks: Ranks, mode: str) -> None:
        case = Case(forests.SHAPES["two levels across tiles"], dtype=torch.float32, with_sinks=True)
        results = ranks.run(attend_under_autocast, case, mode)
        for result in results:
            assert isinstance(result, list), result
            assert result[0].dtype == torch.bfloat16
            assert [x.dtype for x in result[2:5]] == [torch.float32] * 3  # of what was given
        with torch.autocast("cpu", torch.bfloat16):
            expected = one_process(case)
        assert expected[0].dtype == torch.bfloat16
        assert_same(results, replace(case, dtype=torch.bfloat16), expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_deterministic_gradients_are_the_same_bits(self, ranks: Ranks, mode: str) -> None:
        case = Case(forests.SHAPES["two levels across tiles"], dtype=torch.float32, deterministic=True, with_sinks=True)
        first, second = (ranks.run(attend, case, mode) for _ in range(2))
        assert_same(first, case)
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestOverlap:
    def test_keys_of_the_next_wave_are_asked_for_before_attention(self, ranks: Ranks) -> None:
        case, size = Case(([-1], [2000]), heads=1, kv_heads=1, dtype=torch.float32, backend="sdpa"), len(ranks.pipes)
        answers = ranks.run(events_of_ring, case)
        mask = case.mask()
        overlapped = 0
        for rank, events in enumerate(answers):
            assert isinstance(events, list), events
            plan = ring_plan(mask, size, rank)
            parts = [part for part in plan.parts if part.ranges is not None]
            asked_for = [sum(len(wave.rounds) for wave in plan.waves[:n]) for n in range(len(plan.waves) + 1)]
            forward = [i for i, event in enumerate(events) if event == "forward"]
            assert len(forward) == len(parts) == events.count("backward")
            for at, part in zip(forward, parts, strict=True):
                following = 0 if part.wave is None else part.wave + 1
                assert events[:at].count("exchange") == asked_for[min(following + 1, len(plan.waves))]
                overlapped += following < len(plan.waves)
            assert events[forward[-1] + 1 :].index("exchange") < events[forward[-1] + 1 :].index("backward")
        assert overlapped >= size - 1
