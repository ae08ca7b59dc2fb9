"""torch.compile: one graph, no recompilation as token counts change, and the backend in force is the one that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forests import SHAPES, assert_close, random_qkv
from test_options import OPTIONS, arguments
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tree_attn import BackendUnavailable, RowRanges, TreeMask, register_backend, registry, tree_attention, use_backend
from tree_attn import _operator as operator
from tree_attn._backends.reference import ReferenceBackend

FLOAT64 = 1e-12
ONE_BY_ONE_AND_ALL = [(), *[(name,) for name in OPTIONS], tuple(OPTIONS)]

pytestmark = pytest.mark.usefixtures("clean_registry", "fresh_dynamo")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs and no forced backend from before; a compiled ``use_backend`` leaves None behind, which is one more
    state to guard on."""
    torch._dynamo.reset()
    vars(registry._in_thread).clear()
    yield
    torch._dynamo.reset()


class Recording(ReferenceBackend):
    """The reference under another name that writes down which passes it ran."""

    def __init__(self, name: str, priority: int = -1) -> None:
        self.name, self.priority = name, priority
        self.passes: list[str] = []

    def forward(self, *arguments: Any) -> Any:
        self.passes.append("forward")
        return super().forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self.passes.append("backward")
        return super().backward(*arguments)


