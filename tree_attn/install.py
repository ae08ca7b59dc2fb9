"""``python -m tree_attn.install``: installs the wheel with the CUDA kernels that fit this machine.

    python -m tree_attn.install --dry-run                 print the command
    python -m tree_attn.install --index-url URL           from another index than the built-in one

The wheel is chosen by the platform, the NVIDIA driver and the GPU; which CUDA torch was built with does not matter,
because the wheel brings its own runtime.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import torch

from tree_attn import _matrix


def main(arguments: list[str] | None = None) -> int:
    """Run pip, or print the command; returns pip's exit status, 1 when no wheel fits."""
    parser = argparse.ArgumentParser(
        prog="python -m tree_attn.install", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    parser.add_argument("--index-url", help=f"base address of the index; ${_matrix.INDEX_VARIABLE} when left out")
    given = parser.parse_args(arguments)
    matrix = _matrix.load()
    if matrix is None:
        return _fail("this copy of tree_attn was not built (python -m build), so it does not know which wheels exist")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    chosen = _matrix.choose(_matrix.this_machine(capability), matrix)
    if chosen.label is None:
        return _fail(f"no wheel with kernels fits this machine: {chosen.why}. The other backends run without one.")
    url = (given.index_url or "").rstrip("/") or _matrix.index_url(matrix)
    if url is None:
        return _fail(f"{chosen.label} fits ({chosen.why}), but no index is built in: pass --index-url URL")
    command = [sys.executable, "-m", "pip", *_matrix.pip_arguments(chosen.label, matrix, url)]
    print(f"{chosen.label}: {chosen.why}\n{shlex.join(command)}", flush=True)
    return 0 if given.dry_run else subprocess.run(command, check=False).returncode


def _fail(message: str) -> int:
    print(f"tree_attn.install: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
