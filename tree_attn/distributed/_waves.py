"""Moves keys and values to the ranks that see them, a wave ahead of attention, and their gradients back the same way.

On a GPU the messages have a stream of their own, so that a rank passes keys on while its attention runs. It begins
every wave behind what the main stream was given so far, and the main stream waits for a wave's messages before it uses
them; so memory that one of the two gives up is not written again before both are done with it.

Attention kernels may fill a GPU for as long as they run, and NCCL's kernels need a few of its multiprocessors: messages
that begin a moment later than attention would wait for its end, and with them the ranks that wait for the messages. So
attention is held back until the first messages of a wave have begun.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tree_attn.distributed._exchange import Transfer, exchange
from tree_attn.distributed._plan import Part, RingPlan, Send


class Keys:
    """Keys and values of each part, side by side on the wire. The first wave is started at once."""

    def __init__(self, k: Tensor, v: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self.k, self.v, self.waves, self.group = k, v, plan.waves, group
        self.coming: tuple[Tensor, list[Transfer]] | None = None
        self._start(0)

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        """Keys and values of the part; starts the wave after its own."""
        if part.wave is None or self.coming is None:
            return self.k, self.v
        arrived, transfers = self.coming
        self._start(part.wave + 1)
        for transfer in transfers:
            transfer.wait()
        k, v = arrived.split([self.k.shape[2], self.v.shape[2]], -1)
        return (torch.cat([k, self.k]), torch.cat([v, self.v])) if part.own else (k, v)

    def _start(self, i: int) -> None:
        if i >= len(self.waves):
            return
        wave, dim = self.waves[i], self.k.shape[2] + self.v.shape[2]
        arrived = self.k.new_empty(wave.n_keys, self.k.shape[1], dim)
        transfers: list[Transfer] = []
        with _beside(self.k.device) as started:
            for now in wave.rounds:
                if any(len(send.passed_on) for send in now.sends):
                    for transfer in transfers:
                        transfer.wait()
                sends = [(send.target, self._message(send, arrived)) for send in now.sends]
                receives = [(r.source, arrived[r.begin : r.end]) for r in now.receives]
                transfers.append(exchange(self.group, sends, receives))
                started()
        self.coming = arrived, transfers

    def _message(self, send: Send, arrived: Tensor) -> Tensor:
        own = torch.cat([self.k[send.own], self.v[send.own]], -1)
        return torch.cat([own, arrived[send.passed_on]]) if len(send.passed_on) else own


@dataclass
class Returning:
    """A wave's gradients under way: ``own`` has what arrives for keys of this rank, with their indices."""

    grad: Tensor  # kept because the stream of the messages reads it
    transfers: list[Transfer] = field(default_factory=list)
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Gradients:
    """Brings the gradients of keys and values to their owners; those of keys that were passed on add up on the way."""

    def __init__(self, k: Tensor, v: Tensor, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self.k, self.v, self.waves, self.group = k, v, plan.waves, group
        self.wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.grad_k = self.grad_v = k  # until the first part, which has this rank's own keys
        self.returning: Returning | None = None

    def take(self, part: Part, grad_k: Tensor, grad_v: Tensor) -> None:
        """The part's gradients, in the order of its keys; none where no row sees one."""
        arrived = 0 if part.wave is None else self.waves[part.wave].n_keys
        if part.own:
            shared = any(now.sends for wave in self.waves for now in wave.rounds)  # more will be added
            self.grad_k, self.grad_v = (
                x[arrived:].to(self.wide, copy=True) if shared else x[arrived:] for x in (grad_k, grad_v)
            )
        if part.wave is None:
            return
        if part.ranges is None:
            grad = self.k.new_zeros(arrived, self.k.shape[1], self.k.shape[2] + self.v.shape[2])
        else:
            grad = torch.cat([grad_k[:arrived], grad_v[:arrived]], -1)
        before, self.returning = self.returning, self._start(part.wave, grad)
        self._add(before)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's keys and values."""
        self._add(self.returning)
        return self.grad_k.to(self.k.dtype), self.grad_v.to(self.v.dtype)

    def _start(self, i: int, grad: Tensor) -> Returning:
        rounds = self.waves[i].rounds
        if any(len(send.passed_on) for now in rounds for send in now.sends):
            grad = grad.to(self.wide)
        returning = Returning(grad)
        with _beside(grad.device) as started:
            for now in reversed(rounds):
                sends = [(r.source, grad[r.begin : r.end].to(self.k.dtype)) for r in now.receives]
                sizes = [len(send.own) + len(send.passed_on) for send in now.sends]
                parts = [self.k.new_empty(size, *grad.shape[1:]) for size in sizes]
                receives = [(send.target, part) for send, part in zip(now.sends, parts, strict=True)]
                transfer = exchange(self.group, sends, receives)
                returning.transfers.append(transfer)
                started()
                for send, part in zip(now.sends, parts, strict=True):
                    returning.own.append((send.own, part[: len(send.own)]))
                    if len(send.passed_on):
                        transfer.wait()
                        grad.index_add_(0, send.passed_on, part[len(send.own) :].to(grad.dtype))
        return returning

    def _add(self, returning: Returning | None) -> None:
        if returning is None:
            return
        for transfer in returning.transfers:
            transfer.wait()
        for index, part in returning.own:
            grad_k, grad_v = part.to(self.wide).split([self.k.shape[2], self.v.shape[2]], -1)
            self.grad_k.index_add_(0, index, grad_k)
            self.grad_v.index_add_(0, index, grad_v)


# What attention is held back by, in cycles: some 30 us, in which a kernel that is next on another stream begins.
_HEAD_START = 50_000


@contextmanager
def _beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """On a GPU, on the stream of the messages. Call what it gives when messages were given to it: after the block, the
    main stream is held back until the first of them have begun."""
    if device.type != "cuda":
        yield lambda: None
        return
    main, stream = torch.cuda.current_stream(device), _stream(device)
    events: list[torch.cuda.Event] = []
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield lambda: events.append(stream.record_event())
    if events:
        main.wait_event(events[0])
        with torch.cuda.stream(main):
            torch.cuda._sleep(_HEAD_START)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
