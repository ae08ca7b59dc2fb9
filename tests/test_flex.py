"""The flex backend without a GPU: its block lists, its mask and score functions through dense operations, what it
compiles and when, and what it says it cannot do. What needs a GPU is in test_flex_gpu.py."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from forests import SHAPES, Forest, assert_close, forests, random_qkv
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tree_attn import BackendUnavailable, Request, TreeMask, explain, register_backend, tree_attention
from tree_attn._backends import flex
from tree_attn._backends.flex import TILE, FlexBackend, tile_lists
from tree_attn._backends.reference import ReferenceBackend
from tree_attn.mask import RowRanges
from tree_attn.registry import Options

# Both sides compute in float32, in another order of sums: a few hundred roundings of 6e-8 of the largest entry.
FLOAT32 = 2e-5


class DenseFlex(FlexBackend):
    """The backend with its graphs run through dense operations, which any device can."""

    name = "dense-flex"
    priority = -1

    def __init__(self) -> None:
        self.counter = CompileCounterWithBackend("aot_eager")
        super().__init__(self.counter)

    def supports(self, request: Request) -> list[str]:
        return []


@pytest.fixture
def backend(clean_registry: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[DenseFlex]:
    """A registered ``DenseFlex`` that has compiled nothing yet."""
    # flex_attention refuses gradients on the CPU, for which only its compiled kernels are missing.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    torch._dynamo.reset()
    made = DenseFlex()
    register_backend(made)
    yield made
    torch._dynamo.reset()


def mask_of(tokens: int, turns: int = 0) -> TreeMask:
    """A prompt, two responses (the first with ``turns`` branches), and a second tree."""
    prompt, rest = tokens // 2, tokens - tokens // 2 - tokens // 4
    lengths = [prompt, tokens // 4 - turns, *[1] * turns, rest - rest // 3, rest // 3]
    return TreeMask.from_nodes([-1, 0, *[1] * turns, 0, -1], lengths)


def random_ranges(rows: int, keys: int, seed: int) -> RowRanges:
    """A rectangular mask; some keys are seen by no row and some rows see nothing."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(rows // 8, rows + 1, (2, keys), generator=generator, dtype=torch.int32)
    begin, end = ends.amin(0), ends.amax(0)
    depths = [torch.arange(n, dtype=torch.int32) // 3 for n in (rows, keys)]
    return RowRanges.of(begin, end, *depths)


# -- block lists -----------------------------------------------------------------------------------------------------


def tiles(num: Tensor, indices: Tensor) -> Tensor:
    """bool ``(2, n, m)``: the tiles that are in a pair of lists, each at most once and in ascending order."""
    result = torch.zeros(indices.shape, dtype=torch.bool)
    for kind in range(2):
        for row, count in enumerate(num[kind].tolist()):
            listed = indices[kind, row, :count].tolist()
            assert listed == sorted(set(listed))
            result[kind, row, listed] = True
    return result


def torch_tiles(ranges: RowRanges, window: int | None) -> Tensor:
    """What create_block_mask makes of the same mask: bool ``(2, row tiles, key tiles)``, partial and full."""

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        begin = key if ranges.row_begin is None else ranges.row_begin[key]
        near = ranges.q_depth[row] - ranges.k_depth[key] < (1 << 30 if window is None else window)
        return (begin <= row) & (row < ranges.row_end[key]) & near

    made = create_block_mask(sees, None, None, len(ranges.q_depth), len(ranges.row_end), device="cpu")
    pairs = [(made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)]
    return tiles(*(torch.stack([pair[i][0, 0] for pair in pairs]) for i in range(2)))


def our_tiles(ranges: RowRanges, window: int | None) -> Tensor:
    blocks = tile_lists(ranges, window)
    by_row = tiles(blocks.kv_num, blocks.kv_indices)
    assert torch.equal(tiles(blocks.q_num, blocks.q_indices), by_row.mT)
    for lists in blocks[:4]:
        assert lists.dtype == torch.int32
        assert lists.is_contiguous()  # the kernels step through a row by ones, whatever its strides
    return by_row


@settings(max_examples=25, deadline=None, derandomize=True)
@given(forests(max_nodes=12, max_tokens=700))
def test_block_lists_of_a_forest_are_those_of_create_block_mask(forest: Forest) -> None:
    ranges = TreeMask.from_nodes(*forest).ranges()
    assert torch.equal(our_tiles(ranges, None), torch_tiles(ranges, None))


@pytest.mark.parametrize("name", [name for name, (_, lengths) in SHAPES.items() if lengths])
def test_block_lists_of_every_kind_of_tree_are_those_of_create_block_mask(name: str) -> None:
    ranges = TreeMask.from_nodes(*SHAPES[name]).ranges()
    assert torch.equal(our_tiles(ranges, None), torch_tiles(ranges, None))


def assert_safe(ranges: RowRanges, window: int | None) -> None:
    """No tile is left out that some row needs, and none taken for full that has a hidden pair."""
    ours, exact = our_tiles(ranges, window), torch_tiles(ranges, window)
    assert not (exact.any(0) & ~ours.any(0)).any()
    assert not (ours[1] & ~exact[1]).any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(forests(max_nodes=12, max_tokens=700))
def test_block_lists_with_a_window_leave_nothing_out_and_call_nothing_full_that_is_not(forest: Forest) -> None:
    ranges = TreeMask.from_nodes(*forest).ranges()
    for window in (1, 40, 300):
        assert_safe(ranges, window)
    assert torch.equal(our_tiles(ranges, 2**31 - 1), our_tiles(ranges, None))


def test_block_lists_with_a_window_skip_tiles_that_are_too_far_up_the_path() -> None:
    ranges = TreeMask.from_nodes([-1], [8 * TILE]).ranges()
    assert our_tiles(ranges, TILE).sum() == 8 + 7  # the diagonal and the tiles left of it


@pytest.mark.parametrize(("rows", "keys"), [(300, 700), (512, 256), (1, 400), (700, 1)])
@pytest.mark.parametrize("window", [None, 60])
def test_block_lists_of_rectangular_masks_leave_nothing_out(rows: int, keys: int, window: int | None) -> None:
    for seed in range(4):
        assert_safe(random_ranges(rows, keys, seed), window)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.elements = max(self.elements, x.numel())
        return result


def test_block_lists_are_made_without_a_tensor_of_tokens_by_tokens() -> None:
    tokens = 128 * TILE
    ranges = mask_of(tokens).ranges()
    with LargestTensor() as largest:
        tile_lists(ranges, 1000)
    assert 0 < largest.elements <= 2 * tokens  # the lists themselves: 2 * 128 * 128


# -- attention -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "window": {"window": 50},
    "sinks": {"sinks": True},
    "all": {"scale": 0.3, "softcap": 1.5, "window": 50, "sinks": True},
}


