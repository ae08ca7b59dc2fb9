"""Processes of a group (gloo on CPUs, NCCL on GPUs) that tests give functions to run, and the functions."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import forests
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tree_attn import TreeMask
from tree_attn.distributed import explain_cp, gather_tokens, scatter_tokens, tree_attention_cp


class Ranks:
    """``run(function, *arguments)`` calls ``function(mesh, *arguments)`` on every rank and gives what each returned.

    An exception is returned, not raised; a rank that died gives None.
    """

    def __init__(self, world_size: int, timeout: float = 60, device: str = "cpu") -> None:
        context = mp.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (rank, world_size, os.path.join(self.directory.name, "store"), timeout, device, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        return [self._answer(rank) for rank in range(len(self.pipes))]

    def _answer(self, rank: int, patience: float = 120) -> Any:
        pipe = self.pipes[rank]
        assert pipe.poll(patience), f"rank {rank} hangs"
        try:
            return pipe.recv()
        except EOFError:
            return None

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.directory.cleanup()


def _serve(rank: int, world_size: int, store: str, timeout: float, device: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("cp",))
    while True:
        function, arguments, options = pipe.recv()
        try:
            answer = function(mesh, *arguments, **options)
        except Exception as error:  # the test looks at it
            answer = type(error)(str(error))
        pipe.send(answer)


# -- what ranks run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of attention, and everything random in it by seed."""

    forest: forests.Forest
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    with_sinks: bool = False
    deterministic: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    backend: str | None = None

    def mask(self) -> TreeMask:
        return TreeMask.from_nodes(*self.forest)

    def tensors(self) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
        """q, k and v; sinks; gradients of out and lse. Whole."""
        n = sum(self.forest[1])
        q, k, v = forests.random_qkv(
            n, self.heads, self.kv_heads, self.head_dim, self.value_dim, self.dtype, self.seed, requires_grad=False
        )
        grad_out, _, extra = forests.random_qkv(
            n,
            self.heads,
            self.heads,
            self.value_dim or self.head_dim,
            1,
            self.dtype,
            self.seed + 1,
            requires_grad=False,
        )
        generator = torch.Generator().manual_seed(self.seed)
        sinks = torch.randn(self.heads, generator=generator, dtype=torch.float64).to(self.dtype)
        accumulator = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [q, k, v], sinks if self.with_sinks else None, grad_out, extra[..., 0].T.to(accumulator)

    def options(self) -> dict[str, Any]:
        names = ("window", "softcap", "scale", "deterministic", "backend")
        return {name: getattr(self, name) for name in names}


Result = list[Tensor]  # out, lse transposed to tokens first, gradients of q, k and v, and of sinks if there are any


def attend(mesh: DeviceMesh, case: Case, mode: str) -> Result:
    """Forward and backward on this rank's tokens."""
    device = mesh.device_type
    mask = case.mask().to(device)
    qkv, sinks, grad_out, grad_lse = case.tensors()
    qkv, grad_out, grad_lse = [x.to(device) for x in qkv], grad_out.to(device), grad_lse.to(device)
    sinks = None if sinks is None else sinks.to(device)
    local = [scatter_tokens(x, mask, mesh).requires_grad_() for x in qkv]
    leaves = [*local] if sinks is None else [*local, sinks.requires_grad_()]
    out, lse = tree_attention_cp(*local, mask, mesh, mode=mode, sinks=sinks, return_lse=True, **case.options())
    grads = [scatter_tokens(grad_out, mask, mesh), scatter_tokens(grad_lse, mask, mesh, dim=1)]
    found = torch.autograd.grad([out, lse], leaves, grads)
    return [x.detach().cpu() for x in (out, lse.T.contiguous(), *found)]


def attend_all(mesh: DeviceMesh, cases: list[tuple[Case, str]]) -> list[Result]:
    return [attend(mesh, *case) for case in cases]


def attend_under_autocast(mesh: DeviceMesh, case: Case, mode: str) -> Result:
    with torch.autocast(mesh.device_type, torch.bfloat16):
        return attend(mesh, case, mode)


def attend_relayed(mesh: DeviceMesh, case: Case) -> Result:
    """With keys passed on whatever it costs, in waves of 20 keys."""
    from tree_attn.distributed import _schedule

    before = _schedule._length, _schedule.most_keys_of_a_wave
    _schedule._length = lambda rounds: all(len(wave) == 1 for wave in rounds)  # short is what takes several rounds
    _schedule.most_keys_of_a_wave = lambda *_: 20
    try:
        mask = case.mask()
        plan = _schedule.schedule(mask, mesh.size())
        assert plan.relayed
        assert len(plan.waves) > 1
        return attend(mesh, case, "ring")
    finally:
        _schedule._length, _schedule.most_keys_of_a_wave = before


