"""Sizes at which 32-bit offsets and counters break: tensors of 2**32 elements, strides beyond, a million tokens."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import Case, make_inputs, run, ulp

from tree_attn import TreeMask, tree_attention
from tree_attn.registry import Options

GIB = 2**30


def needs(gib: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.mark.slow
@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_strides_that_span_more_than_2_32_elements(far, path):
    needs(22)
    heads, dim = (4, 128) if far == "tokens" else (300, 64)
    case = Case(0, torch.bfloat16, [-1, 0, 0], [150, 60, 90], heads, heads, dim, dim, Options(0.1, deterministic=True))
    inputs = make_inputs(case)
    expected = run(inputs, "cuda")
    step = 2**24 + 8  # 300 of them are 5.0e9 elements
    size = 300 * step + 2**20
    memory = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    strides = (step, dim, 1) if far == "tokens" else (dim, step, 1)
    spread = {}
    for i, name in enumerate(("q", "k", "v", "grad_out")):
        view = memory.as_strided(getattr(inputs, name).shape, strides, i * 2**18)
        spread[name] = view.copy_(getattr(inputs, name))
    found = run(inputs._replace(**spread), "cuda")
    for name in ("out", "lse", "grad_q", "grad_k", "grad_v"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.slow
def test_a_million_tokens_forward_and_backward(path, measured):
    """1 048 576 tokens, 32/8 heads, head dim 128: q, out and their gradients have 2**32 elements each."""
    needs(70)
    node, leaves = 4096, 255
    mask = TreeMask.from_nodes([-1] + [0] * leaves, [node] * (leaves + 1), device="cuda")
    assert mask.total == 2**20
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2**20, h, 128, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for h in (32, 8, 8)
    )
    torch.cuda.reset_peak_memory_stats()
    out = tree_attention(q, k, v, mask, backend="cuda")
    assert out.numel() == 2**32
    grad_out = q.detach()  # normal numbers of the right shape, without 8 GiB of their own
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    end.record()
    end.synchronize()
    measured["million_tokens"] = {
        "backward_ms": begin.elapsed_time(end),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }
    # The last leaf with its prompt, alone: its tokens lie beyond 2**31 elements, and no other row sees its keys.
    tail = slice(2**20 - node, 2**20)
    chain = TreeMask.from_nodes([-1], [2 * node], device="cuda")
    alone = [torch.cat([x[:node], x[tail]]).detach().requires_grad_() for x in (q, k, v)]
    out_alone = tree_attention(*alone, chain, backend="cuda")
    grads_alone = torch.autograd.grad(out_alone, alone, torch.cat([grad_out[:node], grad_out[tail]]))
    assert (out[tail] - out_alone[node:]).abs().amax() <= 2 * ulp(out_alone[node:], q.dtype)
    for grad, want in zip(grads, grads_alone, strict=True):
        assert (grad[tail] - want[node:]).abs().amax() <= 2 * ulp(want[node:], q.dtype)
    for grad in grads:
        for part in grad.split(2**16):
            assert part.isfinite().all()