def results(
    name: str, mask: TreeMask, seed: int = 0, sinks: bool = False, lse: bool = True, **options: object
) -> list[Tensor]:
    """Output, lse and every gradient of a loss of both."""
    q, k, v = random_qkv(mask.total, 4, 2, 16, 24, dtype=torch.float32, seed=seed)
    leaves = [q, k, v]
    if sinks:
        leaves.append(torch.linspace(-1, 2, 4).requires_grad_())
    extra = {"sinks": leaves[3]} if sinks else {}
    out, logs = tree_attention(q, k, v, mask, return_lse=True, backend=name, **extra, **options)  # type: ignore[arg-type]
    loss = out.sin().sum() + (logs.cos().sum() if lse else 0)
    return [out, logs, *torch.autograd.grad(loss, leaves)]


def assert_equals_reference(mask: TreeMask, **options: object) -> None:
    expected = results("reference", mask, **options)  # type: ignore[arg-type]
    for got, wanted in zip(results("dense-flex", mask, **options), expected, strict=True):  # type: ignore[arg-type]
        assert_close(got, wanted, FLOAT32)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_all_gradients_equal_the_reference(backend: DenseFlex, name: str) -> None:
    assert_equals_reference(mask_of(333), **OPTIONS[name])
    assert backend.counter.frame_count == 1


def test_gradients_without_one_through_lse_equal_the_reference(backend: DenseFlex) -> None:
    assert_equals_reference(mask_of(200), lse=False, sinks=True)


