"""What the training examples share: data, a small Qwen3, the loop that trains it in two ways, the report.

The rollouts are those that ship with tree_attn: multi-turn agent trajectories with rewards, eight for each task, as
bytes. One copy of the model trains on trees (``attn_implementation="tree_attn"``), the other on every sequence by
itself with transformers' own ``sdpa`` attention and nothing of tree_attn.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tree_attn.integrations.transformers import register
from tree_attn.rollouts import Rollout, read_rollouts

BOUND = 1e-4  # relative difference of the parameters allowed after the last step


@dataclass(frozen=True)
class Result:
    """Both trainings; lists have one entry a step."""

    tree: list[float]
    paths: list[float]
    seconds_tree: list[float]
    seconds_paths: list[float]
    difference: float  # largest over the parameters, relative to their norm
    change: float  # largest over the parameters since the start, relative to their norm

    @property
    def same(self) -> bool:
        return self.difference < BOUND


def two_tasks() -> list[Rollout]:
    """Eight rollouts each of two of the tasks."""
    return [rollout for rollout in read_rollouts() if rollout.group in ("sql-returning", "code-clock")]


def make_model(seed: int = 0) -> nn.Module:
    """A Qwen3 of two layers for bytes, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def path_log_probs(model: nn.Module, tokens: list[int]) -> Tensor:
    """``(len - 1,)`` log-probabilities of tokens 1, 2, ... of one sequence run by itself."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def train_both(
    tree_loss: Callable[[nn.Module, int], Tensor],
    paths_loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    learning_rate: float = 1e-3,
) -> Result:
    """Train one model both ways; a loss is a function of the model and the number of the step."""
    register()
    start = make_model()
    tree, paths = copy.deepcopy(start), copy.deepcopy(start)
    tree.set_attn_implementation("tree_attn")
    curves = [run(model, loss, steps, learning_rate) for model, loss in ((tree, tree_loss), (paths, paths_loss))]
    return Result(
        tree=curves[0][0],
        paths=curves[1][0],
        seconds_tree=curves[0][1],
        seconds_paths=curves[1][1],
        difference=largest_difference(tree, paths),
        change=largest_difference(start, paths),
    )


def run(
    model: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int, learning_rate: float
) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses, seconds = [], []
    for step in range(steps):
        begin = time.perf_counter()
        value = loss(model, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        seconds.append(time.perf_counter() - begin)
    return losses, seconds


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


# -- command line ----------------------------------------------------------------------------------------------------


def main(title: str, compare: Callable[[int, list[Rollout]], Result]) -> None:
    """Run ``compare(steps, rollouts)``, print what it found, write the plot; exit with 1 when the two ways differ."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(Path(sys.argv[0]).stem + ".png"), help="where the plot goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a model this small loses time by more
    result = compare(arguments.steps, two_tasks())
    print(f"{title}\n{'step':>4} {'loss, paths':>14} {'loss, tree':>14}")
    for step, (paths, tree) in enumerate(zip(result.paths, result.tree, strict=True), 1):
        print(f"{step:4d} {paths:14.6f} {tree:14.6f}")
    best = min(result.seconds_paths), min(result.seconds_tree)
    print(f"best step: paths {best[0]:.2f} s, tree {best[1]:.2f} s, {best[0] / best[1]:.2f}x as fast")
    moved, apart = f"{result.change:.1e}", f"{result.difference:.1e}"
    print(f"parameters moved by {moved} and differ by {apart} (allowed {BOUND:.0e}), relative to their size")
    plot(title, result, arguments.out)
    print(f"plot: {arguments.out}")
    if not result.same:
        raise SystemExit("the two ways do NOT train the same model")


def plot(title: str, result: Result, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(result.tree) + 1)
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(6, 5), height_ratios=(3, 1), layout="constrained")
    above.plot(steps, result.paths, color="tab:orange", linewidth=6, alpha=0.5, label="every sequence by itself")
    above.plot(steps, result.tree, color="tab:blue", linewidth=1.5, label="tree")
    above.set(title=title, ylabel="loss")
    above.legend()
    gap = [max(abs(a - b), 1e-12) for a, b in zip(result.tree, result.paths, strict=True)]
    below.semilogy(steps, gap, color="black")
    below.set(xlabel="optimiser step", ylabel="difference")
    figure.savefig(out, dpi=150)
    plt.close(figure)
