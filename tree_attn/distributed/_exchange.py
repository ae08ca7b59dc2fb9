"""The two ways in which tensors travel between ranks: messages, and all to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Transfer:
    """Messages under way. Holds what is sent until it has left, so keep it until then."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()  # on a GPU the stream waits, not the host, and every stream that uses the tensors has to
        if not any(x.is_cuda for x in (*self.sent, *self.received)):
            self.works = []  # gloo would wait for a second message
        return self.received


def exchange(
    group: dist.ProcessGroup, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
) -> Transfer:
    """Send each tensor to its rank of the group, and fill each other one, contiguous, from its rank; none is empty."""
    sent, received = [x.contiguous() for _, x in sends], [x for _, x in receives]
    ops = [
        dist.P2POp(dist.isend, _bytes(x), group=group, group_peer=to) for (to, _), x in zip(sends, sent, strict=True)
    ]
    ops += [dist.P2POp(dist.irecv, _bytes(x), group=group, group_peer=source) for source, x in receives]
    return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


def all_to_all(
    group: dist.ProcessGroup, sent: Tensor, sent_sizes: Sequence[int], received_sizes: Sequence[int]
) -> Transfer:
    """Send ``sent_sizes[r]`` elements of the flat tensor ``sent`` to each rank r, in turn; what arrives from each, one
    behind the other, is flat too."""
    received = sent.new_empty(sum(received_sizes))
    width = sent.element_size()
    work = dist.all_to_all_single(
        _bytes(received),
        _bytes(sent),
        [n * width for n in received_sizes],
        [n * width for n in sent_sizes],
        group=group,
        async_op=True,
    )
    return Transfer([work] if work is not None else [], [sent], [received])


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes, so that no transport has to know the dtype."""
    return x.view(-1).view(torch.uint8)
