"""What else autograd offers either works and agrees with a plain backward pass, or says clearly that it does not."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils._pytree as pytree
from forests import SHAPES, assert_close, random_qkv
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tree_attn import TreeMask, register_backend, tree_attention
from tree_attn._backends.reference import ReferenceBackend

MASK = TreeMask.from_nodes(*SHAPES["trees and single roots"])
FLOAT64 = 1e-12


def loss_of(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask = MASK) -> Tensor:
    out, lse = tree_attention(q, k, v, mask, window=4, return_lse=True, backend=backend)
    return out.square().sum() + lse.sin().sum()


def plain_gradients(backend: str) -> tuple[Tensor, ...]:
    inputs = random_qkv(MASK.total)
    return torch.autograd.grad(loss_of(backend, *inputs), inputs)


def assert_gradients(got: tuple[Tensor, ...], backend: str) -> None:
    for a, b in zip(got, plain_gradients(backend), strict=True):
        assert_close(a, b, FLOAT64)


class Seen(TorchDispatchMode):
    """Writes down the operators that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# -- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_q_k_and_v_and_nothing_inside(cpu_backend: str) -> None:
    """Bit for bit the call on cast inputs: the float32 arithmetic of the backend is not rounded once more."""
    inputs = random_qkv(MASK.total, dtype=torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = tree_attention(*inputs, MASK, sinks=sinks, return_lse=True, backend=cpu_backend)
        got = torch.autograd.grad(out.float().square().sum() + lse.sum(), [*inputs, sinks])
    cast = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = tree_attention(*cast, MASK, sinks=sinks, return_lse=True, backend=cpu_backend)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    gradients = torch.autograd.grad(expected[0].float().square().sum() + expected[1].sum(), [*cast, sinks])
    for a, b, like in zip(got, gradients, [*inputs, sinks], strict=True):
        assert a.dtype == like.dtype
        assert torch.equal(a, b.to(a.dtype))


def test_autocast_makes_mixed_dtypes_one_and_leaves_float64_alone(cpu_backend: str) -> None:
    q, k, v = random_qkv(MASK.total, dtype=torch.float32, requires_grad=False)
    double = random_qkv(MASK.total, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert tree_attention(q.bfloat16(), k, v.half(), MASK, backend=cpu_backend).dtype == torch.bfloat16
        assert tree_attention(*double, MASK, backend=cpu_backend).dtype == torch.float64


# -- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool, cpu_backend: str) -> None:
    """The mask is an argument of the checkpointed function, as in a transformer's layer."""
    inputs = random_qkv(MASK.total)
    loss = checkpoint(functools.partial(loss_of, cpu_backend), *inputs, MASK, use_reentrant=use_reentrant)
    loss.backward()
    assert_gradients(tuple(x.grad for x in inputs), cpu_backend)


class Counting(ReferenceBackend):
    """The reference, counting its forward passes."""

    name, priority = "counting", -1
    forwards = 0

    def forward(self, *arguments: Any) -> Any:
        self.forwards += 1
        return super().forward(*arguments)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(("keep", "forwards"), [(True, 1), (False, 2)])
def test_selective_checkpointing_can_keep_the_output_of_the_operator(keep: bool, forwards: int) -> None:
    """A policy sees ``tree_attn::attention`` and may save it, so that the backward pass does not run it again."""
    backend = Counting()
    register_backend(backend)

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        ours = function is torch.ops.tree_attn.attention.default
        return CheckpointPolicy.MUST_SAVE if ours and keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    inputs = random_qkv(MASK.total)
    function = functools.partial(loss_of, "counting")
    checkpoint(function, *inputs, MASK, use_reentrant=False, context_fn=contexts).backward()
    assert backend.forwards == forwards
    assert_gradients(tuple(x.grad for x in inputs), "reference")


def test_saved_tensors_may_be_moved_by_hooks(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(cpu_backend, *inputs)
    assert_gradients(torch.autograd.grad(loss, inputs), cpu_backend)


def test_a_function_of_ones_own_can_save_a_mask_for_its_backward_pass() -> None:
    """A mask is tensors and nothing else, so save_for_backward takes its leaves."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> Tensor:
            leaves, ctx.spec = pytree.tree_flatten(mask)
            ctx.save_for_backward(q, k, v, *leaves)
            return loss_of("reference", q, k, v, mask)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
            q, k, v, *leaves = ctx.saved_tensors
            with torch.enable_grad():
                again = [x.detach().requires_grad_() for x in (q, k, v)]
                loss = loss_of("reference", *again, pytree.tree_unflatten(leaves, ctx.spec))
            return *torch.autograd.grad(loss, again, grad_out), None

    inputs = random_qkv(MASK.total)
    assert_gradients(torch.autograd.grad(Layer.apply(*inputs, MASK), inputs), "reference")


# -- torch.func ------------------------------------------------------------------------------------------------------


def test_functional_gradients_agree_with_autograd(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total, requires_grad=False)
    function = functools.partial(loss_of, cpu_backend)
    assert_gradients(grad(function, argnums=(0, 1, 2))(*inputs), cpu_backend)
    _, pull_back = vjp(function, *inputs)
    assert_gradients(pull_back(torch.ones((), dtype=torch.float64)), cpu_backend)
    with Seen() as seen:  # and through the operator, where a mode looks on
        assert_gradients(grad(function, argnums=(0, 1, 2))(*inputs), cpu_backend)
    assert "tree_attn.attention.default" in seen.names


class Reading(ReferenceBackend):
    """The reference, which asks for memory as a kernel does."""

    name, priority = "reading", -1

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        assert all(x.data_ptr() for x in (q, k, v))
        return super().forward(q, k, v, *rest)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("recorded", [False, True])
def test_a_tensor_that_outlived_a_transform_is_an_ordinary_one(recorded: bool) -> None:
    """What a function kept from inside ``grad`` is a wrapper still, without memory of its own."""
    register_backend(Reading())
    q, k, v = random_qkv(MASK.total, requires_grad=False)
    kept: list[Tensor] = []
    grad(lambda x: kept.append(2 * x) or kept[0].sum())(q)
    out = tree_attention(kept[0], k.requires_grad_(recorded), v, MASK, backend="reading")
    assert out.requires_grad == recorded
    assert torch.equal(out, tree_attention(2 * q, k, v, MASK, backend="reference"))


def second_derivative(function: Callable[[Tensor], Tensor], q: Tensor) -> None:
    q = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(q), q, create_graph=True)
    first.sum().backward()


def forward_mode(function: Callable[[Tensor], Tensor], q: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(q, torch.ones_like(q)))


TWICE = "tree_attention is differentiable once; it has no second derivative"
BATCHED = "tree_attention has no vmap rule: pack the batch into one sequence"
FORWARD = "tree_attention has no forward-mode derivative; use reverse mode"
UNSUPPORTED: dict[str, tuple[Callable[[Callable[[Tensor], Tensor], Tensor], object], str]] = {
    "create_graph and backward": (second_derivative, TWICE),
    "grad of grad": (lambda f, q: grad(lambda x: grad(f)(x).sum())(q), TWICE),
    "vmap": (lambda f, q: vmap(f)(torch.stack([q, q])), BATCHED),
    "vmap of grad": (lambda f, q: vmap(grad(f))(torch.stack([q, q])), BATCHED),
    "jacrev": (lambda f, q: jacrev(lambda x: f(x)[None] * torch.ones(2))(q), BATCHED),
    "jvp": (lambda f, q: jvp(f, (q,), (q,)), FORWARD),
    "hessian": (lambda f, q: hessian(f)(q), FORWARD),
    "dual numbers": (forward_mode, FORWARD),
}


@pytest.mark.parametrize("through_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_says_so(name: str, through_operator: bool, cpu_backend: str) -> None:
    transform, message = UNSUPPORTED[name]
    q, k, v = random_qkv(MASK.total, requires_grad=False)

    def function(x: Tensor) -> Tensor:
        if not through_operator:
            return loss_of(cpu_backend, x, k, v)
        with Seen():
            return loss_of(cpu_backend, x, k, v)

    with pytest.raises(NotImplementedError, match=message):
        transform(function, q)


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_transforms_inside_compiled_code_say_so(name: str) -> None:
    """Left alone, jvp would give zeros."""
    q, k, v = random_qkv(MASK.total, requires_grad=False)
    function = functools.partial(loss_of, "reference")
    transforms: dict[str, Callable[[Tensor], object]] = {
        "grad": lambda x: grad(function)(x, k, v),
        "vmap": lambda x: vmap(lambda y: function(y, k, v))(torch.stack([x, x])),
        "jvp": lambda x: jvp(lambda y: function(y, k, v), (x,), (x,)),
    }
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"cannot be compiled inside a torch\.func transform.*outside torch\.compile"):
        torch.compile(transforms[name], backend="eager")(q)


def test_forward_mode_around_compiled_code_says_so() -> None:
    q, k, v = random_qkv(MASK.total, requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: loss_of("reference", x, k, v), backend="eager")
    with pytest.raises(Exception, match="forward-mode"):
        forward_mode(compiled, q)


def test_a_transform_around_compiled_code_works(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total, requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(loss_of, cpu_backend), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not compile under the transform
        assert_gradients(grad(compiled, argnums=(0, 1, 2))(*inputs), cpu_backend)


# -- subclasses and modes --------------------------------------------------------------------------------------------


class Wrapper(Tensor):
    """A tensor subclass that holds a tensor and writes down what is done with it."""

    seen: list[str]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(function))
        unwrap = functools.partial(pytree.tree_map_only, Wrapper, lambda x: x.inner)
        result = function(*unwrap(args), **unwrap(kwargs or {}))
        return pytree.tree_map_only(Tensor, lambda x: x if isinstance(x, Wrapper) else Wrapper(x), result)


seen: list[str] = []


def test_tensor_subclasses_see_one_operator_in_each_pass() -> None:
    """So DTensor and other subclasses can bring a rule of their own, and backends get plain tensors."""
    seen.clear()
    inner = random_qkv(MASK.total, requires_grad=False)
    inputs = [Wrapper(x).requires_grad_() for x in inner]
    out = tree_attention(*inputs, MASK, backend="reference")
    assert isinstance(out, Wrapper)
    out.sum().backward()
    assert [name for name in seen if name.startswith("tree_attn")] == [
        "tree_attn.attention.default",
        "tree_attn.attention_backward.default",
    ]
    assert torch.equal(out.inner, tree_attention(*inner, MASK, backend="reference"))
    assert all(isinstance(x.grad, Wrapper) for x in inputs)


def test_a_dispatch_mode_sees_the_operators_and_not_the_arithmetic_of_autograd(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    with Seen() as mode:
        loss = loss_of(cpu_backend, *inputs)
        gradients = torch.autograd.grad(loss, inputs)
    assert mode.names.count("tree_attn.attention.default") == 1
    assert mode.names.count("tree_attn.attention_backward.default") == 1
    assert_gradients(gradients, cpu_backend)


def test_distributed_tensors_get_to_the_operator_and_are_told_that_it_has_no_sharding_rule() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        inputs = [distribute_tensor(x, mesh) for x in random_qkv(MASK.total, requires_grad=False)]
        with pytest.raises(Exception, match=r"tree_attn\.attention\.default.*|mixed torch\.Tensor and DTensor"):
            tree_attention(*inputs, MASK)
    finally:
        destroy_process_group()


# -- what backends get -----------------------------------------------------------------------------------------------


class Strict(ReferenceBackend):
    """The reference, refusing what the base class promises that it never gets."""

    name, priority = "strict", -1

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        assert [x.stride(-1) for x in (q, k, v)] == [1, 1, 1]
        assert not torch.is_autocast_enabled("cpu")
        return super().forward(q, k, v, *rest)

    def backward(self, grad_out: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        assert [x.stride(-1) for x in (grad_out, q, k, v)] == [1, 1, 1, 1]
        assert not torch.is_autocast_enabled("cpu")
        return super().backward(grad_out, grad_lse, q, k, v, *rest)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("through_operator", [False, True], ids=["eager", "operator"])
def test_backends_get_contiguous_last_dimensions_and_no_autocast(through_operator: bool) -> None:
    register_backend(Strict())
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(MASK.total)]
    assert [x.stride(-1) == 1 for x in inputs] == [False] * 3
    inputs = [x.requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16), Seen() if through_operator else contextlib.nullcontext():
        out = tree_attention(*inputs, MASK, backend="strict")
        out.sum().backward()  # the gradient of a sum is expanded: its strides are 0
    assert all(x.grad is not None for x in inputs)


# -- the rest --------------------------------------------------------------------------------------------------------


def test_inference_and_no_grad_save_nothing(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    expected = tree_attention(*inputs, MASK, backend=cpu_backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = tree_attention(*inputs, MASK, backend=cpu_backend)
        assert not out.requires_grad
        assert torch.equal(out, expected)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_inputs_that_ask_get_gradients(wanted: int, cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total, requires_grad=False)
    inputs[wanted].requires_grad_()
    loss_of(cpu_backend, *inputs).backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]
    assert_close(inputs[wanted].grad, plain_gradients(cpu_backend)[wanted], FLOAT64)


@pytest.mark.parametrize("output", [0, 1], ids=["out alone", "lse alone"])
def test_a_loss_of_one_output_alone(output: int, cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    both = tree_attention(*inputs, MASK, return_lse=True, backend=cpu_backend)
    got = torch.autograd.grad(both[output].sum(), inputs, allow_unused=True, materialize_grads=True)
    zero = [torch.ones_like(x) if i == output else torch.zeros_like(x) for i, x in enumerate(both)]
    again = tree_attention(*inputs, MASK, return_lse=True, backend=cpu_backend)
    for a, b in zip(got, torch.autograd.grad(again, inputs, zero), strict=True):
        assert_close(a, b, FLOAT64)


def test_the_graph_can_be_kept_for_a_second_pass(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    loss = loss_of(cpu_backend, *inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_inputs_changed_in_place_after_the_call_are_noticed(cpu_backend: str) -> None:
    inputs = random_qkv(MASK.total)
    held = [x * 1 for x in inputs]
    loss = loss_of(cpu_backend, *held)
    held[0].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meta_tensors_get_meta_results() -> None:
    q, k, v = (x.to("meta") for x in random_qkv(MASK.total, value_dim=3, requires_grad=False))
    out, lse = tree_attention(q, k, v, MASK.to("meta"), return_lse=True, backend="reference")
    assert (out.shape, out.device.type) == ((MASK.total, 4, 3), "meta")
    assert (lse.shape, lse.dtype) == ((4, MASK.total), torch.float64)
