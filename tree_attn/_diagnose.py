"""What is wrong with a tree that failed validation: the first offending index, and what would be right.

The checks on the fast path are tensor operations that answer yes or no; these plain loops run only once the answer was
no, to say it in words.
"""

from __future__ import annotations


def parents(name: str, item: str, parent: list[int]) -> str:
    """The first entry of ``parent`` that is no depth-first forest."""
    path: list[int] = []  # from the root to the item before
    for i, p in enumerate(parent):
        if p < -1 or p >= i:
            return (
                f"{name}[{i}] is {p}: a parent comes before its child. "
                f"{_allowed(path)} Sort the {item}s depth-first, parents before children."
            )
        if p != -1 and p not in path:
            return (
                f"{name}[{i}] is {p}: not depth-first, the subtree of {item} {p} ended before {item} {i}. "
                f"{_allowed(path)} Keep every subtree contiguous."
            )
        del path[path.index(p) + 1 if p != -1 else 0 :]
        path.append(i)
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
        return f"cu_seqlens[-1] is {offsets[-1]}; the last offset is the number of tokens ({n})."
    for first, stop in zip(offsets, offsets[1:], strict=False):
        for i in range(first + 1, stop):
            if start[i] < start[i - 1]:
                hint = "Pass cu_seqlens if a new sequence starts here." if cu_seqlens is None else "Sort depth-first."
                return f"start_q[{i}] is {start[i]}, below start_q[{i - 1}] ({start[i - 1]}): not depth-first. {hint}"
        open_ends: list[tuple[int, int]] = []  # (index of the last node, token) of the subtrees around token i
        for i in range(first, stop):
            if end[i] < start[i]:
                return f"end_k[{i}] is {end[i]}, below start_q[{i}] ({start[i]}): a token sees itself, so end_k >= start_q."
            while open_ends and open_ends[-1][0] < start[i]:
                open_ends.pop()
            # Two values of end_k mean the same subtree when no token lies between them; only tokens count.
            if open_ends and any(open_ends[-1][0] < s <= end[i] for s in start[i:stop]):
                around, k = open_ends[-1]
                return (
                    f"end_k[{i}] is {end[i]}, beyond end_k[{k}] ({around}) whose subtree holds token {i}: subtrees cross. "
                    f"It can be at most {around}."
                )
            open_ends.append((end[i], i))
    raise AssertionError("called on a valid tree")
