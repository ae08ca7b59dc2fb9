"""The mask of a forest in depth-first order: one integer a token says which rows see it.

Tokens lie in pre-order, so the descendants of token k are the rows ``[k, subtree_end[k])`` and q sees k exactly when
``k <= q < subtree_end[k]``. Everything else (depth, tile bounds) follows from that array by tensor operations, on the
device the arrays came from. docs/design.md says why this form was chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from tree_attn import _diagnose, _kernels

# Keys per entry of the bounds tables. A kernel tile of any size takes the entries it touches: a superset only makes
# "needed" wider and "unmasked" narrower, so both stay right.
GRANULE = 32


class RowRanges(NamedTuple):
    """The rectangular mask that backends compute with: key k is seen by the rows ``[row_begin[k], row_end[k])``.

    ``row_begin`` None means ``row_begin[k] = k`` (a mask over its own tokens). Depths serve ``window`` alone. The
    bounds hold (min, max) of each ``GRANULE`` consecutive entries, int32 ``(ceil(n / GRANULE), 2)``.
    """

    row_begin: Tensor | None  # int32 (keys,)
    row_end: Tensor  # int32 (keys,)
    q_depth: Tensor  # int32 (rows,)
    k_depth: Tensor  # int32 (keys,)
    begin_bounds: Tensor | None
    end_bounds: Tensor
    q_depth_bounds: Tensor
    k_depth_bounds: Tensor

    @classmethod
    def of(cls, row_begin: Tensor | None, row_end: Tensor, q_depth: Tensor, k_depth: Tensor) -> RowRanges:
        """Ranges with their bounds; int32 tensors on one device, not checked."""
        return cls(
            row_begin,
            row_end,
            q_depth,
            k_depth,
            None if row_begin is None else _bounds(row_begin),
            _bounds(row_end),
            _bounds(q_depth),
            _bounds(k_depth),
        )

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
    one device; the class is a registered pytree, so masks pass through ``torch.compile``, checkpointing and CUDA
    graphs, and ``torch.save`` and ``torch.load`` take them. Treat the tensors as constants: what is derived from them
    once (``roots``, ``max_seqlen``) does not follow a change in place.

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
        total: int | None = None,
    ) -> TreeMask:
        """A forest of nodes in depth-first order; a node is a run of tokens.

        Args:
            parents: ``(nodes,)`` index of each node's parent, -1 for a root. Integers.
            lengths: ``(nodes,)`` tokens in each node, at least 1. Integers.
            device: where the mask is built; that of the inputs when None.
            validate: check that the nodes are a forest in depth-first order; costs one synchronisation on a GPU, the
                only one.
            total: the sum of ``lengths``, if you know it. Without it ``validate=False`` still synchronises once with
                lengths on a GPU, because the number of tokens is the size of the result.

        Raises:
            TypeError: not integers.
            ValueError: different numbers of entries, a length below 1, a wrong ``total``, or not depth-first; the first
                offending node is named.
        """
        parents, lengths = (x.long() for x in _int_vectors(device, parents=parents, lengths=lengths))
        _same_length("parents", parents, "lengths", lengths)
        node_end = _subtree_end_of_parents(parents)
        if validate:
            sizes = ((lengths >= 1) & (lengths < _diagnose.INDEX_LIMIT)).all()
            valid = _is_preorder(parents, node_end) & sizes
            valid, found = torch.stack([valid, lengths.sum()]).tolist()  # the one synchronisation
            if not valid:
                raise ValueError(_diagnose.nodes(parents.tolist(), lengths.tolist()))
            if total not in (None, found):
                raise ValueError(f"total is {total} and lengths add up to {found}; leave total out or correct it")
            total = found
        elif total is None:
            total = int(lengths.sum())
        if total >= _diagnose.INDEX_LIMIT:
            raise ValueError(f"lengths add up to {total}; a mask holds fewer than 2**31 tokens")
        return cls._from_node_ends(node_end, lengths, total)

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
        start, end, *rest = _int_vectors(
            None, start_q=start_q, end_k=end_k, **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens})
        )
        if start.dtype != end.dtype:
            start, end = start.long(), end.long()
        offsets = rest[0] if rest else None
        _same_length("start_q", start, "end_k", end)
        if offsets is not None and offsets.shape[0] < 1:
            raise ValueError("cu_seqlens is empty; it holds sequences + 1 offsets, from 0 to the number of tokens")
        made = _dfs_by_kernel(start, end, offsets, validate)
        mask, valid = _dfs_by_operations(start, end, offsets, validate) if made is None else made
        if not valid:
            listed = None if offsets is None else offsets.tolist()
            raise ValueError(_diagnose.dfs(start.tolist(), end.tolist(), listed))
        return mask

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
        parent = _int_vectors(None, parent=parent)[0].long()
        if parent.device.type == "cpu":
            # Runs of only children are few, and their number is free to know here; on a GPU it would synchronise.
            node_parent, lengths = _nodes_of_tokens(parent)
            node_end = _subtree_end_of_parents(node_parent)
            if not validate or _is_preorder(node_parent, node_end):
                return cls._from_node_ends(node_end, lengths, parent.shape[0])
        else:
            subtree_end = _subtree_end_of_parents(parent)
            if not validate or _is_preorder(parent, subtree_end).item():
                return cls._from_subtree_end(subtree_end.to(torch.int32))
        raise ValueError(_diagnose.parents("parent", "token", parent.tolist()))

    @classmethod
    def _from_node_ends(cls, node_end: Tensor, lengths: Tensor, total: int) -> TreeMask:
        """``node_end``: one past the last node of each node's subtree."""
        token_end = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[node_end].to(torch.int32)
        return cls._from_subtree_end(torch.repeat_interleave(token_end, lengths, output_size=total))

    @classmethod
    def _from_subtree_end(cls, subtree_end: Tensor) -> TreeMask:
        depth = _depth(subtree_end)
        # Made one by one: views of one tensor would be inputs that alias each other to torch.compile.
        return cls(subtree_end, depth, _bounds(subtree_end), _bounds(depth))

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
        return max((b - a for a, b in pairwise(starts)), default=0)

    def shard(self, world_size: int) -> tuple[Tensor, ...]:
        """The tokens of each of ``world_size`` ranks, for context parallelism (``tree_attn.distributed``).

        Returns:
            For each rank the ascending int64 positions that it takes, every position in exactly one: balanced by
            visible pairs, in as few pieces as the balance allows. Synchronises at first use and is kept with the mask.

        Raises:
            TypeError, ValueError: world_size is not a positive integer.

        Example:
            >>> [rank.tolist() for rank in TreeMask.from_nodes([-1, 0, 0], [3, 2, 1]).shard(2)]
            [[0, 1, 2, 3], [4, 5]]
        """
        from tree_attn.distributed._shard import shard

        return shard(self, world_size)

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
        return _unflatten([t.to(device, non_blocking=non_blocking) for t in _flatten(self)[0]], None)

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


