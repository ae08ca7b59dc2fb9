"""Finds and loads the library of CUDA kernels, when it is first asked for.

Whatever keeps the library from running is told in words (:class:`Unavailable`), so that ``explain()`` can show it and
another backend runs instead; nothing here raises for it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tree_attn import _hub, _matrix
from tree_attn._version import __version__

# Two libraries that define the same operators end the process, so every build that may meet another has its own.
OP_NAMESPACE = "tree_attn_cuda"
LIBRARY = Path(__file__).with_name("libtree_attn_cuda.so")

PATHS = {"auto": 0, "portable": 1, "hopper": 2}  # enum Path in csrc/params.h


class Unavailable(NamedTuple):
    """Why the kernels cannot run here, and what the user could do about it."""

    reason: str
    remedy: str | None = None


class DeviceFacts(ctypes.Structure):
    """What decides whether the kernels can run on a device, as ``tree_attn_device_facts`` in csrc/ops.cpp fills it.

    Errors are numbers of ``cudaError_t``; versions are 1000 * major + 10 * minor, 0 for no driver.
    """

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("driver", "runtime", "count", "count_error", "major", "minor", "probe_error")
    )
    driver: int
    runtime: int
    count: int
    count_error: int
    major: int
    minor: int
    probe_error: int


class Kernels(NamedTuple):
    """The loaded library: operators, and functions without tensors."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # out, lse
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]  # grad_q, grad_k, grad_v, delta
    mask_from_dfs: Callable[..., None]  # writes into tensors it is given
    functions: ctypes.CDLL
    build: dict[str, object]  # "version", "cuda", "archs", "commit", "torch"

    def device_facts(self, device: int) -> DeviceFacts:
        facts = DeviceFacts()
        # Where torch can use the GPU, it is also what puts the current device back.
        with torch.cuda.device(device if torch.cuda.is_available() else -1):
            self.functions.tree_attn_device_facts(device, facts)
        return facts


_lock = threading.Lock()
_loaded: Kernels | Unavailable | None = None


