"""A release is published whole or not at all, its wheels say what is in them, and the index keeps the older ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wheels import matrix, release

ROOT = Path(__file__).resolve().parent.parent
MATRIX = matrix.load() | {"index_url": "https://example.org/whl"}
BUILD = {"version": "1.2.3", "cuda": "13.0", "archs": ["sm_80", "sm_90a"], "commit": "0123456789ab", "torch": "2.13.0"}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


# -- the whole release -----------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """What a release is checked against, at version 1.2.3."""
    (tmp_path / "tree_attn").mkdir()
    (tmp_path / "tree_attn" / "_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3 - 2026-12-01\n\n* News.\n\n## 1.2.2\n\n* Old.\n")
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    """dist and sbom with an empty file for every one of a release."""
    folders = tmp_path / "dist", tmp_path / "sbom"
    for folder, names in zip(folders, release.expected_files(MATRIX, "1.2.3"), strict=True):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return folders


def test_sources_that_agree_are_a_release(sources):
    assert release.check_sources("v1.2.3", MATRIX, sources) == []
    assert release.notes("1.2.3", sources) == "* News."


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.4", "v1.2.3rc1"])
def test_tag_that_is_not_the_version_is_refused(sources, tag):
    [problem] = release.check_sources(tag, MATRIX, sources)
    assert "must be v1.2.3" in problem


def test_version_without_changes_or_index_is_refused(sources):
    (sources / "CHANGELOG.md").write_text("# Changes\n\n## Unreleased\n\n* News.\n")
    problems = release.check_sources("v1.2.3", MATRIX | {"index_url": ""}, sources)
    assert ["## 1.2.3" in problems[0], "index_url" in problems[1]] == [True, True]


def test_whole_release_passes(folders):
    assert release.check_files(*folders, MATRIX, "1.2.3") == []


def test_release_has_every_wheel_of_the_matrix_and_an_sbom_for_each():
    files, sboms = release.expected_files(MATRIX, "1.2.3")
    wheels = {name for name in files if name.endswith(".whl")}
    assert len(wheels) == 1 + len(matrix.wheel_labels(MATRIX)) * len(MATRIX["platform"])
    assert sboms == {f"{wheel}.cdx.json" for wheel in wheels}
    assert {"tree_attn-1.2.3.tar.gz", "tree_attn-1.2.3-py3-none-any.whl"} <= files


@pytest.mark.parametrize("which", [0, 1])
def test_missing_and_foreign_files_are_named(folders, which):
    gone = sorted(release.expected_files(MATRIX, "1.2.3")[which])[0]
    (folders[which] / gone).unlink()
    (folders[which] / "tree_attn-1.2.2-py3-none-any.whl").touch()
    problems = release.check_files(*folders, MATRIX, "1.2.3")
    assert problems == [
        f"{folders[which]} lacks {gone}",
        f"{folders[which]} has tree_attn-1.2.2-py3-none-any.whl, which is no part of 1.2.3",
    ]


# -- what is in a wheel ----------------------------------------------------------------------------------------------


def write_wheel(folder: Path, label: str | None) -> Path:
    version = "1.2.3" + (f"+{label}" if label else "")
    tag = "manylinux_2_28_x86_64" if label else "any"
    path = folder / f"tree_attn-{version}-py3-none-{tag}.whl"
    metadata = (
        f"Metadata-Version: 2.4\nName: tree-attn\nVersion: {version}\nSummary: Trees\nLicense-Expression: Apache-2.0\n"
        'Requires-Dist: torch>=2.9\nRequires-Dist: typer>=0.12; extra == "cli"\n\n'
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"tree_attn-{version}.dist-info/METADATA", (2026, 1, 2, 3, 4, 6)), metadata)
        if label:
            library = zipfile.ZipInfo("tree_attn/libtree_attn_cuda.so", (2026, 1, 2, 3, 4, 6))
            archive.writestr(library, b"\x7fELF" + json.dumps(BUILD).encode() + b"\0GCC: (GNU) 13.3.1\0")
    return path


@pytest.fixture
def sbom():
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is in ci/release_tools.txt")
    from wheels import sbom

    return sbom


def test_sbom_names_the_wheel_by_its_digest(sbom, tmp_path):
    wheel = write_wheel(tmp_path, None)
    found = json.loads(sbom.describe(wheel))
    component = found["metadata"]["component"]
    assert (component["name"], component["version"]) == ("tree-attn", "1.2.3")
    assert component["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]
    assert component["licenses"] == [{"expression": "Apache-2.0"}]
    assert found["metadata"]["timestamp"].startswith("2026-01-02T03:04:06")
    assert [(c["name"], c["scope"]) for c in found["components"]] == [("torch", "required")]


def test_sbom_of_a_cuda_wheel_names_what_was_linked_into_the_library(sbom, tmp_path):
    found = json.loads(sbom.describe(write_wheel(tmp_path, "cu130")))
    parts = {c["bom-ref"]: c for c in found["components"]}
    assert parts["inside:cudart"]["version"] == "13.0"
    assert parts["inside:cudart"]["licenses"][0]["license"]["name"] == "NVIDIA CUDA Toolkit EULA"
    assert parts["inside:torch-headers"]["version"] == "2.13.0"
    told = {(p["name"], p["value"]) for p in parts[sbom.LIBRARY]["properties"]}
    assert told == {
        ("tree-attn:architectures", "sm_80 sm_90a"),
        ("tree-attn:commit", "0123456789ab"),
        ("tree-attn:compiler", "GCC: (GNU) 13.3.1"),
    }
    links = {entry["ref"]: set(entry.get("dependsOn", [])) for entry in found["dependencies"]}
    assert links[sbom.LIBRARY] == {"inside:cudart", "inside:torch-headers", "inside:libstdc++"}


def test_same_wheel_has_the_same_sbom(sbom, tmp_path):
    wheel = write_wheel(tmp_path, "cu130")
    assert sbom.describe(wheel) == sbom.describe(wheel)


def test_library_that_does_not_say_how_it_was_built_has_no_sbom(sbom, tmp_path):
    wheel = write_wheel(tmp_path, None)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tree_attn/libtree_attn_cuda.so", b"\x7fELF")
    with pytest.raises(ValueError, match="does not say how it was built"):
        sbom.describe(wheel)


# -- scripts ---------------------------------------------------------------------------------------------------------

# Stands in for GitHub: releases are folders of $PAGES.
GH = """#!{python}
import fnmatch, os, shutil, sys
from pathlib import Path
pages, words = Path(os.environ["PAGES"]), sys.argv[1:]
if words[:2] == ["release", "list"]:
    print("\\n".join(sorted((p.name for p in pages.iterdir()), reverse=True)[: int(words[words.index("--limit") + 1])]))
