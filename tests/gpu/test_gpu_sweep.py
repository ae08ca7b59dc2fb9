"""Thousands of random problems over the whole table: dtypes, head dims, groups, options, layouts, forests."""

from __future__ import annotations

import os

import pytest
import torch
from gpu_cases import Case, failures, make_inputs, random_case, run

from tree_attn._backends.cuda import SMEM_VARIABLE
from tree_attn.registry import Options

CASES = int(os.environ.get("TREE_ATTN_SWEEP_CASES") or 3000)
CHUNKS = 20
SMALLER_GPUS = {"sm_86 and sm_89": 99 * 1024, "sm_80": 163 * 1024}  # bytes of shared memory a block may use


def check(seeds: range) -> None:
    wrong = []
    for seed in seeds:
        case = random_case(seed)
        found = failures(case)
        if found:
            wrong.append(f"{case}\n    {'; '.join(found)}")
    assert not wrong, f"{len(wrong)} of {len(seeds)} cases, from seed {seeds[0]}:\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_problems_agree_with_float64(chunk, path, sweep_seed, measured):
    size = -(-CASES // CHUNKS)
    print(f"seeds {sweep_seed + chunk * size} to {sweep_seed + (chunk + 1) * size - 1}")
    check(range(sweep_seed + chunk * size, sweep_seed + (chunk + 1) * size))
    swept = measured.setdefault("sweep_cases", {})
    swept[path] = swept.get(path, 0) + size


@pytest.mark.parametrize("gpu", SMALLER_GPUS)
def test_tiles_of_gpus_with_less_shared_memory(gpu, path, sweep_seed, monkeypatch):
    monkeypatch.setenv(SMEM_VARIABLE, str(SMALLER_GPUS[gpu]))
    check(range(sweep_seed, sweep_seed + CASES // 10))


# Larger than the sweep's: heads whose rows lie in several bands of the backward pass, of 4 096 rows or, where few key
# tiles see one, of 2 048.
BANDS = {
    "long": ([-1], [4000]),
    "long, a prompt and its answers": ([-1] + [0] * 8, [2400] + [200] * 8),
    "short": ([-1] * 20, [200] * 20),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("bands", BANDS)
def test_rows_in_several_bands(bands, rectangular, deterministic, path):
    parents, lengths = BANDS[bands]
    options = Options(64**-0.5, deterministic=deterministic)
    case = Case(7, torch.bfloat16, parents, lengths, 8, 2, 64, 64, options, rectangular=rectangular)
    assert failures(case) == []


def test_a_wrong_result_would_be_found(path):
    """The sweep's own check: each tensor, damaged by one entry, is reported."""
    case = Case(1, torch.float16, [-1, 0, 0], [40, 9, 80], 4, 2, 72, 64, Options(72**-0.5))
    inputs = make_inputs(case)
    results = run(inputs, "cuda")
    assert failures(case, results, inputs) == []
    for name in ("out", "lse", "grad_q", "grad_k", "grad_v"):
        for damage in (float("nan"), 0.5):
            tensor = getattr(results, name).clone()
            tensor.view(-1)[tensor.numel() // 2] += damage
            found = failures(case, results._replace(**{name: tensor}), inputs)
            assert len(found) == 1, (name, damage)
            assert found[0].startswith(f"{name} off by")
