"""Builds csrc/ into one library that every Python and every torch from 2.9 on can load.

    python csrc/build.py                          -> tree_attn/libtree_attn_cuda.so
    TREE_ATTN_CUDA=1 pip install --no-build-isolation -e .        the same, through setup.py

Writes a ninja file and runs it, so a second build compiles only what changed. Needs nvcc 12.4 or newer, the headers of
an installed torch 2.9 or newer (its CPU build will do) and ninja; no GPU.

    TREE_ATTN_CUDA_ARCHS   architectures, default "80+PTX;90a"; +PTX adds code that newer GPUs translate
    TREE_ATTN_NVCC         the nvcc to use; otherwise $CUDA_HOME/bin/nvcc, then PATH, then /usr/local/cuda/bin/nvcc
    CXX                    the host compiler nvcc calls
    MAX_JOBS               compilers at once; the number of cores when not set
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT = ROOT / "tree_attn" / "libtree_attn_cuda.so"
DEFAULT_ARCHS = "80+PTX;90a"
DEFAULT_NAMESPACE = "tree_attn_cuda"
OLDEST_NVCC = (12, 4)
OLDEST_TORCH = (2, 9)
COMMAND = "TREE_ATTN_CUDA=1 pip install --no-build-isolation -e ."

# Kernels are templates. A source that names TA_HEAD_DIM is compiled once for each dtype and each class of head dims
# that instances.h beside it lists for it, so that no file takes minutes; every other source is compiled once.
DTYPES = {"f16": 0, "bf16": 1}  # the values of DType in params.h
HOPPER = "hopper/"  # sources below it are compiled for 90a alone, and only if 90a is asked for


class BuildError(RuntimeError):
    """The library cannot be built here; the message says what to do."""


class Arch(NamedTuple):
    name: str  # "80", "90a"
    ptx: bool

    def gencode(self) -> str:
        codes = [f"sm_{self.name}"] + [f"compute_{self.name}"] * self.ptx
        return f"-gencode=arch=compute_{self.name},code=[{','.join(codes)}]"


class Object(NamedTuple):
    source: str  # relative to csrc/
    name: str  # relative to the build folder, without .o
    flags: list[str]


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]


# -- what to build with ----------------------------------------------------------------------------------------------


def parse_archs(text: str) -> list[Arch]:
    """``"80+PTX;90a"`` as a list; commas and spaces separate as well.

    Raises:
        BuildError: an entry that is no architecture of sm_80 or newer.
    """
    archs = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+[af]?)(\+PTX)?", entry, re.IGNORECASE)
        if not match or int(match[1].rstrip("af")) < 80:
            raise BuildError(
                f"TREE_ATTN_CUDA_ARCHS has {entry!r}; give architectures from 80 on, such as {DEFAULT_ARCHS!r}"
            )
        archs.append(Arch(match[1].lower(), match[2] is not None))
    return archs


def find_nvcc() -> Nvcc:
    """The nvcc to use.

    Raises:
        BuildError: none found, or older than 12.4.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("TREE_ATTN_NVCC"),
        f"{home}/bin/nvcc" if home else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    get_one = (
        f"Install a CUDA toolkit, {_dotted(OLDEST_NVCC)} or newer (https://developer.nvidia.com/cuda-downloads, or "
        "`conda install -c nvidia cuda-nvcc cuda-cudart-dev`), and put nvcc on PATH or its path in TREE_ATTN_NVCC. "
        "Without TREE_ATTN_CUDA=1 the package installs without kernels and needs none of this."
    )
    if candidates[0] and not shutil.which(candidates[0]):
        raise BuildError(f"TREE_ATTN_NVCC is {candidates[0]!r}, which is no executable. {get_one}")
    path = next((found for c in candidates if c and (found := shutil.which(c))), None)
    if path is None:
        raise BuildError(f"no nvcc found. {get_one}")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        raise BuildError(f"{path} --version names no release. {get_one}")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST_NVCC:
        raise BuildError(f"{path} is CUDA {_dotted(version)}. {get_one}")
    return Nvcc(path, version)