elif words[:2] == ["release", "download"]:
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--pattern"]
    files = [f for f in (pages / words[2]).iterdir() if any(fnmatch.fnmatchcase(f.name, p) for p in patterns)]
    if not files:
        sys.exit("no assets match the file pattern")
    for file in files:
        shutil.copy(file, words[words.index("--dir") + 1])
else:
    with (pages.parent / "calls").open("a") as calls:
        calls.write(" ".join(words) + "\\n")
    if words[:2] == ["release", "view"]:
        sys.exit("release not found")
"""


@pytest.fixture
def github(tmp_path):
    """The variables that put the stand-in before the real gh."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "pages").mkdir()
    (tmp_path / "bin" / "gh").write_text(GH.replace("{python}", sys.executable))
    (tmp_path / "bin" / "gh").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PAGES": str(tmp_path / "pages")}


def test_index_keeps_older_releases_but_not_the_labels_that_left_the_matrix(github, tmp_path):
    pages = Path(github["PAGES"])
    for version in ("1.0", "1.1", "1.2"):
        names = [f"+{label}-py3-none-manylinux_2_28_x86_64.whl" for label in ("cu126", "cu126.sm80", "cu117")]
        for name in [*names, "-py3-none-any.whl", ".tar.gz", "-py3-none-any.whl.cdx.json"]:
            (pages / f"v{version}").mkdir(exist_ok=True)
            (pages / f"v{version}" / f"tree_attn-{version}{name}").touch()
    done = run("ci/collect_wheels.sh", str(tmp_path / "dist"), "2", **github)
    assert done.returncode == 0, done.stderr
    kept = ("+cu126-py3-none-manylinux_2_28_x86_64.whl", "+cu126.sm80-py3-none-manylinux_2_28_x86_64.whl")
    assert {p.name for p in (tmp_path / "dist").iterdir()} == {
        f"tree_attn-{version}{name}" for version in ("1.1", "1.2") for name in (*kept, "-py3-none-any.whl", ".tar.gz")
    }


