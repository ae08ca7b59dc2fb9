"""The sdpa backend: its blocks are the mask and little more, its kernels agree, its memory grows with the tokens."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from forests import SHAPES, Forest, assert_close, forests, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tree_attn import Options, RowRanges, TreeMask, tree_attention
from tree_attn._backends import sdpa, sdpa_blocks, sdpa_kernels, sdpa_plan
from tree_attn._backends.reference import ReferenceBackend
from tree_attn._backends.sdpa_blocks import Limits, row_blocks
from tree_attn._backends.sdpa_paths import path_batches

SETTINGS = settings(deadline=None, max_examples=40, derandomize=True)
FLOAT64 = 1e-12  # a few hundred rounding errors of 2**-53 on numbers of order 1
SMALL_BLOCKS = Limits(rows=128, scores=2**14, overhead=64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 1.5},
    "negative scale": {"scale": -0.4},
    "deterministic": {"deterministic": True},
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, taken head by head, so that small inputs have many."""
    monkeypatch.setattr(sdpa_kernels, "_CPU_BLOCKS", (128, 2**8))
    monkeypatch.setattr(sdpa_kernels, "WORKSPACE", 2**16)
    monkeypatch.setattr(sdpa_kernels, "CPU_WORKSPACE", 2**16)


@pytest.fixture(params=["fused", "matrix"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run on each of the two kernels that a CPU has."""
    if request.param == "matrix":
        monkeypatch.setattr(sdpa_kernels, "fused_kernel", lambda *_: None)
    return request.param


def random_forest(seed: int, tokens: int) -> Forest:
    """A forest of about so many tokens, with leaves that are short, long, and of a block's size."""
    rng = random.Random(seed)
    parents, lengths, path = [], [], []
    while sum(lengths) < tokens:
        path = path[: rng.randint(0, len(path))]
        parents.append(path[-1] if path else -1)
        lengths.append(rng.choice([1, 3, 17, 64, 130, 200]))
        path.append(len(lengths) - 1)
    return parents, lengths


def some_rows(mask: TreeMask, share: float, seed: int) -> RowRanges:
    """The mask of some of the rows, in order, over some of the keys: every key's rows stay together."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = (torch.nonzero(torch.rand(mask.total, generator=generator) < share).flatten() for _ in range(2))
    begin, end = (torch.searchsorted(rows, x, out_int32=True) for x in (keys, mask.subtree_end[keys]))
    return RowRanges.of(begin, end, mask.depth[rows], mask.depth[keys])


# -- the same numbers as the reference -------------------------------------------------------------------------------


def run(
    backend: Any, ranges: RowRanges, options: Options, with_sinks: bool, with_lse: bool, **shape: int
) -> list[Tensor]:
    """out, lse and every gradient."""
    rows, keys = len(ranges.q_depth), len(ranges.row_end)
    q, k, v = random_qkv(rows, **shape)[0], *random_qkv(keys, seed=1, **shape)[1:]
    q, k, v = (x.detach() for x in (q, k, v))
    sinks = torch.linspace(-1, 2, q.shape[1], dtype=torch.float64) if with_sinks else None
    out, lse = backend.forward(q, k, v, sinks, ranges, options)
    grad_out, grad_lse = (torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape) for x in (out, lse))
    grad_lse = torch.where(lse.isinf(), 0, grad_lse)
    grads = backend.backward(grad_out, grad_lse if with_lse else None, q, k, v, sinks, out, lse, ranges, options)
    return [out, lse, *(x for x in grads if x is not None)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_lse", [False, True], ids=["", "gradient of lse"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_many_blocks_equal_the_reference(kernel: str, name: str, with_lse: bool, with_sinks: bool) -> None:
    """Square and rectangular masks, in every option and on both kernels, heads in groups of one and of three."""
    options = Options(**{"scale": 0.3, **OPTIONS[name]})
    for seed in range(2):
        mask = TreeMask.from_nodes(*random_forest(seed, 300))
        shape = {"heads": 6, "kv_heads": 2 if seed else 6, "head_dim": 8}
        for ranges in (mask.ranges(), some_rows(mask, 0.6, seed), some_rows(mask, 0.05, seed)):
            got = run(sdpa.SdpaBackend(), ranges, options, with_sinks, with_lse, **shape)
            expected = run(ReferenceBackend(), ranges, options, with_sinks, with_lse, **shape)
            for a, b in zip(got, expected, strict=True):
                assert_close(a, b, FLOAT64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_keeps_the_dtype_and_adds_up_in_float32(kernel: str, dtype: torch.dtype) -> None:
    """Error of output and gradients against float64, as a share of their norm."""
    mask = TreeMask.from_nodes(*random_forest(1, 600)).ranges()
    options = Options(scale=0.25)
    q, k, v, grad = (
        x.detach().to(dtype)
        for x in (*random_qkv(len(mask.row_end), head_dim=16), random_qkv(len(mask.row_end), head_dim=16, seed=1)[0])
    )
    results = []
    for backend, cast in ((sdpa.SdpaBackend(), dtype), (ReferenceBackend(), torch.float64)):
        q_, k_, v_, grad_ = (x.to(cast) for x in (q, k, v, grad))
        out, lse = backend.forward(q_, k_, v_, None, mask, options)
        results.append((out, *backend.backward(grad_, None, q_, k_, v_, None, out, lse, mask, options)[:3]))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        # Each of the roundings on the way (weights, output, its gradient, differences of scores) adds about eps / 3.
        assert error < 3 * torch.finfo(dtype).eps


def test_gradients_through_many_blocks_are_the_derivatives(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """gradcheck over blocks of a few rows: each key's gradient comes from several of them."""
    monkeypatch.setattr(sdpa_blocks, "CUT", 4)
    monkeypatch.setattr(sdpa_blocks, "KEY_COST", 0)
    monkeypatch.setattr(sdpa_kernels, "_CPU_BLOCKS", (4, 1))
    mask = TreeMask.from_nodes([-1, 0, 0, 2, 2], [5, 3, 1, 4, 2])
    q, k, v = random_qkv(mask.total, heads=2, kv_heads=1, head_dim=2)
    assert len(sdpa_kernels.prepare(q, k, v, mask.ranges(), Options(1.0))[1]) >= 3
    sinks = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: tree_attention(q, k, v, mask, sinks=s, window=6, return_lse=True, backend="sdpa"),
        (q, k, v, sinks),
    )


# -- blocks ----------------------------------------------------------------------------------------------------------


def seen_by_blocks(blocks: Sequence[sdpa_blocks.RowBlock], rows: int, keys: int) -> Tensor:
    """The dense mask that row blocks describe; checks that they hold the rows in order, and no key twice."""
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    at = 0
    for block in blocks:
        assert block.begin == at < block.end
        at = block.end
        positions = block.take(torch.arange(keys))
        assert len(positions) == block.n_keys == len(positions.unique())
        seen[block.rows, positions] = block.bias(every_key=True, dtype=torch.float32) == 0
        partial = block.bias(every_key=False, dtype=torch.float32) == 0
        assert seen[block.rows, positions[: block.n_full]].all()
        assert torch.equal(seen[block.rows, positions[block.n_full :]], partial)
    assert at == rows
    return seen


@given(forest=forests(max_tokens=400), window=st.sampled_from([None, 1, 5, 60]))
@SETTINGS
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["square", "rectangular"])
def test_row_blocks_are_the_mask(share: float, forest: Forest, window: int | None) -> None:
    mask = TreeMask.from_nodes(*forest)
    ranges = mask.ranges() if share == 1.0 else some_rows(mask, share, seed=3)
    rows, keys = len(ranges.q_depth), len(ranges.row_end)
    blocks = row_blocks(ranges, rows, window, SMALL_BLOCKS)
    visible = ranges.visible(torch.arange(rows), torch.arange(keys), window)
    assert torch.equal(seen_by_blocks(blocks, rows, keys), visible)


