"""Times what is not attention: building masks, choosing a backend, the call around it, importing the package.

python ci/bench_core.py            # a table in Markdown; a CPU is enough, and nothing else should run on it
"""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import tree_attn
from tree_attn import Backend, Request, TreeMask, registry
from tree_attn._operator import make_request

NODES, TOKENS_PER_NODE = 10_000, 100


def median_seconds(call: Callable[[], object], repeats: int, calls: int = 1) -> float:
    """Median over ``repeats`` of the mean time of ``calls`` calls; the best of three such rounds."""
    call()
    rounds = []
    for _ in range(3):
        seconds = []
        for _ in range(repeats):
            start = time.thread_time()
            for _ in range(calls):
                call()
            seconds.append((time.thread_time() - start) / calls)
        rounds.append(statistics.median(seconds))
    return min(rounds)


def mask_times() -> dict[str, float]:
    """Each constructor on one forest: 10 000 nodes of 100 tokens, paths of up to some hundred nodes."""
    draw, path, parents = random.Random(0), [], []
    for node in range(NODES):
        path = path[: draw.randint(min(len(path), 1), len(path))]
        parents.append(path[-1] if path else -1)
        path.append(node)
    lengths = [TOKENS_PER_NODE] * NODES
    parent = torch.tensor(parents)
    tokens = torch.arange(-1, NODES * TOKENS_PER_NODE - 1)
    tokens[::TOKENS_PER_NODE] = torch.where(parent < 0, -1, (parent + 1) * TOKENS_PER_NODE - 1)
    mask = TreeMask.from_nodes(parents, lengths)
    start = torch.arange(NODES).repeat_interleave(TOKENS_PER_NODE)
    end = start[(mask.subtree_end - 1).long()]
    builds = {
        "from_nodes, two tensors": lambda: TreeMask.from_nodes(parent, torch.tensor(lengths)),
        "from_nodes, two lists": lambda: TreeMask.from_nodes(parents, lengths),
        "from_token_parents": lambda: TreeMask.from_token_parents(tokens),
        "from_dfs": lambda: TreeMask.from_dfs(start, end),
        "from_dfs with cu_seqlens": lambda: TreeMask.from_dfs(start, end, [0, len(start)]),
    }
    for build in builds.values():
        if build() != mask:
            raise SystemExit("the constructors differ")
    return {f"{name}, 1 M tokens": median_seconds(build, 25) for name, build in builds.items()}


class Nothing(Backend):
    """Runs no attention, so that what is left is the library's own time."""

    name, priority = "nothing", 1_000_000

    def __init__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.result = out, lse

    def supports(self, request: Request) -> list[str]:
        return []

    def forward(self, *arguments: Any) -> Any:
        return self.result


def call_times() -> dict[str, float]:
    """Choosing, and a whole eager call around a backend that does nothing."""
    mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    ranges, options = mask.ranges(), tree_attn.Options(0.5)
    tree_attn.register_backend(Nothing(torch.zeros(7, 4, 8), torch.zeros(4, 7)))

    def choose() -> Backend:
        return registry.select(make_request(q, k, v, None, ranges, options), registry.forced(None))

    result = {"choosing the backend": median_seconds(choose, 25, 2000)}
    result["tree_attention around it"] = median_seconds(lambda: tree_attn.tree_attention(q, k, v, mask), 25, 2000)
    q.requires_grad_()
    name = "the same, with gradients to record"
    result[name] = median_seconds(lambda: tree_attn.tree_attention(q, k, v, mask), 25, 2000)
    tree_attn.unregister_backend("nothing")
    return result


def import_time() -> float:
    """What ``import tree_attn`` adds to ``import torch``, in fresh interpreters."""
    code = "import time, torch; start = time.process_time(); import tree_attn; print(time.process_time() - start)"
    run = [sys.executable, "-c", code]
    return statistics.median(float(subprocess.check_output(run)) for _ in range(7))


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, 1 thread\n")
    print("| what | median |\n|---|---:|")
    for name, seconds in {**mask_times(), "import tree_attn, after torch": import_time()}.items():
        print(f"| {name} | {1e3 * seconds:.1f} ms |")
    for name, seconds in call_times().items():
        print(f"| {name} | {1e6 * seconds:.1f} us |")


if __name__ == "__main__":
    main()