def load() -> Kernels | Unavailable:
    """The library, loaded at the first call, or why there is none."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def forget_absence() -> None:
    """Look again at the next call, if there was no library; one that is loaded stays."""
    global _loaded
    with _lock:
        if isinstance(_loaded, Unavailable):
            _loaded = None
            unavailable.cache_clear()


@functools.cache
def unavailable(device: int) -> Unavailable | None:
    """Why the kernels cannot run on this CUDA device, or None when they can."""
    library = load()
    if isinstance(library, Unavailable):
        return library
    if torch.version.cuda is None:
        built = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
        return Unavailable(f"this torch ({torch.__version__}) is built {built}; the kernels need NVIDIA CUDA")
    if not library.functions.tree_attn_has_stream():
        # Launches would go to the wrong stream without a word.
        return Unavailable(
            f"torch {torch.__version__} is built with CUDA {torch.version.cuda} but the library found no function "
            "for torch's current stream in it",
            "Report this with the output of `tree-attn doctor`.",
        )
    return _judge(device, library.device_facts(device), lambda error: library.functions.tree_attn_error_text(error))


# Errors of the CUDA runtime that have a reason of their own.
_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, 100
_NO_CODE = (98, 209, 221, 222)  # invalid device function, no kernel image, no PTX compiler, unsupported PTX version


def _judge(device: int, facts: DeviceFacts, error_text: Callable[[int], bytes]) -> Unavailable | None:
    """What the facts mean for the user."""
    capability = f"sm_{facts.major}{facts.minor}"
    if facts.driver == 0:
        return Unavailable("no NVIDIA driver is installed")
    if facts.count_error == _INSUFFICIENT_DRIVER:
        return Unavailable(
            f"the NVIDIA driver is for CUDA {_dotted(facts.driver)}, too old for this build, which needs CUDA "
            f"{_dotted(facts.runtime)}",
            f"Update the driver, or {_get_them('build with an older CUDA toolkit', (facts.major, facts.minor))}",
        )
    if facts.count_error == _NO_DEVICE or (facts.count_error == 0 and device >= facts.count):
        return Unavailable(f"CUDA sees {facts.count} GPUs, none with index {device}")
    if facts.count_error == 0 and facts.major < 8:
        return Unavailable(f"the GPU is {capability}; the kernels need sm_80 (Ampere) or newer")
    if facts.count_error == 0 and facts.probe_error in _NO_CODE:
        arch = f"{facts.major}{facts.minor}"
        return Unavailable(
            f"this build has no code that the GPU, {capability}, can run",
            _sentence(_get_them("build for it", (facts.major, facts.minor), f'TREE_ATTN_CUDA_ARCHS="{arch}" ')),
        )
    error = facts.count_error or facts.probe_error
    return Unavailable(f"CUDA does not start: {error_text(error).decode()} (error {error})") if error else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _is_checkout() -> bool:
    return (LIBRARY.parent.parent / "csrc" / "build.py").exists()


def _get_them(build: str, capability: tuple[int, int] | None, environment: str = "") -> str:
    """How this machine gets kernels that it can run: a wheel where one fits, else a build, introduced by ``build``."""
    wheel = None if _is_checkout() else _matrix.command(capability)
    return f"install the wheel that fits: {wheel}" if wheel else f"{build}: {environment}{install_command()}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def install_command() -> str:
    """The command that builds the kernels for this install."""
    checkout = LIBRARY.parent.parent
    if _is_checkout():
        return f"TREE_ATTN_CUDA=1 pip install --no-build-isolation -e {checkout}"
    return "TREE_ATTN_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall --no-binary=:all: tree-attn"


def _load() -> Kernels | Unavailable:
    path, namespace = LIBRARY, OP_NAMESPACE
    from_hub = None if LIBRARY.exists() else _hub.find()
    if isinstance(from_hub, str):
        return Unavailable(f"not built, and {from_hub}")
    if from_hub is not None:
        path, namespace = from_hub
    elif not LIBRARY.exists():
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        without = "not built: this install has no CUDA kernels"
        return Unavailable(without + _why_no_wheel(capability), _sentence(_get_them("build them", capability)))
    # The Hub's client compares no digests when it loads a kernel, so this copy of the package, if it is one, does.
    elif LIBRARY.with_name(_hub.METADATA).exists() and (refusal := _hub.altered(LIBRARY.parent)):
        return Unavailable(f"this Hub kernel is refused: {refusal}", "Remove it from the cache and load it again.")
    again = f"Build it again: {install_command()}"
    operator = f"{namespace}::forward"
    if torch._C._dispatch_has_kernel(operator):
        return Unavailable(
            f"the operator {operator} is there already, from another copy of the library in this process; "
            "loading a second one would end the process",
        )
    try:
        torch.ops.load_library(str(path))
        functions = _declare(ctypes.CDLL(str(path)))
    except OSError as error:
        return Unavailable(f"{path.name} does not load on this platform: {error.__cause__ or error}", again)
    except AttributeError as error:
        return Unavailable(f"{path.name} is another library than this package needs: {error}", again)
    build = json.loads(functions.tree_attn_build_info())
    if build["version"] != __version__:
        return Unavailable(f"{path.name} was built for tree_attn {build['version']}, this is {__version__}", again)
    operators = getattr(torch.ops, namespace)
    ours = operators.forward.default, operators.backward.default, operators.mask_from_dfs.default
    return Kernels(*ours, functions, build)


def _why_no_wheel(capability: tuple[int, int] | None) -> str:
    """What pip does not say when it takes the pure wheel because none with kernels fits the platform."""
    matrix, machine = None if _is_checkout() else _matrix.load(), _matrix.this_machine(capability)
    chosen = _matrix.choose(machine, matrix) if matrix and machine.driver_cuda else None
    return f", and no wheel that has them fits this machine: {chosen.why}" if chosen and not chosen.label else ""


def _declare(functions: ctypes.CDLL) -> ctypes.CDLL:
    """Give the C functions of csrc/ops.cpp their signatures; AttributeError if one is missing."""
    integer, text = ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("tree_attn_has_stream", integer, []),
        ("tree_attn_build_info", text, []),
        ("tree_attn_device_facts", None, [integer, ctypes.POINTER(DeviceFacts)]),
        ("tree_attn_error_text", text, [integer]),
        ("tree_attn_path_name", text, [integer] * 7),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions
