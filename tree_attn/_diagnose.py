"""What is wrong with a tree that failed validation: the first offending index, and what would be right.

The checks on the fast path are tensor operations that answer yes or no; these plain loops run only once the answer was
no, to say it in words. They take one step per item, so a million tokens are told about in a second or so.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

# Tokens are counted in int32. The bound also lets the checks add and shift what they are given without overflow.
INDEX_LIMIT = 2**31


def parents(name: str, item: str, parent: list[int]) -> str:
    """The first entry of ``parent`` that is no depth-first forest."""
    path: list[int] = []  # from the root to the item before
    on_path = [False] * len(parent)
    for i, p in enumerate(parent):
        if p < -1 or p >= i:
            return (
                f"{name}[{i}] is {p}: a parent comes before its child. "
                f"{_allowed(path)} Sort the {item}s depth-first, parents before children."
            )
        if p != -1 and not on_path[p]:
            return (
                f"{name}[{i}] is {p}: not depth-first, the subtree of {item} {p} ended before {item} {i}. "
                f"{_allowed(path)} Keep every subtree contiguous."
            )
        while path and path[-1] != p:
            on_path[path.pop()] = False
        path.append(i)
        on_path[i] = True
    raise AssertionError("called on a valid tree")


def _allowed(path: list[int]) -> str:
    if not path:
        return "Here it can only be -1 (a root)."
    return f"Here it can be {path[-1]} (the item before), one of its ancestors, or -1 (a root)."


def nodes(parent: list[int], lengths: list[int]) -> str:
    """The first node with a length below 1, or else the first that is not in depth-first order."""
    for i, n in enumerate(lengths):
        if n < 1:
            return f"lengths[{i}] is {n}; a node has at least 1 token. Leave empty nodes out."
        if n >= INDEX_LIMIT:
            return f"lengths[{i}] is {n}; a mask holds fewer than 2**31 tokens."
    return parents("parents", "node", parent)


def dfs(start: list[int], end: list[int], cu_seqlens: list[int] | None) -> str:
    """The first offending offset or token of the depth-first index arrays."""
    n = len(start)
    offsets = cu_seqlens if cu_seqlens is not None else [0, n]
    if offsets[0] != 0:
        return f"cu_seqlens[0] is {offsets[0]}; the first offset is 0."
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            return f"cu_seqlens[{i}] is {offsets[i]}, below the one before ({offsets[i - 1]}); offsets never decrease."
    if offsets[-1] != n:
        return f"cu_seqlens[{len(offsets) - 1}] is {offsets[-1]}; the last offset is the number of tokens ({n})."
    hint = "Sort depth-first." if cu_seqlens else "Pass cu_seqlens if a new sequence starts here."
    for first, stop in pairwise(offsets):
        what = _dfs_sequence(start, end, first, stop, hint)
        if what:
            return what
    raise AssertionError("called on a valid tree")


def _dfs_sequence(start: list[int], end: list[int], first: int, stop: int, order_hint: str) -> str | None:
    """The first offending token of ``[first, stop)``, whose indices must be one depth-first order."""
    for i in range(first, stop):
        if not -INDEX_LIMIT < start[i] < INDEX_LIMIT:
            return f"start_q[{i}] is {start[i]}; depth-first indices are below 2**31."
        if i > first and start[i] < start[i - 1]:
            return f"start_q[{i}] is {start[i]}, below start_q[{i - 1}] ({start[i - 1]}): not depth-first. {order_hint}"
    around: list[tuple[int, int]] = []  # (one past the last token, token) of the subtrees that hold token i
    for i in range(first, stop):
        if end[i] < start[i]:
            return f"end_k[{i}] is {end[i]}, below start_q[{i}] ({start[i]}): a token sees itself, so end_k >= start_q."
        # Two values of end_k mean the same subtree when no token lies between them; only tokens count.
        beyond = bisect_right(start, end[i], first, stop)
        while around and around[-1][0] <= i:
            around.pop()
        if around and beyond > around[-1][0]:
            k = around[-1][1]
            return (
                f"end_k[{i}] is {end[i]}, beyond end_k[{k}] ({end[k]}) whose subtree holds token {i}: subtrees cross. "
                f"It can be at most {end[k]}."
            )
        around.append((beyond, i))
    return None
