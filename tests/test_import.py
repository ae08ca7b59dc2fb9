"""Importing the library is quick, needs torch alone, and reads nothing it does not need yet."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tree_attn

EXTRAS = ("typer", "rich", "matplotlib", "numpy", "kernels", "pytest", "hypothesis", "transformers", "triton")


def python(code: str) -> dict[str, object]:
    """What a fresh interpreter that runs ``code`` prints, read as JSON."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_needs_torch_and_the_standard_library_alone() -> None:
    """Also where numpy and every extra are missing: their import is made to fail."""
    found = python(
        "import json, sys\n"
        "import torch\n"
        f"for name in {EXTRAS}: sys.modules[name] = None\n"
        "before = set(sys.modules)\n"
        "import tree_attn\n"
        "mask = tree_attn.TreeMask.from_nodes([-1, 0], [2, 2])\n"
        "x = torch.ones(4, 2, 8)\n"
        "out = tree_attn.tree_attention(x, x, x, mask, backend='reference')\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(json.dumps({'new': sorted(new - set(sys.stdlib_module_names)), 'sum': out.sum().item()}))\n"
    )
    assert set(found["new"]) <= {"torch", "tree_attn"}  # type: ignore[arg-type]
    assert abs(found["sum"] - 64.0) < 1e-4  # type: ignore[operator]


def test_import_loads_no_compiler() -> None:
    """torch._dynamo and sympy take a second; only torch.compile needs them."""
    found = python(
        "import json, sys\n"
        "import torch, tree_attn\n"
        "print(json.dumps({'heavy': [m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules]}))\n"
    )
    assert found["heavy"] == []


def test_entry_points_are_read_when_a_backend_is_chosen_and_not_at_import() -> None:
    found = python(
        "import importlib.metadata, json\n"
        "import torch\n"
        "calls = []\n"
        "importlib.metadata.entry_points = lambda **group: calls.append(group) or []\n"
        "import tree_attn\n"
        "at_import = len(calls)\n"
        "tree_attn.backends()\n"
        "print(json.dumps({'at_import': at_import, 'later': calls}))\n"
    )
    assert found == {"at_import": 0, "later": [{"group": "tree_attn.backends"}]}


@pytest.mark.speed
def test_import_adds_under_150_ms_to_torch() -> None:
    """CPU time, so that other work on the machine does not count; the best of three, the first compiles bytecode."""
    code = (
        "import json, time\n"
        "import torch\n"
        "start = time.process_time()\n"
        "import tree_attn\n"
        "print(json.dumps({'seconds': time.process_time() - start}))\n"
    )
    seconds = min(float(python(code)["seconds"]) for _ in range(3))  # type: ignore[arg-type]
    assert seconds < 0.150


def test_torch_is_the_only_requirement() -> None:
    requires = importlib.metadata.requires("tree-attn") or []
    plain = [r for r in requires if "extra ==" not in r]
    assert plain == ["torch>=2.9"]


def test_the_package_is_typed_and_has_a_version() -> None:
    assert (Path(tree_attn.__file__).parent / "py.typed").exists()
    assert tree_attn.__version__ == importlib.metadata.version("tree-attn").partition("+")[0]
