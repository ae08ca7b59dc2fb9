"""A mask of a million tokens in ten thousand nodes takes under 50 ms to build, on one core already."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tree_attn import TreeMask

NODES, TOKENS_PER_NODE = 10_000, 100


@pytest.fixture(scope="module")
def forest() -> dict[str, torch.Tensor]:
    """A random forest of a few deep trees, in all three forms."""
    draw = random.Random(0)
    parents: list[int] = []
    path: list[int] = []
    for node in range(NODES):
        path = path[: draw.randint(min(len(path), 1), len(path))]
        parents.append(path[-1] if path else -1)
        path.append(node)
    last = list(range(NODES))  # last node of each subtree
    for node in reversed(range(NODES)):
        if parents[node] >= 0:
            last[parents[node]] = max(last[parents[node]], last[node])
    parent = torch.tensor(parents)
    tokens = torch.arange(-1, NODES * TOKENS_PER_NODE - 1)
    tokens[::TOKENS_PER_NODE] = torch.where(parent < 0, -1, (parent + 1) * TOKENS_PER_NODE - 1)
    return {
        "parents": parent,
        "lengths": torch.full((NODES,), TOKENS_PER_NODE),
        "tokens": tokens,
        "start": torch.arange(NODES).repeat_interleave(TOKENS_PER_NODE),
        "end": torch.tensor(last).repeat_interleave(TOKENS_PER_NODE),
        "offsets": torch.tensor([0, NODES * TOKENS_PER_NODE]),
    }


BUILDS: dict[str, Callable[[dict[str, torch.Tensor]], TreeMask]] = {
    "from_nodes": lambda f: TreeMask.from_nodes(f["parents"], f["lengths"]),
    "from_nodes of lists": lambda f: TreeMask.from_nodes(f["parents"].tolist(), f["lengths"].tolist()),
    "from_token_parents": lambda f: TreeMask.from_token_parents(f["tokens"]),
    "from_dfs": lambda f: TreeMask.from_dfs(f["start"], f["end"]),
    "from_dfs with cu_seqlens": lambda f: TreeMask.from_dfs(f["start"], f["end"], f["offsets"]),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, so that its CPU time is the time the work takes, also on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.speed
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", BUILDS)
def test_a_million_tokens_take_under_50_ms(name: str, forest: dict[str, torch.Tensor]) -> None:
    build = BUILDS[name]
    assert build(forest) == TreeMask.from_nodes(forest["parents"], forest["lengths"])
    medians = []
    for _ in range(3):  # other work also takes memory bandwidth; the best of three runs has least of it
        seconds = []
        for _ in range(9):
            start = time.thread_time()
            build(forest)
            seconds.append(time.thread_time() - start)
        medians.append(statistics.median(seconds))
    assert min(medians) < 0.050
