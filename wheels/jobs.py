"""What the jobs of the workflows are: from wheels/matrix.toml, and from the Pythons that pyproject.toml names.

    python -m wheels.jobs github >> "$GITHUB_OUTPUT"   tests=..., wheels=..., names=..., each with its JSON
    python -m wheels.jobs oldest-torch                 "torch==2.9.*"
    python -m wheels.jobs machines                     one processor a line: x86_64, aarch64

Needs the standard library alone (tomli on Python 3.10).
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from wheels import matrix as matrices

PYPROJECT = matrices.PATH.parent.parent / "pyproject.toml"
PURE = "pure"


def tests(matrix: dict[str, Any]) -> list[dict[str, str]]:
    """The two ends of what is supported: the oldest Python with the oldest torch, the newest with the newest."""
    minors = sorted(map(int, re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT.read_text())))
    oldest, newest = f"3.{minors[0]}", f"3.{minors[-1]}"
    if oldest != matrix["python"]:
        raise ValueError(f"pyproject.toml begins with Python {oldest}, wheels/matrix.toml with {matrix['python']}")
    return [{"python": oldest, "torch": oldest_torch(matrix)}, {"python": newest, "torch": "torch"}]


def wheels(matrix: dict[str, Any]) -> list[dict[str, str]]:
    """Every wheel with kernels, and under which name its files go from job to job."""
    return [{"name": f"{row['cuda']}-{row['variant']}-{row['machine']}", **row} for row in matrices.github(matrix)]


def oldest_torch(matrix: dict[str, Any]) -> str:
    return f"torch=={matrix['torch']}.*"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["github", "oldest-torch", "machines"])
    given = parser.parse_args()
    matrix = matrices.load()
    if given.what == "oldest-torch":
        print(oldest_torch(matrix))
    elif given.what == "machines":
        print("\n".join(platform["machine"] for platform in matrix["platform"]))
    else:
        print("tests=" + json.dumps({"include": tests(matrix)}))
        print("wheels=" + json.dumps({"include": wheels(matrix)}))
        print("names=" + json.dumps([PURE, *(row["name"] for row in wheels(matrix))]))


if __name__ == "__main__":
    main()
