"""Several ranks give what one process gives: outputs, lse and gradients, in both modes."""

from __future__ import annotations

from collections.abc import Iterator

import forests
import hypothesis.strategies as st
import pytest
import torch
from distributed_ranks import Case, Ranks, Result, attend, attend_all
from hypothesis import HealthCheck, given, settings

from tree_attn import tree_attention

MODES = ("ring", "ulysses")
# Sums of at most a few hundred terms in another order; bfloat16 rounds the part that every rank contributes (2**-8).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4 * 2**-8}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def one_process(case: Case) -> Result:
    qkv, sinks, grad_out, grad_lse = case.tensors()
    leaves = [x.requires_grad_() for x in qkv] + ([] if sinks is None else [sinks.requires_grad_()])
    out, lse = tree_attention(*leaves[:3], case.mask(), sinks=sinks, return_lse=True, **case.options())
    return [out.detach(), lse.detach().T, *torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse])]


def assert_same(results: list[Result], case: Case) -> None:
    expected = one_process(case)
    for result in results:
        assert isinstance(result, list), result
    shards = case.mask().shard(len(results))
    for i, whole in enumerate(expected):
        if i < 5:  # of tokens
            got = torch.empty_like(whole)
            for where, result in zip(shards, results, strict=True):
                got[where] = result[i]
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

    @pytest.mark.parametrize("mode", MODES)
    def test_fewer_tokens_than_ranks(self, ranks: Ranks, mode: str) -> None:
        case = Case(([-1], [1]))
        assert_same(ranks.run(attend, case, mode), case)
