"""The two ways in which tensors travel between ranks: pairs of messages, and all to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Transfer:
    """Messages under way; ``wait`` gives what arrived. Holds what is sent until it has left."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()  # on a GPU the stream waits, not the host
        return self.received


def send_and_receive(
    group: dist.ProcessGroup, sent: Tensor, target: int, received_shape: Sequence[int], source: int
) -> Transfer:
    """Send ``sent`` to ``target`` and get a tensor of its dtype from ``source``, both ranks of the group.

    Nothing travels for an empty tensor: both sides know from the mask that it is one.
    """
    received = sent.new_empty(received_shape)
    ops = []
    if sent.numel():
        sent = sent.contiguous()
        ops.append(dist.P2POp(dist.isend, _bytes(sent), group=group, group_peer=target))
    if received.numel():
        ops.append(dist.P2POp(dist.irecv, _bytes(received), group=group, group_peer=source))
    return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


def all_to_all(group: dist.ProcessGroup, sends: Sequence[Tensor], received_sizes: Sequence[int]) -> list[Tensor]:
    """Send ``sends[r]`` to each rank r; flat tensors of ``received_sizes[r]`` elements arrive from each."""
    sent = torch.cat([x.reshape(-1) for x in sends])
    received = sent.new_empty(sum(received_sizes))
    width = sent.element_size()
    dist.all_to_all_single(
        _bytes(received),
        _bytes(sent),
        [n * width for n in received_sizes],
        [x.numel() * width for x in sends],
        group=group,
    )
    return list(received.split(list(received_sizes)))


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes, so that no transport has to know the dtype."""
    return x.view(-1).view(torch.uint8)
