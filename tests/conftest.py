"""What every test file shares: one thread, GPU tests skipped with a reason, a registry to change and put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tree_attn import registry

# The tensors here are small: a second thread gains nothing, and waits for its core on a machine with other work.
torch.set_num_threads(1)

# Every option runs on these two without a GPU and without compiling.
CPU_BACKENDS = ("reference", "sdpa")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=CPU_BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves every option on a CPU."""
    return request.param


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the registry to change: what a test registers, forces or warns of is gone afterwards."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_load_errors", {})
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_entry_points_loaded", True)
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    registry.reset()
    yield
    monkeypatch.undo()
    registry.reset()