@pytest.mark.parametrize("name", ["no tokens", "one token"])
def test_tiny_masks_equal_the_reference(backend: DenseFlex, name: str) -> None:
    assert_equals_reference(TreeMask.from_nodes(*SHAPES[name]), **OPTIONS["all"])


@pytest.mark.parametrize("rows", [0, 150])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(backend: DenseFlex, rows: int) -> None:
    keys = 200 if rows else 5
    ranges = random_ranges(rows, keys, seed=1)
    q, k, v = (x[:n] for x, n in zip(random_qkv(200, 4, 2, 16, dtype=torch.float32), (rows, keys, keys), strict=True))
    sinks = torch.zeros(4, requires_grad=True)
    options = Options(0.25, window=40)
    out, lse = backend.attend(q, k, v, sinks, ranges, options)
    wanted_out, wanted_lse = ReferenceBackend().forward(q, k, v, sinks, ranges, options)
    assert (wanted_lse == -torch.inf).any() or rows == 0
    assert_close(out, wanted_out, FLOAT32)
    assert_close(lse, wanted_lse, FLOAT32)
    gradients = torch.autograd.grad(out.sin().sum(), (q, k, v, sinks))
    wanted = ReferenceBackend().backward(out.cos().detach(), None, q, k, v, sinks, out, lse, ranges, options)
    for got, expected in zip(gradients, wanted, strict=True):
        assert_close(got, expected, FLOAT32)


# -- compiling -------------------------------------------------------------------------------------------------------


def test_neither_another_tree_nor_another_number_of_tokens_compiles_after_the_second(backend: DenseFlex) -> None:
    for tokens in (300, 310, 400):  # of as many tiles the first two: one compilation
        results("dense-flex", mask_of(tokens), window=50)
    assert backend.counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (310, 129, 512, 641):
            for turns in (0, 3):
                assert_close(
                    results("dense-flex", mask_of(tokens, turns), window=50)[0],
                    results("reference", mask_of(tokens, turns), window=50)[0],
                    FLOAT32,
                )
    assert backend.counter.frame_count == 2


def test_another_window_compiles_nothing(backend: DenseFlex) -> None:
    for window in (50, 51, 7):
        assert_equals_reference(mask_of(200), window=window)
    assert backend.counter.frame_count == 1


def test_every_scale_is_a_constant_of_its_own(backend: DenseFlex) -> None:
    """A scale that torch.compile took for a variable would not reach the kernels."""
    for scale in (0.1, 0.2, 0.3):
        assert_equals_reference(mask_of(150), scale=scale)
    assert backend.counter.frame_count == 3


def model(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
    """Two layers of attention with a window."""
    inner = tree_attention(q * 2, k, v, mask, backend="dense-flex", window=60)
    return tree_attention(inner, k, v + 1, mask, backend="dense-flex", window=60).tanh()


def test_inside_torch_compile_it_is_part_of_one_graph_that_serves_every_size(backend: DenseFlex) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tokens in (300, 310, 512, 513):
        q, k, v = random_qkv(tokens, 4, 2, 16, dtype=torch.float32)
        mask = mask_of(tokens)
        out = compiled(q, k, v, mask)
        assert_close(out, model(q, k, v, mask), FLOAT32)
        gradients = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, model(q, k, v, mask))]
        for got, wanted in zip(*gradients, strict=True):
            assert_close(got, wanted, FLOAT32)
    assert counter.frame_count == 2
    assert sum(node.target is torch.ops.higher_order.flex_attention for node in counter.graphs[-1].graph.nodes) == 2


def test_activation_checkpointing_gives_the_same_gradients(backend: DenseFlex) -> None:
    q, k, v = random_qkv(200, 4, 2, 16, dtype=torch.float32)
    mask = mask_of(200)
    saved = checkpoint(model, q, k, v, mask, use_reentrant=False)
    gradients = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (saved, model(q, k, v, mask))]
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


