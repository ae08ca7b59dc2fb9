"""Checks wheels before they are published: what they claim, against what is in them.

    python -m wheels.check dist/*.whl

* the name: version and local label of the matrix, py3-none, one platform of the matrix (or any, without a library);
* the library: built by the toolkit that the label names, every symbol of libc and libstdc++ old enough for the platform
  (auditwheel's policy and kernel-abi-check's, and the versions that the file itself lists), no library needed
  but torch's and the platform's own, torch used through its stable ABI alone (torch-abi-audit);
* the size. Exit status 1 when one of them fails, with every failure listed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packaging.utils import parse_wheel_filename

from wheels import matrix as matrices

LIBRARY = "tree_attn/libtree_attn_cuda.so"
# What manylinux_2_28 allows and every system has; besides these only torch's own.
ALLOWED = re.compile(r"lib(torch|torch_cpu|stdc\+\+|gcc_s|m|c|dl|pthread|rt)\.so(\.\d+)?|ld-linux.*\.so\.\d+")
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}  # gcc 8, as in the image


def check(wheel: Path, matrix: dict[str, Any]) -> list[str]:
    """What is wrong with ``wheel``; empty when nothing is."""
    name, version, _, tags = parse_wheel_filename(wheel.name)
    problems = []
    if name != matrix["package"]:
        problems.append(f"the package is {name}, not {matrix['package']}")
    if any((tag.interpreter, tag.abi) != ("py3", "none") for tag in tags):
        problems.append("the tag is not py3-none: the library needs no Python of its own")
    size = wheel.stat().st_size / 2**20
    if size > matrix["max_megabytes"]:
        problems.append(f"{size:.1f} MiB; the limit is {matrix['max_megabytes']}")
    platforms = {tag.platform for tag in tags}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [n for n in names if n.endswith(".so") or ".so." in n]
        if "tree_attn/_matrix.json" not in names:
            problems.append("the matrix is not baked in: the package could not say which wheel fits")
        if platforms == {"any"}:
            if libraries or version.local:
                problems.append(f"a pure wheel with {libraries or version.local}")
            return problems
        if libraries != [LIBRARY]:
            return [*problems, f"holds the libraries {libraries}, not {LIBRARY} alone"]
        with tempfile.TemporaryDirectory() as folder:
            library = Path(archive.extract(LIBRARY, folder))
            problems += _check_library(library, str(version.local), platforms, matrix)
    problems += _check_with_auditwheel(wheel, platforms)
    return problems


def _check_library(library: Path, label: str, platforms: set[str], matrix: dict[str, Any]) -> list[str]:
    problems = []
    if label not in matrices.wheel_labels(matrix, published=False):
        return [f"the local version {label!r} is in no row of the matrix"]
    if platforms - {row["tag"] for row in matrix["platform"]}:
        problems.append(f"the platform {', '.join(platforms)} is in no row of the matrix")
    cuda, _, variant = label.partition(".")
    row = matrices.build_row(matrix, cuda, variant or "all")
    needed, symbols = _dynamic(library)
    problems += [f"needs {name}, which not every machine has" for name in needed if not ALLOWED.fullmatch(name)]
    if not {"libtorch.so", "libtorch_cpu.so"} <= set(needed):
        problems.append(f"does not name torch's libraries ({needed}): it would not find torch's current stream")
    for symbol, group, number in symbols:
        found = tuple(map(int, number.split(".")))
        if group in NEWEST and found > NEWEST[group]:
            problems.append(f"{symbol} is {group}_{number}, newer than manylinux_2_28 has")
    problems += _check_build(library, row)
    audit = [str(Path(sys.executable).with_name("torch-abi-audit")), "--check", "torch", str(library)]
    said = subprocess.run(audit, capture_output=True, text=True, check=False)
    if said.returncode:
        problems.append(f"torch-abi-audit: {(said.stdout + said.stderr).strip()}")
    import kernel_abi_check

    parsed = kernel_abi_check.ObjectFile(str(library))
    problems += [f"kernel-abi-check: {v}" for v in parsed.check_manylinux("manylinux_2_28")]
    return problems


def _dynamic(library: Path) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The libraries that ``library`` needs, and (symbol, GLIBC or the like, number) of each version it asks for."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf: Any = ELFFile(file)
        needed = [t.needed for t in elf.get_section_by_name(".dynamic").iter_tags() if t.entry.d_tag == "DT_NEEDED"]
        versions = {}
        for _, entries in elf.get_section_by_name(".gnu.version_r").iter_versions():
            versions.update({entry.entry.vna_other: entry.name for entry in entries})
        numbers = [s["ndx"] for s in elf.get_section_by_name(".gnu.version").iter_symbols()]
        names = [s.name for s in elf.get_section_by_name(".dynsym").iter_symbols()]
    found = []
    for name, number in zip(names, numbers, strict=True):
        match = re.fullmatch(r"([A-Z]+)_(\d+(?:\.\d+)+)", versions.get(number, ""))
        if match:
            found.append((name, match[1], match[2]))
    return needed, found


def _check_build(library: Path, row: dict[str, str]) -> list[str]:
    """What the library says about its own build, against the row of its label."""
    found = re.search(rb'\{"version": "[^}]*\}', library.read_bytes())
    if found is None:
        return ["the library does not say how it was built"]
    said = json.loads(found[0])
    named = [a.removesuffix("+PTX") for a in row["archs"].split(";")]
    archs = {f"sm_{a}" for a in named} | {f"compute_{a[:-4]}" for a in row["archs"].split(";") if a.endswith("+PTX")}
    problems = []
    if said["cuda"] != row["toolkit"]:
        problems.append(f"built by CUDA {said['cuda']}, labelled {row['label']}")
    if set(said["archs"]) != archs:
        problems.append(f"has code for {said['archs']}, not for {sorted(archs)}")
    return problems


def _check_with_auditwheel(wheel: Path, platforms: set[str]) -> list[str]:
    """auditwheel's own verdict on the platform that the wheel claims."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", "--disable-isa-ext-check", str(wheel)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return [f"auditwheel: {said.stderr.strip()}"]
    found = json.loads(said.stdout)["sym_tag"]  # by the symbols alone: torch's libraries are for the user to have
    return [f"claims {p}, its symbols are those of {found}" for p in platforms if _age(found) > _age(p)]


def _age(tag: str) -> tuple[int, int]:
    match = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(match[1]), int(match[2])) if match else (999, 0)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    matrix, failed = matrices.load(), False
    for path in map(Path, sys.argv[1:]):
        problems = check(path, matrix)
        failed |= bool(problems)
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, {'FAILED' if problems else 'ok'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
