"""Registers, stack and spills of every kernel, from the logs of the last build, as a Markdown table.

    python csrc/build.py && python ci/ptxas_report.py [--spills-only] [FOLDER]

Exits with 1 if a kernel of head dim 64 or 128 spills registers to memory: those are held to zero.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HELD_TO_ZERO = ("64x64", "128x128")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<smem>\d+) bytes smem)?",
)


class Kernel(NamedTuple):
    """One kernel for one architecture; sizes in bytes, ``smem`` the static shared memory alone."""

    object: str
    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    smem: int

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0

    @property
    def must_not_spill(self) -> bool:
        return self.object.endswith(HELD_TO_ZERO)


def read(folder: Path) -> list[Kernel]:
    """Every kernel in the logs below ``folder``."""
    kernels = []
    for log in sorted(folder.rglob("*.o.log")):
        name = log.relative_to(folder).as_posix().removesuffix(".o.log")
        kernels += parse(name, log.read_text())
    return kernels


def parse(name: str, log: str) -> list[Kernel]:
    """The kernels in one log of ``ptxas -v``; ``name`` is the object it belongs to."""
    kernels = []
    for entry in re.split(r"(?=Compiling entry function)", log)[1:]:
        match = _ENTRY.search(entry.replace("\n", " "))
        if match is None:
            raise ValueError(f"{name}: this is no output of ptxas -v that is known here:\n{entry[:400]}")
        numbers = [int(match[g] or 0) for g in ("registers", "stack", "stores", "loads", "smem")]
        kernels.append(Kernel(name, match["symbol"], match["arch"], *numbers))
    return kernels


def table(kernels: list[Kernel]) -> str:
    """Markdown, one line a kernel."""
    names = _demangle([k.name for k in kernels])
    lines = [
        "| object | kernel | arch | registers | stack | spill stores | spill loads | static shared |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for k, name in zip(kernels, names, strict=True):
        cells = (k.object, name, k.arch, k.registers, k.stack, k.spill_stores, k.spill_loads, k.smem)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _demangle(symbols: list[str]) -> list[str]:
    """Function names without their namespaces, arguments and template arguments' types."""
    if shutil.which("c++filt") and symbols:
        text = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True)
        symbols = text.stdout.split("\n")[: len(symbols)]
    return [re.sub(r"\(anonymous namespace\)::|tree_attn::|void |\|", "", s) for s in symbols]


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers and spills of the kernels.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/kernels"))
    parser.add_argument("--spills-only", action="store_true", help="leave out kernels that spill nothing")
    given = parser.parse_args()
    kernels = read(given.folder)
    if not kernels:
        raise SystemExit(f"no logs below {given.folder}; run python csrc/build.py first")
    print(table([k for k in kernels if k.spills] if given.spills_only else kernels))
    bad = [k for k in kernels if k.spills and k.must_not_spill]
    spilling = sum(k.spills for k in kernels)
    print(f"\n{len(kernels)} kernels, {spilling} spill, {len(bad)} of head dim 64 or 128.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
