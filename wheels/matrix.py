"""Reads wheels/matrix.toml and answers what is built: labels of wheels, rows for CI, the README's table.

    python -m wheels.matrix labels          one wheel label a line, "cu126", "cu126.sm80", ...
    python -m wheels.matrix github          the build matrix as JSON, for a workflow
    python -m wheels.matrix show cu130 all  the values of one build as shell assignments
    python -m wheels.matrix table           the table of docs/install.md
    python -m wheels.matrix tables          write it there, and the shorter one of the README

Needs the standard library alone (tomli on Python 3.10).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef,unused-ignore]

PATH = Path(__file__).with_name("matrix.toml")
# Pages with a table of this matrix, and whether it names the wheels for one generation of GPUs too.
PAGES = {PATH.parent.parent / "README.md": False, PATH.parent.parent / "docs" / "install.md": True}
BEGIN, END = "<!-- wheels.matrix table -->", "<!-- end -->"
_COLUMNS: dict[str, dict[str, type]] = {
    "cuda": {"label": str, "toolkit": str, "driver": str, "driver_cuda": str, "published": bool},
    "platform": {"tag": str, "machine": str, "where": str, "runner": str},
    "variant": {"name": str, "archs": str, "serves": str},
}


def load(path: Path = PATH) -> dict[str, Any]:
    """The matrix as it stands in the file.

    Raises:
        ValueError: a row lacks a column, has an unknown one, or a label that is not its toolkit's.
    """
    matrix = tomllib.loads(path.read_text())
    for table, columns in _COLUMNS.items():
        for row in matrix[table]:
            if {name: type(value) for name, value in row.items()} != columns:
                raise ValueError(f"{path}: a [[{table}]] row has {row}; give it {', '.join(columns)}")
    for row in matrix["cuda"]:
        if row["label"] != label_of(row["toolkit"]):
            raise ValueError(f"{path}: {row['label']} is built by CUDA {row['toolkit']}: call it what made it")
    if matrix["variant"][0]["name"] != "all":
        raise ValueError(f"{path}: the first variant is 'all', the one that an index without a suffix serves")
    return matrix


def label_of(toolkit: str) -> str:
    """``"13.0"`` -> ``"cu130"``."""
    return "cu" + toolkit.replace(".", "")


def wheel_label(cuda: str, variant: str) -> str:
    """``("cu130", "sm90")`` -> ``"cu130.sm90"``: the local version, and the folder of its index."""
    return cuda if variant == "all" else f"{cuda}.{variant}"


def wheel_labels(matrix: dict[str, Any], published: bool = True) -> list[str]:
    """The label of every wheel; with ``published`` only of those that an index offers by default."""
    rows = [row for row in matrix["cuda"] if row["published"] or not published]
    return [wheel_label(row["label"], variant["name"]) for row in rows for variant in matrix["variant"]]


def build_row(matrix: dict[str, Any], cuda: str, variant: str) -> dict[str, str]:
    """What one build needs: cuda and label ("cu130", "cu130.sm90"), toolkit, archs.

    Raises:
        ValueError: the matrix has no such row.
    """
    rows = {row["label"]: row for row in matrix["cuda"]}
    variants = {row["name"]: row for row in matrix["variant"]}
    if cuda not in rows or variant not in variants:
        raise ValueError(f"{cuda} {variant} is in no row of the matrix; choose of {list(rows)} and {list(variants)}")
    return {
        "cuda": cuda,
        "label": wheel_label(cuda, variant),
        "toolkit": rows[cuda]["toolkit"],
        "archs": variants[variant]["archs"],
    }


def github(matrix: dict[str, Any]) -> list[dict[str, str]]:
    """Every wheel that CI builds."""
    return [
        {"cuda": row["label"], "variant": variant["name"], "machine": platform["machine"], "runner": platform["runner"]}
        for row in matrix["cuda"]
        if row["published"]
        for variant in matrix["variant"]
        for platform in matrix["platform"]
    ]


def table(matrix: dict[str, Any], slim: bool = True) -> str:
    """For people, in Markdown: which command fits which machine. ``slim``: also the wheels for one generation."""
    index = matrix["index_url"] or "$INDEX"
    pip = f"pip install {matrix['package']}"
    systems = " or ".join(sorted(row["machine"] for row in matrix["platform"]))
    lines = ["| NVIDIA driver | GPUs | command |", "|---|---|---|"]
    for row in reversed(matrix["cuda"]):
        for variant in matrix["variant"][: None if slim else 1] if row["published"] else []:
            label = wheel_label(row["label"], variant["name"])
            lines.append(
                f"| {row['driver']} or newer | {variant['serves']} | `{pip} --extra-index-url {index}/{label}` |"
            )
    lines.append(f"| older or none, or not Linux on {systems} | any, or none | `{pip}` (without the CUDA kernels) |")
    return "\n".join(lines)


def with_table(text: str, matrix: dict[str, Any], slim: bool) -> str:
    """``text``, a page in Markdown, with its table as the matrix has it now.

    Raises:
        ValueError: it has no table between the two comments that mark it.
    """
    found = re.search(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}\n", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no table between {BEGIN} and {END}")
    return f"{text[: found.start()]}{BEGIN}\n{table(matrix, slim)}\n{END}\n{text[found.end() :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("labels", "github", "table", "tables"):
        commands.add_parser(name)
    show = commands.add_parser("show")
    show.add_argument("cuda")
    show.add_argument("variant")
    given = parser.parse_args()
    matrix = load()
    if given.command == "labels":
        print("\n".join(wheel_labels(matrix)))
    elif given.command == "github":
        print(json.dumps({"include": github(matrix)}))
    elif given.command == "table":
        print(table(matrix))
    elif given.command == "tables":
        for page, slim in PAGES.items():
            page.write_text(with_table(page.read_text(), matrix, slim))
    else:
        try:
            row = build_row(matrix, given.cuda, given.variant)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        print("\n".join(f"{name}={shlex.quote(value)}" for name, value in row.items()))


if __name__ == "__main__":
    main()