def test_index_without_a_release_is_an_error(github, tmp_path):
    done = run("ci/collect_wheels.sh", str(tmp_path / "dist"), **github)
    assert done.returncode == 1
    assert "no release yet" in done.stderr


@pytest.fixture
def checkout(sources):
    """A checkout at version 1.2.3 with an index, for the scripts of a release."""
    shutil.copytree(ROOT / "ci", sources / "ci")
    (sources / "wheels").mkdir()
    for name in ("__init__.py", "matrix.py", "release.py"):
        shutil.copy(ROOT / "wheels" / name, sources / "wheels" / name)
    text = (ROOT / "wheels" / "matrix.toml").read_text()
    (sources / "wheels" / "matrix.toml").write_text(text.replace('index_url = ""', 'index_url = "https://example.org"'))
    return sources


def test_release_page_is_a_draft_until_it_has_every_file(github, folders, checkout):
    command = [str(checkout / "ci" / "github_release.sh"), "v1.2.3", *map(str, folders)]
    done = run(*command, **github)
    assert done.returncode == 0, done.stderr
    calls = (Path(github["PAGES"]).parent / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["view", "create", "upload", "edit"]
    assert "--draft --verify-tag" in calls[1]
    files, sboms = release.expected_files(MATRIX, "1.2.3")
    uploaded = {Path(word).name for word in calls[2].split()[3:]} - {"--clobber"}
    assert uploaded == {name for name in files if not name.startswith("hub/")} | sboms
    assert calls[3] == "release edit v1.2.3 --draft=false"


def test_release_page_of_half_a_release_is_not_made(github, folders, checkout):
    next(iter(folders[0].glob("*.tar.gz"))).unlink()
    done = run(str(checkout / "ci" / "github_release.sh"), "v1.2.3", *map(str, folders), **github)
    assert done.returncode == 1
    assert "lacks tree_attn-1.2.3.tar.gz" in done.stderr
    assert not (Path(github["PAGES"]).parent / "calls").exists()


def test_pattern_that_is_not_one_file_is_an_error(tmp_path):
    (tmp_path / "a.json").touch()
    assert run("ci/one_file.sh", "path", str(tmp_path / "a.json")).stdout == f"path={tmp_path / 'a.json'}\n"
    assert run("ci/one_file.sh", "path", str(tmp_path / "*.json")).returncode == 1  # as bash leaves a pattern of none
    (tmp_path / "b.json").touch()
    assert run("ci/one_file.sh", "path", *map(str, tmp_path.glob("*.json"))).returncode == 1


@pytest.mark.parametrize("given", [[], ["13"], ["cu130"]])
def test_toolkit_is_asked_for_by_major_and_minor(given):
    done = run("ci/install_cuda.sh", *given)
    assert done.returncode != 0
    assert "such as 13.0" in done.stderr
