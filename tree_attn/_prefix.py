"""Which sequences share which prefix: reads token sequences of any kind and puts them in depth-first order.

The sequences are sorted and neighbours compared; from the order and the common-prefix lengths everything else about the
prefix tree follows. Loops here run over sequences, never over tokens.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Branch = Literal["gather", "fork"]


class Tokens(NamedTuple):
    """All sequences end to end, in input order, on the CPU."""

    flat: Tensor  # int64 (sum of lengths,)
    memory: bytearray  # the memory of ``flat``
    begins: list[int]  # where each sequence starts in ``flat``
    lengths: list[int]
    device: torch.device  # of the first tensor among the sequences; the CPU when there is none


class PrefixOrder(NamedTuple):
    """Sequences in depth-first order of their prefix tree, siblings in order of first appearance in the input."""

    order: list[int]  # indices of the sequences
    shared: list[int]  # how many tokens order[j] shares with order[j - 1]; no earlier sequence shares more with it


# -- reading -----------------------------------------------------------------------------------------------------------


def read_sequences(sequences: Iterable[Any]) -> Tokens:
    """The token sequences as one flat int64 tensor; see :func:`tree_attn.packing.pack` for what is accepted."""
    items = _as_list(sequences, "sequences")
    if not items:
        raise ValueError("sequences is empty; give at least one token sequence")
    vectors = []
    for i, item in enumerate(items):
        vector = integer_vector(item, f"sequences[{i}]")
        if not len(vector):
            raise ValueError(f"sequences[{i}] is empty; every sequence has at least 1 token, leave empty ones out")
        vectors.append(vector)
    lengths = [len(vector) for vector in vectors]
    begins = [0]
    for length in lengths[:-1]:
        begins.append(begins[-1] + length)
    memory = bytearray(8 * (begins[-1] + lengths[-1]))
    flat = torch.frombuffer(memory, dtype=torch.int64)
    torch.cat(vectors, out=flat)
    if int(flat.amin()) < 0:
        i = next(i for i, vector in enumerate(vectors) if int(vector.amin()) < 0)
        t = int((vectors[i] < 0).nonzero()[0])
        raise ValueError(
            f"sequences[{i}][{t}] is {int(vectors[i][t])}; token ids are 0 or more. Strip padding before packing, and "
            "give targets to leave out as labels or loss_mask"
        )
    device = next((item.device for item in items if isinstance(item, Tensor)), torch.device("cpu"))
    return Tokens(flat, memory, begins, lengths, device)


def read_per_token(
    values: Iterable[Any], name: str, lengths: list[int], to_vector: Callable[[Any, str], Tensor]
) -> Tensor:
    """One vector for each sequence, of its length, read by ``to_vector`` and put end to end."""
    items = _as_list(values, name)
    if len(items) != len(lengths):
        raise ValueError(f"{name} has {len(items)} entries for {len(lengths)} sequences; give one for each sequence")
    vectors = []
    for i, (item, length) in enumerate(zip(items, lengths, strict=True)):
        vector = to_vector(item, f"{name}[{i}]")
        if len(vector) != length:
            raise ValueError(
                f"{name}[{i}] has {len(vector)} entries and sequences[{i}] has {length} tokens; give one for each token"
            )
        vectors.append(vector)
    return torch.cat(vectors)


def integer_vector(item: Any, name: str) -> Tensor:
    """``item`` as an int64 vector on the CPU. Integers only: a float or bool id is a mistake, nothing to round."""
    tensor = _array(item, name)
    if tensor is None:
        kinds = set(map(type, item))
        # A list of integers is read in one go by array; bool is the one other type that it would accept.
        if bool not in kinds:
            try:
                values = array("q", item)
                return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
            except TypeError:
                pass  # explained below, with the entry that caused it
            except OverflowError as error:
                raise ValueError(f"{name} holds an integer beyond 64 bits") from error
        t = next(t for t, value in enumerate(item) if not _is_integer(value))
        raise TypeError(f"{name}[{t}] is {_describe(item[t])}; give integers, one list or vector for each sequence")
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} holds {tensor.dtype}; give integers of any width")
    return tensor.to("cpu", torch.int64)


def mask_vector(item: Any, name: str) -> Tensor:
    """``item`` as a bool vector on the CPU; bools, or the integers 0 and 1."""
    tensor = _array(item, name)
    if tensor is None:
        flags = set(map(type, item)) == {bool}
        tensor = torch.frombuffer(bytearray(item), dtype=torch.bool) if flags else integer_vector(item, name)
    elif tensor.dtype == torch.bool:
        return tensor.cpu()
    else:
        tensor = integer_vector(tensor, name)
    bad = ((tensor != 0) & (tensor != 1)).nonzero()
    if len(bad):
        t = int(bad[0])
        raise ValueError(f"{name}[{t}] is {int(tensor[t])}; give True where the token is a target and False elsewhere")
    return tensor.bool()


def _as_list(values: Iterable[Any], name: str) -> list[Any]:
    if isinstance(values, Tensor) or hasattr(values, "__array__"):
        raise TypeError(f"{name} is one {_describe(values)}; give a list with a vector (no padding) for each sequence")
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        raise TypeError(f"{name} is {_describe(values)}; give a list with one entry for each sequence")
    return list(values)


def _array(item: Any, name: str) -> Tensor | None:
    """A tensor or array as a one-dimensional tensor; None for a plain sequence; an error for anything else."""
    tensor = None
    if isinstance(item, Tensor):
        tensor = item.detach()
    elif hasattr(item, "__array__"):
        # Copied: torch takes neither read-only memory (without a warning) nor negative strides.
        values = item.__array__().copy()
        try:
            tensor = torch.as_tensor(values)
        except TypeError as error:
            raise TypeError(f"{name} is an array of {values.dtype}; give integers") from error
    elif not isinstance(item, Sequence) or isinstance(item, (str, bytes, bytearray, memoryview)):
        hint = " (list(text.encode()) makes byte tokens of a string)" if isinstance(item, (str, bytes)) else ""
        raise TypeError(f"{name} is {_describe(item)}; give a list, tuple, array or tensor{hint}")
    if tensor is not None and tensor.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; give one dimension, one entry for each token (unbind a batch and "
            "strip its padding)"
        )
    return tensor


def _is_integer(value: Any) -> bool:
    """Would array take it? (And it is no bool.)"""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else type(value).__name__


# -- ordering ----------------------------------------------------------------------------------------------------------


def prefix_order(tokens: Tokens, branch: Branch) -> PrefixOrder:
    """Depth-first order of the sequences, and how much each shares with the one before it.

    ``branch="gather"`` shares common prefixes; ``"fork"`` keys a token on the next one too, so that the last common
    token of two different sequences is not shared.
    """
    # Sequences with a common prefix of t tokens have 8 t common bytes, so sorting the bytes brings them together; which
    # of the children comes first is settled afterwards, so the byte order of the machine does not matter.
    with memoryview(tokens.memory) as memory:
        keys = [
            bytes(memory[8 * begin : 8 * (begin + length)])
            for begin, length in zip(tokens.begins, tokens.lengths, strict=True)
        ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [0]
    for left, right in pairwise(order):
        shared.append(_common_prefix(tokens, left, right, branch))
    return _by_first_appearance(order, shared)


def _common_prefix(tokens: Tokens, left: int, right: int, branch: Branch) -> int:
    length = min(tokens.lengths[left], tokens.lengths[right])
    a, b = (tokens.flat[tokens.begins[i] : tokens.begins[i] + length] for i in (left, right))
    differ = a != b
    common = int(differ.byte().argmax())
    if common == 0 and not differ[0]:  # no difference: argmax then says 0
        common = length
    identical = common == tokens.lengths[left] == tokens.lengths[right]
    return common if branch == "gather" or identical else max(common - 1, 0)


class _Group:
    """Sequences that share ``depth`` tokens and are not alike beyond."""

    def __init__(self, depth: int, members: list[_Group | int]) -> None:
        self.depth = depth
        self.members = members
        self.first = -1  # smallest index of a sequence inside, known once the group is closed

    def close(self, last: _Group | int) -> _Group:
        self.members.append(last)
        self.members.sort(key=_first)
        self.first = _first(self.members[0])
        return self


def _first(member: _Group | int) -> int:
    return member if isinstance(member, int) else member.first


def _by_first_appearance(order: list[int], shared: list[int]) -> PrefixOrder:
    """The same tree with siblings in the order in which the input first names them."""
    # Sorted order to tree: ``open_groups`` holds the groups around the last sequence, outermost (the forest) first.
    open_groups = [_Group(0, [])]
    last: _Group | int = order[0]
    for sequence, depth in zip(order[1:], shared[1:], strict=True):
        while open_groups[-1].depth > depth:
            last = open_groups.pop().close(last)
        if open_groups[-1].depth < depth:
            open_groups.append(_Group(depth, [last]))
        else:
            open_groups[-1].members.append(last)
        last = sequence
    while open_groups:
        last = open_groups.pop().close(last)

    result = PrefixOrder([], [])
    todo: list[tuple[_Group | int, int]] = [(last, 0)]  # (member, what its first sequence shares with the one before)
    while todo:
        member, depth = todo.pop()
        if isinstance(member, int):
            result.order.append(member)
            result.shared.append(depth)
        else:
            first, *others = member.members
            todo.extend((other, member.depth) for other in reversed(others))
            todo.append((first, depth))
    return result
