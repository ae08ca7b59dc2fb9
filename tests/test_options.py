"""Every option, alone and in pairs, means what the documentation says, and its gradients are its derivatives."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from forests import (
    SHAPES,
    Forest,
    assert_close,
    attention_path_by_path,
    forests,
    random_qkv,
    token_parents,
)
from hypothesis import given, settings
from torch import Tensor

from tree_attn import Options, RowRanges, TreeMask, tree_attention
from tree_attn.attention import attend

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
FLOAT64 = 1e-12  # a few hundred rounding errors of 2**-53 on numbers of order 1

OPTIONS: dict[str, Any] = {"scale": -0.7, "softcap": 1.5, "window": 3, "sinks": True, "deterministic": True}
SMALL: Forest = ([-1, 0, 0, 2, -1], [2, 2, 1, 1, 1])


def combinations() -> list[tuple[str, ...]]:
    """None, each alone, each pair, all."""
    names = list(OPTIONS)
    return [(), *[(n,) for n in names], *itertools.combinations(names, 2), tuple(names)]


def arguments(names: tuple[str, ...], heads: int) -> tuple[dict[str, Any], Tensor | None]:
    """The keyword arguments of the named options, and the sinks by themselves."""
    chosen = {name: OPTIONS[name] for name in names if name != "sinks"}
    generator = torch.Generator().manual_seed(5)
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64) if "sinks" in names else None
    return chosen, sinks


# -- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", combinations(), ids="+".join)
def test_gradients_are_the_derivatives_of_the_outputs(names: tuple[str, ...], cpu_backend: str) -> None:
    """gradcheck in float64 of out and lse, in q, k, v and sinks; heads share keys, values have another width."""
    mask = TreeMask.from_nodes(*SMALL)
    chosen, sinks = arguments(names, heads=2)
    inputs = [*random_qkv(mask.total, heads=2, kv_heads=1, head_dim=2, value_dim=3)]
    if sinks is not None:
        inputs.append(sinks.requires_grad_())

    def call(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        with_sinks = {"sinks": sinks[0]} if sinks else {}
        return tree_attention(q, k, v, mask, return_lse=True, backend=cpu_backend, **chosen, **with_sinks)

    assert torch.autograd.gradcheck(call, inputs)


# -- values ----------------------------------------------------------------------------------------------------------


@given(forest=forests(max_tokens=100), names=st.sampled_from(combinations()))
@SETTINGS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_options_on_any_forest_equal_the_same_options_on_its_paths(
    backend: str, forest: Forest, names: tuple[str, ...]
) -> None:
    parent = token_parents(forest)
    chosen, sinks = arguments(names, heads=4)
    q, k, v = random_qkv(len(parent), requires_grad=False)
    got = tree_attention(q, k, v, TreeMask.from_nodes(*forest), sinks=sinks, return_lse=True, backend=backend, **chosen)
    chosen.pop("deterministic", None)
    expected = attention_path_by_path(q, k, v, parent, sinks=sinks, **chosen)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, FLOAT64)


def test_the_window_counts_along_the_path_and_not_in_packed_order(cpu_backend: str) -> None:
    """A prompt of 2 and responses of 3: the second response's first token sees both prompt tokens in a window of 3."""
    mask = TreeMask.from_nodes([-1, 0, 0], [2, 3, 3])
    q, k, v = random_qkv(8, requires_grad=False)
    sees = {
        1: [[i] for i in range(8)],
        3: [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 1, 5], [1, 5, 6], [5, 6, 7]],
    }
    for window, rows in sees.items():
        out = tree_attention(q, k, v, mask, window=window, backend=cpu_backend)
        for row, keys in enumerate(rows):
            scores = torch.einsum("hd,khd->hk", q[row], k[keys].repeat_interleave(2, 1)) / 8**0.5
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[keys].repeat_interleave(2, 1))
            assert_close(out[row], expected, FLOAT64)


