"""The Hub kernel loads beside the installed package, is refused when it was changed, and is off unless asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tree_attn import _hub, _kernels
from wheels import hub, hub_library, matrix

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A Hub repository with a stand-in for the library: nothing here runs on a GPU."""
    dist = tmp_path_factory.mktemp("dist")
    for label, toolkit in (("cu126", "12.6"), ("cu130", "13.0")):
        folder = dist / "hub" / f"{label}-x86_64"
        folder.mkdir(parents=True)
        (folder / hub.LIBRARY).write_bytes(b"stand-in for the library")
        built = {"namespace": hub_library.namespace(), "cuda": toolkit, "archs": "80+PTX;90a", "machine": "x86_64"}
        (folder / "build.json").write_text(json.dumps(built))
    output = tmp_path_factory.mktemp("hub") / "repository"
    variants = hub.assemble(dist, output, matrix.load())
    assert variants == [
        "torch-stable-abi29-cu126-x86_64-linux",
        "torch-stable-abi29-cu130-x86_64-linux",
        "torch-universal",
    ]
    return output


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_beside_the_installed_package_in_one_process_and_agrees_with_it(repository):
    said = run(f"""
import importlib, importlib.util, json, sys, torch
folder = {str(repository / "build" / "torch-universal")!r}
name = json.load(open(folder + "/metadata.json"))["id"]
import tree_attn
ours = set(sys.modules)
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
theirs = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
loaded = set(m.split(".")[0] for m in set(sys.modules) - ours)
assert loaded - set(sys.stdlib_module_names) <= set([name, "torch"]), loaded
q = torch.randn(7, 4, 16)
outs = []
for package in (tree_attn, theirs):
    mask = package.TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
    outs.append(package.tree_attention(q, q, q, mask))
    outs.append(torch.compile(package.tree_attention, backend="eager", fullgraph=True)(q, q, q, mask))
assert all(torch.equal(outs[0], out) for out in outs)
assert theirs.TreeMask is not tree_attn.TreeMask
assert hasattr(theirs, "flash_attn_forward") and hasattr(theirs, "supports_flash_attn")
assert not hasattr(theirs, "flash_attn_varlen_func")
operators = importlib.import_module(name + "._ops")
print(operators.add_op_namespace_prefix("forward") == name + "::forward")
""")
    assert said.strip() == "True"


def test_pair_ignores_the_dense_mask_when_there_is_a_tree():
    import torch

    from tree_attn import TreeMask, tree_attention
    from wheels.hub_pair import flash_attn_forward

    torch.manual_seed(0)
    mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
    q, k = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)
    wrong = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    expected = tree_attention(q[0].transpose(0, 1), k[0].transpose(0, 1), k[0].transpose(0, 1), mask)
    out, _ = flash_attn_forward(torch.nn.Module(), q, k, k, wrong, tree_mask=mask)
    torch.testing.assert_close(out[0], expected)
    plain, _ = flash_attn_forward(torch.nn.Module(), q, k, k, None)
    path = tree_attention(*(x[0].transpose(0, 1) for x in (q, k, k)), TreeMask.from_nodes([-1], [7]))
    torch.testing.assert_close(plain[0], path)
    with pytest.raises(NotImplementedError, match="dropout"):
        flash_attn_forward(torch.nn.Module(), q, k, k, None, dropout=0.1, tree_mask=mask)


def test_sources_that_the_library_was_not_linked_for_are_refused(tmp_path):
    folder = tmp_path / "hub" / "cu130-x86_64"
    folder.mkdir(parents=True)
    (folder / hub.LIBRARY).touch()
    (folder / "build.json").write_text(json.dumps({"namespace": "old", "cuda": "13.0", "archs": "80"}))
    with pytest.raises(ValueError, match=r"other sources.*ci/build_wheel.sh cu130 all"):
        hub.assemble(tmp_path, tmp_path / "out", matrix.load())


def test_a_changed_library_is_refused_by_its_digest(repository, tmp_path):
    import shutil

    folder = tmp_path / "variant"
    shutil.copytree(repository / "build" / "torch-stable-abi29-cu130-x86_64-linux", folder)
    found = _hub._checked(folder, "org/tree-attn@v1")
    assert found == (folder / hub.LIBRARY, json.loads((folder / "metadata.json").read_text())["id"])
    (folder / hub.LIBRARY).write_bytes(b"something else")
    assert "is refused: libtree_attn_cuda.so is not the file" in _hub._checked(folder, "org/tree-attn@v1")


def test_universal_variant_is_a_reason_and_no_library(repository):
    said = _hub._checked(repository / "build" / "torch-universal", "org/tree-attn@v1")
    assert said == "the Hub kernel org/tree-attn@v1 has no kernels for this machine, only torch-universal"


def test_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv(_hub.VARIABLE, raising=False)
    assert _hub.find() is None


@pytest.mark.parametrize("source", ["org/tree-attn", "tree-attn@v1", "org/tree-attn@", "/tree-attn@v1"])
def test_revision_and_organisation_are_mandatory(source, monkeypatch):
    with pytest.raises(ValueError, match="revision is mandatory"):
        _hub.use_hub(source)
    monkeypatch.setenv(_hub.VARIABLE, source)
    assert "revision is mandatory" in _hub.find()


def test_missing_client_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_kernels, "LIBRARY", tmp_path / "missing.so")
    monkeypatch.setattr(_kernels, "_loaded", None)
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setenv(_hub.VARIABLE, "org/tree-attn@v1")
    reason = _kernels.load().reason
    assert "pip install 'tree-attn[hub]'" in reason
