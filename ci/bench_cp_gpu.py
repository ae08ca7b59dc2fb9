"""Context parallelism on the GPUs of one machine: speed-up over one GPU, bytes on the wire, and that results agree.

    python ci/bench_cp_gpu.py [--gpus 2] [--tokens 262144] [--heads 32,8,128] [--profile] [--json FILE]

The tree is a random agent rollout (turns of 128 to 2048 tokens, two or three branches, depth 12), dtype bfloat16. Each
GPU first runs the whole tree alone; then all run it together in both modes. A time is one forward and backward, from a
barrier until the last GPU is done, the median of several: the host's work counts. Shares of out and of the gradients
are compared with the whole run, and rows of it with float64.

--profile also times each thing alone: the link, the messages, the attention of each part, the checks.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tree_attn import TreeMask, explain, tree_attention
from tree_attn.cli.workloads import rollout_tree, tree_mask
from tree_attn.distributed import explain_cp, tree_attention_cp
from tree_attn.distributed._exchange import exchange
from tree_attn.distributed._plan import ring_plan
from tree_attn.distributed._schedule import schedule
from tree_attn.distributed._ulysses import _to_heads, _to_tokens, split_heads, tokens_of_ranks
from tree_attn.distributed._waves import Gradients, Keys
from tree_attn.registry import Options, backends

SPEED_UP, BYTES = 1.8, 0.6  # the bars, for two GPUs
# A result differs from the whole run's by the rounding of bfloat16 in both, of out and of what is merged or sent.
DIFFERENCE = 4 * 2**-8
MODES = ("ring", "ulysses")


def seconds(run: Callable[[], object], device: torch.device, count: int = 7) -> float:
    """Median time from a barrier until the last rank is done."""
    times = []
    for i in range(count + 2):
        _synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        run()
        _synchronize(device)
        taken = torch.tensor([time.perf_counter() - begin], device=device, dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if i >= 2:
            times.append(taken.item())
    return median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_rank(rank: int, world_size: int, store: str, given: argparse.Namespace) -> None:
    device = torch.device(f"cuda:{rank}" if given.device == "cuda" else "cpu")
    if given.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if given.device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh(given.device, (world_size,), mesh_dim_names=("cp",))
    found = measure(mesh, device, given)
    if rank == 0:
        report(found, given)
    dist.destroy_process_group()


def measure(mesh: DeviceMesh, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    heads, kv_heads, dim = (int(n) for n in given.heads.split(","))
    rank, world_size = mesh.get_local_rank(), mesh.size()
    mask = tree_mask(rollout_tree(17, given.tokens, (128, 2048), (2, 3), 12)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(mask.total, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(*s, device=device, dtype=torch.bfloat16, generator=generator) for s in shapes)
    whole = [x.requires_grad_() for x in (q, k, v)]

    def alone() -> list[Tensor]:
        out = tree_attention(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, whole, grad)]

    begin = time.perf_counter()
    mine = mask.shard(world_size)[rank]
    ring_plan(mask, world_size, rank)
    planned = time.perf_counter() - begin
    expected = [x[mine] for x in alone()]
    found: dict[str, Any] = {
        "environment": environment(device, world_size),
        "heads": [heads, kv_heads, dim],
        "tokens": mask.total,
        "pairs": mask.visible_pairs(),
        "backend": explain(q, k, v, mask).chosen,
        "plan_seconds": planned,
        "error_against_float64": error(q.detach(), k.detach(), v.detach(), mask, expected[0], mine),
        "one_gpu_seconds": seconds(alone, device, given.count),
        "modes": {},
    }
    my_q, my_k, my_v = local = [x.detach()[mine].requires_grad_() for x in whole]
    my_grad = grad[mine]
    for mode in MODES:

        def together(mode: Any = mode, validate: bool = True) -> list[Tensor]:
            out = tree_attention_cp(my_q, my_k, my_v, mask, mesh, mode=mode, validate=validate)
            assert isinstance(out, Tensor)
            return [out.detach(), *torch.autograd.grad(out, local, my_grad)]

        pairs = zip(together(), expected, strict=True)
        distances = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
        differences = torch.tensor(distances, device=device, dtype=torch.float64)
        dist.all_reduce(differences, op=dist.ReduceOp.MAX)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        base = _memory(device)
        taken = seconds(together, device, given.count)
        found["modes"][mode] = {
            "seconds": taken,
            "speed_up": found["one_gpu_seconds"] / taken,
            "seconds_without_checks": seconds(functools.partial(together, validate=False), device, given.count),
            "difference": dict(zip(("out", "grad_q", "grad_k", "grad_v"), differences.tolist(), strict=True)),
            "gib_of_calls": (_memory(device, peak=True) - base) / 2**30,
        }
    said = explain_cp(my_q, my_k, my_v, mask, mesh)
    plan = schedule(mask, world_size)
    found["bytes_of_ring"] = said.estimates["ring"].bytes
    found["bytes_of_all_gather"] = said.all_gather_bytes
    found["balance"] = said.estimates["ring"].balance
    found["relayed"], found["rounds"] = plan.relayed, sum(map(len, plan.rounds))
    if given.profile:
        found["profile"] = profile(mesh, device, mask, local, found["backend"], max(3, given.count // 2))
    return found


def _memory(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def error(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, out: Tensor, mine: Tensor) -> float:
    """Relative error of some of this rank's rows of out against float64."""
    some = torch.randint(len(mine), (8,), generator=torch.Generator().manual_seed(0)).to(q.device)
    rows, keys = mine[some], torch.arange(mask.total, device=q.device)
    seen = mask.ranges().visible(rows, keys)
    group = q.shape[1] // k.shape[1]
    want = []
    for row, visible in zip(rows.tolist(), seen, strict=True):
        some_k, some_v = (x[visible].double().repeat_interleave(group, 1) for x in (k, v))
        weights = (torch.einsum("hd,khd->hk", q[row].double(), some_k) * q.shape[2] ** -0.5).softmax(-1)
        want.append(torch.einsum("hk,khd->hd", weights, some_v))
    wanted = torch.stack(want)
    return float((out[some].double() - wanted).norm() / wanted.norm())