def test_a_dispatch_mode_does_not_turn_it_into_dense_attention(
    backend: DenseFlex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile steps aside under such modes, and flex_attention warns that it materializes all scores."""
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", set())
    q, k, v = random_qkv(200, 4, 2, 16, dtype=torch.float32, requires_grad=False)
    with warnings.catch_warnings(), FlopCounterMode(display=False):
        warnings.simplefilter("error", UserWarning)
        try:
            out = tree_attention(q, k, v, mask_of(200), backend="dense-flex")
        except NotImplementedError as refusal:  # torch 2.9 leaves no other way
            assert "dispatch mode" in str(refusal)  # noqa: PT017  the point is that it is one or the other
            return
    assert backend.counter.frame_count == 1
    assert_close(out, tree_attention(q, k, v, mask_of(200), backend="reference"), FLOAT32)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_function_transforms_are_refused(backend: DenseFlex, transform) -> None:  # type: ignore[no-untyped-def]
    q, k, v = random_qkv(20, 4, 2, 16, dtype=torch.float32, requires_grad=False)
    mask = mask_of(20)
    with pytest.raises(NotImplementedError, match=r"torch\.func.*sdpa"):
        transform(lambda q: tree_attention(q, k, v, mask, backend="dense-flex").sum())(q)


# -- one build for all layers ----------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The window of every build of block lists."""
    made: list[int | None] = []

    def recording(mask: RowRanges, window: int | None = None) -> flex.TileLists:
        made.append(window)
        return tile_lists(mask, window)

    monkeypatch.setattr(flex, "tile_lists", recording)
    return made


def test_all_layers_share_one_build_per_mask_and_window(builds: list[int | None]) -> None:
    mask = mask_of(300)
    lists = [flex._cached_tile_lists(mask.ranges(), window) for window in (None, 30, None, 30, None)]
    assert builds == [None, 30]
    assert lists[0] is lists[2] is lists[4]
    assert lists[1] is lists[3]
    flex._cached_tile_lists(mask_of(300).ranges(), None)
    assert builds == [None, 30, None]


def test_a_build_lives_no_longer_than_its_mask() -> None:
    gc.collect()
    before = len(flex._built)
    mask = mask_of(300)
    flex._cached_tile_lists(mask.ranges(), None)
    assert len(flex._built) == before + 1
    del mask
    gc.collect()
    assert len(flex._built) == before


def test_a_mask_changed_in_place_is_built_again(builds: list[int | None]) -> None:
    ranges = mask_of(300).ranges()
    flex._cached_tile_lists(ranges, None)
    ranges.row_end.copy_(mask_of(300, turns=3).subtree_end)
    again = flex._cached_tile_lists(ranges, None)
    assert builds == [None, None]
    assert torch.equal(again.kv_indices, tile_lists(mask_of(300, turns=3).ranges()).kv_indices)


def test_other_rows_for_the_same_keys_are_built_again(builds: list[int | None]) -> None:
    ranges = random_ranges(300, 200, 0)
    other = ranges._replace(row_begin=ranges.row_begin.clone())  # type: ignore[union-attr]
    first = flex._cached_tile_lists(ranges, None)
    flex._cached_tile_lists(other, None)
    assert flex._cached_tile_lists(ranges, None) is first
    assert builds == [None, None]


# -- what it cannot do -----------------------------------------------------------------------------------------------


def test_on_a_cpu_the_reason_is_that_it_needs_a_gpu() -> None:
    q, k, v = random_qkv(4, dtype=torch.float32)
    mask = TreeMask.from_nodes([-1], [4])
    reasons = explain(q, k, v, mask).reasons["flex"]
    assert len(reasons) == 1
    assert "GPU" in reasons[0]
    with pytest.raises(BackendUnavailable, match="GPU"):
        tree_attention(q, k, v, mask, backend="flex")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"value_dim": 600}, "value_dim is 600"),
    ],
)
def test_every_reason_names_what_was_given(change: dict, reason: str) -> None:
    request = Request(torch.device("cuda", 0), torch.bfloat16, 4, 2, 128, 128)._replace(**change)
    assert any(reason in line for line in FlexBackend().supports(request))


def test_a_disabled_torch_compile_is_a_reason() -> None:
    request = Request(torch.device("cuda", 0), torch.bfloat16, 4, 2, 128, 128)
    with torch._dynamo.config.patch(disable=True):
        assert any("torch.compile is disabled" in line for line in FlexBackend().supports(request))
