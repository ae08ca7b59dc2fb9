"""What the tests of publishing share: wheels that ci/build_wheel.sh built, an index server, fresh environments.

The wheels are built once a session, for real, from a copy of the sources whose kernels have one class of head dims:
less than a minute where everything takes several. Two variables make more of it by hand:

    TREE_ATTN_DIST      a dist/ that ci/build_wheel.sh filled, in the checkout it lies in, to test instead
    TREE_ATTN_CLIENTS   "PYTHON TORCH; ...", such as "python3.10 torch==2.9.1; python3.13 torch==2.14.1": the clients
                        (one, this Python with this torch)
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from wheels import hub_library
from wheels import matrix as matrices

ROOT = Path(__file__).resolve().parent.parent
MATRIX = matrices.load()
BUILD = hub_library.load_build()
TOOLS = ("auditwheel", "build", "elftools", "kernel_abi_check", "ninja", "packaging")


class Built(NamedTuple):
    root: Path  # the checkout
    dist: Path
    label: str  # of the toolkit here, "cu130"

    def wheel(self, label: str | None) -> Path:
        """The wheel with that local version; the pure one for None."""
        [found] = self.dist.glob(f"tree_attn-*+{label}-py3-none-*.whl" if label else "tree_attn-*-py3-none-any.whl")
        return found


def small_checkout(folder: Path, source: Path = ROOT) -> Path:
    """A copy of the sources whose kernels serve head dims up to 64 alone."""
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "site", "__pycache__", "*.so", "*.egg-info", "_matrix.json"
    )
    shutil.copytree(source, folder, ignore=left_out)
    changed = 0
    for path in (folder / "csrc").rglob("instances.h"):
        text, found = re.subn(r"(#define TREE_ATTN_\w*CLASSES\(X\))(?:.*\\\n)*.*", r"\1 X(64, 64)", path.read_text())
        path.write_text(text)
        changed += found
    assert changed, "no instances.h lists classes any more"
    return folder


def build_wheel(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``ci/build_wheel.sh`` in ``checkout``, with a compiler whose results run on manylinux_2_28."""
    return subprocess.run(
        ["bash", "ci/build_wheel.sh", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def toolkit_label() -> str:
    """The label of the toolkit here; skips the test where none can build a wheel."""
    absent = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"building wheels needs {', '.join(absent)}: pip install -r ci/wheel_tools.txt")
    try:
        label = matrices.label_of(".".join(map(str, BUILD.find_nvcc().version)))
    except BUILD.BuildError as error:
        pytest.skip(str(error))
    if label not in [row["label"] for row in MATRIX["cuda"]]:
        pytest.skip(f"the toolkit here is {label}, which the matrix does not build")
    return label


@functools.cache
def compiler() -> dict[str, str]:
    """``CXX`` for the build: none where the C library is old enough, else the one that ci/old_sysroot.sh unpacks."""
    if os.environ.get("CXX") or (platform.libc_ver()[0] == "glibc" and platform.libc_ver()[1] <= "2.28"):
        return {}
    folder = ROOT / "build" / "old_sysroot"
    done = subprocess.run(["bash", "ci/old_sysroot.sh", str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no compiler for manylinux_2_28 here: {done.stderr.strip()[-300:]}")
    return {"CXX": str(folder / "g++")}


def built(factory: pytest.TempPathFactory) -> Built:
    """The pure wheel, the sdist, the wheel of the toolkit here and the library of the Hub kernel."""
    label = toolkit_label()
    if os.environ.get("TREE_ATTN_DIST"):
        dist = Path(os.environ["TREE_ATTN_DIST"]).resolve()
        return Built(dist.parent, dist, label)
    checkout = factory.getbasetemp() / "built" / "checkout"
    if (checkout / "dist").exists():  # by a test file before
        return Built(checkout, checkout / "dist", label)
    small_checkout(checkout)
    for arguments in (("pure",), (label, "all")):
        done = build_wheel(checkout, *arguments, **compiler())
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Built(checkout, checkout / "dist", label)


# -- serving and installing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """``folder`` on the loopback interface as a static host shows it: its address, and each path asked for."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *message: object) -> None:
            requests.append(urllib.parse.unquote(self.path))

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()


class Client(NamedTuple):
    """A fresh environment with torch and nothing of ours."""

    python: Path
    torch: str

    def pip(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """pip as on a machine without settings of its own."""
        return self.run("-m", "pip", *arguments, PIP_CONFIG_FILE=os.devnull, **environment)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "TREE_ATTN_"))
        }
        plain = {"no_proxy": "127.0.0.1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.python.parent,
            env=inherited | plain | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )


def clients() -> list[tuple[str, str]]:
    """``(python, what to install as torch)`` of each client."""
    asked = os.environ.get("TREE_ATTN_CLIENTS") or f"{sys.executable} torch=={torch.__version__.partition('+')[0]}"
    return [(python, name) for python, name in (entry.split() for entry in asked.split(";"))]


def make_client(folder: Path, python: str, torch_name: str) -> Client:
    """A virtual environment of ``python`` with torch from where this machine's pip takes it."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True, capture_output=True)
    client = Client(folder / "bin" / "python", torch_name)
    done = subprocess.run(
        [str(client.python), "-m", "pip", "install", "-q", torch_name], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return client
