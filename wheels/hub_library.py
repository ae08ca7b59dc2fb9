"""Links the Hub kernel's library: the wheel's objects, under an operator namespace of their own.

    python -m wheels.hub_library cu130 dist/hub/cu130-x86_64/libtree_attn_cuda.so

Two libraries that define the same operators end the process, and a wheel and the Hub kernel, or two versions of the
Hub kernel, may meet in one. So the namespace ends in a digest of the sources. It is written beside the library, in
build.json, for wheels.hub.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
from pathlib import Path
from types import ModuleType

from wheels import matrix

ROOT = Path(__file__).resolve().parent.parent


def namespace(root: Path = ROOT) -> str:
    """``tree_attn_hub_`` and the first digits of a digest of what the Hub kernel is made from."""
    digest = hashlib.sha256()
    for path in sorted([*(root / "csrc").rglob("*"), *(root / "tree_attn").rglob("*.py")]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"tree_attn_hub_{digest.hexdigest()[:10]}"


def load_build(root: Path = ROOT) -> ModuleType:
    """csrc/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("tree_attn_build", root / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuda", help="label of a row of the matrix")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    build = load_build()
    row = matrix.build_row(matrix.load(), given.cuda, "all")
    toolkit = ".".join(map(str, build.find_nvcc().version))
    if toolkit != row["toolkit"]:
        raise SystemExit(f"error: the toolkit here is CUDA {toolkit}, {given.cuda} is built by CUDA {row['toolkit']}")
    name = namespace()
    folder = ROOT / "build" / f"kernels-{given.cuda}-all"
    build.build(given.output, row["archs"], name, folder=folder, release=True)
    facts = {"namespace": name, "cuda": row["toolkit"], "archs": row["archs"], "machine": platform.machine()}
    given.output.with_name("build.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(given.output)


if __name__ == "__main__":
    main()
