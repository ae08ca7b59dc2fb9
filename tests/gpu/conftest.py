"""Tests that need an NVIDIA GPU: skipped with the reason elsewhere, and run with freshly allocated memory poisoned.

TREE_ATTN_REQUIRE_GPU=1 (set by ci/gpu.sh) makes a machine on which they cannot run an error instead.
TREE_ATTN_SWEEP_SEED and TREE_ATTN_SWEEP_CASES repeat a sweep, or size it.
TREE_ATTN_GPU_REPORT names a JSON file for what the tests measured.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from tree_attn import _kernels
from tree_attn._backends.cuda import PATH_VARIABLE, CudaBackend
from tree_attn.registry import Request

HERE = Path(__file__).parent
SEED = int(os.environ.get("TREE_ATTN_SWEEP_SEED") or random.SystemRandom().randrange(10**9))
MEASURED: dict[str, object] = {"sweep_seed": SEED}


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    problem = _kernels.unavailable(torch.cuda.current_device())
    return problem.reason if problem else None


WHY_NOT = _why_not()
# Run everything on each set of kernels that this build has for this GPU.
HOPPER = WHY_NOT is None and "hopper" in CudaBackend().detail(
    Request(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 1, 1, 128, 128)
)
PATHS = ("portable", "hopper") if HOPPER else ("portable",)


def pytest_configure(config):
    if WHY_NOT and os.environ.get("TREE_ATTN_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"the GPU tests cannot run here: {WHY_NOT}")


def pytest_report_header(config):
    return f"tree_attn kernels: {WHY_NOT or ', '.join(PATHS)}; sweep seed: TREE_ATTN_SWEEP_SEED={SEED}"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if WHY_NOT:
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", PATHS, indirect=True)


@pytest.fixture
def path(request, monkeypatch):
    """Forces a set of kernels."""
    monkeypatch.setenv(PATH_VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every tensor from torch.empty holds NaN (bytes: 0xff, a NaN as float32), so that what is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        if made.is_floating_point():
            made.fill_(float("nan"))
        elif made.dtype == torch.uint8:
            made.fill_(255)
        return made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def sweep_seed():
    return SEED


@pytest.fixture(scope="session")
def measured():
    """What a test puts here ends up in the report."""
    return MEASURED


def pytest_sessionfinish(session):
    target = os.environ.get("TREE_ATTN_GPU_REPORT")
    if target:
        Path(target).write_text(json.dumps(MEASURED, indent=1))
