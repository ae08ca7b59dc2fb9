"""The command line ``tree-attn``, also ``python -m tree_attn``.

Its commands need the extra ``cli`` (typer, rich, matplotlib). Without it ``doctor`` still works, in plain text, and the
others say what to install. Nothing here is imported by ``import tree_attn``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from tree_attn._version import __version__

INSTALL_CLI = 'pip install "tree-attn[cli]"'
COMMANDS = ("doctor", "demo", "show", "bench", "cp-plan")


def missing(*modules: str) -> list[str]:
    """Those of ``modules`` that cannot be imported."""
    return [name for name in modules if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook refused it, or sys.modules holds None for it
        return False


def hint(command: str, absent: Sequence[str]) -> str:
    """What to say when a command lacks modules of the extra."""
    return f"tree-attn {command} needs {' and '.join(absent)}, which the extra 'cli' installs:\n    {INSTALL_CLI}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 it failed or found a difference, 2 wrong or missing usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    absent = missing("typer", "rich")
    if absent:
        return _plain(arguments, absent)
    from tree_attn.cli import cp_plan  # noqa: F401  adds its command to the app
    from tree_attn.cli.app import app

    try:
        app(args=arguments, prog_name="tree-attn")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _plain(arguments: list[str], absent: list[str]) -> int:
    """The command line of an install without the extra."""
    parser = argparse.ArgumentParser(
        prog="tree-attn",
        description="Exact attention on trees.",
        epilog=f"Only doctor works here; the other commands need {' and '.join(absent)}: {INSTALL_CLI}",
    )
    parser.add_argument("--version", action="version", version=f"tree-attn {__version__}")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--json", action="store_true", help="print JSON (doctor)")
    known, _ = parser.parse_known_args(arguments)  # the other commands' options are not checked, only named as missing
    if known.command != "doctor":
        print(hint(known.command, absent), file=sys.stderr)
        return 2
    from tree_attn.cli import doctor

    print(doctor.as_json() if known.json else doctor.as_text())
    return 0
