"""This project against what torch alone offers on this machine: the measurements behind ``tree-attn bench``.

Every peer computes attention of the same tree from the same tensors, forward and backward, and its output is compared
with this project's. What a peer can prepare once for a tree (a dense mask, a block list, expanded keys and values) is
prepared outside the clock.

    tree_attn   tree_attention, on the backend the registry chooses
    sdpa        one scaled_dot_product_attention call with a dense boolean mask and keys and values already expanded
    paths       no tree at all: every root-to-leaf path as a causal sequence, paths of one length in one call
    flex        torch.compile(flex_attention) with a block mask
"""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tree_attn
from tree_attn import TreeMask, tree_attention

PEERS = ("tree_attn", "sdpa", "paths", "flex")
SHAPES = ("star", "agent", "dpo")
Nodes = list[tuple[int, int]]  # (parent or -1, tokens), depth-first


@dataclass(frozen=True)
class Setup:
    """What is measured: where, with which heads, how often."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int = 5

    @classmethod
    def of_this_machine(cls, device: str) -> Setup:
        """A size that takes about a minute: training heads in bfloat16 on a GPU, small ones in float32 elsewhere."""
        if torch.device(device).type == "cuda":
            return cls(device, torch.bfloat16, 32, 8, 128, 20)
        return cls(device, torch.float32, 8, 2, 64)


@dataclass(frozen=True)
class Row:
    """One peer on one tree. Times are median milliseconds; None, with the reason in ``why_not``, if it cannot run."""

    shape: str
    peer: str
    tokens: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    difference: float | None = None  # norm(out - tree_attn's) / norm(tree_attn's)
    note: str = ""
    why_not: str = ""

    @property
    def total_ms(self) -> float | None:
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


# -- trees -----------------------------------------------------------------------------------------------------------


def tree(shape: str, large: bool) -> Nodes:
    """The nodes of a shape: ``star`` one prompt with many responses (GRPO), ``agent`` a rollout tree that branches at
    many turns, ``dpo`` several prompts with two responses each. Small ones have about 4 096 tokens."""
    if shape == "star":
        return _star(4096, 16, 1024) if large else _star(1024, 12, 256)
    if shape == "dpo":
        pair, count = (_star(1024, 2, 512), 8) if large else (_star(512, 2, 256), 4)
        return [(p + i * len(pair) if p >= 0 else -1, n) for i in range(count) for p, n in pair]
    return _agent(32768, 128, 1024) if large else _agent(4096, 32, 192)


def _star(prompt: int, leaves: int, length: int) -> Nodes:
    return [(-1, prompt)] + [(0, length)] * leaves


def _agent(total: int, shortest: int, longest: int) -> Nodes:
    rng = random.Random(7)
    nodes: Nodes = []

    def grow(parent: int, level: int, room: int) -> int:
        length = min(rng.randint(shortest, longest), room)
        me, room = len(nodes), room - length
        nodes.append((parent, length))
        for _ in range(rng.randint(2, 4) if level < 6 else 0):
            if room > 0:
                room = grow(me, level + 1, room)
        return room

    room = grow(-1, 0, total)
    while room > 0:
        room = grow(0, 1, room)
    return nodes


def leaf_paths(nodes: Nodes) -> list[list[int]]:
    """Token positions of every root-to-leaf path, in depth-first order of the leaves."""
    begin, at = [], 0
    for _, length in nodes:
        begin.append(at)
        at += length
    path: list[list[int]] = []
    for (parent, length), first in zip(nodes, begin, strict=True):
        path.append((path[parent] if parent >= 0 else []) + list(range(first, first + length)))
    inner = {parent for parent, _ in nodes}
    return [path[i] for i in range(len(nodes)) if i not in inner]


# -- peers -----------------------------------------------------------------------------------------------------------

# What a peer makes of the tree's q, k, v: the leaves it differentiates, a function that gives its output, the packed
# positions that its output rows are for (None: all of them in order), and a note.
Prepared = tuple[Sequence[Tensor], Callable[[], Tensor], Tensor | None, str]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _tree_attn(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, nodes: Nodes) -> Prepared:
    q, k, v = leaves = tuple(_leaf(x) for x in (q, k, v))
    chosen = tree_attn.explain(q, k, v, mask).chosen
    return leaves, lambda: tree_attention(q, k, v, mask), None, f"backend {chosen}"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, nodes: Nodes) -> Prepared:
    group = q.shape[1] // k.shape[1]
    expanded = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    q, k, v = leaves = tuple(_leaf(_heads_first(x)) for x in expanded)
    dense = mask.dense()

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=dense)[0].transpose(0, 1)

    return leaves, run, None, f"mask of {dense.numel() / 2**20:.0f} MiB"


def _paths(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, nodes: Nodes) -> Prepared:
    by_length: dict[int, list[list[int]]] = {}
    for path in leaf_paths(nodes):
        by_length.setdefault(len(path), []).append(path)
    groups = [torch.tensor(paths, device=q.device) for paths in by_length.values()]  # (paths, length) each
    calls = [tuple(_leaf(x[index].transpose(1, 2)) for x in (q, k, v)) for index in groups]

    def run() -> Tensor:
        outs = [
            scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            for query, key, value in calls
        ]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])

    rows = torch.cat([index.flatten() for index in groups])
    return sum(calls, ()), run, rows, f"{len(rows):,} tokens in {sum(map(len, groups))} paths"


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, nodes: Nodes) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = leaves = tuple(_leaf(_heads_first(x)) for x in (q, k, v))
    end = mask.subtree_end

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row < end[key])

    # Compiled, it never holds the tokens times tokens matrix; on the CPU that would need a C++ compiler.
    compile_it = q.device.type == "cuda"
    blocks = create_block_mask(sees, None, None, mask.total, mask.total, device=str(q.device), _compile=compile_it)
    compiled: Any = torch.compile(flex_attention)
    return leaves, lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1), None, ""


_PREPARE: dict[str, Callable[[Tensor, Tensor, Tensor, TreeMask, Nodes], Prepared]] = {
    "tree_attn": _tree_attn,
    "sdpa": _sdpa,
    "paths": _paths,
    "flex": _flex,
}


# -- measuring -------------------------------------------------------------------------------------------------------


def run(
    shapes: Sequence[str],
    peers: Sequence[str],
    setup: Setup,
    on_start: Callable[[str, str], None] = lambda shape, peer: None,
) -> list[Row]:
    """Measure every peer on every shape, shapes first.

    Args:
        shapes, peers: of ``SHAPES`` and ``PEERS``.
        on_start: called with (shape, peer) before each measurement.

    Raises:
        ValueError: an unknown shape or peer.
    """
    _check_names("shape", shapes, SHAPES)
    _check_names("peer", peers, PEERS)
    rows = []
    for shape in shapes:
        nodes = tree(shape, large=torch.device(setup.device).type == "cuda")
        mask = TreeMask.from_nodes([p for p, _ in nodes], [n for _, n in nodes], device=setup.device)
        generator = torch.Generator(setup.device).manual_seed(0)
        q, k, v = (
            torch.randn(mask.total, h, setup.head_dim, device=setup.device, dtype=setup.dtype, generator=generator)
            for h in (setup.heads, setup.kv_heads, setup.kv_heads)
        )
        with torch.no_grad():
            expected = tree_attention(q, k, v, mask)
        for peer in peers:
            on_start(shape, peer)
            try:
                rows.append(_measure(shape, peer, (q, k, v), mask, nodes, expected, setup))
            except RuntimeError as error:
                # A peer that this machine cannot run is a finding, told in the table. Ours is no peer: it must run.
                if peer == "tree_attn":
                    raise
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
                rows.append(Row(shape, peer, mask.total, why_not=first_line[:160]))
    return rows


def _measure(
    shape: str,
    peer: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: TreeMask,
    nodes: Nodes,
    expected: Tensor,
    setup: Setup,
) -> Row:
    leaves, forward, rows, note = _PREPARE[peer](*qkv, mask, nodes)
    out = forward()
    want = (expected if rows is None else expected[rows]).double()
    difference = float((out.detach().double() - want).norm() / want.norm())
    grad = torch.randn_like(out)
    out.backward(grad)  # the warm-up of the backward
    del out, want
    forwards, backwards = [], []
    for _ in range(setup.repeats):
        for leaf in leaves:
            leaf.grad = None
        begin = _now(setup.device)
        out = forward()
        between = _now(setup.device)
        out.backward(grad)
        end = _now(setup.device)
        forwards.append(1e3 * (between - begin))
        backwards.append(1e3 * (end - between))
    return Row(shape, peer, mask.total, median(forwards), median(backwards), difference, note)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; choose of: {', '.join(known)}")


# -- results ---------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """The device's name, for tables and plots."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def as_json(rows: Iterable[Row], setup: Setup) -> dict[str, Any]:
    """The measurements as plain JSON types."""
    return {
        "machine": machine(setup.device),
        "torch": torch.__version__,
        "tree_attn": tree_attn.__version__,
        "setup": {**asdict(setup), "dtype": str(setup.dtype).removeprefix("torch.")},
        "rows": [{**asdict(row), "total_ms": row.total_ms} for row in rows],
    }


