"""What ``tree-attn bench`` compares: ways to compute attention on one tree from the same tensors.

A peer is a context manager: in it the peer can run. What it can make once for a tree (a dense mask, a block list,
expanded keys and values) it makes on entering, so outside the clock. It raises if it cannot run here.

    tree_attn          tree_attention, on the backend that the registry chooses
    hopper, portable   this project's CUDA kernels, one set of them forced
    fa4                flash-attn-4: a mask_mod and block lists; where the tree is one chain, its causal attention
    fa2                torch's own FlashAttention-2, which is causal: where the tree is one chain alone
    flex               torch.compile(flex_attention) with create_block_mask
    paths              no tree at all: every root-to-leaf path as a causal sequence, paths of one length in one call
    sdpa               one scaled_dot_product_attention call with a dense boolean mask
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tree_attn import TreeMask, explain, registry, tree_attention
from tree_attn._backends.cuda import PATH_VARIABLE
from tree_attn.cli.workloads import Nodes, leaf_paths


@dataclass(frozen=True)
class Problem:
    """Attention on one tree: q ``(tokens, heads, dim)``, k and v ``(tokens, kv_heads, dim)``, leaves of autograd."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: TreeMask
    nodes: Nodes

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def is_chain(self) -> bool:
        return len(self.nodes) == 1


@dataclass(frozen=True)
class Attention:
    """How a peer solves a problem."""

    run: Callable[[], Tensor]  # the output, (rows, heads, dim)
    leaves: tuple[Tensor, ...]  # what it is differentiated by
    rows: Tensor | None = None  # packed position of every row of the output; None: all of them in order
    note: str = ""


@contextmanager
def _tree_attn(problem: Problem, backend: str | None = None) -> Iterator[Attention]:
    said = explain(*problem.leaves, problem.mask, backend=backend)
    name = said.chosen or ""
    detail = said.details.get(name)
    yield Attention(
        lambda: tree_attention(*problem.leaves, problem.mask, backend=backend),
        problem.leaves,
        note=f"{name} ({detail})" if detail else name,
    )


def _kernels(path: str) -> Callable[[Problem], AbstractContextManager[Attention]]:
    @contextmanager
    def peer(problem: Problem) -> Iterator[Attention]:
        with _environment(PATH_VARIABLE, path), _tree_attn(problem, "cuda") as attention:
            yield attention

    return peer


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable that backends read, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    registry.reset()  # what can run is asked again
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        registry.reset()


@contextmanager
def _fa4(problem: Problem) -> Iterator[Attention]:
    try:
        from tree_attn.cli import fa4
    except ImportError as error:
        raise RuntimeError(f"not installed ({error}); pip install flash-attn-4") from error
    attend = fa4.on_chain() if problem.is_chain else fa4.on_tree(problem.mask.subtree_end, _block_mask(problem))
    yield Attention(lambda: attend(*problem.leaves), problem.leaves)


@contextmanager
def _fa2(problem: Problem) -> Iterator[Attention]:
    if not problem.is_chain:
        raise NotImplementedError("it is causal, and this tree branches")

    def run() -> Tensor:
        q, k, v = map(_heads_first, problem.leaves)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    yield Attention(run, problem.leaves)


@contextmanager
def _flex(problem: Problem) -> Iterator[Attention]:
    from torch.nn.attention.flex_attention import flex_attention

    blocks = _block_mask(problem)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        q, k, v = map(_heads_first, problem.leaves)
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    yield Attention(run, problem.leaves)


@contextmanager
def _paths(problem: Problem) -> Iterator[Attention]:
    by_length: dict[int, list[list[int]]] = {}
    for path in leaf_paths(problem.nodes):
        by_length.setdefault(len(path), []).append(path)
    groups = [torch.tensor(paths, device=problem.q.device) for paths in by_length.values()]  # (paths, length) each
    calls = [tuple(_leaf(x[index].transpose(1, 2)) for x in problem.leaves) for index in groups]

    def run() -> Tensor:
        outs = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in calls]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])

    rows = torch.cat([index.flatten() for index in groups])
    yield Attention(run, sum(calls, ()), rows, f"{len(rows):,} tokens in {sum(map(len, groups))} paths")


@contextmanager
def _sdpa(problem: Problem) -> Iterator[Attention]:
    group = problem.q.shape[1] // problem.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (problem.k, problem.v))
    q, k, v = leaves = tuple(_leaf(_heads_first(x)) for x in (problem.q, k, v))
    dense = problem.mask.dense()

    def run() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=dense)[0].transpose(0, 1)

    yield Attention(run, leaves, note=f"mask of {dense.numel() / 2**20:,.0f} MiB")


# In the order of tables and plots.
PEERS: dict[str, Callable[[Problem], AbstractContextManager[Attention]]] = {
    "tree_attn": _tree_attn,
    "hopper": _kernels("hopper"),
    "portable": _kernels("portable"),
    "fa4": _fa4,
    "fa2": _fa2,
    "flex": _flex,
    "paths": _paths,
    "sdpa": _sdpa,
}


# -- shared ----------------------------------------------------------------------------------------------------------


def _heads_first(x: Tensor) -> Tensor:
    """``(tokens, heads, dim)`` as torch's ``(1, heads, tokens, dim)``."""
    return x.transpose(0, 1)[None]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _block_mask(problem: Problem) -> Any:
    """torch's block lists of the tree."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()  # every tree compiles for its own size: after a second size torch would compile for any
    end, tokens, device = problem.mask.subtree_end, problem.mask.total, problem.q.device

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row < end[key])

    # Not compiled, though it then holds a few tokens times tokens matrices: the compiler takes minutes for some sizes.
    return create_block_mask(sees, None, None, tokens, tokens, device=str(device))