# -- each thing alone --------------------------------------------------------------------------------------------------


def profile(
    mesh: DeviceMesh, device: torch.device, mask: TreeMask, local: list[Tensor], name: str, count: int
) -> dict[str, Any]:
    """Milliseconds of the slowest rank for each thing by itself."""
    group, rank, world_size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    q, k, v = (x.detach() for x in local)
    options = Options(q.shape[2] ** -0.5)
    backend = next(b for b in backends() if b.name == name)
    plan = ring_plan(mask, world_size, rank)
    result: dict[str, Any] = {}

    def took(what: str, run: Callable[[], object]) -> None:
        result[what] = 1e3 * seconds(run, device, count)

    block = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    target, source = (rank + 1) % world_size, (rank - 1) % world_size
    took("link", lambda: exchange(group, [(target, block)], [(source, other)]).wait())
    result["link GB/s each way"] = block.numel() / result["link"] / 1e6
    took("nothing", lambda: None)

    def keys_alone() -> None:
        keys = Keys(k, v, plan, group)
        for part in plan.parts:
            keys.of(part)

    def keys_and_gradients() -> None:
        keys, gradients = Keys(k, v, plan, group), Gradients(k, v, plan, group)
        for part in plan.parts:
            gradients.take(part, *keys.of(part))
        gradients.finish()

    took("ring: keys alone", keys_alone)
    took("ring: keys and gradients alone", keys_and_gradients)
    for i in range(max(_everywhere(len(plan.parts), device))):
        part = plan.parts[i] if i < len(plan.parts) else None
        if part is None or part.ranges is None:
            took(f"ring: forward of part {i}", lambda: None)
            took(f"ring: backward of part {i}", lambda: None)
            continue
        n = len(part.ranges.row_end)
        rows = q[part.rows]
        part_k, part_v = (torch.randn(n, *x.shape[1:], dtype=x.dtype, device=device) for x in (k, v))
        out, lse = backend.forward(rows, part_k, part_v, None, part.ranges, options)
        arguments = (rows, part_k, part_v, None)
        took(f"ring: forward of part {i}", functools.partial(backend.forward, *arguments, part.ranges, options))
        backward = functools.partial(backend.backward, out, None, *arguments, out, lse, part.ranges, options)
        took(f"ring: backward of part {i}", backward)
    split = split_heads(q.shape[1], k.shape[1], world_size)
    tokens = tokens_of_ranks(mask, world_size)
    q_heads, kv_heads = [(h.begin, h.end) for h in split], [(h.kv_begin, h.kv_end) for h in split]
    all_heads = (q_heads, kv_heads, kv_heads)
    took("ulysses: q, k and v to heads", functools.partial(_to_heads, tokens, all_heads, group, (q, k, v)))
    q, k, v = full = _to_heads(tokens, all_heads, group, (q, k, v))
    took("ulysses: out to tokens", lambda: _to_tokens(tokens, (q_heads,), (split[-1].end,), group, full[:1]))
    ranges = mask.ranges()
    out, lse = backend.forward(q, k, v, None, ranges, options)
    took("ulysses: forward", lambda: backend.forward(q, k, v, None, ranges, options))
    took("ulysses: backward", lambda: backend.backward(out, None, q, k, v, None, out, lse, ranges, options))
    return result