def plot(rows: Sequence[Row], setup: Setup, path: Path) -> None:
    """Bars of forward and backward, one group a shape."""
    from matplotlib.figure import Figure

    colours = {"tree_attn": "#274a8a", "sdpa": "#4aa9ad", "paths": "#9aa5b1", "flex": "#d9a441"}
    shapes = list(dict.fromkeys(row.shape for row in rows))
    fig = Figure(figsize=(7.4, 1.0 + 0.33 * len(rows) + 0.3 * len(shapes)), dpi=140, layout="constrained")
    axes = fig.subplots()
    ticks, names, at = [], [], 0.0
    for shape in shapes:
        of_shape = [row for row in rows if row.shape == shape]
        axes.text(0, at - 0.85, f"{shape}, {of_shape[0].tokens:,} tokens", fontsize=9, fontweight="bold", va="center")
        for row in of_shape:
            ticks.append(at)
            names.append(row.peer)
            if row.forward_ms is None or row.backward_ms is None:
                axes.text(0, at, f" {textwrap.shorten(row.why_not, 100)}", fontsize=7.5, va="center", color="#666666")
            else:
                axes.barh(at, row.forward_ms, height=0.75, color=colours[row.peer])
                axes.barh(at, row.backward_ms, left=row.forward_ms, height=0.75, color=colours[row.peer], alpha=0.55)
                both = row.forward_ms + row.backward_ms
                axes.text(both, at, f" {both:,.1f} ms", fontsize=8, va="center")
            at += 1
        at += 1.3
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(at - 1.4, -1.5)
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds: forward (dark) and backward (light)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    heads = (
        f"{setup.heads}/{setup.kv_heads} heads, head dim {setup.head_dim}, {str(setup.dtype).removeprefix('torch.')}"
    )
    axes.set_title(f"{machine(setup.device)}, torch {torch.__version__}\n{heads}", fontsize=9, loc="left")
    fig.savefig(path)