@given(
    forest=forests(max_tokens=400), window=st.sampled_from([None, 1, 5, 60]), workspace=st.sampled_from([1, 500, 10**9])
)
@SETTINGS
def test_path_batches_are_the_mask(forest: Forest, window: int | None, workspace: int) -> None:
    """Every segment is causal over its path, aligned at the end; with a window by the distance along it."""
    mask = TreeMask.from_nodes(*forest)
    batches = path_batches(mask.ranges(), window, 1, 1, workspace)
    assert batches is not None
    seen = torch.zeros(mask.total, mask.total, dtype=torch.bool)
    at = 0
    for batch in batches:
        assert batch.begin == at < batch.end
        at = batch.end
        keys = batch.take(torch.arange(mask.total))
        rows = torch.arange(batch.begin, batch.end)
        lengths_q, lengths_k = batch.offsets_q.diff(), batch.offsets_k.diff()
        assert (lengths_q.sum(), lengths_k.sum()) == (len(rows), len(keys))
        assert (lengths_q.max(), lengths_k.max()) == (batch.longest_q, batch.longest_k)
        assert len(lengths_q) == 1 or len(rows) + len(keys) <= workspace
        for own, path in zip(rows.split(lengths_q.tolist()), keys.split(lengths_k.tolist()), strict=True):
            distance = torch.arange(len(own))[:, None] + len(path) - len(own) - torch.arange(len(path))
            seen[own[:, None], path] = (distance >= 0) & (distance < (window or mask.total))
    assert at == mask.total
    index = torch.arange(mask.total)
    assert torch.equal(seen, mask.ranges().visible(index, index, window))


