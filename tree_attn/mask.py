"""The mask of a forest in depth-first order: one integer a token says which rows see it.

Tokens lie in pre-order, so the descendants of token k are the rows ``[k, subtree_end[k])`` and q sees k exactly when
``k <= q < subtree_end[k]``. Everything else (depth, tile bounds) follows from that array by tensor operations, on the
device the arrays came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from tree_attn import _diagnose

# Keys per entry of the bounds tables. A kernel tile of any size takes the entries it touches: a superset only makes
# "needed" wider and "unmasked" narrower, so both stay right.
GRANULE = 32


class RowRanges(NamedTuple):
    """The rectangular mask that backends compute with: key k is seen by the rows ``[row_begin[k], row_end[k])``.

    ``row_begin`` None means ``row_begin[k] = k`` (a mask over its own tokens). Depths serve ``window`` alone. The bounds
    hold (min, max) of each ``GRANULE`` consecutive entries, int32 ``(ceil(n / GRANULE), 2)``.
    """

    row_begin: Tensor | None  # int32 (keys,)
    row_end: Tensor  # int32 (keys,)
    q_depth: Tensor  # int32 (rows,)
    k_depth: Tensor  # int32 (keys,)
    begin_bounds: Tensor | None
    end_bounds: Tensor
    q_depth_bounds: Tensor
    k_depth_bounds: Tensor

    def visible(self, rows: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
        """bool ``(len(rows), len(keys))``: does row see key. ``rows`` and ``keys`` are int64 indices."""
        begin = keys if self.row_begin is None else self.row_begin[keys]
        seen = (begin <= rows[:, None]) & (rows[:, None] < self.row_end[keys])
        if window is not None:
            seen &= self.q_depth[rows][:, None] - self.k_depth[keys] < window
        return seen


@dataclass(frozen=True, eq=False, repr=False)
class TreeMask:
    """Which tokens see which, for a forest of token sequences packed in depth-first order.

    Build it with :meth:`from_nodes`, :meth:`from_dfs` or :meth:`from_token_parents`. All fields are int32 tensors on
    one device; the class is a registered pytree, so masks pass through ``torch.compile``, checkpointing and CUDA graphs.

    Attributes:
        subtree_end: ``(tokens,)`` one past the last token of each token's subtree.
        depth: ``(tokens,)`` distance from the root along the path; the position id of RoPE and windows.
        end_bounds: ``(ceil(tokens / 32), 2)`` min and max of ``subtree_end`` over each 32 tokens.
        depth_bounds: the same of ``depth``.

    Example:
        >>> mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 1])     # a prompt of 3 tokens, responses of 2 and 1
        >>> mask.subtree_end.tolist(), mask.depth.tolist()
        ([6, 6, 6, 5, 5, 6], [0, 1, 2, 3, 4, 3])
    """

    subtree_end: Tensor
    depth: Tensor
    end_bounds: Tensor
    depth_bounds: Tensor

    # -- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def from_nodes(
        cls,
        parents: Sequence[int] | Tensor,
        lengths: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
        validate: bool = True,
    ) -> TreeMask:
        """A forest of nodes in depth-first order; a node is a run of tokens.

        Args:
            parents: ``(nodes,)`` index of each node's parent, -1 for a root. Integers.
            lengths: ``(nodes,)`` tokens in each node, at least 1. Integers. Lengths on the GPU cost one
                synchronisation, because the number of tokens must be known.
            device: where the mask is built; that of the inputs when None.
            validate: check that the nodes are a forest in depth-first order.

        Raises:
            TypeError: not integers.
            ValueError: different lengths, a length below 1, or not depth-first; the first offending node is named.
        """
        parents = _int_vector("parents", parents, device)
        lengths = _int_vector("lengths", lengths, device or parents.device)
        _same_length("parents", parents, "lengths", lengths)
        if parents.device != lengths.device:
            raise ValueError(f"parents are on {parents.device} and lengths on {lengths.device}; put both on one device")
        node_end = _subtree_end_of_parents(parents)
        ends = lengths.cumsum(0)  # one past each node's last token
        total = 0
        if len(lengths):
            tree = _is_preorder(parents, node_end) & (lengths >= 1).all()
            valid, total = torch.stack([tree.long(), ends[-1]]).tolist()  # the one synchronisation
            if validate and not valid:
                raise ValueError(_diagnose.nodes(parents.tolist(), lengths.tolist()))
        token_end = ends[node_end - 1].to(torch.int32)
        return cls._from_subtree_end(torch.repeat_interleave(token_end, lengths, output_size=total))

    @classmethod
    def from_dfs(
        cls,
        start_q: Tensor | Sequence[int],
        end_k: Tensor | Sequence[int],
        cu_seqlens: Tensor | Sequence[int] | None = None,
        validate: bool = True,
    ) -> TreeMask:
        """Depth-first node indices per token: q sees k when both are in one sequence, ``k <= q`` and
        ``start_q[q] <= end_k[k]``.

        Args:
            start_q: ``(tokens,)`` depth-first index of the token's node (``tree_dfs_order_start_q``).
            end_k: ``(tokens,)`` largest index in the subtree of the token's node (``tree_dfs_order_end_k``).
            cu_seqlens: ``(sequences + 1,)`` offsets of packed sequences; indices may restart in each. Without it all
                tokens are one sequence (which may be a forest).
            validate: check the arrays; costs one synchronisation on a GPU, the only one.

        Raises:
            TypeError: not integers.
            ValueError: indices that decrease inside a sequence, subtrees that cross, or bad offsets; the first
                offending token is named.
        """
        start, end = _int_vector("start_q", start_q), _int_vector("end_k", end_k)
        _same_length("start_q", start, "end_k", end)
        n = len(start)
        offsets = None if cu_seqlens is None else _int_vector("cu_seqlens", cu_seqlens, start.device)
        if offsets is not None and len(offsets) < 1:
            raise ValueError("cu_seqlens is empty; it holds sequences + 1 offsets, from 0 to the number of tokens")
        if end.device != start.device or (offsets is not None and offsets.device != start.device):
            raise ValueError("start_q, end_k and cu_seqlens are on different devices; put them on one")
        sorted_start, query = start, end
        if n and offsets is not None and len(offsets) > 2:
            # Indices may restart in each sequence: shift every sequence past the largest index of those before.
            sequence = torch.searchsorted(offsets, torch.arange(n, device=start.device), right=True) - 1
            low = torch.minimum(start.amin(), end.amin())
            shift = sequence * (torch.maximum(start.amax(), end.amax()) - low + 1)
            sorted_start, query = start + shift, end + shift
        subtree_end = torch.searchsorted(sorted_start, query, right=True, out_int32=True)
        if validate:
            valid = torch.ones((), dtype=torch.bool, device=start.device)
            if n:
                valid = (sorted_start[1:] >= sorted_start[:-1]).all() & _intervals_nest(subtree_end)
            if offsets is not None:
                valid = valid & (offsets[0] == 0) & (offsets[-1] == n) & (offsets[1:] >= offsets[:-1]).all()
            if not valid.item():
                listed = None if offsets is None else offsets.tolist()
                raise ValueError(_diagnose.dfs(start.tolist(), end.tolist(), listed))
        return cls._from_subtree_end(subtree_end)

    @classmethod
    def from_token_parents(cls, parent: Tensor | Sequence[int], validate: bool = True) -> TreeMask:
        """One parent per token, tokens in depth-first order.

        Args:
            parent: ``(tokens,)`` position of each token's parent, -1 for the first token of a tree. Integers.
            validate: check the order; costs one synchronisation on a GPU, the only one.

        Raises:
            TypeError: not integers.
            ValueError: not depth-first; the first offending token is named.
        """
        parent = _int_vector("parent", parent)
        # Doubling over runs of tokens is several times faster than over tokens, but the number of runs must be known on
        # the host: free on the CPU, a synchronisation on a GPU.
        doubling = _subtree_end_of_parents_by_run if parent.device.type == "cpu" else _subtree_end_of_parents
        subtree_end = doubling(parent)
        if validate and len(parent) and not _is_preorder(parent, subtree_end).item():
            raise ValueError(_diagnose.parents("parent", "token", parent.tolist()))
        return cls._from_subtree_end(subtree_end.to(torch.int32))

    @classmethod
    def _from_subtree_end(cls, subtree_end: Tensor) -> TreeMask:
        depth = _depth(subtree_end)
        end_bounds, depth_bounds = _bounds(torch.stack([subtree_end, depth])).unbind(0)
        return cls(subtree_end, depth, end_bounds, depth_bounds)

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Tokens in the mask."""
        return self.subtree_end.shape[0]

    @property
    def device(self) -> torch.device:
        return self.subtree_end.device

    @cached_property
    def roots(self) -> list[int]:
        """Positions of the first token of every tree. Synchronises at first use."""
        return torch.nonzero(self.depth == 0).flatten().tolist()

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the largest tree. Synchronises at first use."""
        starts = [*self.roots, self.total]
        return max((b - a for a, b in zip(starts, starts[1:], strict=False)), default=0)

    def ranges(self) -> RowRanges:
        """The mask in the rectangular form of the kernels; shares the tensors."""
        return RowRanges(
            None,
            self.subtree_end,
            self.depth,
            self.depth,
            None,
            self.end_bounds,
            self.depth_bounds,
            self.depth_bounds,
        )

    def dense(self) -> Tensor:
        """bool ``(tokens, tokens)``: ``dense()[q, k]`` is True when q sees k. O(tokens^2) memory: for looking, not for
        computing."""
        index = torch.arange(self.total, device=self.device)
        return self.ranges().visible(index, index)

    def visible_pairs(self) -> int:
        """How many (q, k) pairs attention computes. Synchronises."""
        return int(self.depth.sum(dtype=torch.int64)) + self.total

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TreeMask:
        """The same mask on another device."""
        move = (t.to(device, non_blocking=non_blocking) for t in _flatten(self)[0])
        return TreeMask(*move)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TreeMask):
            return NotImplemented
        return self.device == other.device and torch.equal(self.subtree_end, other.subtree_end)

    __hash__ = None  # type: ignore[assignment]  # equal by value, holds mutable tensors

    def __repr__(self) -> str:
        if self.subtree_end.device.type == "meta" or type(self.subtree_end) is not Tensor:
            return f"TreeMask({self.total} tokens, device={str(self.device)!r})"
        pairs = self.visible_pairs()
        causal = self.total * (self.total + 1) // 2
        share = f", {pairs / causal:.1%} of causal" if causal else ""
        deepest = int(self.depth.max()) + 1 if self.total else 0
        return (
            f"TreeMask({self.total} tokens, {len(self.roots)} trees, longest path {deepest}, "
            f"{pairs} visible pairs{share}, device={str(self.device)!r})"
        )


# -- tensor algebra --------------------------------------------------------------------------------------------------


def _int_vector(name: str, values: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """``values`` as an int64 vector; integers only, so that a float index is an error and not a rounding."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} holds {tensor.dtype}; give integers (int32 or int64)")
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give one dimension, one entry for each token or node")
    return tensor.to(device=device, dtype=torch.int64)