def _int_vectors(device: torch.device | str | None, **values: Sequence[int] | Tensor) -> list[Tensor]:
    """The values as int32 or int64 vectors on one device: the given one, or that of the tensors among them."""
    devices = {name: x.device for name, x in values.items() if isinstance(x, Tensor)}
    if device is None and devices:
        device = next(iter(devices.values()))
        if any(d != device for d in devices.values()):
            where = ", ".join(f"{name} is on {d}" for name, d in devices.items())
            raise ValueError(f"{where}; put all on one device")
    return [_int_vector(name, x, device) for name, x in values.items()]


def _int_vector(name: str, values: Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    """``values`` as a vector of int64, or int32 if they are; only integers: a float index is an error, not rounded."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} cannot become a tensor of integers: {error}") from error
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} holds {tensor.dtype}; give integers (int32 or int64)")
    if tensor.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; give one dimension, one entry for each token or node"
        )
    return tensor.to(device=device, dtype=torch.int32 if tensor.dtype == torch.int32 else torch.int64)


def _same_length(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{a_name} has {len(a)} entries and {b_name} has {len(b)}; they must have the same number")


def _subtree_end_of_parents(parent: Tensor) -> Tensor:
    """One past the last descendant, by pointer doubling along "last child of": log2(n) gathers, no loop over items.

    Right for pre-order input; for other input the result is some array that :func:`_is_preorder` rejects.
    """
    n = parent.shape[0]
    index = torch.arange(n, device=parent.device)
    # Parents that are no earlier item would index out of range here; they are clamped, and rejected afterwards.
    safe = parent.clamp(min=-1).minimum(index - 1)
    last = torch.full((n + 1,), -1, dtype=torch.int64, device=parent.device)
    last.scatter_reduce_(0, safe + 1, index, "amax")  # slot 0 collects the roots
    last = last[1:].maximum(index)
    for _ in range(max(n - 1, 1).bit_length()):
        last = last[last]
    return last + 1


def _nodes_of_tokens(parent: Tensor) -> tuple[Tensor, Tensor]:
    """``(parent of each node, tokens of each node)``: every longest run of only children is one node.

    The nodes are a depth-first forest exactly when the tokens are: inside a run each token is the child of the one
    before, and a run begins at every other token.
    """
    n = parent.shape[0]
    starts = parent != torch.arange(-1, n - 1, device=parent.device)
    starts[:1] = True
    branching = parent[starts].clamp(-1, n - 2) + 1  # the token after a branch point starts a node too
    starts[branching] = True
    first = torch.nonzero(starts).flatten()
    run = starts.cumsum(0) - 1
    above = parent[first]
    node_parent = torch.where(above < 0, above, run[above.clamp(0, max(n - 1, 0))]) if n else above
    return node_parent, torch.diff(first, append=first.new_full((1,), n))


def _depth(subtree_end: Tensor) -> Tensor:
    """Ancestors of each token: those that began before it, less those whose subtree has ended."""
    n = subtree_end.shape[0]
    change = torch.ones(n + 1, dtype=torch.int32, device=subtree_end.device)
    change.index_add_(0, subtree_end, subtree_end.new_ones(1).expand(n), alpha=-1)
    return change[:n].cumsum(0, dtype=torch.int32).sub_(1)


def _nesting(subtree_end: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """``(excess, shortest)``, one element each: 0 if the intervals ``[k, subtree_end[k])`` are nested or disjoint, and
    the length of the shortest. ``subtree_end`` is not empty, with entries from 0 to n; ``depth`` is its :func:`_depth`.

    Count, at each position, the pairs of intervals that both cover it: depth (depth + 1) / 2. A nested pair is counted
    once for each token of the inner one, so the sum over all positions is that of length * depth; a crossing pair is
    counted less often. ``excess`` is twice the difference, modulo 2**64, which it cannot reach below 3 million tokens
    and would have to hit exactly above.
    """
    length = subtree_end - torch.arange(subtree_end.shape[0], dtype=torch.int32, device=subtree_end.device)
    shortest = length.amin(0, keepdim=True)
    excess = length.long().mul_(-2).add_(depth).add_(1).mul_(depth).sum(0, keepdim=True)  # in place: one allocation
    return excess, shortest


def _dfs_by_kernel(start: Tensor, end: Tensor, offsets: Tensor | None, validate: bool) -> tuple[TreeMask, bool] | None:
    """``(mask, do the arrays describe it)`` of :meth:`TreeMask.from_dfs` by the library of CUDA kernels, in two
    launches where the tensor operations take some thirty; None where it cannot run. Synchronises once, to validate."""
    n = start.shape[0]
    if not start.is_cuda or n == 0 or type(start) is not Tensor or torch.compiler.is_compiling():
        return None
    library = _kernels.load()
    if isinstance(library, _kernels.Unavailable) or _kernels.unavailable(start.device.index) is not None:
        return None
    granules = (n + GRANULE - 1) // GRANULE
    new = functools.partial(torch.empty, dtype=torch.int32, device=start.device)
    mask = TreeMask(new(n), new(n), new(granules, 2), new(granules, 2))
    scratch = new(n + 5)  # struct MaskFacts in csrc/params.h: an int64, an int32 and padding; then a count for each end
    library.mask_from_dfs(
        start.contiguous(),
        end.contiguous(),
        None if offsets is None else offsets.contiguous(),
        mask.subtree_end,
        mask.depth,
        mask.end_bounds,
        mask.depth_bounds,
        scratch,
    )
    return mask, not validate or scratch[:3].tolist() == [0, 0, 0]


def _dfs_by_operations(start: Tensor, end: Tensor, offsets: Tensor | None, validate: bool) -> tuple[TreeMask, bool]:
    """The same by tensor operations, on any device and in traced graphs."""
    n = start.shape[0]
    sorted_start, query = start, end
    low, high = torch.aminmax(start, dim=0, keepdim=True) if n else (start[:0], start[:0])
    if n and offsets is not None and offsets.shape[0] > 2:
        # Indices may restart in each sequence: shift every sequence past the largest index of those before.
        index = torch.arange(n, dtype=offsets.dtype, device=start.device)
        sequence = torch.searchsorted(offsets, index, right=True) - 1
        shift = sequence * (high.long() - low + 2)
        sorted_start, query = start + shift, end.maximum(low - 1).minimum(high) + shift
    mask = TreeMask._from_subtree_end(torch.searchsorted(sorted_start, query, right=True, out_int32=True))
    return mask, not validate or _is_dfs(mask, sorted_start, low, high, offsets)


def _is_dfs(mask: TreeMask, start: Tensor, low: Tensor, high: Tensor, offsets: Tensor | None) -> bool:
    """Did the depth-first index arrays describe ``mask``? Everything goes to the host in one transfer."""
    n = mask.total
    facts = [] if offsets is None else [offsets]
    if n:
        ordered = (start[1:] >= start[:-1]).all().view(1)
        facts = [*_nesting(mask.subtree_end, mask.depth), low, high, ordered, *facts]
    numbers = torch.cat(facts).tolist() if facts else []  # the one synchronisation
    if n:
        excess, shortest, least, most, in_order, *numbers = numbers
        limit = _diagnose.INDEX_LIMIT  # beyond it a shift may have overflowed
        if excess or shortest < 1 or not in_order or least <= -limit or most >= limit:
            return False
    return offsets is None or (numbers[0] == 0 and numbers[-1] == n and numbers == sorted(numbers))


def _is_preorder(parent: Tensor, subtree_end: Tensor) -> Tensor:
    """Scalar bool: does ``parent`` describe a forest in depth-first order whose subtrees end at ``subtree_end``?"""
    n = parent.shape[0]
    if n == 0:
        return torch.ones((), dtype=torch.bool, device=parent.device)
    index = torch.arange(n, device=parent.device)
    earlier = ((parent < index) & (parent >= -1)).all()
    safe = parent.clamp(min=-1).minimum(index - 1) + 1
    # With a virtual parent of all roots in slot 0: the parent is the enclosing interval one level up, and no other is.
    end = torch.cat([subtree_end.new_full((1,), n), subtree_end])
    depth = _depth(subtree_end.to(torch.int32))
    around = torch.cat([depth.new_full((1,), -1), depth])[safe]  # depth of the parent
    inside = ((end[safe] >= subtree_end) & (around + 1 == depth)).all()
    excess, shortest = _nesting(subtree_end, depth)
    return earlier & inside & (excess == 0).all() & (shortest > 0).all()


def _bounds(values: Tensor) -> Tensor:
    """(min, max) of every GRANULE entries: ``(n,) -> (ceil(n / GRANULE), 2)``."""
    n = values.shape[0]
    if n == 0:
        return values.new_zeros(0, 2)
    if n % GRANULE:
        values = torch.cat([values, values[-1:].expand(-n % GRANULE)])
    return torch.stack(torch.aminmax(values.unflatten(0, (-1, GRANULE)), dim=1), dim=1)


# -- pytree ----------------------------------------------------------------------------------------------------------


# No name before one that it begins: torch.export 2.13 finds the inputs in its guards by replacing text.
_FIELDS = ("subtree_end", "end_bounds", "depth_bounds", "depth")


def _flatten(mask: TreeMask) -> tuple[list[Tensor], None]:
    return [getattr(mask, name) for name in _FIELDS], None


def _flatten_with_keys(mask: TreeMask) -> tuple[list[tuple[Any, Tensor]], None]:
    return [(pytree.GetAttrKey(name), getattr(mask, name)) for name in _FIELDS], None


def _unflatten(tensors: Iterable[Tensor], _context: None) -> TreeMask:
    return TreeMask(**dict(zip(_FIELDS, tensors, strict=True)))


pytree.register_pytree_node(
    TreeMask,
    _flatten,
    _unflatten,
    serialized_type_name="tree_attn.TreeMask",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([TreeMask])  # tensors and nothing else, so torch.load may rebuild it
