"""The plot of ``tree-attn bench``: one group of bars a workload, forward above backward, the ceiling as a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tree_attn.cli import picture
from tree_attn.cli.bench import Results, Row

# One colour a peer, in the order of the bars; this project's in blue.
COLOURS = {
    "tree_attn": "#274a8a",
    "hopper": "#3f6bb5",
    "portable": "#86a5d8",
    "fa4": "#2f9e8f",
    "fa2": "#a8432f",
    "flex": "#e0a63a",
    "paths": "#8d6cab",
    "sdpa": "#a3adb8",
}
LABELS = {
    "hopper": "tree_attn (hopper)",
    "portable": "tree_attn (portable)",
    "fa4": "FlashAttention-4",
    "fa2": "FlashAttention-2",
    "flex": "FlexAttention",
    "paths": "every path by itself",
    "sdpa": "SDPA, dense mask",
}
_MARK = "#d9480f"
_WIDTH = 0.84  # of a group, where two groups are 1 apart


def draw(results: Results, path: str | Path) -> Path:
    """Write the plot of results.

    Args:
        path: file to write; its suffix says the format, one of ``picture.FORMATS``.

    Raises:
        ValueError: an unknown suffix, or no peer ran.
    """
    path = picture.checked(path)
    rows = [row for row in results.rows if not row.why_not]
    if not rows:
        raise ValueError("no peer ran; there is nothing to draw")
    fig = Figure(figsize=(10.4, 6.2), dpi=140, layout="constrained")
    upper, lower = fig.subplots(2, 1, sharex=True)
    _panel(upper, "forward", rows, results, lambda row: row.forward_tflops or 0)
    _panel(lower, "backward", rows, results, lambda row: row.backward_tflops or 0)
    groups = list({row.workload: row for row in rows}.values())
    lower.set_xticks(range(len(groups)), [_label(row) for row in groups], fontsize=9)
    handles, labels = upper.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    fig.suptitle(_title(results), fontsize=10.5, x=0.01, ha="left")
    fig.savefig(path)
    return path


def _panel(axes: Axes, name: str, rows: list[Row], results: Results, rate: Callable[[Row], float]) -> None:
    scale, unit = (1, "TFLOP/s") if results.matmul_tflops >= 1 else (1000, "GFLOP/s")
    workloads = list(dict.fromkeys(row.workload for row in rows))
    of_workload = {workload: [row for row in rows if row.workload == workload] for workload in workloads}
    width = _WIDTH / max(map(len, of_workload.values()))
    for peer in (peer for peer in COLOURS if any(row.peer == peer for row in rows)):
        at, heights = [], []
        for group, workload in enumerate(workloads):
            order = sorted(of_workload[workload], key=lambda row: list(COLOURS).index(row.peer))
            for place, row in enumerate(order):
                if row.peer == peer:
                    at.append(group + (place - (len(order) - 1) / 2) * width)
                    heights.append(scale * rate(row))
        bars = axes.bar(at, heights, 0.92 * width, color=COLOURS[peer], label=LABELS.get(peer, peer))
        weight = "bold" if peer == "tree_attn" else "normal"
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7.5, padding=1.5, fontweight=weight, color="#333333")
    ceiling, size = scale * results.matmul_tflops, results.matmul_size
    axes.axhline(ceiling, color=_MARK, linewidth=1.2, linestyle=(0, (5, 3)))
    what = f"matrix product of {size} x {size}: {ceiling:.0f}"
    axes.annotate(what, (1, ceiling), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", va="bottom", fontsize=8, color=_MARK)  # fmt: skip
    axes.set_ylim(0, 1.14 * max(ceiling, *(scale * rate(row) for row in rows)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(-0.55, len(workloads) - 0.45)
    axes.set_ylabel(f"{name}, {unit}", fontsize=9.5)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label(row: Row) -> str:
    share = row.visible_pairs / (row.tokens * (row.tokens + 1) / 2)
    return f"{row.workload}\n{row.tokens:,} tokens\n{100 * share:.3g}% of causal pairs"


def _title(results: Results) -> str:
    heads, kv_heads, head_dim = results.heads
    version = f"tree_attn {results.tree_attn}" + (f" at {results.commit}" if results.commit else "")
    return (
        f"{results.machine}, {results.dtype}, {heads} query heads, {kv_heads} key/value heads, head dim {head_dim}\n"
        f"{version}, torch {results.torch}; operations on visible pairs alone"
    )
