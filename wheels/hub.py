"""Assembles the Hub kernel, and uploads it.

    python -m wheels.hub dist -o hubrepo
    python -m wheels.hub dist -o hubrepo --push org/tree-attn [--dry-run]

``hubrepo/build/`` gets one variant for each library that ci/build_wheel.sh left in ``dist/hub`` and ``torch-universal``
with the fallbacks alone. Each is the package itself with relative imports, no more of it than the public functions
reach, and operators in the namespace that the library was linked with (wheels/hub_library.py), so that it lives beside
an installed wheel in one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from wheels import hub_library
from wheels import matrix as matrices

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1  # of the Hub kernel: the branch v1, for as long as its interface lasts
UNIVERSAL = "torch-universal"
LIBRARY = "libtree_attn_cuda.so"
PAIR = "_hub_pair.py"

# What two copies of the package in one process would both define: file, text, its replacement.
_OWN_NAMES = [
    ("_operator.py", 'OP_NAMESPACE = "tree_attn"', 'OP_NAMESPACE = "{namespace}"'),
    ("_operator.py", 'Library(OP_NAMESPACE, "DEF")', 'Library(OP_NAMESPACE, "FRAGMENT")'),  # the library has the DEF
    ("_kernels.py", 'OP_NAMESPACE = "tree_attn_cuda"', 'OP_NAMESPACE = "{namespace}"'),
    ("mask.py", 'serialized_type_name="tree_attn.TreeMask"', 'serialized_type_name="{namespace}.TreeMask"'),
    ("registry.py", 'ENTRY_POINT_GROUP = "tree_attn.backends"', 'ENTRY_POINT_GROUP = "{namespace}.backends"'),
]


def assemble(dist: Path, output: Path, matrix: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Write the repository's files to ``output``, which is replaced, and return the variants.

    Raises:
        ValueError: a library that was linked for other sources than these, or by a toolkit that is not its label's.
    """
    namespace = hub_library.namespace(root)
    sources = package_sources(root, namespace)
    shutil.rmtree(output, ignore_errors=True)
    variants = []
    for row in matrix["cuda"]:
        for platform in matrix["platform"] if row["published"] else []:
            library = dist / "hub" / f"{row['label']}-{platform['machine']}" / LIBRARY
            if not library.exists():
                continue
            built = json.loads(library.with_name("build.json").read_text())
            if built["namespace"] != namespace or built["cuda"] != row["toolkit"]:
                raise ValueError(
                    f"{library} is of other sources ({built['namespace']}, CUDA {built['cuda']}; here {namespace}, "
                    f"CUDA {row['toolkit']}): run ci/build_wheel.sh {row['label']} all again"
                )
            abi = matrix["torch"].replace(".", "")
            name = f"torch-stable-abi{abi}-{row['label']}-{platform['machine']}-linux"
            folder = _write_variant(output / "build" / name, sources, namespace)
            shutil.copyfile(library, folder / LIBRARY)
            _write_metadata(folder, namespace, {"type": "cuda", "archs": _archs(built["archs"])})
            variants.append(name)
    folder = _write_variant(output / "build" / UNIVERSAL, sources, namespace)
    _write_metadata(folder, namespace, {"type": "cpu"})
    (output / "README.md").write_text(_card([*variants, UNIVERSAL], matrix))
    return [*variants, UNIVERSAL]


def package_sources(root: Path, namespace: str) -> dict[str, str]:
    """``{path in the variant: text}`` of every module that the package and the pair import, made relative."""
    package = root / "tree_attn"
    pending, sources = [Path("__init__.py"), Path(PAIR)], {}
    while pending:
        path = pending.pop()
        if path.as_posix() in sources:
            continue
        text = (root / "wheels" / "hub_pair.py" if path.name == PAIR else package / path).read_text()
        pending += _imported(text, package, path)
        sources[path.as_posix()] = _relative(text, path)
    for name, text, replacement in _OWN_NAMES:
        if sources[name].count(text) != 1:
            raise ValueError(f"tree_attn/{name} has {text!r} not once; bring wheels/hub.py up to date")
        sources[name] = sources[name].replace(text, replacement.format(namespace=namespace))
    pair = f"\nfrom .{PAIR.removesuffix('.py')} import flash_attn_forward, supports_flash_attn\n"
    exported = '\n__all__ += ["flash_attn_forward", "supports_flash_attn"]\n'
    sources["__init__.py"] += pair + exported
    sources["_ops.py"] = (
        '"""The operators of this build."""\n\nimport torch\n\n'
        f"ops = torch.ops.{namespace}\n\n\n"
        "def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{namespace}::{{op_name}}"\n'
    )
    return sources


