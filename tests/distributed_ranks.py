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
    value_dim: int | None = None
    window: int | None = None
    softcap: float = 0.0
    with_sinks: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    backend: str | None = None

    def mask(self) -> TreeMask:
        return TreeMask.from_nodes(*self.forest)

    def tensors(self) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
        """q, k and v; sinks; gradients of out and lse. Whole."""
        n = sum(self.forest[1])
        q, k, v = forests.random_qkv(
            n, self.heads, self.kv_heads, 8, self.value_dim, self.dtype, self.seed, requires_grad=False
        )
        grad_out, _, extra = forests.random_qkv(
            n, self.heads, self.heads, self.value_dim or 8, 1, self.dtype, self.seed + 1, requires_grad=False
        )
        generator = torch.Generator().manual_seed(self.seed)
        sinks = torch.randn(self.heads, generator=generator, dtype=torch.float64).to(self.dtype)
        accumulator = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [q, k, v], sinks if self.with_sinks else None, grad_out, extra[..., 0].T.to(accumulator)

    def options(self) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "backend": self.backend}


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


# -- calls that go wrong, and what arrives -----------------------------------------------------------------------------


def disagree(mesh: DeviceMesh, mode: str, what: str) -> None:
    """Rank 1 makes another call than the others."""
    odd = mesh.get_local_rank() == 1
    case = Case(([-1, 0, 0], [6, 5, 4] if not (odd and what == "mask") else [6, 4, 5]))
    if odd and what == "heads":
        case = Case(case.forest, heads=8)
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
    tree_attention_cp(*local, mask, mesh, mode=mode, window=3 if odd and what == "window" else None)


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


def largest_key_blocks(mesh: DeviceMesh, case: Case) -> tuple[int, int, int]:
    """Keys of the largest block this rank computed with; keys that arrived, forward; tokens of this rank."""
    from tree_attn import registry
    from tree_attn.distributed import _ring

    seen: list[int] = []
    arrived: list[int] = []
    backend = next(b for b in registry.backends() if b.name == "sdpa")
    forward, send_and_receive = backend.forward, _ring.send_and_receive

    def counting_forward(q: Tensor, k: Tensor, *rest: Any) -> Any:
        seen.append(len(k))
        return forward(q, k, *rest)

    def counting_transfer(group: Any, sent: Tensor, target: int, shape: Any, source: int) -> Any:
        arrived.append(shape[0])
        return send_and_receive(group, sent, target, shape, source)

    backend.forward, _ring.send_and_receive = counting_forward, counting_transfer  # type: ignore[method-assign]
    try:
        mask = case.mask()
        local = [scatter_tokens(x, mask, mesh) for x in case.tensors()[0]]
        tree_attention_cp(*local, mask, mesh, mode="ring", backend="sdpa")
    finally:
        del backend.forward
        _ring.send_and_receive = send_and_receive
    return max(seen), sum(arrived), len(local[0])


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


def fsdp_step(mesh: DeviceMesh, groups: list[list[list[int]]]) -> dict[str, Tensor]:
    """Gradients of one step with FSDP2 over all four ranks: two batches, the tokens of each split over two ranks."""
    from hf_models import make_model
    from torch.distributed.fsdp import fully_shard

    from tree_attn import pack
    from tree_attn.distributed.transformers import local_loss, model_inputs, register

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    register(grid["cp"])
    model = make_model("llama", "tree_attn_cp").double()
    flat = grid["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    batch = pack(groups[grid["dp"].get_local_rank()])
    logits = model(**model_inputs(batch, grid["cp"])).logits
    (grid.size() * local_loss(batch, logits, grid["cp"])).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
