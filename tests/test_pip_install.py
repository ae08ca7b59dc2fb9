"""The real pip, over loopback, into fresh environments: the wheel that was asked for comes, loads and answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("packaging")

import wheel_builds
from wheel_builds import MATRIX, Built, Client

from tree_attn._version import __version__
from wheels import index

pytestmark = pytest.mark.slow

TRY = """
import importlib.metadata, json, torch, tree_attn
from tree_attn import _kernels, _matrix
found = _kernels.load()
loaded = isinstance(found, _kernels.Kernels)
mask = tree_attn.TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
torch.manual_seed(0)
q, k, v = torch.randn(7, 4, 16, requires_grad=True), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
out = tree_attn.tree_attention(q, k, v, mask)
out.sum().backward()
scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 16**-0.5
weights = scores.masked_fill(~mask.dense(), -torch.inf).softmax(-1)
torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1)))
chosen = tree_attn.explain(q, k, v, mask)
print(json.dumps({
    "version": importlib.metadata.version("tree-attn"),
    "build": found.build if loaded else None,
    "reason": None if loaded else found.reason,
    "remedy": None if loaded else found.remedy,
    "operators": torch._C._dispatch_has_kernel("tree_attn_cuda::forward"),
    "stream": bool(found.functions.tree_attn_has_stream()) if loaded else None,
    "torch": [torch.__version__, torch.version.cuda],
    "device": _kernels.unavailable(0).reason,
    "explained": str(chosen),
    "chosen": chosen.chosen,
}))
"""
# What the machine is said to be: pip and the package ask the same functions.
OLD_MACHINE = """
import os, platform
confstr = os.confstr
os.confstr = lambda name: "glibc 2.17" if name == "CS_GNU_LIBC_VERSION" else confstr(name)
platform.libc_ver = lambda *arguments, **named: ("glibc", "2.17")
"""
DRIVER = "int cuDriverGetVersion(int *version) { *version = %d; return 0; }"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return wheel_builds.built(tmp_path_factory)


@pytest.fixture(scope="module")
def hosts(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two addresses: an index with the pure files alone, in the place of PyPI, and the index of the wheels."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "pure").mkdir()
    for file in [*built.dist.glob("*-any.whl"), *built.dist.glob("*.tar.gz")]:
        shutil.copy(file, folder / "pure")
    index.make(folder / "pure", folder / "pypi", MATRIX)
    index.make(built.dist, folder / "site", MATRIX, all_rows=True)
    with wheel_builds.serve(folder / "pypi") as (pypi, _), wheel_builds.serve(folder / "site") as (site, _):
        yield f"{pypi}/{MATRIX['cuda'][-1]['label']}", site


@pytest.fixture(scope="module", params=wheel_builds.clients(), ids=lambda client: " ".join(client))
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client") / "environment"
    yield wheel_builds.make_client(folder, *request.param)
    shutil.rmtree(folder)  # gigabytes, with a CUDA build of torch


def install(client: Client, hosts: tuple[str, str], label: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``pip install`` as the table of docs/install.md says, in an environment without the package."""
    client.pip("uninstall", "-y", "tree-attn")
    pypi, site = hosts
    given = arguments or ("tree-attn",)
    return client.pip("install", *given, "--index-url", pypi, "--extra-index-url", f"{site}/{label}")


def tried(client: Client, **environment: str) -> dict[str, object]:
    done = client.run("-c", TRY, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def labels(built: Built) -> list[str]:
    """The label of each CUDA wheel that was built."""
    return sorted(re.search(r"\+([\w.]+)-", wheel.name)[1] for wheel in built.dist.glob("*+*.whl"))


def test_wheel_of_the_index_comes_and_registers_its_operators_and_the_fallback_answers(client, hosts, built):
    for label in labels(built):
        done = install(client, hosts, label)
        assert done.returncode == 0, done.stderr
        said = tried(client)
        assert said["version"] == f"{__version__}+{label}"
        assert said["operators"]
        assert "cu" + said["build"]["cuda"].replace(".", "") == label.partition(".")[0]
        assert client.torch in f"torch=={said['torch'][0]}"
        # torch's current stream is found wherever torch has CUDA, whatever toolkit made the library.
        assert said["stream"] == bool(said["torch"][1])
        assert said["device"].endswith("no NVIDIA driver is installed") or not said["torch"][1]
        assert "is built without CUDA" in said["device"] or said["torch"][1]
        assert said["chosen"] in ("sdpa", "reference")
        assert "runs on NVIDIA GPUs; the tensors are on cpu" in said["explained"]


def test_strict_version_on_the_wrong_index_fails_and_installs_nothing(client, hosts, built):
    other = next(row["label"] for row in MATRIX["cuda"] if row["label"] != built.label)
    done = install(client, hosts, built.label, f"tree-attn=={__version__}+{other}")
    assert done.returncode == 1
    assert f"No matching distribution found for tree-attn=={__version__}+{other}" in done.stderr
    assert client.run("-c", "import tree_attn").returncode == 1


@pytest.fixture
def driver(tmp_path: Path):
    """``LD_LIBRARY_PATH`` with an NVIDIA driver that reports a version and can do nothing else."""

    def make(version: int) -> dict[str, str]:
        folder = tmp_path / str(version)
        folder.mkdir()
        (folder / "driver.c").write_text(DRIVER % version)
        library = folder / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", folder / "driver.c", "-o", library], check=True)
        return {"LD_LIBRARY_PATH": str(folder)}

    return make


def test_machine_too_old_for_the_wheels_gets_the_pure_one_and_is_told(client, hosts, built, driver):
    [packages] = client.python.parent.parent.glob("lib/python3*/site-packages")
    old = packages / "sitecustomize.py"
    old.write_text(OLD_MACHINE)
    try:
        done = install(client, hosts, built.label)
        assert done.returncode == 0, done.stderr
        said = tried(client, **driver(13000))
    finally:
        old.unlink()
    assert said["version"] == __version__
    assert said["build"] is None
    assert said["reason"] == (
        "not built: this install has no CUDA kernels, and no wheel that has them fits this machine: "
        "the wheels need glibc 2.28 or newer; the C library here is glibc 2.17"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux")
def test_install_command_replaces_the_pure_wheel_by_the_one_that_fits(client, hosts, built, driver):
    row = next(row for row in MATRIX["cuda"] if row["label"] == built.label)
    if not row["published"]:
        pytest.skip(f"{built.label} is not published, so the package does not advise it")
    pypi, site = hosts
    major, minor = map(int, row["driver_cuda"].split("."))
    fits = driver(1000 * major + 10 * minor) | {"TREE_ATTN_INDEX_URL": site, "PIP_INDEX_URL": pypi}
    client.pip("uninstall", "-y", "tree-attn")
    assert client.pip("install", "tree-attn", "--index-url", pypi).returncode == 0
    exact = f"tree-attn=={__version__}+{built.label} --extra-index-url {site}/{built.label}"
    assert tried(client, **fits)["remedy"] == f"Install the wheel that fits: pip install {exact}"
    dry = client.run("-m", "tree_attn.install", "--dry-run", **fits)
    assert dry.stdout.splitlines()[-1].endswith(f"-m pip install {exact}")
    assert tried(client)["version"] == __version__
    done = client.run("-m", "tree_attn.install", **fits)
    assert done.returncode == 0, done.stderr
    assert tried(client)["version"] == f"{__version__}+{built.label}"
    without = client.run("-m", "tree_attn.install")
    assert without.returncode == 1
    assert "no NVIDIA driver is installed" in without.stderr
