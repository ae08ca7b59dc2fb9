"""How calls run: the same bits every time, in CUDA graphs, on other streams, GPUs and threads, under torch.compile."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from gpu_cases import CLASSES, Case, Inputs, failures, make_inputs, run, ulp

import tree_attn
from tree_attn import TreeMask, _kernels, tree_attention
from tree_attn._operator import attend
from tree_attn.registry import Options

# A prompt, branches of every kind of length and a second tree; keys with thousands of rows below them.
PARENTS = [-1, 0, 1, 1, 0, 0, 5, 5, -1, 8, 8]
LENGTHS = [700, 130, 64, 7, 300, 129, 1, 255, 512, 33, 1500]


def case(dtype=torch.bfloat16, head_dim=128, value_dim=None, deterministic=False, seed=11, **options) -> Case:
    chosen = Options(head_dim**-0.5, deterministic=deterministic, **options)
    return Case(seed, dtype, PARENTS, LENGTHS, 8, 2, head_dim, value_dim or head_dim, chosen, sinks=True, grad_lse=True)


def assert_same_bits(a, b) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x, y), name


def assert_close(a, b) -> None:
    """Equal up to the order in which gradients were added."""
    torch.testing.assert_close(a.out, b.out, rtol=0, atol=0)
    torch.testing.assert_close(a.lse, b.lse, rtol=0, atol=0)
    for x, y in zip(a[2:5], b[2:5], strict=True):
        assert (x - y).abs().amax() <= 2 * ulp(y, y.dtype)


# -- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", CLASSES, ids=lambda d: f"{d[0]}x{d[1]}")
def test_deterministic_results_are_the_same_bits_in_20_runs(dims, path):
    inputs = make_inputs(case(torch.bfloat16, *dims, deterministic=True))
    first = run(inputs, "cuda")
    for _ in range(19):
        assert_same_bits(run(inputs, "cuda"), first)


# Deterministic calls may add up the gradient of q in integers, sized for the largest key and value of the head.


@pytest.mark.parametrize("dims", CLASSES, ids=lambda d: f"{d[0]}x{d[1]}")
@pytest.mark.parametrize("scale", [1.0, 2.0**-50, 2.0**50])
def test_deterministic_gradients_beside_outliers_and_of_any_size(scale, dims, path):
    problem = case(torch.bfloat16, *dims, deterministic=True)
    inputs = make_inputs(problem)
    for x in (inputs.k, inputs.v):
        x[[5, 2000]] *= 8  # in both trees
    inputs = inputs._replace(grad_out=inputs.grad_out * scale, grad_lse=inputs.grad_lse * scale)
    assert failures(problem, run(inputs, "cuda"), inputs) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_reaches_deterministic_gradients(dtype, where, bad, path):
    inputs = make_inputs(case(dtype, deterministic=True))
    getattr(inputs, where)[0, 0, 5] = bad  # the root of the first tree
    grad_q = run(inputs, "cuda").grad_q
    rows = 1 if where == "grad_out" else sum(LENGTHS[:8])
    heads = 1 if where == "grad_out" else 4
    reached = ~grad_q[:rows, :heads].isfinite().all(-1)
    if where == "k" and bad == float("inf"):  # a score of -inf is a probability of zero
        reached |= inputs.q[:rows, :heads, 5] < 0
    assert reached.all()
    assert grad_q[:, heads:].isfinite().all()


def test_half_precision_that_overflows_is_seen_in_deterministic_gradients(path):
    """As gradient scalers count on: a score gradient beyond 65504 is not a number in any kernel."""
    inputs = make_inputs(case(torch.float16, deterministic=True))
    inputs = inputs._replace(grad_out=inputs.grad_out * 1e4)
    in_any_order = inputs._replace(options=replace(inputs.options, deterministic=False))
    seen, expected = (~run(x, "cuda").grad_q.isfinite().all(-1) for x in (inputs, in_any_order))
    assert expected.any()
    assert (seen | ~expected).all()


def test_forward_is_the_same_bits_in_20_runs_without_asking(path):
    inputs = make_inputs(case())
    first = run(inputs, "cuda")
    for _ in range(19):
        again = run(inputs, "cuda")
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


# -- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_captured_in_a_graph_and_replayed_on_other_values(deterministic, path):
    inputs = make_inputs(case(deterministic=deterministic))
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run(inputs, "cuda")
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, "cuda")
    for seed in (1, 2, 3):
        fresh = make_inputs(case(deterministic=deterministic, seed=seed))
        for name in ("q", "k", "v", "sinks", "grad_out", "grad_lse"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        graph.replay()
        eager = run(fresh, "cuda")
        (assert_same_bits if deterministic else assert_close)(captured, eager)


# -- streams, threads, devices ---------------------------------------------------------------------------------------


def test_runs_on_the_current_stream(path):
    """Inputs that a slow stream is still writing are waited for by a call on that stream."""
    inputs = make_inputs(case(deterministic=True))
    expected = run(inputs, "cuda")
    late = Inputs(*(torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for x in inputs))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # clock cycles, about 0.1 s
        for to, source in zip(late, inputs, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(source)
        found = run(late, "cuda")
    side.synchronize()
    assert_same_bits(found, expected)


def test_two_streams_at_once(path):
    problems = [make_inputs(case(deterministic=True, seed=seed)) for seed in (1, 2)]
    expected = [run(inputs, "cuda") for inputs in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(run(problems[i], "cuda"))
    torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, want)


def test_two_threads_at_once(path):
    problems = [make_inputs(case(deterministic=True, seed=seed, head_dim=d)) for seed, d in ((1, 64), (2, 128))]
    expected = [run(inputs, "cuda") for inputs in problems]
    torch.cuda.synchronize()
    found: list[list] = [[], []]
    begin = threading.Barrier(2)

    def work(i: int) -> None:
        begin.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            found[i].extend(run(problems[i], "cuda") for _ in range(20))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, want in zip(found, expected, strict=True):
        assert len(results) == 20
        for result in results:
            assert_same_bits(result, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here; this needs two")
def test_second_gpu_while_the_first_is_current(path):
    inputs = make_inputs(case(deterministic=True))
    expected = run(inputs, "cuda")
    moved = Inputs(*(x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in inputs))
    moved = moved._replace(ranges=type(inputs.ranges)(*(None if x is None else x.to("cuda:1") for x in inputs.ranges)))
    torch.cuda.set_device(0)
    found = run(moved, "cuda")
    assert torch.cuda.current_device() == 0
    assert found.out.device == torch.device("cuda", 1)
    assert_same_bits(type(found)(*(None if x is None else x.to("cuda:0") for x in found)), expected)


# -- torch.compile and operators -------------------------------------------------------------------------------------


def _operator_arguments(inputs: Inputs) -> tuple:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    options = inputs.options
    return (*leaves, inputs.sinks, *inputs.ranges, options.scale, options.softcap, options.window, True, "cuda")


def test_opcheck_passes_on_cuda_tensors(path):
    small = Case(
        0, torch.bfloat16, [-1, 0, 0], [40, 9, 17], 4, 2, 64, 64, Options(0.125, deterministic=True), sinks=True
    )
    inputs = make_inputs(small)
    torch.library.opcheck(torch.ops.tree_attn.attention.default, _operator_arguments(inputs))
    torch.library.opcheck(_kernels.load().forward, _forward_arguments(inputs), test_utils="test_schema")
    torch.library.opcheck(_kernels.load().backward, _backward_arguments(inputs), test_utils="test_schema")


def _forward_arguments(inputs):
    return (*inputs[:4], *inputs.ranges, 0.125, 0.0, 0, 0, 0)


def _backward_arguments(inputs):
    q, k, v, sinks, *mask_and_options = _forward_arguments(inputs)
    out, lse = _kernels.load().forward(*_forward_arguments(inputs))
    return (inputs.grad_out, inputs.grad_lse, q, k, v, sinks, out, lse, *mask_and_options, False)


def test_operators_refuse_what_would_be_read_or_written_out_of_bounds():
    small = Case(0, torch.bfloat16, [-1, 0], [40, 9], 4, 2, 64, 64, Options(0.125), sinks=True)
    inputs = make_inputs(small)
    kernels = _kernels.load()

    def named(operator, values):
        names = [argument.name for argument in operator._schema.arguments]
        return operator, dict(zip(names, values, strict=True))

    forward = named(kernels.forward, _forward_arguments(inputs))
    backward = named(kernels.backward, _backward_arguments(inputs))
    for operator, good in (forward, backward):
        operator(**good)
    good = backward[1]
    for (operator, arguments), name, bad, message in (
        (forward, "q", good["q"].cpu(), "q is not on a GPU"),
        (forward, "k", good["k"].cpu(), "k is not on cuda:0"),
        (forward, "v", good["v"].half(), "v has the wrong dtype"),
        (forward, "q", torch.zeros(49 * 256 + 1, device="cuda").bfloat16()[1:].view(49, 4, 64), "q needs a contiguous"),
        (forward, "row_end", good["row_end"][:-1], r"row_end has shape \(48\), expected 49 contiguous entries"),
        (forward, "row_end", good["row_end"].long(), "row_end has the wrong dtype"),
        (forward, "end_bounds", good["end_bounds"][:-1], "end_bounds has shape"),
        (forward, "q_depth", good["q_depth"][:-1], "q_depth has shape"),
        (forward, "sinks", good["sinks"].double(), "sinks has the wrong dtype"),
        (forward, "path", 3, "path is 3"),
        (forward, "window", -1, "window is -1, out of range"),
        (forward, "begin_bounds", good["end_bounds"], "row_begin and begin_bounds come together"),
        (backward, "grad_out", good["grad_out"][:-1], r"grad_out has shape \(48, 4, 64\), expected \(49, 4, 64\)"),
        (backward, "out", good["out"][:-1], r"out has shape \(48, 4, 64\), expected \(49, 4, 64\)"),
        (backward, "lse", good["lse"].T.contiguous().T, "lse has shape"),
        (backward, "grad_lse", good["lse"][:-1], "grad_lse has shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(**{**arguments, name: bad})
    operator, arguments = forward
    with pytest.raises(RuntimeError, match="a window needs the depths"):
        operator(**{**arguments, "window": 4, "q_depth": None})


def test_compiles_into_one_graph(path):
    mask = TreeMask.from_nodes(PARENTS, LENGTHS, device="cuda")
    q, k, v = (torch.randn(mask.total, h, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))

    def layer(q, k, v):
        return tree_attention(q * 2, k, v, mask, deterministic=True, backend="cuda") * 3

    def with_grads(function):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    compiled = with_grads(torch.compile(layer, fullgraph=True))
    for found, want in zip(compiled, with_grads(layer), strict=True):
        assert (found - want).abs().amax() <= 2 * ulp(want, want.dtype)


def test_no_call_waits_for_the_gpu(path):
    inputs = make_inputs(case())
    run(inputs, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- inputs at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_no_rows_or_no_keys(rows, keys):
    q = torch.randn(rows, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(keys, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    whole = TreeMask.from_nodes([-1], [8], device="cuda").ranges()
    ranges = whole._replace(
        row_begin=whole.row_end[:keys] * 0, begin_bounds=whole.end_bounds[: (keys + 31) // 32] * 0,
        row_end=whole.row_end[:keys] * 0 + rows, end_bounds=whole.end_bounds[: (keys + 31) // 32] * 0 + rows,
        q_depth=whole.q_depth[:rows], k_depth=whole.k_depth[:keys],
        q_depth_bounds=whole.q_depth_bounds[: (rows + 31) // 32],
        k_depth_bounds=whole.k_depth_bounds[: (keys + 31) // 32],
    )  # fmt: skip
    out, lse = attend(q, k, v, sinks, ranges, Options(0.125), "cuda")
    assert out.shape == (rows, 4, 64)
    assert lse.shape == (4, rows)
    assert not out.any()
    assert (lse == float("-inf")).all()
    for leaf, grad in zip((q, k, v, sinks), torch.autograd.grad(out.sum(), (q, k, v, sinks)), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_expanded_and_non_contiguous_gradients(path):
    inputs = make_inputs(case(deterministic=True))
    rows, heads, dim = inputs.grad_out.shape
    for given in (
        torch.ones((), device="cuda", dtype=torch.bfloat16).expand(rows, heads, dim),
        inputs.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        inputs.grad_out[:, :1].expand(rows, heads, dim),
    ):
        found = run(inputs._replace(grad_out=given), "cuda")
        assert_same_bits(found, run(inputs._replace(grad_out=given.contiguous()), "cuda"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_number_that_is_not_finite_reaches_the_rows_that_see_it(where, bad, path):
    mask = TreeMask.from_nodes(PARENTS, LENGTHS, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {
        name: torch.randn(mask.total, h, 64, device="cuda", generator=generator).to(torch.bfloat16)
        for name, h in (("q", 8), ("k", 2), ("v", 2))
    }
    clean = tree_attention(**tensors, mask=mask, backend="cuda")
    token = 800  # inside the first branch
    tensors[where][token, 0, 5] = bad
    found = tree_attention(**tensors, mask=mask, backend="cuda")
    index = torch.arange(mask.total, device="cuda")
    sees = index == token if where == "q" else mask.ranges().visible(index, index[token : token + 1])[:, 0]
    heads = slice(0, 1) if where == "q" else slice(0, 4)
    reached = ~found[sees][:, heads].isfinite().all(-1)
    if where == "k" and bad == float("inf"):  # a score of -inf is a probability of zero, one of +inf is not finite
        positive = tensors["q"][sees][:, heads, 5] > 0
        assert torch.equal(reached, positive)
    else:
        assert reached.all()
    if where != "v":  # a row's own tile may hold values of keys that it does not see, times zero
        assert torch.equal(found[~sees], clean[~sees])
        assert torch.equal(found[sees][:, heads.stop :], clean[sees][:, heads.stop :])


def test_explain_names_the_kernels(path):
    mask = TreeMask.from_nodes([-1], [64], device="cuda")
    x = torch.randn(64, 2, 64, device="cuda", dtype=torch.bfloat16)
    explained = tree_attn.explain(x, x, x, mask)
    assert explained.chosen == "cuda"
    kernels = explained.details["cuda"].split(" kernels, CUDA ")[0]
    assert kernels.startswith(path)
    assert path == "hopper" or kernels == "portable"


def test_a_path_that_is_not_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("TREE_ATTN_CUDA_PATH", "hopper")
    mask = TreeMask.from_nodes([-1], [64], device="cuda")
    x = torch.randn(64, 2, 64, device="cuda", dtype=torch.bfloat16)
    explained = tree_attn.explain(x, x, x, mask)
    if explained.details["cuda"].startswith("hopper"):
        pytest.skip("this build has Hopper kernels for this GPU")
    assert any("TREE_ATTN_CUDA_PATH is hopper" in why for why in explained.reasons["cuda"])
