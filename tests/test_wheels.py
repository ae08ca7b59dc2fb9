"""Each machine is told the wheel that runs on it, and a wheel that claims what it does not keep is not published."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tree_attn import _kernels, _matrix, install
from tree_attn._version import __version__
from wheels import matrix

ROOT = Path(__file__).resolve().parent.parent
MATRIX = matrix.load()
H100 = _matrix.Machine("linux", "x86_64", (2, 35), (13, 0), (9, 0))
URL = "https://example.org/whl"


@pytest.mark.parametrize(
    ("change", "label", "why"),
    [
        ({}, "cu130", "the driver runs CUDA 13.0"),
        ({"driver_cuda": (13, 2)}, "cu130", "the driver runs CUDA 13.2"),
        ({"driver_cuda": (12, 8)}, "cu126", "the driver runs CUDA 12.8"),
        ({"driver_cuda": (12, 0)}, "cu126", "the driver runs CUDA 12.0"),
        ({"libc": (2, 28)}, "cu130", "the driver runs"),
        ({"processor": "aarch64"}, "cu130", "the driver runs"),
        ({"capability": None}, "cu130", "the driver runs"),
        ({"driver_cuda": (11, 8)}, None, "too old: update it to 525.60.13"),
        ({"driver_cuda": None}, None, "no NVIDIA driver"),
        ({"libc": (2, 27)}, None, "need glibc 2.28 or newer; the C library here is glibc 2.27"),
        ({"libc": None}, None, "is no glibc"),
        ({"processor": "ppc64le"}, None, "this processor is ppc64le"),
        ({"system": "darwin"}, None, "Linux alone"),
        ({"capability": (7, 5)}, None, "sm_80"),
    ],
)
def test_the_wheel_is_chosen_by_platform_driver_and_gpu(change, label, why):
    chosen = _matrix.choose(H100._replace(**change), MATRIX)
    assert chosen.label == label
    assert why in chosen.why


def test_command_is_strict_and_names_the_index_of_its_cuda(monkeypatch):
    monkeypatch.setattr(_matrix, "load", lambda: MATRIX)
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100)
    monkeypatch.setenv(_matrix.INDEX_VARIABLE, URL + "/")
    assert _matrix.command() == f"pip install tree-attn=={__version__}+cu130 --extra-index-url {URL}/cu130"
    monkeypatch.delenv(_matrix.INDEX_VARIABLE)
    monkeypatch.setitem(MATRIX, "index_url", "")
    assert _matrix.command() is None


def test_install_without_kernels_says_which_wheel_has_them(monkeypatch, tmp_path):
    monkeypatch.setattr(_kernels, "LIBRARY", tmp_path / "missing.so")
    monkeypatch.setattr(_matrix, "load", lambda: MATRIX)
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100)
    monkeypatch.setenv(_matrix.INDEX_VARIABLE, URL)
    found = _kernels._load()
    assert found.remedy == f"Install the wheel that fits: {_matrix.command()}"
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100._replace(libc=(2, 27)))
    assert "the wheels need glibc 2.28" in _kernels._load().reason


def test_wheel_whose_library_cannot_run_here_is_told_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(_kernels, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(_matrix, "load", lambda: MATRIX)
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100._replace(driver_cuda=(12, 4)))
    monkeypatch.setenv(_matrix.INDEX_VARIABLE, URL)
    too_old = _kernels.DeviceFacts(driver=12040, runtime=13000, count_error=35)
    assert f"Update the driver, or install the wheel that fits: {_matrix.command()}" == (
        _kernels._judge(0, too_old, lambda error: b"").remedy
    )
    no_code = _kernels.DeviceFacts(driver=13000, runtime=13000, count=1, major=8, minor=6, probe_error=209)
    assert "install the wheel that fits" in _kernels._judge(0, no_code, lambda error: b"").remedy.lower()


def test_dry_run_prints_the_command_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(_matrix, "load", lambda: MATRIX)
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100)
    monkeypatch.setattr(install.subprocess, "run", lambda *a, **k: pytest.fail("ran pip"))
    assert install.main(["--dry-run", "--index-url", URL]) == 0
    assert f"-m pip install tree-attn=={__version__}+cu130 --extra-index-url {URL}/cu130" in capsys.readouterr().out
    monkeypatch.setattr(_matrix, "this_machine", lambda capability: H100._replace(driver_cuda=None))
    assert install.main(["--dry-run", "--index-url", URL]) == 1
    assert "no NVIDIA driver" in capsys.readouterr().err


def test_a_label_is_always_that_of_its_toolkit(tmp_path):
    changed = tmp_path / "matrix.toml"
    changed.write_text(matrix.PATH.read_text().replace('toolkit = "12.6"', 'toolkit = "12.4"'))
    with pytest.raises(ValueError, match=r"cu126 is built by CUDA 12.4"):
        matrix.load(changed)
    with pytest.raises(ValueError, match="cu135 all is in no row"):
        matrix.build_row(MATRIX, matrix.label_of("13.5"), "all")


def test_one_line_in_the_matrix_is_all_that_a_new_cuda_needs(tmp_path):
    changed = tmp_path / "matrix.toml"
    row = '[[cuda]]\nlabel = "cu140"\ntoolkit = "14.0"\ndriver = "700.0"\ndriver_cuda = "14.0"\npublished = true\n'
    changed.write_text(matrix.PATH.read_text() + row)
    grown = matrix.load(changed)
    assert set(matrix.wheel_labels(grown)) - set(matrix.wheel_labels(MATRIX)) == {"cu140", "cu140.sm80", "cu140.sm90"}
    assert {r["cuda"] for r in matrix.github(grown)} == {"cu126", "cu130", "cu140"}
    assert _matrix.choose(H100._replace(driver_cuda=(14, 1)), grown).label == "cu140"
    assert "/cu140`" in matrix.table(grown)


@pytest.mark.parametrize("page", matrix.PAGES, ids=lambda page: page.name)
def test_table_in_the_docs_is_the_matrix(page):
    text = page.read_text()
    assert text == matrix.with_table(text, matrix.load(), matrix.PAGES[page]), "run: python -m wheels.matrix tables"
    with pytest.raises(ValueError, match="no table between"):
        matrix.with_table("# A page\n", matrix.load(), slim=True)


def write_wheel(folder, name, *files):
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return path


@pytest.mark.parametrize(
    ("name", "files", "problem"),
    [
        ("tree_attn-1.0-py3-none-any.whl", [], "the matrix is not baked in"),
        ("tree_attn-1.0-py3-none-any.whl", ["tree_attn/_matrix.json", "tree_attn/x.so"], "a pure wheel with"),
        ("tree_attn-1.0-cp311-cp311-any.whl", ["tree_attn/_matrix.json"], "py3-none"),
        ("tree_attn-1.0+cu130-py3-none-manylinux_2_28_x86_64.whl", ["tree_attn/_matrix.json"], "not tree_attn/libtree"),
        ("other-1.0-py3-none-any.whl", ["tree_attn/_matrix.json"], "the package is other"),
    ],
)
def test_wheel_that_is_not_what_its_name_says_fails_the_check(tmp_path, name, files, problem):
    pytest.importorskip("packaging")
    from wheels import check

    problems = check.check(write_wheel(tmp_path, name, *files), MATRIX)
    assert any(problem in said for said in problems), problems
