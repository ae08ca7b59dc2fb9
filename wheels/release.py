"""Says whether a release is whole, before anything of it is published.

    python -m wheels.release check v0.1.0            the tag, the changelog and the matrix, before anything is built
    python -m wheels.release check v0.1.0 dist sbom  and that the folders hold every file of it, and no other
    python -m wheels.release notes                   what CHANGELOG.md says of this version, for the release's page

Needs the standard library alone (tomli on Python 3.10).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from wheels import matrix as matrices

ROOT = Path(__file__).resolve().parent.parent


def version(root: Path = ROOT) -> str:
    found = re.search(r'__version__ = "(.+)"', (root / "tree_attn" / "_version.py").read_text())
    if found is None:
        raise ValueError('tree_attn/_version.py has no __version__ = "..."')
    return found[1]


def notes(number: str, root: Path = ROOT) -> str:
    """The section of CHANGELOG.md under ``## X.Y.Z``; empty when there is none."""
    section = rf"(?ms)^## \[?{re.escape(number)}\]?(?: .*?)?$\n(.*?)(?=^## |\Z)"
    found = re.search(section, (root / "CHANGELOG.md").read_text())
    return found[1].strip() if found else ""


def check_sources(tag: str, matrix: dict[str, Any], root: Path = ROOT) -> list[str]:
    """What keeps this commit from being the release ``tag``; empty when nothing does."""
    number = version(root)
    problems = []
    if tag != f"v{number}":
        problems.append(f"the tag is {tag}, tree_attn/_version.py has {number}: the tag must be v{number}")
    if not notes(number, root):
        problems.append(f"CHANGELOG.md says nothing under '## {number}'")
    if not matrix["index_url"]:
        problems.append("index_url in wheels/matrix.toml is empty: the wheels could not say where the others are")
    return problems


def expected_files(matrix: dict[str, Any], number: str) -> tuple[set[str], set[str]]:
    """The files of a release: its folder of wheels, then its folder of SBOMs."""
    platforms = matrix["platform"]
    name = matrix["package"].replace("-", "_")
    wheels = {f"{name}-{number}-py3-none-any.whl"}
    for label in matrices.wheel_labels(matrix):
        wheels |= {f"{name}-{number}+{label}-py3-none-{platform['tag']}.whl" for platform in platforms}
    hub = {
        f"hub/{row['label']}-{platform['machine']}/{file}"
        for row in matrix["cuda"]
        if row["published"]
        for platform in platforms
        for file in ("libtree_attn_cuda.so", "build.json")
    }
    return wheels | hub | {f"{name}-{number}.tar.gz"}, {f"{wheel}.cdx.json" for wheel in wheels}


def check_files(dist: Path, sbom: Path, matrix: dict[str, Any], number: str) -> list[str]:
    """What the folders lack, or have too much; empty when they are the release."""
    problems = []
    for folder, expected in zip((dist, sbom), expected_files(matrix, number), strict=True):
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        problems += [f"{folder} lacks {file}" for file in sorted(expected - found)]
        problems += [f"{folder} has {file}, which is no part of {number}" for file in sorted(found - expected)]
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("notes")
    check = commands.add_parser("check")
    check.add_argument("tag")
    check.add_argument("dist", type=Path, nargs="?")
    check.add_argument("sbom", type=Path, nargs="?")
    given = parser.parse_args()
    if given.command == "notes":
        print(notes(version()))
        return
    if given.dist and not given.sbom:
        parser.error("name the folder of SBOMs as well")
    matrix = matrices.load()
    problems = check_sources(given.tag, matrix)
    if given.dist:
        problems += check_files(given.dist, given.sbom, matrix, version())
    if problems:
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    print(f"{given.tag}: {'the files are' if given.dist else 'the sources are'} those of a release")


if __name__ == "__main__":
    main()
