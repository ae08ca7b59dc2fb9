"""Gathers what ci/gpu.sh left in a folder into FOLDER/gpu.json: commit, versions, machine and the results of each part.

python ci/gpu_report.py FOLDER [--numerics]      --numerics prints the error table of docs/numerics.md
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import torch

import tree_attn
from tree_attn import _kernels
from tree_attn.cli.bench import commit

SANITIZED = [f"{tool}-{path}" for path in ("portable", "hopper") for tool in ("memcheck", "racecheck")]
PARTS = ("build", "tests", *SANITIZED, "bench", "bench-small")


def versions() -> dict[str, object]:
    library = _kernels.load()
    build = library.build if isinstance(library, _kernels.Kernels) else {"unavailable": library.reason}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "commit": commit(),
        "tree_attn": tree_attn.__version__,
        "library": build,
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "driver": driver[0] if driver else None,
        "gpu": f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parts(folder: Path) -> dict[str, object]:
    """The exit status of each part that ran, and what it found."""
    found: dict[str, object] = {}
    for name in PARTS:
        status = folder / f"{name}.status"
        if not status.exists():
            continue
        result: dict[str, object] = {"passed": status.read_text().strip() == "0"}
        if name == "tests":
            result |= _test_counts(folder / "tests.xml")
        if name in SANITIZED:
            log = (folder / f"{name}.log").read_text(errors="replace")
            result["summary"] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
            result["cases"] = re.findall(r"\d+ cases from seed \d+ ran", log)
        if (folder / f"{name}.json").exists():
            result["results"] = json.loads((folder / f"{name}.json").read_text())
        found[name] = result
    return found


def _test_counts(xml: Path) -> dict[str, object]:
    if not xml.exists():
        return {}
    suites = ElementTree.parse(xml).getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return dict(totals)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def numerics(report: dict) -> str:
    """The error table as Markdown: relative error of ours, and as a share of memory-efficient attention's."""
    errors = report["parts"]["tests"]["results"]["relative_error"]
    lines = ["| kernels, dtype, head dims | out | grad_q | grad_k | grad_v |", "| --- | --: | --: | --: | --: |"]
    for key in sorted(errors, key=lambda k: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", k)]):
        cells = [f"{e['tree_attn']:.2e} ({e['tree_attn'] / e['memory_efficient']:.2f})" for e in errors[key].values()]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gather the results of ci/gpu.sh.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--numerics", action="store_true", help="print the error table of an existing gpu.json")
    given = parser.parse_args()
    target = given.folder / "gpu.json"
    if given.numerics:
        print(numerics(json.loads(target.read_text())))
        return
    target.write_text(json.dumps({**versions(), "parts": parts(given.folder)}, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
