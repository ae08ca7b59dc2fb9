"""Published files can be made again: the same sources give the same bytes, and a label is always the toolkit's own."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("packaging")

import wheel_builds
from wheel_builds import MATRIX, ROOT, Built

from wheels import check, matrix

CODE = """
#include <dlfcn.h>
void *found(const char *name) { return dlsym(0, name); }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return wheel_builds.built(tmp_path_factory)


@functools.cache
def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif("TREE_ATTN_DIST" in os.environ, reason="TREE_ATTN_DIST was built from other sources than these")
def test_another_checkout_makes_the_same_bytes(built, tmp_path):
    elsewhere = wheel_builds.small_checkout(tmp_path / "a path of another length" / "checkout", built.root)
    for arguments in (("pure",), (built.label, "all")):
        done = wheel_builds.build_wheel(elsewhere, *arguments, **wheel_builds.compiler())
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = sorted(p.relative_to(built.dist) for p in built.dist.rglob("*") if p.is_file())
    assert [p.suffix for p in made].count(".whl") == 2
    assert {str(p): digest(elsewhere / "dist" / p) for p in made} == {str(p): digest(built.dist / p) for p in made}


@pytest.mark.slow
def test_wheel_is_what_its_name_says_and_says_nothing_of_the_machine_that_built_it(built, tmp_path):
    for wheel in built.dist.glob("*.whl"):
        assert check.check(wheel, MATRIX) == []
    wheel = built.wheel(built.label)
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(check.LIBRARY)
    for trace in (str(built.root), sys.prefix, "tmpxft_", "_GLOBAL__N__"):
        assert trace.encode() not in library, f"the library holds {trace}"
    platform = MATRIX["platform"][0]
    assert platform["tag"].endswith(platform["machine"])


def test_toolkit_of_another_cuda_than_the_label_is_refused_before_anything_is_built(tmp_path):
    here = wheel_builds.toolkit_label()
    other = next(row for row in MATRIX["cuda"] if row["label"] != here)
    done = wheel_builds.build_wheel(ROOT, other["label"], "all", DIST=str(tmp_path))
    assert done.returncode == 1
    assert f"{other['label']} is built by CUDA {other['toolkit']}; here is CUDA" in done.stderr
    assert f": point CUDA_HOME at CUDA {other['toolkit']}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wheel_that_only_claims_the_old_platform_fails_the_check(tmp_path):
    wheel_builds.toolkit_label()  # skips where the checkers are not installed
    source, library = tmp_path / "found.c", tmp_path / "found.so"
    source.write_text(CODE)
    subprocess.run(["cc", "-shared", "-fPIC", "-nostdlib", source, "-o", library, "-lc"], check=True)
    if b"GLIBC_2.34" not in library.read_bytes():
        pytest.skip("the C library here is old enough that nothing built on it is too new")
    label = matrix.wheel_labels(MATRIX)[0]
    wheel = tmp_path / f"tree_attn-1.0+{label}-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, check.LIBRARY)
        archive.writestr("tree_attn/_matrix.json", "{}")
        archive.writestr(f"tree_attn-1.0+{label}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        archive.writestr(f"tree_attn-1.0+{label}.dist-info/RECORD", f"{check.LIBRARY},,\n")
    problems = "\n".join(check.check(wheel, MATRIX))
    assert "dlsym is GLIBC_2.34, newer than manylinux_2_28 has" in problems
    assert re.search(r"claims manylinux_2_28_x86_64, its symbols are those of manylinux_2_3\d", problems)


# -- sdist -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sdist_has_the_kernels_sources_and_builds_the_pure_wheel_on_every_python(built, tmp_path):
    [sdist] = built.dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    for folder in ("csrc", "ci", "wheels"):
        expected = {p.relative_to(built.root) for p in (built.root / folder).rglob("*") if p.is_file()}
        expected = {p for p in expected if "__pycache__" not in p.parts}
        assert expected
        assert expected <= {p.relative_to(source) for p in source.rglob("*")}
    for python in pythons():
        wheels = tmp_path / Path(python).parent.parent.name
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(sdist)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_HOME": "/"})
        assert done.returncode == 0, done.stderr
        [made] = wheels.iterdir()
        assert made.name.endswith("-py3-none-any.whl")
        assert check.check(made, MATRIX) == []


def pythons() -> list[str]:
    """This Python, which has tomllib, and where there is one a Python 3.10, which needs tomli to read the matrix."""
    beside = sorted(Path(sys.base_prefix).parent.glob("3.10*/bin/python"))  # as pyenv has them
    return [sys.executable, *map(str, beside[:1])]
