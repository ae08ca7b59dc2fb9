"""Errors against float64, beside those of torch's memory-efficient attention on the same numbers and a dense mask."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_cases import Case, Inputs, Results, exact, make_inputs, random_forest, run, ulp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tree_attn.registry import Options

# Every compiled class of head dims, and some that are padded to one.
HEAD_DIMS = (8, 32, 40, 64, 80, 96, 128, 160, 192, 224, 256)
DIMS = [(d, d) for d in HEAD_DIMS] + [(192, 128)]
NAMES = ("out", "grad_q", "grad_k", "grad_v")
AGGREGATED, SINGLE = 1.1, 2.0  # at most this many times the other kernel's error


def cases(dtype: torch.dtype, head_dim: int, value_dim: int) -> list[Case]:
    rng = random.Random(1000 * head_dim + value_dim)
    made = []
    for seed in range(8):
        parents, lengths = random_forest(rng, rng.randint(200, 900))
        heads, group = rng.choice(((4, 1), (4, 4), (6, 3)))
        options = Options(head_dim**-0.5)
        made.append(Case(seed, dtype, parents, lengths, heads, heads // group, head_dim, value_dim, options))
    return made


def memory_efficient(inputs: Inputs) -> Results:
    """The same attention by torch's kernel; its heads are expanded, as it takes no groups."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q, k, v = (x.repeat_interleave(n, 1).transpose(0, 1)[None] for x, n in zip(leaves, (1, group, group), strict=True))
    index = torch.arange(inputs.q.shape[0], device=q.device)
    dense = inputs.ranges.visible(index, index)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=inputs.options.scale)[0].transpose(0, 1)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    return Results(out.detach(), out.new_empty(0), *grads, None)


@pytest.mark.parametrize("dims", DIMS, ids=lambda d: f"{d[0]}x{d[1]}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_error_is_that_of_memory_efficient_attention(dtype, dims, path, measured):
    squares = {name: torch.zeros(3, dtype=torch.float64, device="cuda") for name in NAMES}  # ours, theirs, the numbers
    for case in cases(dtype, *dims):
        inputs = make_inputs(case)
        want, ours, theirs = exact(inputs), run(inputs, "cuda"), memory_efficient(inputs)
        for name in NAMES:
            truth = getattr(want, name)
            off, allowed = (getattr(r, name).double() - truth for r in (ours, theirs))
            squares[name] += torch.stack([x.square().sum() for x in (off, allowed, truth)])
            largest, limit = off.abs().amax(), SINGLE * allowed.abs().amax() + ulp(truth, dtype)
            assert largest <= limit, f"{name} of {case}: largest error {largest:.3e}, allowed {limit:.3e}"
    key = f"{path} {str(dtype).removeprefix('torch.')} {dims[0]}x{dims[1]}"
    table = measured.setdefault("relative_error", {}).setdefault(key, {})
    for name, sums in squares.items():
        error, allowed, size = sums.sqrt().tolist()
        table[name] = {"tree_attn": error / size, "memory_efficient": allowed / size}
    print(key, table)
    for name, found in table.items():
        assert found["tree_attn"] <= AGGREGATED * found["memory_efficient"], (name, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_tree_equals_its_paths_one_by_one(dtype, path):
    rng = random.Random(5)
    parents, lengths = [-1, 0, 1, 1, 0, 4, -1, 6, 6], [200, 130, 64, 7, 300, 129, 90, 33, 128]
    case = Case(3, dtype, parents, lengths, 8, 2, 128, 128, Options(128**-0.5))
    inputs = make_inputs(case)
    begin = [sum(lengths[:i]) for i in range(len(lengths))]
    leaves = [i for i in range(len(parents)) if i not in parents]
    rng.shuffle(leaves)
    whole = run(inputs, "cuda")
    summed = [torch.zeros_like(x, dtype=torch.float32) for x in (inputs.q, inputs.k, inputs.v)]
    counted = torch.zeros(sum(lengths), dtype=torch.bool, device="cuda")
    for leaf in leaves:
        nodes = []
        while leaf != -1:
            nodes.insert(0, leaf)
            leaf = parents[leaf]
        index = torch.cat([torch.arange(begin[i], begin[i] + lengths[i]) for i in nodes]).cuda()
        chain = make_inputs(Case(3, dtype, [-1], [len(index)], 8, 2, 128, 128, case.options))
        # A token's gradient is counted in one of the paths through it.
        grad_out = inputs.grad_out[index].masked_fill(counted[index][:, None, None], 0)
        counted[index] = True
        chain = chain._replace(q=inputs.q[index], k=inputs.k[index], v=inputs.v[index], grad_out=grad_out)
        alone = run(chain, "cuda")
        assert (whole.out[index] - alone.out).abs().amax() <= 2 * ulp(alone.out, dtype)
        torch.testing.assert_close(whole.lse[:, index], alone.lse, rtol=1e-5, atol=1e-5)
        for total, grad in zip(summed, alone[2:5], strict=True):
            total.index_add_(0, index, grad.float())
    assert counted.all()
    for total, grad in zip(summed, whole[2:5], strict=True):
        # Each path's share was rounded, and so was the tree's.
        assert (total - grad.float()).abs().amax() <= (len(leaves) + 1) * ulp(total, dtype)
