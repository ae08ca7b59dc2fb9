"""The install stays pure unless the kernels are asked for, and a build that cannot work says what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and NamedTuples look their module up
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "csrc" / "build.py")
ptxas_report = load(ROOT / "ci" / "ptxas_report.py")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, with a library lying in the package as after an editable build."""
    root = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("tree_attn", "csrc"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    (root / "tree_attn" / "libtree_attn_cuda.so").write_text("left behind")
    return root


def fake_nvcc(folder: Path, says: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def wheel(root: Path, hidden: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel as pip does, with the module ``hidden`` not importable."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden.split()!r}));"
        "sys.argv = ['setup.py', '-q', 'bdist_wheel', '-d', 'out']; runpy.run_path('setup.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# -- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["", "0"])
def test_without_being_asked_the_wheel_is_pure_and_needs_no_torch(checkout, asked):
    done = wheel(checkout, hidden="torch ninja", TREE_ATTN_CUDA=asked, TREE_ATTN_NVCC="/missing", PATH="")
    assert done.returncode == 0, done.stderr
    (made,) = (checkout / "out").iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    assert "tree_attn/attention.py" in names
    assert not [n for n in names if n.endswith(".so") or n.startswith("csrc")]


# -- errors ----------------------------------------------------------------------------------------------------------


def test_build_that_cannot_see_torch_prints_the_line_that_works(checkout):
    done = wheel(checkout, hidden="torch", TREE_ATTN_CUDA="1")
    assert done.returncode != 0
    assert "cannot see torch" in done.stderr
    assert "\n    TREE_ATTN_CUDA=1 pip install --no-build-isolation -e .\n" in done.stderr


def test_old_nvcc_is_refused_before_anything_is_compiled(checkout, tmp_path):
    nvcc = fake_nvcc(tmp_path, "Cuda compilation tools, release 12.3, V12.3.107")
    done = wheel(checkout, TREE_ATTN_CUDA="1", TREE_ATTN_NVCC=nvcc)
    assert done.returncode != 0
    assert f"{nvcc} is CUDA 12.3. Install a CUDA toolkit, 12.4 or newer" in done.stderr


def test_missing_nvcc_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("TREE_ATTN_NVCC", raising=False)
    with pytest.raises(build.BuildError, match=r"^no nvcc found\. Install a CUDA toolkit, 12\.4 or newer"):
        build.find_nvcc()
    monkeypatch.setenv("TREE_ATTN_NVCC", "/missing/nvcc")
    with pytest.raises(build.BuildError, match="TREE_ATTN_NVCC is '/missing/nvcc', which is no executable"):
        build.find_nvcc()


def test_nvcc_is_the_one_named_before_the_one_on_the_path(tmp_path, monkeypatch):
    named, other = tmp_path / "named", tmp_path / "bin"
    named.mkdir()
    other.mkdir()
    fake_nvcc(other, "release 12.9,")
    monkeypatch.setenv("PATH", str(other), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("TREE_ATTN_NVCC", raising=False)
    assert build.find_nvcc().version == (12, 9)
    monkeypatch.setenv("TREE_ATTN_NVCC", fake_nvcc(named, "release 13.0,"))
    assert build.find_nvcc().version == (13, 0)


def test_torch_below_2_9_is_refused(monkeypatch):
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "2.8.0+cu126")
    with pytest.raises(build.BuildError, match=r"torch is 2\.8\.0\+cu126; the kernels need torch 2\.9"):
        build.find_torch()


# -- architectures ---------------------------------------------------------------------------------------------------


def test_default_architectures_also_serve_newer_gpus():
    flags = [a.gencode() for a in build.parse_archs(build.DEFAULT_ARCHS)]
    assert flags == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]


@pytest.mark.parametrize("text", ["80;90a", "80, 90a", "sm_80 sm_90a"])
def test_architectures_may_be_separated_as_one_likes(text):
    assert build.parse_archs(text) == [build.Arch("80", False), build.Arch("90a", False)]


@pytest.mark.parametrize("text", ["75", "80;", "Ampere", "80-PTX"])
def test_architectures_that_cannot_be_built_are_an_error(text):
    with pytest.raises(build.BuildError, match=r"TREE_ATTN_CUDA_ARCHS has .*; give architectures from 80 on"):
        build.parse_archs(text)


def test_every_class_is_compiled_for_both_dtypes_and_hopper_for_90a_alone(tmp_path):
    for name in ("dispatch.cu", "portable/forward.cu", "hopper/forward.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "dispatch.cu" else "launch<TA_HEAD_DIM>();")
        (tmp_path / name).with_name("instances.h").write_text(
            "#define TREE_ATTN_CLASSES(X) X(64, 64) \\\n  X(192, 128)\n#define OTHER X(8, 8)\n"
        )
    both = build.objects(tmp_path, build.parse_archs("80+PTX;90a"))
    names = [o.name for o in both]
    assert len(set(names)) == len(names)
    assert {n for n in names if n.startswith("portable/")} == {
        f"portable/forward.{dtype}.{dims}" for dtype in ("f16", "bf16") for dims in ("64x64", "192x128")
    }
    hopper = [o for o in both if o.source.startswith("hopper/")]
    assert hopper
    assert all(o.flags[0] == "-gencode=arch=compute_90a,code=[sm_90a]" for o in hopper)
    assert not any("sm_80" in flag for o in hopper for flag in o.flags)
    older = build.objects(tmp_path, build.parse_archs("80"))
    assert [o.name for o in older if o.source.startswith("hopper/")] == []
    assert "dispatch" in [o.name for o in older]


def test_a_source_may_have_classes_of_its_own(tmp_path):
    for name in ("forward.cu", "backward.cu", "backward_dq.cu"):
        (tmp_path / "hopper").mkdir(exist_ok=True)
        (tmp_path / "hopper" / name).write_text("launch<TA_HEAD_DIM>();")
    (tmp_path / "hopper" / "instances.h").write_text(
        "#define TREE_ATTN_CLASSES(X) X(32, 32)\n"
        "#define TREE_ATTN_HOPPER_FORWARD_CLASSES(X) X(64, 64) X(256, 256)\n"
        "#define TREE_ATTN_HOPPER_BACKWARD_CLASSES(X) X(64, 64)\n"
    )
    assert {o.name for o in build.objects(tmp_path, build.parse_archs("90a")) if ".f16." in o.name} == {
        "hopper/forward.f16.64x64",
        "hopper/forward.f16.256x256",
        "hopper/backward.f16.64x64",
        "hopper/backward_dq.f16.32x32",
    }
    (tmp_path / "hopper" / "instances.h").write_text("#define TREE_ATTN_HOPPER_FORWARD_CLASSES(X) X(64, 64)\n")
    with pytest.raises(build.BuildError, match=r"lists no classes for backward\.cu"):
        build.objects(tmp_path, build.parse_archs("90a"))


# -- what ptxas said -------------------------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
ptxas info    : Function properties for _Z6kernelv
    {spill} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes smem, 576 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_90a'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_report_reads_registers_spills_and_shared_memory():
    first, second = ptxas_report.parse("portable/forward.f16.256x256", PTXAS.format(spill=16))
    assert (first.arch, first.registers, first.spill_stores, first.spill_loads, first.smem) == (
        "sm_80",
        255,
        16,
        16,
        48,
    )
    assert (second.arch, second.registers, second.spills, second.smem) == ("sm_90a", 32, False, 0)


@pytest.mark.parametrize(
    ("name", "spill", "status"), [("128x128", 0, 0), ("128x128", 4, 1), ("64x64", 4, 1), ("256x256", 4, 0)]
)
def test_report_fails_on_spills_where_there_must_be_none(name, spill, status, tmp_path, monkeypatch, capsys):
    (tmp_path / f"forward.f16.{name}.o.log").write_text(PTXAS.format(spill=spill))
    monkeypatch.setattr(sys, "argv", ["ptxas_report.py", str(tmp_path)])
    assert ptxas_report.main() == status
    assert f"forward.f16.{name}" in capsys.readouterr().out
