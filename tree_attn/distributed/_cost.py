"""What each mode would take: a model of time and bytes from the mask and the heads alone, so every rank finds the same.

    ring      sum over forward and backward of max(attention of the busiest rank, exchange of the keys), because keys
              travel while attention runs, but for a first wave that ranks wait for; a round of messages takes as long
              as its busiest rank; backward sends keys again and their gradients back
    ulysses   attention of the rank with most heads, plus the exchanges, which nothing hides

Attention is ``2 (head_dim + value_dim)`` floating-point operations a visible pair and head forward, and 2.5 times that
backward. A window is not looked at: with one, ring moves and computes less than this says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tree_attn.distributed._schedule import schedule
from tree_attn.distributed._shard import once_per_mask, pairs_of, pieces
from tree_attn.distributed._ulysses import split_heads
from tree_attn.mask import TreeMask

_BACKWARD = 2.5  # arithmetic of the backward pass, forward passes


@dataclass(frozen=True)
class CostModel:
    """What the machine does. The default speed is an H100's on agent rollouts (docs/performance.md: 508 TFLOP/s forward
    and 246 backward, together 289); bandwidth and latency are those of a 400 Gbit/s network card, assumed.

    Attributes:
        tflops: 10^12 floating-point operations a second of one device in attention, forward and backward together.
        bandwidth: 10^9 bytes a second that a rank can send, and receive at the same time.
        latency: seconds to start one exchange.
    """

    tflops: float = 289.0
    bandwidth: float = 50.0
    latency: float = 20e-6

    def __post_init__(self) -> None:
        if not (self.tflops > 0 and self.bandwidth > 0 and self.latency >= 0):
            raise ValueError(f"{self}: tflops and bandwidth must be above 0, latency at least 0")


class Shapes(NamedTuple):
    """Heads and dims of one call."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    bytes_per_number: int


