"""Packing 64 sequences of 16 384 tokens takes under 0.25 s, whatever they share.

One thread alone keeps the promise, so its CPU time is what is measured: it does not depend on what else is running.
``pytest tests/test_packing_speed.py -s`` prints the times; ``-m "not speed"`` leaves the tests out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tree_attn.packing import pack, plan

SEQUENCES, LENGTH, VOCAB = 64, 16384, 128_000
LIMIT_SECONDS = 0.25

pytestmark = pytest.mark.speed


def _random(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=generator)


def prompts(generator: torch.Generator) -> list[Tensor]:
    """4 prompts of 8192 tokens with 16 responses of 8192 each, shuffled."""
    shared = [_random(generator, LENGTH // 2) for _ in range(4)]
    return [torch.cat([shared[i % 4], _random(generator, LENGTH // 2)]) for i in range(SEQUENCES)]


def identical(generator: torch.Generator) -> list[Tensor]:
    """One sequence 64 times, in 64 places of memory."""
    sequence = _random(generator, LENGTH)
    return [sequence.clone() for _ in range(SEQUENCES)]


def unrelated(generator: torch.Generator) -> list[Tensor]:
    """Nothing shared."""
    return [_random(generator, LENGTH) for _ in range(SEQUENCES)]


def binary_turns(generator: torch.Generator) -> list[Tensor]:
    """7 turns of equal length, two continuations of each: 64 leaves of a binary tree."""
    level = [_random(generator, LENGTH - 6 * (LENGTH // 7))]
    for _ in range(6):
        level = [torch.cat([path, _random(generator, LENGTH // 7)]) for path in level for _ in range(2)]
    return level


def deep_turns(generator: torch.Generator) -> list[Tensor]:
    """One trunk, and a sequence that leaves it at each of 64 turns of 256 tokens."""
    trunk = _random(generator, LENGTH)
    return [torch.cat([trunk[:t], _random(generator, LENGTH - t)]) for t in range(256, LENGTH + 1, 256)]


SHAPES: list[Callable[[torch.Generator], list[Tensor]]] = [prompts, identical, unrelated, binary_turns, deep_turns]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds of one thread, the fastest of a few runs: what else the machine does can only add to a time."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


@pytest.mark.parametrize("branch", ["gather", "fork"])
@pytest.mark.parametrize("kind", ["tensors", "lists"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_64_sequences_of_16384_tokens_pack_in_a_quarter_second(shape, kind, branch):
    sequences = shape(torch.Generator().manual_seed(0))
    assert [len(sequence) for sequence in sequences] == [LENGTH] * SEQUENCES
    given = sequences if kind == "tensors" else [sequence.tolist() for sequence in sequences]
    seconds = _best_seconds(lambda: pack(given, branch=branch))
    packed = pack(given, branch=branch).num_tokens
    print(f"\n| {shape.__name__} | {kind} | {branch} | {packed} | {seconds * 1e3:.0f} ms |", end="")
    assert seconds < LIMIT_SECONDS


def test_thousands_of_short_sequences_are_planned_in_a_second():
    """The loops over sequences stay linear: 4096 sequences of 256 tokens, 64 prompts, the same total as above."""
    generator = torch.Generator().manual_seed(0)
    shared = [_random(generator, 128) for _ in range(64)]
    sequences = [torch.cat([shared[i % 64], _random(generator, 128)]) for i in range(4096)]
    seconds = _best_seconds(lambda: plan(sequences, 16384))
    print(
        f"\n| plan 4096 x 256, budget 16384 | {len(plan(sequences, 16384))} batches | {seconds * 1e3:.0f} ms |", end=""
    )
    assert seconds < 1.0
