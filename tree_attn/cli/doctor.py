"""What is installed, what each backend says about this machine, what to install. Standard library and torch alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tree_attn
from tree_attn import _matrix
from tree_attn.cli import INSTALL_CLI, missing

# extra -> what it installs, by the name it is imported under
EXTRAS = {
    "cli": ("typer", "rich", "matplotlib"),
    "hub": ("kernels",),
    "bench": ("numpy",),
    "test": ("pytest", "hypothesis"),
}
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def report() -> dict[str, Any]:
    """Everything that doctor knows, as plain JSON types."""
    driver = _driver()
    extras = {name: {module: _version(module) for module in modules} for name, modules in EXTRAS.items()}
    machines = [_ask_backends(device, dtype) for device, dtype in _devices()]
    return {
        "tree_attn": {
            "version": tree_attn.__version__,
            "installed_as": _version("tree_attn", "tree-attn"),
            "cuda_kernels": any(Path(tree_attn.__file__).parent.rglob("*.so")),
            "location": str(Path(tree_attn.__file__).parent),
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "driver": driver,
        "gpus": _gpus(),
        "wheel": _wheel(),
        "extras": extras,
        "backends": machines,
        "advice": _advice(driver, extras, machines),
    }


def as_json() -> str:
    """The report as JSON."""
    return json.dumps(report(), indent=2)


def as_text() -> str:
    """The report for a person to read."""
    found = report()
    package, built = found["tree_attn"], found["torch"]
    kernels = "with CUDA kernels" if package["cuda_kernels"] else "pure Python, without CUDA kernels"
    installed = package["installed_as"]
    as_what = f", installed as {installed}" if installed and installed != package["version"] else ""
    toolkit = f"CUDA {built['cuda']}" if built["cuda"] else f"ROCm {built['hip']}" if built["hip"] else "CPU only"
    lines = [
        f"tree_attn  {package['version']}{as_what} ({kernels})",
        f"           {package['location']}",
        f"torch      {built['version']} ({toolkit})",
        f"Python     {found['python']} on {found['platform']}, {found['cpus']} CPUs",
        f"driver     {found['driver'] or 'no NVIDIA driver found'}",
    ]
    for gpu in found["gpus"] or [None]:
        if gpu is None:
            lines.append("GPU        none that torch can use")
        else:
            lines.append(f"GPU {gpu['index']}      {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    wheel = found["wheel"]
    lines.append(f"wheel      {wheel['label'] or 'none with kernels fits'} ({wheel['why']})")
    if wheel["command"]:
        lines.append(f"           {wheel['command']}")
    lines += ["", "Extras"]
    for name, modules in found["extras"].items():
        each = ", ".join(f"{module} {version or 'missing'}" for module, version in modules.items())
        lines.append(f"  {name:<6} {each}")
    lines += ["", f"Backends ({HEADS} heads, {KV_HEADS} key/value heads, head dim {HEAD_DIM}; the arrow runs)"]
    for machine in found["backends"]:
        lines.append(f"  {machine['dtype']} on {machine['device']}")
        for name, reasons in machine["reasons"].items():
            detail = f" ({machine['details'][name]})" if not reasons and machine["details"].get(name) else ""
            state = "; ".join(reasons) if reasons else "runs" if name == machine["chosen"] else "could run"
            lines.append(f"  {'->' if name == machine['chosen'] else '  '} {name:<10} {state}{detail}")
    lines += ["", "What to install"]
    lines += [f"  {line}" for line in found["advice"] or ["nothing: this install has all that this machine can use"]]
    return "\n".join(lines)


def _version(module: str, distribution: str | None = None) -> str | None:
    """The version of a module that can be imported; None when it cannot, "unknown" when nobody noted its version."""
    if missing(module):
        return None
    try:
        return importlib.metadata.version(distribution or module)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _driver() -> str | None:
    """The NVIDIA driver's version as nvidia-smi says it, None without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        asked = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi did not answer ({type(error).__name__})"
    if asked.returncode:
        return f"nvidia-smi failed: {(asked.stderr or asked.stdout).strip().splitlines()[:1]}"
    return ", ".join(sorted(set(asked.stdout.split())))


def _wheel() -> dict[str, str | None]:
    """The published wheel for this machine, by its driver and GPU; torch's own CUDA does not matter to it."""
    matrix = _matrix.load()
    if matrix is None:
        return {"label": None, "why": "this copy of the package was not built and knows no wheels", "command": None}
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    chosen = _matrix.choose(_matrix.this_machine(capability), matrix)
    return {**chosen._asdict(), "command": _matrix.command(capability)}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _devices() -> list[tuple[str, torch.dtype]]:
    """Where tensors can live here, and the dtypes worth asking about."""
    devices = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    kinds: set[str] = set()
    for gpu in _gpus():
        if gpu["name"] not in kinds:  # eight cards of one kind would say the same eight times
            kinds.add(gpu["name"])
            devices += [(f"cuda:{gpu['index']}", torch.bfloat16), (f"cuda:{gpu['index']}", torch.float32)]
    if torch.backends.mps.is_available():
        devices.append(("mps", torch.float32))
    return devices


def _ask_backends(device: str, dtype: torch.dtype) -> dict[str, Any]:
    mask = tree_attn.TreeMask.from_nodes([-1, 0, 0], [2, 1, 1], device=device)
    q = torch.zeros(mask.total, HEADS, HEAD_DIM, device=device, dtype=dtype)
    k = torch.zeros(mask.total, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    said = asdict(tree_attn.explain(q, k, k, mask))
    request = tree_attn.Request(q.device, dtype, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM)
    remedies = {b.name: b.remedy(request) for b in tree_attn.backends() if said["reasons"].get(b.name)}
    return {"device": device, "dtype": str(dtype).removeprefix("torch."), **said, "remedies": remedies}


def _advice(driver: str | None, extras: dict[str, Any], machines: list[dict[str, Any]]) -> list[str]:
    advice = []
    if driver is not None and torch.version.cuda is None:
        advice.append(
            "There is an NVIDIA driver but torch is a CPU build: install a CUDA build of torch (pytorch.org)."
        )
    elif driver is not None and not torch.cuda.is_available():
        advice.append(f"torch is built for CUDA {torch.version.cuda} but cannot use the GPU: update the NVIDIA driver.")
    advice += dict.fromkeys(remedy for machine in machines for remedy in machine["remedies"].values() if remedy)
    absent = [module for module, version in extras["cli"].items() if version is None]
    if absent:
        advice.append(f"For tree-attn demo, show and bench ({', '.join(absent)} missing): {INSTALL_CLI}")
    return advice