@dataclass(frozen=True)
class Estimate:
    """One mode, forward and backward.

    Attributes:
        seconds: of the slowest rank.
        attention_seconds: of that, attention alone.
        balance: the largest share of the attention, over the mean.
        bytes: that all ranks receive in the forward pass.
        busiest_bytes: the most that one rank sends or receives in the forward pass.
        efficiency: ideal seconds (attention divided by the number of ranks) over ``seconds``.
    """

    seconds: float
    attention_seconds: float
    balance: float
    bytes: int
    busiest_bytes: int
    efficiency: float


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain_cp` returns; ``print`` it.

    Attributes:
        chosen: the mode that runs.
        asked: the mode that was asked for.
        estimates: for each mode.
        world_size, tokens, pairs: what is split over how many ranks.
        most_tokens: tokens of the rank that has most.
        most_pieces: runs of packed positions of the rank that has most.
        all_gather_bytes: what all ranks would receive if each got every key and value.
        cost: the machine.
    """

    chosen: str
    asked: str
    estimates: Mapping[str, Estimate]
    world_size: int
    tokens: int
    pairs: int
    most_tokens: int
    most_pieces: int
    all_gather_bytes: int
    cost: CostModel

    def __str__(self) -> str:
        lines = [
            f"tree_attention_cp: {self.tokens:,} tokens, {self.pairs:,} visible pairs on {self.world_size} ranks; "
            f"at most {self.most_tokens:,} tokens and {self.most_pieces} pieces a rank",
            f"assumed: {self.cost.tflops:g} TFLOP/s and {self.cost.bandwidth:g} GB/s a rank, "
            f"{self.cost.latency * 1e6:g} us an exchange",
        ]
        for mode, e in self.estimates.items():
            mark = "->" if mode == self.chosen else "  "
            share = f" ({e.bytes / self.all_gather_bytes:.1%} of an all-gather of k and v)" * (
                self.all_gather_bytes > 0
            )
            lines.append(
                f"{mark} {mode:<8} {e.seconds * 1e3:.3g} ms forward and backward, efficiency {e.efficiency:.0%}, "
                f"balance {e.balance:.3f}, {e.bytes / 1e6:.4g} MB received forward{share}"
            )
        lines.append(
            "mode='auto' takes the faster one" if self.asked == "auto" else f"mode={self.asked!r} was asked for"
        )
        return "\n".join(lines)


def explain(mask: TreeMask, world_size: int, shapes: Shapes, mode: str, cost: CostModel) -> Explanation:
    """Estimates of both modes; ``auto`` takes the one with fewer seconds, ring when they tie. Kept with the mask."""
    key = ("explained", world_size, shapes, mode, cost)
    return once_per_mask(mask, key, lambda: _explain(mask, world_size, shapes, mode, cost))


def _explain(mask: TreeMask, world_size: int, shapes: Shapes, mode: str, cost: CostModel) -> Explanation:
    pairs = pairs_of(mask, world_size)
    total = int(pairs.sum())
    flops = 2 * (shapes.head_dim + shapes.value_dim) * (1 + _BACKWARD) / (cost.tflops * 1e12)  # s a pair and head
    ideal = total * shapes.heads * flops / world_size
    estimates = {
        "ring": _ring(mask, pairs, world_size, shapes, flops, ideal, cost),
        "ulysses": _ulysses(mask, total, world_size, shapes, flops, ideal, cost),
    }
    chosen = min(estimates, key=lambda name: estimates[name].seconds) if mode == "auto" else mode
    lengths = [len(where) for where in mask.shard(world_size)]
    gathered = mask.total * (world_size - 1) * _key_bytes(shapes)
    most_pieces = max(map(len, pieces(mask, world_size)))
    return Explanation(
        chosen, mode, estimates, world_size, mask.total, total, max(lengths), most_pieces, gathered, cost
    )


def _key_bytes(shapes: Shapes) -> int:
    return shapes.kv_heads * (shapes.head_dim + shapes.value_dim) * shapes.bytes_per_number


def _ring(
    mask: TreeMask,
    pairs: torch.Tensor,
    world_size: int,
    shapes: Shapes,
    flops: float,
    ideal: float,
    cost: CostModel,
) -> Estimate:
    plan = schedule(mask, world_size)
    busiest = int(plan.sent.maximum(plan.seen.sum(0)).max()) * _key_bytes(shapes)
    waves = [
        sum(rounds) * _key_bytes(shapes) / (cost.bandwidth * 1e9) + len(rounds) * cost.latency for rounds in plan.rounds
    ]
    waited = waves[0] if plan.joined else 0.0
    attention = int(pairs.max()) * shapes.heads * flops
    hidden = sum(waves) - waited
    forward = attention / (1 + _BACKWARD)
    # Backward: keys again and gradients of as many, the other way; reckoned as if one waited for the other.
    backwards = max(attention - forward, 2 * hidden) + 2 * waited
    seconds = max(forward, hidden) + waited + backwards
    balance = int(pairs.max()) * world_size / max(int(pairs.sum()), 1)
    received = int(plan.seen.sum()) * _key_bytes(shapes)
    return Estimate(seconds, attention, balance, received, busiest, _ratio(ideal, seconds))


def _ulysses(
    mask: TreeMask, total: int, world_size: int, shapes: Shapes, flops: float, ideal: float, cost: CostModel
) -> Estimate:
    split = split_heads(shapes.heads, shapes.kv_heads, world_size)
    tokens = [len(where) for where in mask.shard(world_size)]
    numbers = [
        (h.end - h.begin) * (shapes.head_dim + shapes.value_dim)
        + (h.kv_end - h.kv_begin) * (shapes.head_dim + shapes.value_dim)
        for h in split
    ]  # of one token that a rank gets (q, k, v) or gives back (out)
    passing = [max((mask.total - n) * mine, n * (sum(numbers) - mine)) for n, mine in zip(tokens, numbers, strict=True)]
    busiest = max(passing) * shapes.bytes_per_number
    received = sum((mask.total - n) * mine for n, mine in zip(tokens, numbers, strict=True)) * shapes.bytes_per_number
    most_heads = max(h.end - h.begin for h in split)
    attention = total * most_heads * flops
    wire = 0.0 if world_size == 1 else busiest / (cost.bandwidth * 1e9) + 2 * cost.latency
    seconds = attention + 2 * wire  # backward moves what forward did, the other way
    balance = most_heads * world_size / shapes.heads
    return Estimate(seconds, attention, balance, received, busiest, _ratio(ideal, seconds))


def _ratio(ideal: float, seconds: float) -> float:
    return ideal / seconds if seconds else 1.0
