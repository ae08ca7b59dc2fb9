"""The picture of a tree and of its mask: what ``tree-attn show`` and ``tree-attn demo`` write.

Above, the tree as an icicle: a node is as wide as its subtree and as high as it has tokens, so a path from the root is
read downwards. Below, on the same horizontal axis, the mask: which keys each row sees. Both are coloured by how many
branches share a token. A tree of many nodes gets a second column, the same two drawings of a stretch of it, magnified.
Everything is drawn from one rectangle a node and one interval a token, never from a matrix of tokens times tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from tree_attn.mask import TreeMask

FORMATS = (".png", ".svg", ".pdf")
MAGNIFY_FROM = 400  # nodes; above, single nodes are too thin to see and a stretch of them is drawn again, magnified
MAGNIFIED = 60  # nodes of that stretch
# Shared by one branch: light; shared by many: dark. Ends short of white, so that thin lines stay visible.
_COLOURS = LinearSegmentedColormap.from_list("sharing", ("#8fd3bd", "#4aa9ad", "#2a7aa3", "#274a8a", "#1a1f52"))
_INK = "#1a1f52"
_MARK = "#d9480f"
_MASK_PIXELS = 1100


@dataclass(frozen=True)
class _Forest:
    """The arrays that the drawings need, int64, positions counted from token 0 of the whole mask."""

    offset: int  # first token drawn
    end: np.ndarray  # (tokens,) subtree_end
    depth: np.ndarray  # (tokens,)
    sharing: np.ndarray  # (tokens,) leaves below
    first: np.ndarray  # (nodes,) first token of each node

    def part(self, begin: int, stop: int) -> _Forest:
        """The tokens [begin, stop) and what they are to one another."""
        first = self.first[(self.first >= begin) & (self.first < stop)]
        piece = slice(begin - self.offset, stop - self.offset)
        return _Forest(begin, self.end[piece].clip(max=stop), self.depth[piece], self.sharing[piece], first)


def draw(mask: TreeMask, path: str | Path, *, title: str = "", labels: Sequence[tuple[int, str]] = ()) -> Path:
    """Write the picture of a mask.

    Args:
        mask: the tree; at least one token.
        path: file to write; its suffix says the format, one of ``FORMATS``.
        title: a line above the picture.
        labels: ``(token, text)``: the text is written into the node that holds the token, where it fits.

    Returns:
        The path written.

    Raises:
        ValueError: an unknown suffix, or a mask without tokens.
    """
    path = checked(path)
    if mask.total == 0:
        raise ValueError("the mask has no tokens; there is nothing to draw")
    end, depth = mask.subtree_end.cpu().numpy().astype(np.int64), mask.depth.cpu().numpy().astype(np.int64)
    whole = _Forest(0, end, depth, branches_below(end), node_starts(end, depth))
    norm = LogNorm(1, max(2, int(whole.sharing.max())))

    views = [whole]
    if len(whole.first) > MAGNIFY_FROM:
        views.append(_stretch(whole))
    fig = Figure(figsize=(7.4 * len(views), 9.6), dpi=140, layout="constrained")
    grid = fig.subplots(2, len(views), sharex="col", height_ratios=(3, 7), squeeze=False)
    for view, (tree_axes, mask_axes) in zip(views, grid.T, strict=True):
        _draw_tree(tree_axes, view, norm)
        _draw_mask(mask_axes, view, norm)
        _write_labels(tree_axes, view, norm, labels, fig.get_figwidth() / len(views))
    _legend(grid[1, 0], whole, norm)
    if len(views) == 2:
        _mark(grid, whole, views[1])
    if title:
        fig.suptitle(title, fontsize=11)
    fig.savefig(path)
    return path


def checked(path: str | Path) -> Path:
    """The path of a picture to be written, if its suffix is one of ``FORMATS``; a ValueError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot write {path.name!r} as a picture; its name must end with one of {', '.join(FORMATS)}")
    return path


# -- arrays ----------------------------------------------------------------------------------------------------------


