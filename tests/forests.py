"""Forests to test with, and attention path by path to compare with: written without the library."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from torch import Tensor

Forest = tuple[list[int], list[int]]  # parents and lengths of nodes in depth-first order

# A name for each kind of tree that has its own way of going wrong; 128 is the tile size of kernels.
SHAPES: dict[str, Forest] = {
    "no tokens": ([], []),
    "one token": ([-1], [1]),
    "127 tokens": ([-1], [127]),
    "128 tokens": ([-1], [128]),
    "129 tokens": ([-1], [129]),
    "chain": ([-1, 0, 1, 2], [3, 1, 4, 2]),
    "star": ([-1, *[0] * 8], [5, *range(1, 9)]),
    "star of single tokens": ([-1, *[0] * 40], [1] * 41),
    "caterpillar": ([-1, 0, 0, 2, 2, 4, 4, 6, 6], [3, 2, 1, 2, 1, 2, 1, 2, 1]),
    "binary": ([-1, 0, 1, 1, 0, 4, 4], [2, 3, 1, 2, 2, 1, 3]),
    "many roots": ([-1] * 30, [1, 2, 3] * 10),
    "trees and single roots": ([-1, -1, 1, 1, -1, 4, 5, 4], [1, 2, 2, 1, 4, 1, 2, 3]),
    "prompt of a tile, responses across tiles": ([-1, 0, 0, 0], [128, 1, 127, 129]),
    "two levels across tiles": ([-1, 0, 1, 1, 0, 4], [100, 28, 60, 7, 130, 33]),
}


@st.composite
def forests(draw: st.DrawFn, max_nodes: int = 14, max_tokens: int = 200) -> Forest:
    """Any forest in depth-first order: each node hangs below some node of the path to the one before, or is a root."""
    count = draw(st.integers(1, max_nodes))
    length = st.one_of(st.integers(1, 6), st.sampled_from([1, 31, 32, 33, 127, 128, 129]))
    parents, lengths, path = [], [], []
    for node in range(count):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(min(draw(length), max(1, max_tokens - sum(lengths) - (count - node))))
        path.append(node)
    return parents, lengths


def token_parents(forest: Forest) -> list[int]:
    """The parent of each token, -1 for the first token of a tree."""
    parents, lengths = forest
    last: list[int] = []  # last token of each node
    result: list[int] = []
    for parent, length in zip(parents, lengths, strict=True):
        result.append(-1 if parent == -1 else last[parent])
        result.extend(range(len(result) - 1, len(result) + length - 2))
        last.append(len(result) - 1)
    return result


def ancestors(parent: list[int]) -> list[list[int]]:
    """For each token the tokens on its path, from the root to itself."""
    paths: list[list[int]] = []
    for token, above in enumerate(parent):
        paths.append([*(paths[above] if above >= 0 else []), token])
    return paths


def dense(parent: list[int]) -> Tensor:
    """bool ``(tokens, tokens)``, by following parents."""
    mask = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for token, path in enumerate(ancestors(parent)):
        mask[token, path] = True
    return mask


def attention_path_by_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parent: list[int],
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with every root-to-leaf path run alone, as plain causal attention over its own tokens.

    A token in several paths gets the same row in each, so it is taken from the first.
    """
    inner = set(parent)
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    done: set[int] = set()
    order: list[int] = []
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(0, q.shape[1])]
    for path in ancestors(parent):
        if path[-1] in inner:
            continue  # no leaf
        new = [i for i, token in enumerate(path) if token not in done]
        q_path = q[path].transpose(0, 1)
        k_path, v_path = (x[path].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q_path @ k_path.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(len(path))
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (window or len(path)))
        scores = scores.masked_fill(hidden, float("-inf"))
        logits = scores if sinks is None else torch.cat([scores, sinks[:, None, None].expand(-1, len(path), 1)], -1)
        weights = logits.softmax(-1)[..., : len(path)]
        outs.append((weights @ v_path).transpose(0, 1)[new])
        lses.append(scores.logsumexp(-1).transpose(0, 1)[new])
        order += [path[i] for i in new]
        done.update(path)
    back = torch.tensor(order, dtype=torch.int64).argsort()
    return torch.cat(outs)[back], torch.cat(lses)[back].transpose(0, 1)


def random_qkv(
    tokens: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    requires_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with normal entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim)]
    q, k, v = (torch.randn(tokens, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(requires_grad), k.requires_grad_(requires_grad), v.requires_grad_(requires_grad)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference is at most ``tolerance`` times the largest entry (or times 1)."""
    assert got.shape == expected.shape
    if got.numel() == 0:
        return
    assert torch.isfinite(got).eq(torch.isfinite(expected)).all()
    finite = torch.isfinite(expected)
    difference = (got.double() - expected.double())[finite].abs().max().item() if finite.any() else 0.0
    bound = tolerance * max(1.0, expected[finite].abs().max().item()) if finite.any() else 0.0
    assert difference <= bound, f"largest difference {difference:.3g}, allowed {bound:.3g}"
