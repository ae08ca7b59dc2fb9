"""What the tests of packing compare with: a dictionary trie, and strategies for sequences that share a lot."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

BRANCHES = ["gather", "fork"]

# Few different tokens and short sequences: sharing, duplicates and prefixes of others come up all the time.
sequence = st.lists(st.integers(0, 2), min_size=1, max_size=7)
sequences = st.lists(sequence, min_size=1, max_size=8)
bounded = settings(deadline=None, max_examples=100, derandomize=True)


@st.composite
def masked_sequences(draw):
    seqs = draw(sequences)
    return seqs, [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in seqs]


def keys_of(tokens: list[int], branch: str) -> list:
    """What a token must agree on to be shared: itself, and with fork the next one too."""
    return tokens if branch == "gather" else list(zip(tokens, [*tokens[1:], "end"], strict=True))


def trie(seqs: list[list[int]], branch: str) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """(ids, depth, parent, positions of each sequence) by a dictionary a token, children in order of insertion."""
    root: dict = {}
    for tokens in seqs:
        node = root
        for key in keys_of(tokens, branch):
            node = node.setdefault(key, {})
    ids, depths, parents = [], [], []
    where: dict[tuple, int] = {}

    def visit(node: dict, path: tuple, parent: int) -> None:
        for key, child in node.items():
            position = where[(*path, key)] = len(ids)
            ids.append(key if branch == "gather" else key[0])
            depths.append(len(path))
            parents.append(parent)
            visit(child, (*path, key), position)

    visit(root, (), -1)
    index = []
    for tokens in seqs:
        keys = keys_of(tokens, branch)
        index.append([where[tuple(keys[: t + 1])] for t in range(len(keys))])
    return ids, depths, parents, index