def events_of_ring(mesh: DeviceMesh, case: Case) -> list[str]:
    """What one call does, forward and backward, in order."""
    from tree_attn import registry
    from tree_attn.distributed import _waves

    events: list[str] = []
    backend = next(b for b in registry.backends() if b.name == "sdpa")
    forward, backward, exchange = backend.forward, backend.backward, _waves.exchange

    def told(event: str, function: Any) -> Any:
        return lambda *arguments: (events.append(event), function(*arguments))[1]  # type: ignore[func-returns-value]

    backend.forward, backend.backward = told("forward", forward), told("backward", backward)  # type: ignore[method-assign]
    _waves.exchange = told("exchange", exchange)  # type: ignore[assignment]
    try:
        attend(mesh, case, "ring")
    finally:
        del backend.forward, backend.backward
        _waves.exchange = exchange
    return events


def attend_without_waiting(mesh: DeviceMesh, case: Case, mode: str) -> Result:
    """The second call on a mask, in which every wait of the host for the GPU is an error."""
    mask = case.mask().to(mesh.device_type)
    local = [scatter_tokens(x.to(mesh.device_type), mask, mesh).requires_grad_() for x in case.tensors()[0]]
    grad = torch.ones(len(local[0]), case.heads, case.value_dim or case.head_dim, dtype=case.dtype).to(local[0])
    for debug in ("default", "error"):
        torch.cuda.set_sync_debug_mode(debug)
        try:
            out = tree_attention_cp(*local, mask, mesh, mode=mode, validate=debug == "default", **case.options())
            found = torch.autograd.grad(out, local, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [x.detach().cpu() for x in (out, *found)]


# -- calls that go wrong, and what arrives -----------------------------------------------------------------------------


def disagree(mesh: DeviceMesh, mode: str, what: str) -> None:
    """Rank 1 makes another call than the others."""
    odd = mesh.get_local_rank() == 1
    lengths = {"mask": [6, 4, 5], "size": [6, 5, 5]}.get(what if odd else "", [6, 5, 4])
    case = Case(
        ([-1, 0, 0], lengths),
        heads=8 if odd and what == "heads" else 4,
        value_dim=4 if odd and what == "value_dim" else None,
    )
    mask = case.mask()
    local = [scatter_tokens(x, mask, mesh) for x in case.tensors()[0]]
    if odd and what == "tokens":
        local[0] = local[0][:-1]
    if odd and what == "dtype":
        local = [x.float() for x in local]
    if odd and what == "gradient":
        local[0].requires_grad_()
    if odd and what == "mode":
        mode = {"ring": "ulysses", "ulysses": "ring"}[mode]
    options = {"window": 3, "softcap": 2.0, "sinks": torch.zeros(4, dtype=torch.float64), "return_lse": True}
    tree_attention_cp(*local, mask, mesh, mode=mode, **({what: options[what]} if odd and what in options else {}))


def die(mesh: DeviceMesh, mode: str) -> Result:
    """The last rank is gone after the forward pass."""
    case = Case(([-1, 0, 0], [60, 50, 40]))
    mask = case.mask()
    local = [scatter_tokens(x, mask, mesh).requires_grad_() for x in case.tensors()[0]]
    out = tree_attention_cp(*local, mask, mesh, mode=mode)
    if mesh.get_local_rank() == mesh.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    out.sum().backward()
    tree_attention_cp(*local, mask, mesh, mode=mode)  # who did not need the dead rank before meets it here
    return []


def largest_key_blocks(mesh: DeviceMesh, case: Case) -> tuple[int, int, int, int]:
    """Keys of the largest block this rank computed with; keys that arrived, forward; that left; tokens of this rank."""
    from tree_attn import registry
    from tree_attn.distributed import _waves

    seen: list[int] = []
    arrived: list[int] = []
    left: list[int] = []
    backend = next(b for b in registry.backends() if b.name == "sdpa")
    forward, exchange = backend.forward, _waves.exchange

    def counting_forward(q: Tensor, k: Tensor, *rest: Any) -> Any:
        seen.append(len(k))
        return forward(q, k, *rest)

    def counting_exchange(group: Any, sends: Any, receives: Any) -> Any:
        left.extend(len(x) for _, x in sends)
        arrived.extend(len(x) for _, x in receives)
        return exchange(group, sends, receives)

    backend.forward, _waves.exchange = counting_forward, counting_exchange  # type: ignore[method-assign]
    try:
        mask = case.mask()
        local = [scatter_tokens(x, mask, mesh) for x in case.tensors()[0]]
        tree_attention_cp(*local, mask, mesh, mode="ring", backend="sdpa")
    finally:
        del backend.forward
        _waves.exchange = exchange
    return max(seen), sum(arrived), sum(left), len(local[0])


def scatter_and_gather(mesh: DeviceMesh, case: Case) -> tuple[bool, Tensor]:
    """Does gathering undo scattering; and the gradient of a loss that every rank computes alike."""
    mask = case.mask()
    whole = case.tensors()[0][0]
    local = scatter_tokens(whole, mask, mesh).requires_grad_()
    back = gather_tokens(local, mask, mesh)
    ((back * whole).sum() / mesh.size()).backward()
    assert local.grad is not None
    return torch.equal(back, whole), local.grad


def explained(mesh: DeviceMesh, case: Case, **options: Any) -> str:
    mask = case.mask()
    local = [scatter_tokens(x, mask, mesh) for x in case.tensors()[0]]
    return str(explain_cp(*local, mask, mesh, **options))


def bad_call(mesh: DeviceMesh, **changes: Any) -> None:
    """The same wrong call on every rank."""
    case = Case(([-1, 0, 0], [6, 5, 4]))
    mask = case.mask()
    local = [scatter_tokens(x, mask, mesh) for x in case.tensors()[0]]
    tree_attention_cp(*local, mask, changes.pop("over", mesh), **changes)


def absent(mesh: DeviceMesh, mode: str, what: str) -> None:
    """Rank 1 does not make the call that the others make, or makes it without its backward pass."""
    case = Case(([-1, 0, 0], [60, 50, 40]))
    mask = case.mask()
    local = [scatter_tokens(x, mask, mesh).requires_grad_() for x in case.tensors()[0]]
    odd = mesh.get_local_rank() == 1
    if odd and what == "forward":
        return
    out = tree_attention_cp(*local, mask, mesh, mode=mode)
    if not (odd and what == "backward"):
        out.sum().backward()


# -- a whole model -----------------------------------------------------------------------------------------------------


def model_step(mesh: DeviceMesh, model_type: str, mode: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step on ``SEQUENCES``, both summed over the ranks."""
    from hf_models import SEQUENCES, make_model

    from tree_attn import pack
    from tree_attn.distributed.transformers import local_loss, model_inputs, register

    register(mesh, mode=mode)
    batch = pack(SEQUENCES)
    model = make_model(model_type, "tree_attn_cp").double()
    loss = local_loss(batch, model(**model_inputs(batch, mesh)).logits, mesh)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    grads = {}
    for name, parameter in model.named_parameters():
        grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grads[name])
    return total.item(), grads


def fsdp_step(mesh: DeviceMesh, groups: list[list[list[int]]], loss: str) -> dict[str, Tensor]:
    """Gradients of one step with FSDP2 over all four ranks: two batches, the tokens of each split over two ranks.

    The loss is computed from this rank's logits, or from all log-probabilities alike on both ranks of a batch.
    """
    from hf_models import make_model
    from torch.distributed.fsdp import fully_shard

    from tree_attn import pack
    from tree_attn.distributed.transformers import local_loss, log_probs, model_inputs, register

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    register(grid["cp"])
    model = make_model("llama", "tree_attn_cp").double()
    flat = grid["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    batch = pack(groups[grid["dp"].get_local_rank()])
    logits = model(**model_inputs(batch, grid["cp"])).logits
    if loss == "local":
        part = local_loss(batch, logits, grid["cp"])
    else:
        part = -sum(x.sum() for x in log_probs(batch, logits, grid["cp"])) / grid["cp"].size()
    (grid.size() * part).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def losses_of(mesh: DeviceMesh, sequences: list[list[int]], branch: str, logits: Tensor) -> dict[str, Any]:
    """log_probs and local_loss from this rank's rows of ``logits``, with the gradients of both."""
    from tree_attn import pack
    from tree_attn.distributed import local_loss, log_probs

    batch = pack(sequences, branch=branch)
    mine = scatter_tokens(logits, batch.mask, mesh)
    mine.requires_grad_(mine.is_floating_point())
    found = log_probs(batch, mine[None], mesh)
    alike = sum((x * (i + 1)).square().sum() for i, x in enumerate(found)) / mesh.size()
    (grad_alike,) = torch.autograd.grad(alike, mine)
    loss = local_loss(batch, mine, mesh)
    (grad_loss,) = torch.autograd.grad(loss, mine)
    # Each rank with its own sequences; a rank without one still takes part in the backward pass.
    weights = [(i + 1) * (i % mesh.size() == mesh.get_local_rank()) for i in range(len(sequences))]
    split = sum((x * weight).square().sum() for x, weight in zip(log_probs(batch, mine, mesh), weights, strict=True))
    (grad_split,) = torch.autograd.grad(split, mine)
    return {
        "log_probs": [x.detach() for x in found],
        "loss": loss.detach(),
        "grad_alike": grad_alike,
        "grad_loss": grad_loss,
        "grad_split": grad_split,
    }
