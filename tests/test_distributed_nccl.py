"""The sweep of test_distributed on two GPUs with NCCL, in both modes, against one process on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from distributed_ranks import Case, Ranks, attend_all
from hypothesis import HealthCheck, given, settings
from test_distributed import MODES, assert_same, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 GPUs; torch.cuda.device_count() is {torch.cuda.device_count()}"
    ),
]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, device="cuda")
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_any_forest_and_options(two: Ranks, dtype: torch.dtype, case: Case) -> None:
    # Value dims below 8 run on sdpa, the others on the kernels, where they take the dtype.
    case = replace(case, dtype=dtype, backend=None if dtype == torch.bfloat16 else "sdpa")
    answers = two.run(attend_all, [(case, mode) for mode in MODES])
    for answer in answers:
        assert isinstance(answer, list), answer
    for i in range(len(MODES)):
        assert_same([answer[i] for answer in answers], case)
