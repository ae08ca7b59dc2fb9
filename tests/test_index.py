"""The index gives each client the wheel for the CUDA version it names, and the pure one where none fits."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import urllib.parse
import zipfile

import pytest

pytest.importorskip("packaging")

from wheel_builds import serve

from wheels import index
from wheels import matrix as matrices

MATRIX = matrices.load()
HERE = "manylinux_2_17_x86_64.manylinux2014_x86_64"


def make_wheel(folder, version="1.0", platform="any", name="tree_attn", claims=None):
    path = folder / f"{name}-{version}-py3-none-{platform}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"build = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {claims or version}\nRequires-Python: >=3.10\n",
        )
        tags = "".join(f"Tag: py3-none-{p}\n" for p in platform.split("."))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\n{tags}")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def site(tmp_path):
    """An index of the pure wheel and two CUDA versions, on the loopback interface."""
    dist = tmp_path / "dist"
    dist.mkdir()
    make_wheel(dist)
    for label in ("cu126", "cu130", "cu130.sm90"):
        make_wheel(dist, f"1.0+{label}", HERE)
    index.make(dist, tmp_path / "site", MATRIX)
    with serve(tmp_path / "site") as (url, requests):
        yield tmp_path / "site", url, requests


def pip(folder, *arguments):
    """Which wheels pip picks for ``arguments``, by its real code; nothing else is asked."""
    command = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir", "-q", "-d"]
    done = subprocess.run(
        [*command, str(folder / "got"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "no_proxy": "127.0.0.1"},
        timeout=120,
    )
    return done, sorted(p.name for p in (folder / "got").glob("*.whl"))


on_linux_x86_64 = pytest.mark.skipif(
    not sys.platform.startswith("linux") or __import__("platform").machine() != "x86_64",
    reason="the wheels made here are for Linux on x86_64",
)


@on_linux_x86_64
@pytest.mark.parametrize("label", ["cu126", "cu130", "cu130.sm90"])
def test_pip_takes_the_wheel_of_the_index_it_is_given(site, tmp_path, label):
    _, url, requests = site
    done, got = pip(tmp_path, "tree-attn", "--index-url", f"{url}/{label}")
    assert got == [f"tree_attn-1.0+{label}-py3-none-{HERE}.whl"], done.stderr
    assert any(path.endswith(".whl.metadata") for path in requests)  # read before the wheel itself


@on_linux_x86_64
def test_pip_prefers_the_extra_index_to_the_pure_wheel_of_the_main_one(site, tmp_path):
    _, url, _ = site
    plain = tmp_path / "plain"
    plain.mkdir()
    make_wheel(plain)
    index.make(plain, tmp_path / "main", MATRIX)
    with serve(tmp_path / "main") as (main, _):
        done, got = pip(tmp_path, "tree-attn", "--index-url", f"{main}/cu126", "--extra-index-url", f"{url}/cu130")
    assert got == [f"tree_attn-1.0+cu130-py3-none-{HERE}.whl"], done.stderr


def test_platform_without_a_wheel_gets_the_pure_one(site, tmp_path):
    _, url, _ = site
    place = ("--only-binary=:all:", "--platform", "macosx_14_0_arm64")
    done, got = pip(tmp_path, "tree-attn", "--index-url", f"{url}/cu130", *place)
    assert got == ["tree_attn-1.0-py3-none-any.whl"], done.stderr


def test_strict_version_on_the_wrong_index_fails(site, tmp_path):
    _, url, _ = site
    done, got = pip(tmp_path, "tree-attn==1.0+cu126", "--index-url", f"{url}/cu130")
    assert done.returncode != 0
    assert got == []
    assert "1.0+cu126" in done.stderr


def test_every_label_of_the_matrix_has_a_folder_even_without_a_wheel(site):
    folder, _, _ = site
    for label in matrices.wheel_labels(MATRIX):
        page = (folder / label / "tree-attn" / "index.html").read_text()
        assert "tree_attn-1.0-py3-none-any.whl" in page
        others = set(re.findall(r">tree_attn-1\.0\+([\w.]+)-py3", page)) - {label}
        assert not others, f"{label} offers {others}"
    assert not (folder / "cu124").exists()  # not published


def test_every_link_has_the_digest_of_its_file_and_html_and_json_agree(site):
    folder, _, _ = site
    for label in matrices.wheel_labels(MATRIX):
        project = folder / label / "tree-attn"
        listed = json.loads((project / "index.json").read_text())
        links = re.findall(
            r'href="([^#"]+)#sha256=(\w+)".*?data-core-metadata="sha256=(\w+)"', (project / "index.html").read_text()
        )
        assert [(f["url"], f["hashes"]["sha256"], f["core-metadata"]["sha256"]) for f in listed["files"]] == links
        assert links
        for address, digest, metadata in links:
            assert "+" not in address
            file = (project / urllib.parse.unquote(address)).resolve()
            assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
            assert hashlib.sha256(file.with_name(file.name + ".metadata").read_bytes()).hexdigest() == metadata


def test_front_page_has_a_command_for_every_label(site):
    folder, _, _ = site
    page = (folder / "index.html").read_text()
    for label in matrices.wheel_labels(MATRIX):
        assert f"</span>/{label}</code>" in page


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        ({"version": "1.0+cu999", "platform": HERE}, "no 'cu999'"),
        ({"version": "1.0+cu124", "platform": HERE}, "no 'cu124'"),
        ({"name": "other"}, "is not tree-attn"),
        ({"claims": "2.0"}, "has the metadata of 2.0"),
    ],
)
def test_a_wheel_that_the_index_would_not_serve_right_is_refused(tmp_path, wheel, expected):
    make_wheel(tmp_path, **wheel)
    with pytest.raises(ValueError, match=re.escape(expected)):
        index.make(tmp_path, tmp_path / "site", MATRIX)
    assert not (tmp_path / "site").exists()
