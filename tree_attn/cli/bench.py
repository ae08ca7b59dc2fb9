"""The measurements behind ``tree-attn bench`` and ``ci/gpu_bench.py``: peers on tree workloads, in one process.

TFLOP/s count the visible pairs alone: 4 * head_dim operations a pair and query head forward, 10 * head_dim backward. So
time spent on masked pairs counts against a peer. Every output is compared with float64 on some rows. The ceiling is a
plain matrix product, timed in the same process.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tree_attn
from tree_attn import _kernels
from tree_attn.cli.peers import PEERS, Attention, Problem
from tree_attn.cli.workloads import SMALL_WORKLOADS, WORKLOADS, tree_mask

ALL_WORKLOADS = {**WORKLOADS, **SMALL_WORKLOADS}


@dataclass(frozen=True)
class Setup:
    """What is measured: where, in which dtype, with which heads."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of_device(cls, device: str) -> Setup:
        """Training heads in bfloat16 on a GPU, small ones in float32 elsewhere."""
        if torch.device(device).type == "cuda":
            return cls(device, torch.bfloat16, 32, 8, 128)
        return cls(device, torch.float32, 8, 2, 64)

    @property
    def workloads(self) -> list[str]:
        """The names that suit the device."""
        return list(WORKLOADS if torch.device(self.device).type == "cuda" else SMALL_WORKLOADS)