class Traced(Recording):
    """Made of torch operations, to be traced as they are: attention that gives the values of the token itself."""

    traced = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Any, mask: RowRanges, options: Any) -> Any:
        out = v.repeat_interleave(q.shape[1] // v.shape[1], 1) + 0 * q.sum()
        return out, q.new_zeros(q.shape[1], q.shape[0])


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """``function`` in one graph through dynamo and AOT autograd, and the counter of graphs. Inductor is left out: it
    generates code for the graph and decides nothing here; one test below runs it."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def model(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
    """Attention in the middle of other operations, as in a transformer."""
    return tree_attention(q * 2, k + 1, v, mask).flatten(1).tanh()


def mask_of(tokens: int) -> TreeMask:
    prompt = tokens // 2
    return TreeMask.from_nodes([-1, 0, 0], [prompt, 1, tokens - prompt - 1])


def run(function: Callable[..., Tensor], tokens: int) -> None:
    """``function`` gives the output and the gradients of ``model``."""
    inputs = random_qkv(tokens, seed=tokens)
    out = function(*inputs, mask_of(tokens))
    expected_inputs = random_qkv(tokens, seed=tokens)
    expected = model(*expected_inputs, mask_of(tokens))
    assert_close(out, expected, FLOAT64)
    gradients = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), expected_inputs), strict=True):
        assert_close(a, b, FLOAT64)


# -- one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ONE_BY_ONE_AND_ALL, ids="+".join)
def test_every_option_compiles_to_one_graph_with_the_same_results(names: tuple[str, ...]) -> None:
    chosen, sinks = arguments(names, heads=4)
    mask = TreeMask.from_nodes(*SHAPES["binary"])

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: TreeMask) -> tuple[Tensor, Tensor]:
        return tree_attention(q, k, v, mask, sinks=sinks, return_lse=True, **chosen)

    function, counter = compiled(call)
    results = []
    for version in (function, call):
        inputs = list(random_qkv(mask.total))
        if sinks is not None:
            inputs.append(sinks.clone().requires_grad_())
        out, lse = version(*inputs[:3], inputs[3] if sinks is not None else None, mask)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, FLOAT64)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_it_too() -> None:
    run(torch.compile(model, fullgraph=True, dynamic=True), 33)


def test_the_mask_may_be_an_input_of_the_graph_or_a_constant_of_the_model() -> None:
    held = mask_of(20)
    function, counter = compiled(lambda q, k, v: model(q, k, v, held))
    inputs = random_qkv(20)
    assert_close(function(*inputs), model(*inputs, held), FLOAT64)
    assert counter.frame_count == 1


# -- token counts ----------------------------------------------------------------------------------------------------


def test_token_counts_beyond_the_first_two_compile_nothing_new() -> None:
    function, counter = compiled(model)
    for number, tokens in enumerate([40, 70, 128, 33, 129, 1000, 41]):
        run(function, tokens)
        assert counter.frame_count == min(number + 1, 2)
    for tokens in (32, 7, 3):  # torch.compile takes sizes of 1 for constants; here it is one tile of bounds
        run(function, tokens)
    assert counter.frame_count == 3


def test_dynamic_shapes_compile_once_for_every_count_and_tree() -> None:
    function, counter = compiled(model, dynamic=True)
    for tokens in (200, 70, 33, 128):  # first a count that equals no other size: torch.compile would join the two
        run(function, tokens)
    inputs = random_qkv(40)
    star = TreeMask.from_nodes([-1, *[0] * 20], [20] + [1] * 20)
    assert_close(function(*inputs, star), model(*inputs, star), FLOAT64)
    assert counter.frame_count == 1


def test_numbers_among_the_arguments_may_change_without_a_graph_break() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, softcap: float, window: int) -> Tensor:
        return tree_attention(q, k, v, mask, softcap=softcap, window=window)

    function, _ = compiled(call, dynamic=True)
    inputs, mask = random_qkv(20), mask_of(20)
    for softcap, window in ((1.0, 3), (2.5, 7), (0.0, 2), (1.0, 2**40)):
        arguments = (*inputs, mask, softcap, window)
        assert_close(function(*arguments), call(*arguments), FLOAT64)


# -- the backend in force --------------------------------------------------------------------------------------------


def test_a_compiled_call_honours_use_backend_afterwards_in_both_passes() -> None:
    one, other = Recording("one"), Recording("other")
    register_backend(one)
    register_backend(other)
    function, counter = compiled(model)
    inputs, mask = random_qkv(20), mask_of(20)

    def both_passes() -> None:
        function(*inputs, mask).sum().backward()

    both_passes()
    assert one.passes == other.passes == []
    for _ in range(2):
        with use_backend("one"):
            both_passes()
        with use_backend("other"):
            both_passes()
    assert one.passes == other.passes == ["forward", "backward"] * 2
    both_passes()
    assert one.passes == other.passes == ["forward", "backward"] * 2
    assert counter.frame_count == 3  # unforced, one, other: once each


def test_the_backward_pass_runs_what_its_forward_pass_was_forced_to() -> None:
    """Wherever it is called: after the block, in another thread (on a GPU it always is), inside another block."""
    one, other = Recording("one"), Recording("other")
    register_backend(one)
    register_backend(other)
    for function in (compiled(model)[0], model):
        one.passes.clear()
        inputs, mask = random_qkv(20), mask_of(20)
        losses = []
        with use_backend("one"):
            losses = [function(*inputs, mask).sum() for _ in range(3)]
        losses[0].backward()
        thread = threading.Thread(target=losses[1].backward)
        thread.start()
        thread.join()
        with use_backend("other"):
            losses[2].backward()
        assert one.passes == ["forward"] * 3 + ["backward"] * 3
        loss = function(*inputs, mask).sum()  # forced to nothing
        with use_backend("other"):
            loss.backward()
        assert other.passes == []


def test_the_argument_beats_the_context_in_a_graph_too() -> None:
    one, other = Recording("one"), Recording("other")
    register_backend(one)
    register_backend(other)
    function, _ = compiled(lambda q, k, v, mask: tree_attention(q, k, v, mask, backend="one"))
    with use_backend("other"):
        function(*random_qkv(20), mask_of(20)).sum().backward()
    assert one.passes == ["forward", "backward"]
    assert other.passes == []


def test_use_backend_works_inside_the_compiled_function() -> None:
    one = Recording("one")
    register_backend(one)

    def inside(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
        with use_backend("one"):
            first = tree_attention(q, k, v, mask)
        return first + tree_attention(q, k, v, mask)

    function, _ = compiled(inside)
    function(*random_qkv(20), mask_of(20)).sum().backward()
    assert one.passes == ["forward", "backward"]
    assert registry.forced_in_thread() is None


def test_use_backend_in_one_thread_leaves_the_graphs_of_another_alone() -> None:
    one = Recording("one")
    register_backend(one)
    function, counter = compiled(model)
    inputs, mask = random_qkv(20, requires_grad=False), mask_of(20)
    function(*inputs, mask)
    with use_backend("one"):
        function(*inputs, mask)
        assert one.passes == ["forward"]
        thread = threading.Thread(target=function, args=(*inputs, mask))
        thread.start()
        thread.join()
        assert one.passes == ["forward"]
    assert counter.frame_count == 2


def test_the_environment_is_read_when_the_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Recording("one")
    register_backend(one)
    function, counter = compiled(model)
    inputs, mask = random_qkv(20), mask_of(20)
    function(*inputs, mask)
    monkeypatch.setenv("TREE_ATTN_BACKEND", "one")
    function(*inputs, mask).sum().backward()
    assert one.passes == ["forward", "backward"]
    monkeypatch.delenv("TREE_ATTN_BACKEND")
    function(*inputs, mask)
    assert one.passes == ["forward", "backward"]
    assert counter.frame_count == 1


def test_registering_a_backend_is_seen_by_compiled_code() -> None:
    function, _ = compiled(model)
    inputs, mask = random_qkv(20), mask_of(20)
    function(*inputs, mask)
    better = Recording("better", 5000)
    register_backend(better)
    function(*inputs, mask).sum().backward()
    assert better.passes == ["forward", "backward"]


def test_a_traced_backend_is_chosen_while_tracing_and_another_choice_recompiles() -> None:
    traced, plain = Traced("traced"), Recording("plain")
    register_backend(traced)
    register_backend(plain)
    function, counter = compiled(lambda q, k, v, mask: tree_attention(q, k, v, mask), dynamic=True)
    mask = mask_of(20)
    for _ in range(2):
        with use_backend("traced"):
            q, k, v = random_qkv(20)
            out = function(q, k, v, mask)
            assert torch.equal(out, v.repeat_interleave(2, 1))
            out.sum().backward()
            assert v.grad.eq(2).all()  # every value is in two heads
        with use_backend("plain"):
            function(*random_qkv(20), mask).sum().backward()
    assert plain.passes == ["forward", "backward"] * 2
    assert traced.passes == []
    assert counter.frame_count == 2
    with use_backend("traced"):
        function(*random_qkv(30), mask_of(30))
    assert counter.frame_count == 2


def test_an_eager_call_of_a_traced_backend_is_differentiable() -> None:
    register_backend(Traced("traced"))
    q, k, v = random_qkv(20)
    tree_attention(q, k, v, mask_of(20), backend="traced").sum().backward()
    assert v.grad.eq(2).all()


def test_the_environment_cannot_force_a_traced_backend_on_a_finished_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing guards on the environment, so this is an error and not another backend."""
    register_backend(Traced("traced"))
    function, _ = compiled(model)
    inputs, mask = random_qkv(20), mask_of(20)
    function(*inputs, mask)
    monkeypatch.setenv("TREE_ATTN_BACKEND", "traced")
    with pytest.raises(BackendUnavailable, match=r"'traced' was chosen after this graph was traced.*use_backend"):
        function(*inputs, mask)


def test_a_forced_backend_that_cannot_run_is_an_error_while_tracing() -> None:
    class Unable(Recording):
        def supports(self, request: Any) -> list[str]:
            return ["ill today"]

    register_backend(Unable("unable"))
    function, _ = compiled(model)
    with use_backend("unable"), pytest.raises(Exception, match="the forced backend 'unable' cannot run"):
        function(*random_qkv(20), mask_of(20))


def test_wrong_arguments_are_named_while_tracing_too() -> None:
    function, _ = compiled(model)
    q, k, v = random_qkv(20)
    with pytest.raises(Exception, match="q has 20 tokens, k 20, v 20, and mask is for 21"):
        function(q, k, v, mask_of(21))


# -- the operators ---------------------------------------------------------------------------------------------------


def samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments of the forward operator: with every option, rectangular, empty, bfloat16."""
    square = TreeMask.from_nodes(*SHAPES["binary"]).ranges()
    for names in ONE_BY_ONE_AND_ALL:
        chosen, sinks = arguments(names, heads=4)
        options = {"scale": 0.3, "softcap": 0.0, "window": None, "deterministic": False, **chosen}
        inputs = random_qkv(square.row_end.shape[0], value_dim=3)
        if sinks is not None:
            sinks.requires_grad_()
        yield "+".join(names) or "plain", (*inputs, sinks, *square, *options.values(), None)
    begin, end = torch.tensor([[0, 1, 3], [2, 4, 3]], dtype=torch.int32)
    depths = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    rectangle = RowRanges.of(begin, end, *depths)
    plain = (0.3, 0.0, None, False)
    yield "rectangular", (random_qkv(4)[0], *random_qkv(3)[1:], None, *rectangle, *plain, "reference")
    empty = TreeMask.from_nodes([], []).ranges()
    yield "empty", (*random_qkv(0), None, *empty, *plain, None)
    yield "bfloat16", (*random_qkv(square.row_end.shape[0], dtype=torch.bfloat16), None, *square, *plain, None)


@pytest.mark.parametrize(("name", "inputs"), list(samples()), ids=[name for name, _ in samples()])
def test_opcheck_passes_in_full(name: str, inputs: tuple[Any, ...]) -> None:
    """Schema, fake kernels, autograd registration and AOT dispatch with dynamic shapes, of both operators."""
    passed = torch.library.opcheck(operator._op, inputs)
    assert set(passed.values()) == {"SUCCESS"}
    assert len(passed) >= 4
    plain = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    out, lse = operator._op(*plain)
    grad_lse = None if name == "plain" else torch.ones_like(lse)
    backward = (torch.ones_like(out), grad_lse, *plain[:4], out, lse, *plain[4:])
    assert set(torch.library.opcheck(operator._op_backward, backward).values()) == {"SUCCESS"}


def test_fake_tensors_get_the_shapes_and_dtypes_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs, mask = random_qkv(20, value_dim=3, dtype=dtype), mask_of(20)
        real = tree_attention(*inputs, mask, return_lse=True)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(x) for x in inputs]
            result = tree_attention(*fake, mask, return_lse=True)
            result[0].sum().backward()
        for a, b in zip(result, real, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert [x.grad.shape for x in fake] == [x.shape for x in inputs]


def test_export_keeps_the_operator_and_its_options() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
            return tree_attention(q, k, v, mask, window=OPTIONS["window"])

    inputs, mask = random_qkv(20, requires_grad=False), mask_of(20)
    program = torch.export.export(Attention(), (*inputs, mask))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "tree_attn.attention.default" in targets
    assert_close(program.module()(*inputs, mask), tree_attention(*inputs, mask, window=3), FLOAT64)
