"""TreeMask.from_dfs by the kernel makes what the tensor operations make, and refuses what they refuse."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_cases import random_forest

from tree_attn import TreeMask, mask

pytestmark = pytest.mark.gpu


def arrays(rng: random.Random, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """start_q, end_k and cu_seqlens of one to four sequences, the node indices of each from 0 on."""
    start: list[int] = []
    end: list[int] = []
    offsets = [0]
    for _ in range(rng.randint(1, 4)):
        parents, lengths = random_forest(rng, rng.randint(1, tokens))
        last = list(range(len(parents)))
        for node in reversed(range(len(parents))):
            if parents[node] >= 0:
                last[parents[node]] = max(last[parents[node]], last[node])
        for node, length in enumerate(lengths):
            start += [node] * length
            end += [last[node]] * length
        offsets.append(len(start))
    return start, end, offsets


def outcome(start: torch.Tensor, end: torch.Tensor, offsets: torch.Tensor) -> TreeMask | str:
    try:
        return TreeMask.from_dfs(start, end, offsets).to("cpu")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_makes_the_mask_of_the_tensor_operations(seed: int) -> None:
    rng = random.Random(seed)
    dtypes = [rng.choice((torch.int32, torch.int64)) for _ in range(2)]
    start, end, offsets = arrays(rng, rng.choice((1, 40, 400, 6000)))
    cpu = [torch.tensor(x, dtype=d) for x, d in zip((start, end, offsets), (dtypes[0], *dtypes), strict=True)]
    made = mask._dfs_by_kernel(*(x.cuda() for x in cpu), validate=True)
    assert made is not None
    ours, valid = made
    assert valid
    expected = TreeMask.from_dfs(*cpu)
    for name in ("subtree_end", "depth", "end_bounds", "depth_bounds"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("seed", range(120))
def test_the_kernel_refuses_what_the_tensor_operations_refuse_in_the_same_words(seed: int) -> None:
    rng = random.Random(seed)
    values = arrays(rng, rng.choice((8, 100)))
    tensors = [torch.tensor(x) for x in values]
    for _ in range(rng.randint(1, 3)):  # one to three entries anywhere become something else
        tensor = rng.choice(tensors)
        tensor[rng.randrange(len(tensor))] += rng.choice((-(2**31), -100, -2, -1, 1, 2, 100, 2**31))
    expected = outcome(*tensors)
    assert outcome(*(x.cuda() for x in tensors)) == expected


def test_a_mask_is_made_inside_a_cuda_graph() -> None:
    start, end, offsets = (torch.tensor(x).cuda() for x in arrays(random.Random(3), 3000))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        TreeMask.from_dfs(start, end, offsets, validate=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = TreeMask.from_dfs(start, end, offsets, validate=False)
    end.fill_(int(start.amax()))  # every token now sees all that its sequence holds before it
    graph.replay()
    assert made == TreeMask.from_dfs(start, end, offsets)