def find_torch() -> Path:
    """The folder of the installed torch; torch itself is not imported.

    Raises:
        BuildError: no torch, or one older than 2.9.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            f"this build cannot see torch, whose headers it needs: pip builds in an empty environment unless told "
            f"otherwise. With torch, ninja and setuptools installed, run\n\n    {COMMAND}\n"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST_TORCH:
        raise BuildError(f"torch is {version}; the kernels need torch {_dotted(OLDEST_TORCH)} or newer")
    return Path(spec.submodule_search_locations[0])


def find_ninja() -> list[str]:
    """The command that runs ninja.

    Raises:
        BuildError: there is none.
    """
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if not found:
        raise BuildError("no ninja found; run `pip install ninja`")
    return [found]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


# -- what to build ---------------------------------------------------------------------------------------------------


def objects(csrc: Path, archs: list[Arch]) -> list[Object]:
    """Every object of the library, the slowest to compile first."""
    with_hopper = _with_hopper(csrc, archs)
    everywhere = [a.gencode() for a in archs]
    found = []
    for path in sorted(csrc.rglob("*.cu")):
        source = path.relative_to(csrc).as_posix()
        gencode = everywhere
        if source.startswith(HOPPER):
            if not with_hopper:
                continue
            gencode = [Arch("90a", False).gencode()]
        stem = source.removesuffix(".cu")
        if "TA_HEAD_DIM" not in path.read_text():
            found.append(Object(source, stem, gencode))
            continue
        for head_dim, value_dim in _classes(path):
            for dtype, number in DTYPES.items():
                defines = [f"-DTA_DTYPE={number}", f"-DTA_HEAD_DIM={head_dim}", f"-DTA_VALUE_DIM={value_dim}"]
                found.append(Object(source, f"{stem}.{dtype}.{head_dim}x{value_dim}", [*gencode, *defines]))
    return [*sorted(found, key=lambda o: (-_weight(o.name), o.name)), Object("ops.cpp", "ops", [])]


def _classes(source: Path) -> list[tuple[int, int]]:
    """``(head_dim, value_dim)`` of each ``X(head_dim, value_dim)`` in the list for a source in instances.h beside it.

    For forward.cu that is ``TREE_ATTN_..._FORWARD_CLASSES``, or where there is none ``TREE_ATTN_CLASSES``.
    """
    instances = source.with_name("instances.h")
    lists = dict(re.findall(r"#define TREE_ATTN_(\w*)CLASSES\(X\)((?:.*\\\n)*.*)", instances.read_text()))
    own = [listed for name, listed in lists.items() if name.endswith(f"_{source.stem.upper()}_")]
    classes = re.findall(r"X\((\d+),\s*(\d+)\)", (own or [lists.get("", "")])[0])
    if not classes:
        raise BuildError(f"{instances} lists no classes for {source.name}")
    return [(int(head_dim), int(value_dim)) for head_dim, value_dim in classes]


def _with_hopper(csrc: Path, archs: list[Arch]) -> bool:
    return any(a.name == "90a" for a in archs) and any((csrc / HOPPER).glob("*.cu"))


def _weight(name: str) -> int:
    """Roughly how long an object takes: large head dims, backward before forward."""
    dims = re.search(r"(\d+)x(\d+)$", name)
    return (int(dims[1]) + int(dims[2]) if dims else 0) * (2 if "backward" in name else 1)


def _ninja_file(
    csrc: Path, folder: Path, torch: Path, nvcc: Nvcc, archs: list[Arch], namespace: str, release: bool
) -> str:
    root = csrc.parent
    compress = "--compress-mode=size" if nvcc.version >= (12, 8) else "-Xfatbin=-compress-all"
    host = [f"-ccbin={shlex.quote(os.environ['CXX'])}"] if os.environ.get("CXX") else []
    flags = [
        *host,
        "-std=c++17",
        "-O3",
        # For profilers. It holds absolute paths and names with the compiler's process id, other in every build.
        *([] if release else ["-lineinfo"]),
        "-Xptxas=-v",
        # Paths of the build machine stay out of the library; those of the sources are relative anyway.
        f"-Xcompiler=-fPIC,-fvisibility=hidden,-ffile-prefix-map={torch}=torch",
        f"-I{_relative(csrc, root)}",
        f"-DTREE_ATTN_HOPPER={int(_with_hopper(csrc, archs))}",
        compress,
    ]
    include = torch / "include"
    ops = [
        f"-isystem={include}",
        "-DTORCH_TARGET_VERSION=0x0209000000000000ULL",
        "-DTORCH_STABLE_ONLY",
        "-DUSE_CUDA",
        f"-DTREE_ATTN_OP_NAMESPACE={namespace}",
        f"-I{_relative(folder, root)}",  # build_info.h
    ]
    # One list: as separate arguments nvcc reorders them and the linker drops libtorch, which has the stream function.
    torch_libraries = "-Xlinker=--no-as-needed,-ltorch,-ltorch_cpu,--as-needed"
    # Nothing to link for the device: its linker would only put its command line, with paths, into the library.
    link = [*host, "-shared", "-nodlink", "-cudart=static", f"-L{torch / 'lib'}", torch_libraries]
    link.append("-Xlinker=--strip-all")  # names of nvcc's temporary files, other in every build
    link.append(f"-Xlinker=--version-script={_relative(csrc / 'exports.map', root)}")

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {_ninja(_relative(folder, root))}",
        f"nvcc = {_ninja(shlex.quote(nvcc.path))}",
        f"flags = {_ninja(' '.join(flags))}",
        # ptxas writes registers and spills to the log of each object, which ci/ptxas_report.py reads.
        "rule compile",
        "  command = $nvcc -c $in -o $out $flags $own -MMD -MF $out.d > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $nvcc $in -o $out {_ninja(' '.join(link))}",
        "  description = $out",
        "",
    ]
    names = []
    for source, name, own in objects(csrc, archs):
        target = _relative(folder / f"{name}.o", root)
        names.append(target)
        lines.append(f"build {_ninja_path(target)}: compile {_ninja_path(_relative(csrc / source, root))}")
        lines.append(f"  own = {_ninja(' '.join(ops if source == 'ops.cpp' else own))}")
    library, exports = (
        _ninja_path(_relative(p, root)) for p in (folder / "libtree_attn_cuda.so", csrc / "exports.map")
    )
    lines.append(f"build {library}: link {' '.join(map(_ninja_path, names))} | {exports}")
    return "\n".join(lines) + "\n"


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _ninja(text: str) -> str:
    return text.replace("$", "$$")


def _ninja_path(text: str) -> str:
    return _ninja(text).replace(" ", "$ ").replace(":", "$:")


def _build_info(root: Path, nvcc: Nvcc, archs: list[Arch]) -> dict[str, object]:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=root, capture_output=True, text=True, check=False,
    ) if (root / ".git").exists() and shutil.which("git") else None  # fmt: skip
    version = re.search(r'__version__ = "(.+)"', (root / "tree_attn" / "_version.py").read_text())
    assert version is not None
    return {
        "version": version[1],
        "cuda": _dotted(nvcc.version),
        "archs": list(_arch_names(archs)),
        "commit": (described.stdout.strip() if described else "") or None,
        "torch": importlib.metadata.version("torch"),  # whose headers; any torch from 2.9 on runs it
    }


def _arch_names(archs: list[Arch]) -> Iterator[str]:
    for arch in archs:
        yield f"sm_{arch.name}"
        if arch.ptx:
            yield f"compute_{arch.name}"


# -- building --------------------------------------------------------------------------------------------------------


def build(
    output: Path = DEFAULT_OUTPUT,
    archs: str | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    csrc: Path = ROOT / "csrc",
    folder: Path | None = None,
    release: bool = False,
) -> Path:
    """Build the library and put it at ``output``.

    Args:
        output: where the library goes; replaced in one step.
        archs: as ``TREE_ATTN_CUDA_ARCHS``, which counts when this is None.
        namespace: of the operators; two libraries in one process must differ in it.
        csrc: the sources.
        folder: for objects, logs and the ninja file; ``build/kernels`` beside csrc when None.
        release: the same sources and compilers make the same bytes, in whatever folder; without line numbers.

    Raises:
        BuildError: something that the build needs is missing or too old, or a compiler failed.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", namespace):
        raise BuildError(f"the namespace {namespace!r} is no identifier")
    csrc = csrc.resolve()
    folder = (folder or csrc.parent / "build" / "kernels").resolve()
    chosen = parse_archs(archs or os.environ.get("TREE_ATTN_CUDA_ARCHS") or DEFAULT_ARCHS)
    torch, nvcc, ninja = find_torch(), find_nvcc(), find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    info = json.dumps(_build_info(csrc.parent, nvcc, chosen))
    _write_if_changed(folder / "build_info.h", f"#define TREE_ATTN_BUILD_INFO {json.dumps(info)}\n")
    plan = folder / "build.ninja"
    plan.write_text(_ninja_file(csrc, folder, torch, nvcc, chosen, namespace, release))
    jobs = os.environ.get("MAX_JOBS") or str(_cores())
    done = subprocess.run([*ninja, "-f", str(plan), "-j", jobs], cwd=csrc.parent, check=False)
    if done.returncode:
        raise BuildError(f"building the kernels failed; the compiler's message is above, its logs are in {folder}")
    output.parent.mkdir(parents=True, exist_ok=True)
    # A process that has the old library mapped keeps it: the new one gets a new inode.
    fresh = output.with_name(output.name + ".new")
    shutil.copy2(folder / "libtree_attn_cuda.so", fresh)
    fresh.replace(output)
    return output


def _write_if_changed(path: Path, text: str) -> None:
    """So that ninja sees no change where there is none."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--archs", help=f'default: TREE_ATTN_CUDA_ARCHS, or "{DEFAULT_ARCHS}"')
    parser.add_argument("--namespace", default=DEFAULT_NAMESPACE, help="of the operators (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for objects and logs (default: build/kernels)")
    parser.add_argument("--release", action="store_true", help="the same bytes from every checkout; no line numbers")
    parser.add_argument("--nvcc", action="store_true", help="print the version and path of nvcc and build nothing")
    given = parser.parse_args()
    try:
        if given.nvcc:
            nvcc = find_nvcc()
            print(_dotted(nvcc.version), nvcc.path)
        else:
            print(build(given.output, given.archs, given.namespace, folder=given.folder, release=given.release))
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