def test_short_segments_under_a_long_path_are_not_gathered() -> None:
    """2000 leaves of one token would gather a prompt of 300 tokens 2000 times."""
    mask = TreeMask.from_nodes([-1] + [0] * 2000, [300] + [1] * 2000)
    assert path_batches(mask.ranges(), None, 1, 1, 10**9) is None
    assert path_batches(mask.ranges(), 20, 1, 1, 10**9) is not None


@pytest.mark.parametrize(
    ("forest", "most"),
    [
        (([-1], [4096]), 1.3),
        (([-1] + [0] * 12, [1024] + [256] * 12), 1.5),  # a block may hold two leaves, which do not see each other
        (([-1] + [0] * 64, [512] + [120] * 64), 2.0),
    ],
    ids=["causal", "responses", "short leaves"],
)
def test_blocks_hold_little_more_than_what_is_visible(forest: Forest, most: float) -> None:
    """Scores computed over scores visible, at the sizes that a CPU takes."""
    mask = TreeMask.from_nodes(*forest)
    q, k, v = random_qkv(mask.total, heads=8, kv_heads=2, head_dim=64, dtype=torch.float32)
    _, blocks = sdpa_kernels.prepare(q, k, v, mask.ranges(), Options(scale=1.0))
    computed = sum((b.end - b.begin) * b.n_keys for b in blocks)
    assert mask.visible_pairs() <= computed <= most * mask.visible_pairs()


# -- root paths, with a stand-in for the GPU's kernel ----------------------------------------------------------------