def _same_length(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if len(a) != len(b):
        raise ValueError(f"{a_name} has {len(a)} entries and {b_name} has {len(b)}; they must have the same number")


def _subtree_end_of_parents(parent: Tensor) -> Tensor:
    """One past the last descendant, by pointer doubling along "last child of": log2(n) gathers, no loop over items.

    Right for pre-order input; for other input the result is some array that :func:`_is_preorder` rejects.
    """
    n = len(parent)
    index = torch.arange(n, device=parent.device)
    # Parents that are no earlier item would index out of range here; they are clamped, and rejected afterwards.
    safe = parent.clamp(min=-1).minimum(index - 1)
    last = torch.full((n + 1,), -1, dtype=torch.int64, device=parent.device)
    last.scatter_reduce_(0, safe + 1, index, "amax")  # slot 0 collects the roots
    last = last[1:].maximum(index)
    for _ in range(max(n - 1, 1).bit_length()):
        last = last[last]
    return last + 1


def _subtree_end_of_parents_by_run(parent: Tensor) -> Tensor:
    """The same over tokens: chains of only children are joined to nodes first."""
    n = len(parent)
    index = torch.arange(n, device=parent.device)
    starts = parent != index - 1
    branching = parent[starts].clamp(-1, n - 2) + 1  # the token after a branch point starts a node too
    starts[branching] = True
    starts[:1] = True
    run = starts.cumsum(0) - 1
    first = torch.nonzero(starts).flatten()
    above = parent[first].clamp(-1, n - 1)
    run_end = _subtree_end_of_parents(torch.where(above < 0, -1, run[above]))
    after = torch.cat([first, first.new_full((1,), n)])  # the first token of the run after
    return after[run_end][run]


def _depth(subtree_end: Tensor) -> Tensor:
    """Ancestors of each token: those that began before it, less those whose subtree has ended."""
    n = subtree_end.shape[0]
    ended = torch.zeros(n + 1, dtype=torch.int32, device=subtree_end.device)
    ended.index_add_(0, subtree_end, torch.ones_like(subtree_end))
    index = torch.arange(n, dtype=torch.int32, device=subtree_end.device)
    return index - ended[:n].cumsum(0, dtype=torch.int32)


def _intervals_nest(subtree_end: Tensor) -> Tensor:
    """Scalar bool: are all intervals ``[k, subtree_end[k])`` non-empty, in range, and nested or disjoint?

    Count, at each position, the pairs of intervals that both cover it. A nested pair is counted once for each token of
    the inner one, a crossing pair less often; so the two sums below agree exactly when no pair crosses (both are taken
    modulo 2**64, which the difference cannot reach below 4 million tokens and would have to hit exactly above).
    """
    n = subtree_end.shape[0]
    index = torch.arange(n, device=subtree_end.device)
    in_range = ((subtree_end > index) & (subtree_end <= n)).all()
    end = subtree_end.clamp(0, n).long()
    depth = _depth(end.to(torch.int32)).long()
    covered = (depth * (depth + 1) // 2).sum()
    nested = ((end - index) * depth).sum()
    return in_range & (covered == nested)


def _is_preorder(parent: Tensor, subtree_end: Tensor) -> Tensor:
    """Scalar bool: does ``parent`` describe a forest in depth-first order whose subtrees end at ``subtree_end``?"""
    n = parent.shape[0]
    index = torch.arange(n, device=parent.device)
    earlier = ((parent < index) & (parent >= -1)).all()
    safe = parent.clamp(min=-1).minimum(index - 1) + 1
    # With the virtual parent of all roots in slot 0, the parent is the enclosing interval one level up, and no other is.
    end = torch.cat([subtree_end.new_full((1,), n), subtree_end])
    depth = torch.cat([subtree_end.new_full((1,), -1), _depth(subtree_end.to(torch.int32)).to(subtree_end.dtype)])
    inside = ((end[safe] >= subtree_end) & (depth[safe] + 1 == depth[1:])).all()
    return earlier & inside & _intervals_nest(subtree_end)


def _bounds(values: Tensor) -> Tensor:
    """(min, max) of every GRANULE entries of the last dimension: ``(..., n) -> (..., ceil(n / GRANULE), 2)``."""
    n = values.shape[-1]
    short = -n % GRANULE
    if short and n:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], short)], dim=-1)
    tiles = values.unflatten(-1, (-1, GRANULE)) if n else values.new_zeros(*values.shape[:-1], 0, GRANULE)
    return torch.stack(torch.aminmax(tiles, dim=-1), dim=-1)


# -- pytree ----------------------------------------------------------------------------------------------------------


def _flatten(mask: TreeMask) -> tuple[list[Tensor], None]:
    return [mask.subtree_end, mask.depth, mask.end_bounds, mask.depth_bounds], None


def _unflatten(tensors: list[Tensor], _context: None) -> TreeMask:
    return TreeMask(*tensors)


pytree.register_pytree_node(TreeMask, _flatten, _unflatten, serialized_type_name="tree_attn.TreeMask")
