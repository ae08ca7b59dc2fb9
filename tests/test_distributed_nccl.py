"""The sweep of test_distributed on two GPUs with NCCL, in both modes, against one process in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import forests
import hypothesis.strategies as st
import pytest
import torch
from distributed_ranks import Case, Ranks, attend, attend_all, attend_without_waiting
from hypothesis import HealthCheck, Phase, given, settings
from test_distributed import MODES, assert_same, one_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 GPUs; torch.cuda.device_count() is {torch.cuda.device_count()}"
    ),
]

# Forests smaller than a tile of the kernels, and of many tiles. Value dim 4 is none of the kernels': it runs on sdpa.
cases = st.builds(
    lambda heads, dims, **rest: Case(
        heads=heads[0], kv_heads=heads[1], head_dim=dims[0], value_dim=dims[1], backend=dims[2], **rest
    ),
    forest=st.one_of(
        forests.forests(max_nodes=12, max_tokens=150),
        forests.forests(max_nodes=30, max_tokens=800),
    ),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2), (3, 1), (6, 2), (1, 1), (6, 3)]),
    dims=st.sampled_from(
        [
            (8, None, "cuda"),
            (64, None, "cuda"),
            (128, None, "cuda"),
            (128, None, "cuda"),
            (40, 72, "cuda"),
            (8, 4, None),
        ]
    ),
    window=st.sampled_from([None, None, 1, 3, 40]),
    softcap=st.sampled_from([0.0, 1.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, device="cuda")
    yield ranks
    ranks.close()


def check(two: Ranks, case: Case) -> None:
    expected = one_process(replace(case, backend="sdpa"), torch.float64)
    answers = two.run(attend_all, [(case, mode) for mode in MODES])
    for answer in answers:
        assert isinstance(answer, list), answer
    for i in range(len(MODES)):
        assert_same([answer[i] for answer in answers], case, expected)


SWEEP = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # looking for a smaller failure would take longer than a machine with two GPUs is lent
)


@settings(SWEEP, max_examples=100)
@given(case=cases)
def test_any_forest_and_options_on_the_kernels(two: Ranks, case: Case) -> None:
    check(two, replace(case, dtype=torch.bfloat16))


@settings(SWEEP, max_examples=25)
@given(case=cases)
def test_any_forest_and_options_in_float32(two: Ranks, case: Case) -> None:
    check(two, replace(case, dtype=torch.float32, backend="sdpa"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", forests.SHAPES)
def test_named_shapes(two: Ranks, name: str, mode: str) -> None:
    case = Case(forests.SHAPES[name], head_dim=64, dtype=torch.bfloat16, with_sinks=True)
    assert_same(two.run(attend, case, mode), case, one_process(case, torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forest", [([-1], [600]), ([-1, *[0] * 6], [200, *[100] * 6]), ([-1] * 4, [100] * 4)])
def test_the_host_never_waits_in_an_unchecked_call(two: Ranks, forest: forests.Forest, mode: str) -> None:
    case = Case(forest, head_dim=64, dtype=torch.bfloat16)
    for answer in two.run(attend_without_waiting, case, mode):
        assert isinstance(answer, list), answer