def node_starts(end: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """First token of every node, int64: a token continues a node if it is the only child of the one before."""
    continues = (end[1:] == end[:-1]) & (depth[1:] == depth[:-1] + 1)
    return np.concatenate([[0], 1 + np.flatnonzero(~continues)])


def branches_below(end: np.ndarray) -> np.ndarray:
    """How many leaves each token's subtree has, int64 ``(tokens,)``."""
    index = np.arange(len(end))
    leaves_before = np.concatenate([[0], np.cumsum(end == index + 1)])
    return leaves_before[end] - leaves_before[index]


def mask_density(end: np.ndarray, pixels: int) -> np.ndarray:
    """Share of visible pairs in every pixel of the mask, float64 ``(pixels, pixels)``, rows are queries.

    Token k is seen by the rows ``[k, end[k])``. An interval's coverage of a column of pixels is the difference of two
    ramps; a ramp up to x fills the pixels below x and a part of the one that holds x. The ramps are summed as first
    differences and integrated once: O(tokens + pixels^2).
    """
    tokens = len(end)
    column = np.arange(tokens) * pixels // tokens
    steps = np.zeros((pixels + 2, pixels))
    for stop, sign in ((end, 1.0), (np.arange(tokens), -1.0)):
        x = stop * (pixels / tokens)
        row = np.floor(x).astype(np.int64)
        part = x - row
        # A ramp is 1 before `row`, `part` at it, 0 after it. The 1 from pixel 0 on cancels between the two ramps.
        np.add.at(steps, (row, column), sign * (part - 1))
        np.add.at(steps, (row + 1, column), -sign * part)
    covered = np.cumsum(steps, axis=0)[:pixels]
    return np.clip(covered / np.bincount(column, minlength=pixels).clip(1), 0, 1)


def _stretch(forest: _Forest) -> _Forest:
    """``MAGNIFIED`` consecutive nodes from the middle third, from the one nearest to a root on."""
    nodes = len(forest.first)
    third = forest.first[nodes // 3 : 2 * nodes // 3]
    node = nodes // 3 + int(np.argmin(forest.depth[third]))
    after = node + MAGNIFIED
    return forest.part(int(forest.first[node]), int(forest.first[after]) if after < nodes else len(forest.end))


# -- drawings --------------------------------------------------------------------------------------------------------


def _draw_tree(axes: Axes, forest: _Forest, norm: LogNorm) -> None:
    at = forest.first - forest.offset
    left, right, top = forest.first, forest.end[at], forest.depth[at]
    bottom = top + np.diff(np.append(at, len(forest.end)))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    boxes = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)
    many = len(left) > MAGNIFY_FROM
    nodes = PolyCollection(
        list(boxes),
        facecolors=_COLOURS(norm(forest.sharing[at])),
        edgecolors="none" if many else "white",
        linewidths=0 if many else 0.5,
    )
    nodes.set_rasterized(many)
    axes.add_collection(nodes)
    axes.set_ylim(bottom.max(), top.min())
    axes.set_ylabel("depth: tokens from the root", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8, bottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_mask(axes: Axes, forest: _Forest, norm: LogNorm) -> None:
    tokens = len(forest.end)
    pixels = min(_MASK_PIXELS, tokens)
    shared = np.ones(pixels)
    np.maximum.at(shared, np.arange(tokens) * pixels // tokens, forest.sharing)
    image = np.empty((pixels, pixels, 4))
    image[..., :3] = _COLOURS(norm(shared))[None, :, :3]
    # The cube root keeps a pixel visible of whose pairs only a few can be seen; a full one stays 1.
    image[..., 3] = np.cbrt(mask_density(forest.end - forest.offset, pixels))
    begin, stop = forest.offset, forest.offset + tokens
    axes.imshow(image, extent=(begin, stop, stop, begin), interpolation="nearest", aspect="auto")
    axes.set_xlim(begin - 0.006 * tokens, stop)  # the axis must not cover a thin first column
    axes.set_xlabel("key, in packed order", fontsize=9)
    axes.set_ylabel("query, in packed order", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _write_labels(axes: Axes, forest: _Forest, norm: LogNorm, labels: Sequence[tuple[int, str]], inches: float) -> None:
    stop = forest.offset + len(forest.end)
    points_per_token = 72 * 0.87 * inches / len(forest.end)  # the axes take about this share of their column
    points_per_depth = 72 * 2.6 / (1 + forest.depth.max() - forest.depth.min())
    for token, text in labels:
        if not forest.offset <= token < stop:
            continue
        node = int(np.searchsorted(forest.first, token, side="right")) - 1
        start = forest.first[node]
        last = (forest.first[node + 1] if node + 1 < len(forest.first) else stop) - 1
        right = forest.end[start - forest.offset]
        top, bottom = forest.depth[start - forest.offset], forest.depth[last - forest.offset] + 1
        # A letter is about 0.6 of its font size wide.
        size = min(8.5, (right - start) * points_per_token / (0.6 * len(text)), (bottom - top) * points_per_depth * 0.8)
        if size >= 4.5:
            dark = norm(forest.sharing[start - forest.offset]) > 0.3
            axes.text(
                (start + right) / 2,
                (top + bottom) / 2,
                text,
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else _INK,
            )


def _legend(axes: Axes, forest: _Forest, norm: LogNorm) -> None:
    """Numbers and colours, in the triangle of the mask that is empty in every causal mask."""
    tokens = len(forest.end)
    pairs = int((forest.end - np.arange(tokens)).sum())
    share = pairs / (tokens * (tokens + 1) / 2)
    text = (
        f"{tokens:,} tokens in {len(forest.first):,} nodes\n{forest.depth.max() + 1:,} tokens on the longest path\n"
        f"{pairs:,} visible pairs, {share:.1%} of causal"
    )
    axes.text(0.98, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=9, linespacing=1.5)
    most = int(forest.sharing.max())
    marks = [m * 10**e for e in range(7) for m in (1, 3) if m * 10**e * 1.6 <= most]
    bar_axes = axes.inset_axes((0.6, 0.8, 0.38, 0.022))
    bar = axes.figure.colorbar(ScalarMappable(norm, _COLOURS), cax=bar_axes, orientation="horizontal")
    bar.ax.xaxis.set_major_locator(FixedLocator([*marks, most]))
    bar.ax.xaxis.set_minor_locator(FixedLocator([]))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("branches that share the token", fontsize=8)
    bar.outline.set_visible(False)


def _mark(grid: Any, whole: _Forest, part: _Forest) -> None:
    """Say on the whole where the magnified part lies."""
    begin, tokens = part.offset, len(part.end)
    grid[0, 1].set_title(
        f"magnified: tokens {begin:,} to {begin + tokens:,}, {len(part.first)} nodes", fontsize=9, color=_MARK
    )
    high = whole.depth.max() - part.depth.min() + 1
    grid[0, 0].add_patch(
        Rectangle((begin, part.depth.min()), tokens, high, fill=False, edgecolor=_MARK, linewidth=1.2, zorder=3)
    )
    grid[1, 0].add_patch(
        Rectangle((begin, begin), tokens, tokens, fill=False, edgecolor=_MARK, linewidth=1.2, zorder=3)
    )
    grid[1, 0].annotate(
        "magnified",
        (begin + tokens, begin),
        xytext=(14, 14),
        textcoords="offset points",
        fontsize=8,
        color=_MARK,
        arrowprops={"arrowstyle": "-", "color": _MARK},
    )
