"""The flex backend on a GPU: compiled kernels against float64, every option, any size, no recompilation, memory.

    python -m pytest tests/test_flex_gpu.py

Speed is measured by ci/bench_flex_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tree_attn import TreeMask, tree_attention
from tree_attn._backends.flex import FlexBackend
from tree_attn._backends.reference import ReferenceBackend
from tree_attn.mask import RowRanges
from tree_attn.registry import Options

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# Relative to the norm of the float64 result. 16 bits: probabilities, score gradients and results are each rounded once
# (half an epsilon), and a product of two such has at most the sum. float32: sums of hundreds of products, and
# exponentials that are right to 2**-22.
TOLERANCE = {
    torch.float16: 2 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float32: 2e-5,
}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "window": {"window": 90},
    "sinks": {"sinks": True},
    "all": {"scale": 0.3, "softcap": 1.5, "window": 90, "sinks": True},
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No graphs and no memory of sizes from before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mask_of(tokens: int, turns: int = 0) -> TreeMask:
    """A prompt, two responses (the first with ``turns`` branches), and a second tree."""
    if tokens < 16:
        return TreeMask.from_nodes([-1] * (tokens > 0), [tokens] * (tokens > 0), device=DEVICE)
    prompt, rest = tokens // 2, tokens - tokens // 2 - tokens // 4
    lengths = [prompt, tokens // 4 - turns, *[1] * turns, rest - rest // 3, rest // 3]
    return TreeMask.from_nodes([-1, 0, *[1] * turns, 0, -1], lengths, device=DEVICE)


def inputs(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (6, 2),
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and sinks; three query heads to a key head by default, no power of two."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = [(tokens, heads[0], dims[0]), (tokens, heads[1], dims[0]), (tokens, heads[1], dims[1]), (heads[0],)]
    made = [torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made[:3]] + [made[3].requires_grad_()]


def results(
    attend: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], sinks: bool, with_lse: bool = True
) -> list[Tensor]:
    """Output, lse and every gradient of a loss of both, for ``attend(q, k, v, sinks)``."""
    q, k, v, sink = leaves
    out, lse = attend(q, k, v, sink if sinks else None)
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).cos().view(out.shape)
    loss = (out.double() * weight).sum() + (lse.double().cos().sum() if with_lse else 0)
    return [out, lse, *torch.autograd.grad(loss, leaves if sinks else leaves[:3])]


def assert_as_exact_as_rounding_allows(
    mask: TreeMask, leaves: list[Tensor], sinks: bool = False, with_lse: bool = True, **options: object
) -> list[Tensor]:
    """flex on ``leaves`` against the reference in float64 on the same numbers."""

    def run(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda q, k, v, s: tree_attention(  # type: ignore[call-overload,no-any-return]
            q, k, v, mask, sinks=s, return_lse=True, backend=backend, **options
        )

    got = results(run("flex"), leaves, sinks, with_lse)
    exact = results(run("reference"), [x.detach().double().requires_grad_() for x in leaves], sinks, with_lse)
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_sinks"]
    for name, ours, wanted in zip(names, got, exact, strict=False):
        assert_close(name, ours, wanted, TOLERANCE[leaves[0].dtype])
    return got


def assert_close(name: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape, name
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: not finite elsewhere"
    difference = torch.linalg.vector_norm((got.double() - exact)[finite])
    bound = tolerance * torch.linalg.vector_norm(exact[finite])
    assert difference <= bound, f"{name}: off by {difference:.3g}, allowed {bound:.3g}"


# -- right for every option, dtype and shape -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in OPTIONS)]
    + [(name, dtype) for dtype in (torch.float16, torch.float32) for name in ("plain", "all")],
    ids=str,
)
def test_output_and_all_gradients_are_right(name: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_rounding_allows(mask_of(700), inputs(700, dtype), **OPTIONS[name])


def test_gradients_without_one_through_lse_are_right() -> None:
    assert_as_exact_as_rounding_allows(mask_of(640), inputs(640), with_lse=False)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        *(((d, d), torch.bfloat16) for d in (16, 80, 96, 128, 192, 256, 512)),
        *((dims, torch.bfloat16) for dims in ((192, 128), (64, 256), (128, 256), (256, 64))),
        *(((d, d), torch.float32) for d in (96, 128, 192, 256, 512)),
    ],
    ids=str,
)
def test_every_head_dim_fits_the_device_and_is_right(dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_exact_as_rounding_allows(mask_of(384), inputs(384, dtype, dims, (4, 2)))


@pytest.mark.parametrize("tokens", [0, 1, 15, 127, 128, 129])
def test_any_number_of_tokens_is_right(tokens: int) -> None:
    assert_as_exact_as_rounding_allows(mask_of(tokens), inputs(tokens), **OPTIONS["all"])


@pytest.mark.parametrize("layout", ["fused", "heads first"])
def test_strided_inputs_are_right(layout: str) -> None:
    tokens, mask = 300, mask_of(300)
    if layout == "fused":
        fused = torch.randn(tokens, 10, 64, device=DEVICE, dtype=torch.bfloat16)
        q, k, v = fused.split([6, 2, 2], dim=1)
    else:
        q, k, v = (torch.randn(n, tokens, 64, device=DEVICE, dtype=torch.bfloat16).transpose(0, 1) for n in (6, 2, 2))
    leaves = [*(x.detach().requires_grad_() for x in (q, k, v)), torch.zeros(6, device=DEVICE)]
    assert not leaves[0].is_contiguous()
    assert_as_exact_as_rounding_allows(mask, leaves)


@pytest.mark.parametrize("window", [None, 60])
def test_rows_that_see_nothing_give_zeros_and_right_gradients(window: int | None) -> None:
    rows, keys = 300, 420
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(rows // 4, rows + 1, (2, keys), generator=generator, dtype=torch.int32)
    tensors = [ends.amin(0), ends.amax(0), *(torch.arange(n, dtype=torch.int32) // 3 for n in (rows, keys))]
    ranges = RowRanges.of(*(x.to(DEVICE) for x in tensors))
    q, k, v, sinks = inputs(keys)
    leaves = [q.detach()[:rows].requires_grad_(), k, v, sinks]
    options = Options(0.125, window=window)
    out, lse = FlexBackend().attend(*leaves, ranges, options)
    doubles = [x.detach().double() for x in leaves]
    reference = ReferenceBackend()
    wanted_out, wanted_lse = reference.forward(*doubles, ranges, options)
    finite = torch.isfinite(wanted_lse)
    assert not finite.all()
    gradients = torch.autograd.grad(out.sum() + lse[finite].sum(), leaves)
    grads = (torch.ones_like(wanted_out), finite.double())
    wanted = reference.backward(*grads, *doubles, wanted_out, wanted_lse, ranges, options)
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_sinks"]
    for name, got, exact in zip(names, [out, lse, *gradients], [wanted_out, wanted_lse, *wanted], strict=True):
        assert_close(name, got, exact, TOLERANCE[torch.bfloat16])  # type: ignore[arg-type]


def test_gradients_are_the_same_bits_in_every_run() -> None:
    mask, leaves = mask_of(5000), inputs(5000)
    first, second = (
        results(
            lambda q, k, v, s: tree_attention(
                q, k, v, mask, sinks=s, deterministic=True, return_lse=True, backend="flex"
            ),
            leaves,
            sinks=True,
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# -- compiling -------------------------------------------------------------------------------------------------------


def test_neither_another_tree_nor_another_number_of_tokens_compiles_after_the_second() -> None:
    for tokens in (1000, 1010, 1100):  # of as many tiles the first two: one compilation
        assert_as_exact_as_rounding_allows(mask_of(tokens), inputs(tokens), window=90)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (1010, 129, 1024, 1536, 2000):
            for turns in (0, 5):
                assert_as_exact_as_rounding_allows(mask_of(tokens, turns), inputs(tokens), window=90)


def model(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
    """Two layers of attention with a window."""
    inner = tree_attention(q, k, v, mask, backend="flex", window=60)
    return tree_attention(inner, k, v, mask, backend="flex", window=60)


def test_inside_torch_compile_every_size_gives_what_eager_gives() -> None:
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (1000, 1010, 640, 2048):
        mask, (q, k, v, _) = mask_of(tokens), inputs(tokens)
        with torch.compiler.set_stance("fail_on_recompile" if tokens in (640, 2048) else "default"):
            out = compiled(q, k, v, mask)
        eager = model(q, k, v, mask)
        assert_close("out", out, eager.double(), TOLERANCE[torch.bfloat16])
        for got, wanted in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, eager)), strict=True):
            assert_close("gradient", got, wanted.double(), TOLERANCE[torch.bfloat16])


def test_a_cuda_graph_follows_the_mask_it_is_replayed_with() -> None:
    q, k, v, _ = (x.detach() for x in inputs(1000))
    static = mask_of(1000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, outside the capture
        tree_attention(q, k, v, static, backend="flex")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(q, k, v, static, backend="flex")
    for turns in (0, 5):
        mask = mask_of(1000, turns)
        static.subtree_end.copy_(mask.subtree_end)
        graph.replay()
        assert_close("out", out, tree_attention(q.double(), k.double(), v.double(), mask, backend="reference"), 2e-2)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_stays_far_below_a_mask_of_tokens_by_tokens() -> None:
    """32768 tokens: a bool for every pair would be 1 GiB. Output, gradients, lse and block lists take some 100 MiB."""
    mask, (q, k, v, _) = mask_of(32768), inputs(32768, heads=(8, 2))
    go = torch.randn_like(q)
    tree_attention(q, k, v, mask, backend="flex").backward(go)
    q.grad = k.grad = v.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tree_attention(q, k, v, mask, backend="flex").backward(go)
    assert torch.cuda.max_memory_allocated() - before < 400 * 2**20
