"""Writes an sdist again, so that the same files give the same bytes: their order, times, owners and modes are fixed.

SOURCE_DATE_EPOCH=1780000000 python -m wheels.sdist dist/tree_attn-0.1.0.tar.gz
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path


def rewrite(sdist: Path, seconds: int) -> None:
    """Replace ``sdist`` by one whose entries are all of ``seconds`` after 1970."""
    packed = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for entry in sorted(old, key=lambda entry: entry.name):
            fixed = tarfile.TarInfo(entry.name)
            fixed.type, fixed.size, fixed.mtime = entry.type, entry.size, seconds
            fixed.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            new.addfile(fixed, old.extractfile(entry) if entry.isfile() else None)
    sdist.write_bytes(gzip.compress(packed.getvalue(), mtime=seconds))


def main() -> None:
    if len(sys.argv) != 2 or "SOURCE_DATE_EPOCH" not in os.environ:
        raise SystemExit(__doc__)
    rewrite(Path(sys.argv[1]), int(os.environ["SOURCE_DATE_EPOCH"]))


if __name__ == "__main__":
    main()
