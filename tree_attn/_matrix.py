"""Which wheel has kernels for this machine, and the pip command that installs it.

The build bakes wheels/matrix.toml into the package (setup.py); a checkout reads the file itself.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tree_attn._version import __version__

INDEX_VARIABLE = "TREE_ATTN_INDEX_URL"
_BAKED = Path(__file__).with_name("_matrix.json")
_SOURCE = Path(__file__).parent.parent / "wheels" / "matrix.toml"


class Machine(NamedTuple):
    """What decides which wheel fits."""

    system: str  # sys.platform
    processor: str  # platform.machine()
    libc: tuple[int, int] | None  # of glibc; None for another C library
    driver_cuda: tuple[int, int] | None  # the newest CUDA that the driver runs; None without a driver
    capability: tuple[int, int] | None  # of the GPU; None when not known


class Choice(NamedTuple):
    """A wheel for a machine, or the reason there is none."""

    label: str | None  # "cu130"
    why: str


@functools.cache
def load() -> dict[str, Any] | None:
    """The matrix; None in a copy of the package that no build made."""
    if _SOURCE.exists() and sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(_SOURCE.read_text())
    return json.loads(_BAKED.read_text()) if _BAKED.exists() else None


def this_machine(capability: tuple[int, int] | None = None) -> Machine:
    libc = re.fullmatch(r"(\d+)\.(\d+).*", platform.libc_ver()[1]) if platform.libc_ver()[0] == "glibc" else None
    return Machine(
        sys.platform, platform.machine(), (int(libc[1]), int(libc[2])) if libc else None, _driver_cuda(), capability
    )


def choose(machine: Machine, matrix: dict[str, Any]) -> Choice:
    """The best published wheel for ``machine``."""
    package, oldest = matrix["package"], min(matrix["cuda"], key=lambda row: _version(row["driver_cuda"]))
    if machine.system != "linux":
        return Choice(None, f"{package} has CUDA wheels for Linux alone")
    platforms = [row for row in matrix["platform"] if row["machine"] == machine.processor]
    if not platforms:
        known = ", ".join(row["machine"] for row in matrix["platform"])
        return Choice(None, f"the wheels are for {known}; this processor is {machine.processor}")
    needed = _version(platforms[0]["tag"].removesuffix("_" + machine.processor).removeprefix("manylinux_"), "_")
    if machine.libc is None or machine.libc < needed:
        found = "is no glibc" if machine.libc is None else f"is glibc {_dotted(machine.libc)}"
        return Choice(None, f"the wheels need glibc {_dotted(needed)} or newer; the C library here {found}")
    if machine.driver_cuda is None:
        return Choice(None, "no NVIDIA driver is installed")
    if machine.capability is not None and machine.capability < (8, 0):
        return Choice(None, "the kernels need an sm_80 (Ampere) GPU or newer")
    fitting = [r for r in matrix["cuda"] if r["published"] and _version(r["driver_cuda"]) <= machine.driver_cuda]
    if not fitting:
        return Choice(None, f"the driver is too old: update it to {oldest['driver']} or newer")
    best = max(fitting, key=lambda row: _version(row["toolkit"]))
    return Choice(best["label"], f"the driver runs CUDA {_dotted(machine.driver_cuda)}")


def index_url(matrix: dict[str, Any]) -> str | None:
    """Where the wheels are: the environment's answer, else the matrix's."""
    return (os.environ.get(INDEX_VARIABLE) or matrix["index_url"] or "").rstrip("/") or None


def pip_arguments(label: str, matrix: dict[str, Any], url: str) -> list[str]:
    """What pip is given to install that wheel of this version; strict, so that another wheel is an error."""
    return ["install", f"{matrix['package']}=={__version__}+{label}", "--extra-index-url", f"{url}/{label}"]


def command(capability: tuple[int, int] | None = None) -> str | None:
    """The exact command that brings the kernels to this machine; None when no published wheel fits it."""
    matrix = load()
    url = index_url(matrix) if matrix else None
    if matrix is None or url is None:
        return None
    chosen = choose(this_machine(capability), matrix)
    return " ".join(["pip", *pip_arguments(chosen.label, matrix, url)]) if chosen.label else None


def _driver_cuda() -> tuple[int, int] | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _version(text: str, separator: str = ".") -> tuple[int, int]:
    major, minor = text.split(separator)[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