@pytest.mark.parametrize("window", [200, 2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_wider_than_the_tree_hides_nothing(window: int, cpu_backend: str) -> None:
    mask = TreeMask.from_nodes(*SHAPES["binary"])
    q, k, v = random_qkv(mask.total, requires_grad=False)
    got = tree_attention(q, k, v, mask, window=window, backend=cpu_backend)
    assert_close(got, tree_attention(q, k, v, mask, backend=cpu_backend), FLOAT64)


def test_the_default_scale_is_one_over_the_root_of_head_dim(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes(*SHAPES["binary"])
    q, k, v = random_qkv(mask.total, head_dim=16, requires_grad=False)
    got = tree_attention(q, k, v, mask, backend=cpu_backend)
    assert torch.equal(got, tree_attention(q, k, v, mask, scale=0.25, backend=cpu_backend))


def test_a_scale_of_zero_gives_the_mean_of_the_values(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes([-1], [5])
    q, k, v = random_qkv(5, requires_grad=False)
    got = tree_attention(q, k, v, mask, scale=0, backend=cpu_backend)
    mean = (v.cumsum(0) / torch.arange(1, 6)[:, None, None]).repeat_interleave(2, 1)
    assert_close(got, mean, FLOAT64)


def test_lse_is_natural_without_the_sink_and_in_float32_or_float64(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes([-1], [4])
    zeros = {dtype: torch.zeros(4, 2, 8, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float16)}
    expected = torch.log(torch.arange(1, 5).double()).expand(2, 4)
    for dtype, x in zeros.items():
        sinks = torch.full((2,), 3.0, dtype=dtype)
        _, lse = tree_attention(x, x, x, mask, sinks=sinks, return_lse=True, backend=cpu_backend)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(lse, expected, 1e-6)  # float32 holds log(4) to 2**-24


def test_sinks_of_another_dtype_get_gradients_of_theirs(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes(*SMALL)
    q, k, v = random_qkv(mask.total, dtype=torch.bfloat16)
    sinks = torch.zeros(4, dtype=torch.float32, requires_grad=True)
    tree_attention(q, k, v, mask, sinks=sinks, backend=cpu_backend).sum().backward()
    assert sinks.grad.dtype == torch.float32
    assert q.grad.dtype == torch.bfloat16


def test_a_sink_of_minus_infinity_is_no_sink(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes(*SHAPES["binary"])
    q, k, v = random_qkv(mask.total)
    sinks = torch.full((4,), float("-inf"), dtype=torch.float64, requires_grad=True)
    with_sinks = tree_attention(q, k, v, mask, sinks=sinks, return_lse=True, backend=cpu_backend)
    without = tree_attention(q, k, v, mask, return_lse=True, backend=cpu_backend)
    for a, b in zip(with_sinks, without, strict=True):
        assert_close(a, b, FLOAT64)
    grads = torch.autograd.grad(with_sinks[0].sum(), [q, k, v, sinks])
    for a, b in zip(grads[:3], torch.autograd.grad(without[0].sum(), [q, k, v]), strict=True):
        assert_close(a, b, FLOAT64)
    assert grads[3].tolist() == [0.0] * 4


def test_deterministic_gives_the_same_bits_again(cpu_backend: str) -> None:
    mask = TreeMask.from_nodes(*SHAPES["two levels across tiles"])
    runs = []
    for _ in range(3):
        q, k, v = random_qkv(mask.total, dtype=torch.float32)
        out = tree_attention(q, k, v, mask, deterministic=True, backend=cpu_backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v])))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# -- rectangular masks -----------------------------------------------------------------------------------------------


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[RowRanges, int, int]:
    """Any row range for each key, also empty ones; rows that see nothing and keys that nobody sees."""
    rows, keys = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    ends = [sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows)))) for _ in range(keys)]
    depth = st.integers(0, 9)
    q_depth = draw(st.lists(depth, min_size=rows, max_size=rows))
    k_depth = draw(st.lists(depth, min_size=keys, max_size=keys))
    begin, end = ([pair[i] for pair in ends] for i in (0, 1))
    return RowRanges.of(*(torch.tensor(x, dtype=torch.int32) for x in (begin, end, q_depth, k_depth))), rows, keys


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, visible: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Plain softmax with autograd; 0 and -inf for rows that see nothing."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, -1e9)  # not -inf, whose derivative autograd makes NaN
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    top = top.detach().clamp(min=-100)
    weights = torch.exp(scores - top) * visible
    total = weights.sum(-1)
    denominator = total if sinks is None else total + torch.exp(sinks[:, None] - top[..., 0])
    seen = visible.any(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
    out = out / torch.where(seen, denominator, 1).T[..., None]
    lse = torch.where(seen, torch.where(seen, total, 1).log() + top[..., 0], float("-inf"))
    return out, lse


@given(rectangle=rectangles(), names=st.sampled_from(combinations()))
@SETTINGS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_any_row_ranges_equal_dense_attention(
    backend: str, rectangle: tuple[RowRanges, int, int], names: tuple[str, ...]
) -> None:
    """Kernels serve masks whose rows are not their keys; nothing but the ranges says who sees whom."""
    ranges, rows, keys = rectangle
    chosen, sinks = arguments(names, heads=4)
    options = Options(**{"scale": 0.4, **chosen})
    inputs = [random_qkv(rows)[0], *random_qkv(keys, seed=1)[1:]]
    if sinks is not None:
        inputs.append(sinks.requires_grad_())
    q, k, v = inputs[:3]
    visible = torch.zeros(rows, keys, dtype=torch.bool)
    for key in range(keys):
        for row in range(ranges.row_begin[key], ranges.row_end[key]):
            near = ranges.q_depth[row] - ranges.k_depth[key] < (options.window or 100)
            visible[row, key] = near
    got = attend(q, k, v, sinks, ranges, options, backend)
    expected = dense_attention(q, k, v, sinks, visible, options)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, FLOAT64)
    assert got[0][~visible.any(-1)].eq(0).all()
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    grads = torch.autograd.grad(got, inputs, weights)
    expected_grads = torch.autograd.grad(expected, inputs, weights, allow_unused=True, materialize_grads=True)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(a).all()
        assert_close(a, b, FLOAT64)


@pytest.mark.parametrize("sink", [None, 0.5, float("-inf")])
def test_rows_that_see_nothing_give_zero_and_take_part_in_no_gradient(sink: float | None, cpu_backend: str) -> None:
    """Also where the sink is -inf: 0 and -inf, never NaN."""
    begin, end = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32)
    ranges = RowRanges.of(begin, end, torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    q, k, v = random_qkv(4)[0], *random_qkv(2, seed=1)[1:]
    sinks = None if sink is None else torch.full((4,), sink, dtype=torch.float64, requires_grad=True)
    out, lse = attend(q, k, v, sinks, ranges, Options(scale=1.0), cpu_backend)
    assert out[2:].eq(0).all()
    assert lse[:, 2:].eq(float("-inf")).all()
    assert torch.isfinite(lse[:, :2]).all()
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    grads = torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[0][2:].eq(0).all()
