"""The training examples: 20 optimiser steps on trees leave the parameters that 20 steps path by path leave."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip(f"{EXAMPLES} is not here: the tests run outside a checkout", allow_module_level=True)


@pytest.fixture(autouse=True)
def _examples_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in ("common", "sft", "dpo", "grpo"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_twenty_steps_on_trees_and_path_by_path_train_the_same_model(name):
    result = importlib.import_module(name).compare(20, importlib.import_module("common").two_tasks()[:4])
    # AdamW divides by the size of a gradient, so it magnifies the rounding of small ones: the bound of the project.
    assert result.difference < 1e-4
    assert len(result.tree) == len(result.paths) == 20
    for tree, paths in zip(result.tree, result.paths, strict=True):
        assert tree == pytest.approx(paths, rel=1e-4, abs=1e-6)
    # Something was learned: each loss falls, by far more than the two ways may differ.
    assert result.paths[-1] < result.paths[0] - 0.01
    assert result.change > 0.1


def test_an_example_prints_its_curves_and_writes_the_plot(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; the plot needs it")
    common = importlib.import_module("common")
    result = common.Result([2.0, 1.0], [2.0, 1.0], [1.0, 1.0], [2.0, 2.0], difference=1e-7, change=0.5)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--steps", "2", "--out", str(tmp_path / "curves.png")])
    compare: Callable[[int, list], object] = lambda steps, rollouts: result  # noqa: E731
    common.main("a title", compare)
    assert "2.00x as fast" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    wrong = common.Result([2.0], [2.0], [1.0], [2.0], difference=2e-4, change=0.5)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--out", str(tmp_path / "wrong.png")])
    with pytest.raises(SystemExit, match="NOT"):
        common.main("a title", lambda steps, rollouts: wrong)