class _Flash:
    """What the flash kernel of a GPU computes, sequence by sequence, with the same arguments."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Sequence[Tensor],
        longest: Sequence[int],
        scale: float,
        window_size_left: int | None,
    ) -> tuple[Tensor, Tensor]:
        window = len(k) if window_size_left is None else window_size_left
        outs, lses = [], []
        sizes = [x.diff().tolist() for x in offsets]
        assert [max(x) for x in sizes] == [*longest]
        for own, path, values in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True):
            heads = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", own, path.repeat_interleave(heads, 1)) * scale
            distance = torch.arange(len(own))[:, None] + len(path) - len(own) - torch.arange(len(path))
            hidden = (distance < 0) | (distance > window)
            scores = scores.masked_fill(hidden, float("-inf"))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(heads, 1)))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, None]:
        """``rest`` is offsets and longest sequences of q and k, dropout, causal, debug."""
        assert rest[4:] == (0.0, True, False)
        return *self.attend(q, k, v, rest[:2], rest[2:4], **options), None

    def backward(self, grad: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        """``rest`` is q, k, v, out, lse, then as above with a seed instead of debug."""
        inputs = [x.detach().requires_grad_() for x in rest[:3]]
        assert rest[9:11] == (0.0, True)
        with torch.enable_grad():
            out, lse = self.attend(*inputs, rest[5:7], rest[7:9], **options)
        assert_close(rest[3], out.detach(), 1e-5)
        assert_close(rest[4], lse.detach(), 1e-5)
        return torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("workspace", [2**14, 2**20])
@pytest.mark.parametrize("name", ["plain", "window"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
def test_root_paths_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, workspace: int, name: str, heads: tuple[int, int]
) -> None:
    """Gathered, computed head by head or at once, and their gradients added up, in float32."""
    flash = _Flash()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash.backward)
    monkeypatch.setattr(sdpa_kernels, "fused_kernel", lambda *_: sdpa_kernels.PathKernel)
    monkeypatch.setattr(sdpa_kernels, "WORKSPACE", workspace)
    mask = TreeMask.from_nodes(*random_forest(4, 400))
    inputs = [x.detach().float().requires_grad_() for x in random_qkv(mask.total, *heads)]
    assert isinstance(sdpa_kernels.prepare(*inputs, mask.ranges(), Options(scale=1.0))[0], sdpa_kernels.PathKernel)
    results = []
    for backend in ("sdpa", "reference"):
        out, lse = tree_attention(*inputs, mask, **OPTIONS[name], return_lse=True, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out, inputs, torch.cos(inputs[0].detach()))])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, 1e-5)  # sums of some hundred float32 numbers of order 1


# -- plans are kept --------------------------------------------------------------------------------------------------


def test_a_plan_is_made_once_and_freed_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*arguments: Any) -> list[Any]:
        made.append(1)
        return row_blocks(*arguments)

    monkeypatch.setattr(sdpa_kernels, "row_blocks", counted)
    before = len(sdpa_plan._kept)
    mask = TreeMask.from_nodes(*SHAPES["two levels across tiles"])
    for _ in range(2):
        q, k, v = random_qkv(mask.total)
        tree_attention(q, k, v, mask, backend="sdpa").sum().backward()
    assert len(made) == 1
    tree_attention(q, k, v, mask, window=4, backend="sdpa")
    assert len(made) == 2
    assert len(sdpa_plan._kept) == before + 1
    del mask
    gc.collect()
    assert len(sdpa_plan._kept) == before


def test_a_mask_written_to_gets_a_new_plan() -> None:
    """The tensors of a mask are constants; even so, no answer is of a mask that was."""
    first, second = TreeMask.from_nodes([-1, 0, 0], [9, 5, 5]), TreeMask.from_nodes([-1, -1, 1], [9, 5, 5])
    q, k, v = random_qkv(first.total)
    tree_attention(q, k, v, first, backend="sdpa")
    first.subtree_end.copy_(second.subtree_end)
    first.depth.copy_(second.depth)
    assert torch.equal(*(tree_attention(q, k, v, mask, backend="sdpa") for mask in (first, second)))


# -- memory ----------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The most entries of any storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("forest", [([-1], [1]), ([-1] + [0] * 4, [1] * 5)], ids=["causal", "responses"])
def test_the_largest_intermediate_grows_with_the_tokens_and_not_their_square(kernel: str, forest: Forest) -> None:
    parents, lengths = forest
    largest = []
    for tokens in (4096, 8192, 16384):
        mask = TreeMask.from_nodes(parents, [n * tokens // len(lengths) for n in lengths])
        q, k, v = (x.detach() for x in random_qkv(mask.total, 2, 1, head_dim=1, dtype=torch.float32))
        with _Largest() as mode:
            out, lse = sdpa.SdpaBackend().forward(q, k, v, None, mask.ranges(), Options(scale=1.0))
            sdpa.SdpaBackend().backward(out, None, q, k, v, None, out, lse, mask.ranges(), Options(scale=1.0))
        largest.append(mode.entries)
        assert mode.entries <= 1024 * tokens  # the most rows of a block on a CPU
    assert largest[2] <= 2.2 * largest[1] <= 2.2 * 2.2 * largest[0]


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "window", "softcap", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_are_as_close_as_their_rounding_allows(name: str, dtype: torch.dtype) -> None:
    mask = TreeMask.from_nodes(*random_forest(1, 3000), device="cuda")
    q, k, v = (x.detach().cuda().to(dtype) for x in random_qkv(mask.total, heads=8, kv_heads=2, head_dim=64))
    results = []
    for backend, cast in (("sdpa", dtype), ("reference", torch.float64)):
        inputs = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = tree_attention(*inputs, mask, **OPTIONS[name], backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, torch.cos(q).to(cast))])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < 3 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["root paths", "row blocks"])
def test_the_host_waits_for_the_gpu_once_for_a_mask(options: dict[str, Any]) -> None:
    """For the plan, which forward and backward of every later call use too."""
    mask = TreeMask.from_nodes(*random_forest(2, 3000), device="cuda")
    q, k, v = (x.detach().cuda().bfloat16().requires_grad_() for x in random_qkv(mask.total, head_dim=64))
    waits = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = tree_attention(q, k, v, mask, **options, backend="sdpa")
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            waits.append(sum("synchroniz" in str(w.message) for w in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["root paths", "row blocks"])
@pytest.mark.parametrize("forest", [([-1], [32768]), ([-1] + [0] * 28, [4096] + [1024] * 28)], ids=["causal", "tree"])
def test_a_gibibyte_is_enough_for_32768_tokens(forest: Forest, options: dict[str, Any]) -> None:
    """Beyond inputs, outputs and gradients: 32/8 heads of 128 in bfloat16, forward and backward."""
    mask = TreeMask.from_nodes(*forest, device="cuda")
    q, k, v = (torch.randn(32768, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (32, 8, 8))
    grad = torch.randn_like(q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = tree_attention(q, k, v, mask, **options, return_lse=True, backend="sdpa")
    grads = torch.autograd.grad(out, (q, k, v), grad)
    results = sum(x.numel() * x.element_size() for x in (out, lse, *grads))
    assert torch.cuda.max_memory_allocated() - before - results <= 2**30


@pytest.mark.gpu
def test_a_graph_capture_is_refused() -> None:
    """A replay would use the tree that was captured, whatever the mask holds by then."""
    mask = TreeMask.from_nodes([-1, 0, 0], [64, 64, 64], device="cuda")
    q, k, v = (x.detach().cuda().bfloat16() for x in random_qkv(mask.total, head_dim=64))
    tree_attention(q, k, v, mask, backend="sdpa")
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tree_attention(q, k, v, mask, backend="sdpa")