def _imported(text: str, package: Path, path: Path) -> list[Path]:
    """The package's modules that ``text`` imports, anywhere in it, and the packages they lie in."""
    modules = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == "tree_attn" for a in node.names):
            raise ValueError(f"{path} has `import tree_attn`, which cannot be made relative; import from it")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "tree_attn":
            base = Path(*(node.module or "").split(".")[1:])
            for candidate in [base, *(base / alias.name for alias in node.names)]:
                if (package / candidate).is_dir():
                    modules.append(candidate / "__init__.py")
                elif (package / candidate).with_suffix(".py").exists() and candidate != Path():
                    modules += [candidate.with_suffix(".py"), candidate.parent / "__init__.py"]
    return modules


def _relative(text: str, path: Path) -> str:
    dots = "." * len(path.parts)
    return re.sub(
        r"(?m)^(\s*)from tree_attn(?:\.([\w.]+))? import", lambda m: f"{m[1]}from {dots}{m[2] or ''} import", text
    )


def _write_variant(folder: Path, sources: dict[str, str], namespace: str) -> Path:
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def _write_metadata(folder: Path, namespace: str, backend: dict[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": "tree-attn",
        "id": namespace,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _archs(archs: str) -> list[str]:
    """``"80+PTX;90a"`` -> ``["8.0+PTX", "9.0a"]``."""
    return [re.sub(r"^(\d+)(\d)(?=\D|$)", r"\1.\2", arch) for arch in archs.split(";")]


def _card(variants: list[str], matrix: dict[str, Any]) -> str:
    listed = "\n".join(f"* `{name}`" for name in variants)
    return f"""---
license: apache-2.0
tags:
- kernels
---
# tree-attn

Exact attention on trees: every token sees its ancestors and itself, in one pass.

```python
from kernels import get_kernel

tree_attn = get_kernel("ORG/tree-attn", version={VERSION})
mask = tree_attn.TreeMask.from_nodes(parents=[-1, 0, 0], lengths=[4096, 1024, 1024])
out = tree_attn.tree_attention(q, k, v, mask)   # q (tokens, heads, head_dim)
print(tree_attn.explain(q, k, v, mask))         # which backend runs, and why the others do not
```

Builds, for torch {matrix["torch"]} and newer on Linux; `{UNIVERSAL}` has the fallbacks and no kernels:

{listed}

With transformers, `attn_implementation="ORG/tree-attn"` calls `flash_attn_forward` here for models that get the tree as
keyword arguments. transformers also makes its dense mask then, one byte for each pair of tokens (1 GiB at 32768
tokens), which this kernel does not read. The installed package's `tree_attn.integrations.transformers.register()`
makes none.
"""


def push(folder: Path, repository: str, dry_run: bool) -> None:
    """Upload ``folder`` as branch v1 of a kernel repository; with ``dry_run`` only say what would go where."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(folder)}")
    print(f"{len(files)} files to {repository}, branch v{VERSION}" + (" (dry run: nothing is sent)" if dry_run else ""))
    if dry_run:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, repo_type="kernel", exist_ok=True)
    api.create_branch(repository, repo_type="kernel", branch=f"v{VERSION}", exist_ok=True)
    for revision in (f"v{VERSION}", "main"):  # huggingface_hub shows the progress
        api.upload_folder(
            repo_id=repository,
            repo_type="kernel",
            folder_path=folder,
            revision=revision,
            delete_patterns=["build/**"],
            commit_message=f"tree-attn, version {VERSION}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--push", metavar="ORG/NAME")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    try:
        variants = assemble(given.dist, given.output, matrices.load())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.output}: {', '.join(variants)}")
    if given.push:
        push(given.output, given.push, given.dry_run)


if __name__ == "__main__":
    main()