@dataclass(frozen=True)
class Row:
    """One peer on one workload. Times are median milliseconds; all numbers are None, with the reason in ``why_not``, if
    the peer cannot run."""

    workload: str
    peer: str
    tokens: int
    visible_pairs: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    error: float | None = None  # relative, against float64
    note: str = ""
    why_not: str = ""

    @property
    def total_ms(self) -> float | None:
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Results:
    """What was measured on what, as plain JSON types and rows."""

    machine: str
    torch: str
    tree_attn: str
    commit: str | None
    dtype: str
    heads: tuple[int, int, int]  # query heads, key/value heads, head dim
    matmul_size: int
    matmul_tflops: float
    rows: list[Row]  # medians over the runs
    runs: list[list[Row]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Raises ValueError if the text is not what :meth:`to_json` wrote."""
        try:
            found = json.loads(text)
            rows = [Row(**row) for row in found.pop("rows")]
            runs = [[Row(**row) for row in run] for run in found.pop("runs")]
            return cls(**{**found, "heads": tuple(found["heads"])}, rows=rows, runs=runs)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not what `tree-attn bench --json` prints ({error!r})") from error


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(
    workloads: Sequence[str],
    peers: Sequence[str],
    setup: Setup,
    runs: int = 1,
    on_start: Callable[[str, str], None] = lambda workload, peer: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Results:
    """Measure every peer on every workload, ``runs`` times all of it.

    Args:
        workloads, peers: of ``ALL_WORKLOADS`` and ``PEERS``.
        on_start: called with (workload, peer) before each measurement.
        on_row: called with what each measurement found.

    Raises:
        ValueError: an unknown workload or peer.
    """
    _check_names("workload", workloads, ALL_WORKLOADS)
    _check_names("peer", peers, PEERS)
    on_gpu = torch.device(setup.device).type == "cuda"
    size = 8192 if on_gpu else 1024
    products: list[float] = []
    found: list[list[Row]] = []
    with torch.cuda.device(setup.device if on_gpu else -1):
        for _ in range(runs):
            products.append(matmul_tflops(size, setup))
            found.append([])
            for workload, peer in itertools.product(workloads, peers):
                on_start(workload, peer)
                found[-1].append(_row(workload, peer, setup))
                on_row(found[-1][-1])
    return Results(
        machine(setup.device),
        torch.__version__,
        tree_attn.__version__,
        commit(),
        str(setup.dtype).removeprefix("torch."),
        (setup.heads, setup.kv_heads, setup.head_dim),
        size,
        median(products),
        [_typical(rows) for rows in zip(*found, strict=True)],
        found,
    )


def milliseconds(calls: Iterator[Callable[[], object]], device: str, seconds: float = 0.3, at_least: int = 5) -> float:
    """Median time of calls, each prepared outside the clock; on a GPU between events, with the L2 cache emptied."""
    timed = _timer(device)
    next(calls)()
    times: list[float] = []
    while sum(times) < 1e3 * seconds or len(times) < at_least:
        times.append(timed(next(calls)))
    return median(times)


def _timer(device: str) -> Callable[[Callable[[], object]], float]:
    """A function that calls another one and tells the milliseconds."""
    if torch.device(device).type != "cuda":

        def on_cpu(run: Callable[[], object]) -> float:
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)

        return on_cpu
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)

    def on_gpu(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return on_gpu


def matmul_tflops(size: int, setup: Setup) -> float:
    """TFLOP/s of a product of two square matrices, what no attention can exceed."""
    a, b = (torch.randn(size, size, device=setup.device, dtype=setup.dtype) for _ in range(2))
    return 2 * size**3 / 1e9 / milliseconds(itertools.repeat(lambda: a @ b), setup.device)


def _row(workload: str, peer: str, setup: Setup) -> Row:
    problem = _problem(workload, setup)
    row = Row(workload, peer, problem.mask.total, problem.mask.visible_pairs())
    try:
        with PEERS[peer](problem) as attention:
            return _measured(row, attention, problem)
    except Exception as failure:  # compilers raise anything; a peer that cannot run is a finding. Ours must run.
        if peer == "tree_attn":
            raise
        words = " ".join(str(failure).split()) or type(failure).__name__
        return replace(row, why_not=textwrap.shorten(words, 200))
    finally:
        if torch.device(setup.device).type == "cuda":
            torch.cuda.empty_cache()


def _problem(workload: str, setup: Setup) -> Problem:
    nodes = ALL_WORKLOADS[workload]()
    mask = tree_mask(nodes, setup.device)
    generator = torch.Generator(setup.device).manual_seed(0)
    kind: dict[str, Any] = {"device": setup.device, "dtype": setup.dtype, "generator": generator}
    q, k, v = (
        torch.randn(mask.total, heads, setup.head_dim, **kind).requires_grad_()
        for heads in (setup.heads, setup.kv_heads, setup.kv_heads)
    )
    return Problem(q, k, v, mask, nodes)


def _measured(row: Row, attention: Attention, problem: Problem) -> Row:
    device = str(problem.q.device)
    found = error(attention.run().detach(), attention.rows, problem)
    with torch.no_grad():
        forward = milliseconds(itertools.repeat(attention.run), device)
    backward = milliseconds(_backwards(attention), device)
    work = row.visible_pairs * problem.q.shape[1] * problem.q.shape[2] / 1e9  # per millisecond, in TFLOP/s
    return replace(
        row,
        forward_ms=forward,
        backward_ms=backward,
        forward_tflops=4 * work / forward,
        backward_tflops=10 * work / backward,
        error=found,
        note=attention.note,
    )


def _backwards(attention: Attention) -> Iterator[Callable[[], object]]:
    """Calls of the backward pass, each for a forward pass of its own: not every peer can repeat it."""
    grad = torch.randn_like(attention.run())
    while True:
        yield functools.partial(torch.autograd.grad, attention.run(), attention.leaves, grad)


@torch.no_grad()
def error(out: Tensor, positions: Tensor | None, problem: Problem) -> float:
    """Relative error of some rows of the output against float64.

    Args:
        positions: packed position of every row of ``out``; None: all of them in order.
    """
    q, k, v = (x.double() for x in problem.leaves)
    some = torch.randint(len(out), (8,), generator=torch.Generator().manual_seed(0)).to(q.device)
    rows = some if positions is None else positions[some]
    seen = problem.mask.ranges().visible(rows, torch.arange(len(k), device=k.device))
    grouped = q[rows].unflatten(1, (k.shape[1], -1))  # (rows, kv_heads, group, dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    want = torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)
    return float((out[some].double() - want).norm() / want.norm())


def _typical(rows: Sequence[Row]) -> Row:
    """The medians of one measurement over the runs, or the first failure of it."""
    failed = next((row for row in rows if row.why_not), None)
    if failed is not None:
        return failed
    numbers = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "error")
    return replace(rows[0], **{name: median(getattr(row, name) for row in rows) for name in numbers})


def _check_names(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; choose of: {', '.join(known)}")


# -- where -----------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """The device's name, for tables and plots."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def commit() -> str | None:
    """The commit of this checkout; where the sources have no history, the one that the library was built from."""
    root = Path(tree_attn.__file__).parents[1]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if said:
            return said
    library = _kernels.load()
    found = library.build.get("commit") if isinstance(library, _kernels.Kernels) else None
    return None if found is None else str(found)