def _everywhere(number: int, device: torch.device) -> list[int]:
    mine = torch.tensor([number], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone).tolist()


# -- the report --------------------------------------------------------------------------------------------------------


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "gpus": world_size,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "variables": {name: x for name, x in os.environ.items() if name.startswith(("NCCL_", "TREE_ATTN_"))},
    }


def report(found: dict[str, Any], given: argparse.Namespace) -> None:
    one = found["one_gpu_seconds"]
    flops = 14 * found["pairs"] * found["heads"][0] * found["heads"][2]
    print(f"{found['environment']}")
    print(
        f"{found['tokens']:,} tokens, {found['pairs']:,} pairs, heads {found['heads']}, backend {found['backend']}, "
        f"error against float64 {found['error_against_float64']:.1e}, plan made in {found['plan_seconds']:.2f} s"
    )
    columns = f"{'':10s} {'ms':>9s} {'TFLOP/s':>8s} {'speed-up':>9s} {'unchecked ms':>13s} {'GiB':>6s}"
    print(f"{columns}  difference (bar {DIFFERENCE:.1e})")
    print(f"{'one GPU':10s} {1e3 * one:9.2f} {flops / one / 1e12:8.0f}")
    for mode, m in found["modes"].items():
        differences = ", ".join(f"{name} {x:.1e}" for name, x in m["difference"].items())
        print(
            f"{mode:10s} {1e3 * m['seconds']:9.2f} {flops / m['seconds'] / 1e12:8.0f} {m['speed_up']:8.2f}x "
            f"{1e3 * m['seconds_without_checks']:13.2f} {m['gib_of_calls']:6.1f}  {differences}"
        )
    share = found["bytes_of_ring"] / max(found["bytes_of_all_gather"], 1)
    print(
        f"ring receives {found['bytes_of_ring'] / 1e6:.1f} MB forward, {share:.3f} of an all-gather (bar {BYTES}), in "
        f"{found['rounds']} rounds; balance {found['balance']:.3f}"
    )
    for name, value in found.get("profile", {}).items():
        print(f"  {name:32s} {value:9.3f}" + ("" if "GB/s" in name else " ms"))
    met = {
        "speed_up": all(m["speed_up"] >= SPEED_UP for m in found["modes"].values()),
        "bytes": share <= BYTES,
        "results": all(x <= DIFFERENCE for m in found["modes"].values() for x in m["difference"].values()),
    }
    print("bars met: " + ", ".join(f"{name} {'yes' if yes else 'NO'}" for name, yes in met.items()))
    if given.json:
        given.json.write_text(json.dumps({**found, "met": met}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time context parallelism on the GPUs of one machine.")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--heads", default="32,8,128", help="query heads, key/value heads, head dim")
    parser.add_argument("--count", type=int, default=7, help="repetitions of each time")
    parser.add_argument("--profile", action="store_true", help="also time each thing alone")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script, with gloo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(one_rank, (given.gpus, os.path.join(directory, "store"), given), given.gpus)


if __name__ == "__main__":
    main()
