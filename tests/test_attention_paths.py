"""Attention on a forest equals every root-to-leaf path run alone: outputs, lse and all gradients, on any forest."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from forests import (
    SHAPES,
    Forest,
    ancestors,
    assert_close,
    attention_path_by_path,
    forests,
    random_qkv,
    token_parents,
)
from hypothesis import given, settings
from torch import Tensor

from tree_attn import TreeMask, tree_attention

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)

# Both sides sum at most a few hundred products of numbers of order 1, in different orders: a few hundred rounding
# errors of 2**-53, and room for the gradients, which sum over rows as well.
FLOAT64 = 1e-12
# The same with rounding errors of 2**-24 (arithmetic) and 2**-8 (bfloat16 inputs, outputs and gradients).
FLOAT32 = 1e-5
BFLOAT16 = 4 * 2**-8


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Of a random linear function of all outputs: every entry of every output counts, with another weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


def check(forest: Forest, backend: str, heads: int = 4, kv_heads: int = 2, value_dim: int | None = None) -> None:
    parent = token_parents(forest)
    mask = TreeMask.from_nodes(*forest)
    q, k, v = random_qkv(len(parent), heads, kv_heads, value_dim=value_dim, seed=len(parent))
    expected = attention_path_by_path(q, k, v, parent)
    got = tree_attention(q, k, v, mask, return_lse=True, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, FLOAT64)
    for a, b in zip(gradients(got, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        assert_close(a, b, FLOAT64)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "no tokens"])
def test_every_shape_of_tree_equals_its_paths(shape: str, cpu_backend: str) -> None:
    check(SHAPES[shape], cpu_backend)


@given(forest=forests(), heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), value_dim=st.sampled_from([8, 3]))
@SETTINGS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_any_forest_equals_its_paths(backend: str, forest: Forest, heads: tuple[int, int], value_dim: int) -> None:
    check(forest, backend, *heads, value_dim=value_dim)


@pytest.mark.parametrize("shape", ["caterpillar", "trees and single roots", "two levels across tiles"])
def test_the_paths_themselves_equal_torch_sdpa(shape: str, cpu_backend: str) -> None:
    """What the other tests compare with is no invention: torch's causal attention, run on each path."""
    parent = token_parents(SHAPES[shape])
    q, k, v = random_qkv(len(parent), heads=2, kv_heads=2, requires_grad=False)
    out = tree_attention(q, k, v, TreeMask.from_token_parents(parent), backend=cpu_backend)
    for path in ancestors(parent):
        q_path, k_path, v_path = (x[path].transpose(0, 1) for x in (q, k, v))
        alone = F.scaled_dot_product_attention(q_path, k_path, v_path, is_causal=True)
        assert_close(out[path[-1]], alone[:, -1], FLOAT64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("shape", ["binary", "many roots", "two levels across tiles"])
def test_lower_precision_is_as_close_as_its_rounding_allows(
    shape: str, dtype: torch.dtype, tolerance: float, cpu_backend: str
) -> None:
    parent = token_parents(SHAPES[shape])
    mask = TreeMask.from_token_parents(parent)
    low = random_qkv(len(parent), dtype=dtype)
    high = [x.detach().double().requires_grad_() for x in low]
    expected = attention_path_by_path(*high, parent)
    got = tree_attention(*low, mask, return_lse=True, backend=cpu_backend)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, tolerance)
    for a, b in zip(gradients(got, list(low)), gradients(expected, high), strict=True):
        assert a.dtype == dtype
        assert_close(a, b, tolerance)


@given(forest=forests(max_tokens=60), data=st.data())
@SETTINGS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_token_is_changed_by_its_ancestors_and_by_nothing_else(
    backend: str, forest: Forest, data: st.DataObject
) -> None:
    """The keys and values of every token that is no ancestor are replaced; the row stays."""
    parent = token_parents(forest)
    token = data.draw(st.integers(0, len(parent) - 1))
    q, k, v = random_qkv(len(parent), requires_grad=False)
    mask = TreeMask.from_nodes(*forest)
    before = tree_attention(q, k, v, mask, backend=backend)[token]
    path = ancestors(parent)[token]
    other = torch.ones(len(parent), dtype=torch.bool)
    other[path] = False
    k, v = k.clone(), v.clone()
    k[other] += 100.0
    v[other] -= 100.0
    assert_close(tree_attention(q, k, v, mask, backend=backend)[token], before, FLOAT64)


def test_packing_two_forests_changes_neither(cpu_backend: str) -> None:
    first, second = SHAPES["binary"], SHAPES["caterpillar"]
    nodes = len(first[0])
    both = (first[0] + [p if p == -1 else p + nodes for p in second[0]], first[1] + second[1])
    tokens = sum(first[1])
    q, k, v = random_qkv(sum(both[1]), requires_grad=False)
    together = tree_attention(q, k, v, TreeMask.from_nodes(*both), backend=cpu_backend)
    a = tree_attention(q[:tokens], k[:tokens], v[:tokens], TreeMask.from_nodes(*first), backend=cpu_backend)
    b = tree_attention(q[tokens:], k[tokens:], v[tokens:], TreeMask.from_nodes(*second), backend=cpu_backend)
    assert_close(together, torch.cat([a, b]), FLOAT64)


def test_no_tokens_give_an_empty_output_and_gradients(cpu_backend: str) -> None:
    q, k, v = random_qkv(0)
    out, lse = tree_attention(q, k, v, TreeMask.from_nodes([], []), return_lse=True, backend=cpu_backend)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)
    (out.sum() + lse.sum()).backward()
    assert [x.grad.shape for x in (q, k, v)] == [q.shape, k.shape, v.shape]


def test_strided_inputs_and_gradients_are_read_where_they_lie(cpu_backend: str) -> None:
    """Slices of one projection, transposed heads, a last dimension that is not contiguous, an expanded gradient."""
    forest = SHAPES["trees and single roots"]
    mask = TreeMask.from_nodes(*forest)
    n = mask.total
    fused = torch.randn(n, 4 + 2 + 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = fused.split([4, 2, 2], dim=1)  # strides of the fused tensor
    expected = tree_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, backend=cpu_backend)
    layouts = [
        (q, k, v),
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        tuple(x.repeat_interleave(2, dim=0)[::2] for x in (q, k, v)),
    ]
    for layout in layouts:
        inputs = [x.detach().requires_grad_() for x in layout]
        out = tree_attention(*inputs, mask, backend=cpu_backend)
        assert_close(out, expected, FLOAT64)
        out.sum().backward()  # the gradient is one number, expanded: all strides are 0
        plain = [x.detach().clone().contiguous().requires_grad_() for x in (q, k, v)]
        tree_attention(*plain, mask, backend=cpu_backend).backward(torch.ones_like(expected))
        for a, b in zip(inputs, plain, strict=True):
            assert_close(a.grad, b.grad, FLOAT64)
