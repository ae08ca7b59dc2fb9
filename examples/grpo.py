"""Group-relative policy optimisation of multi-turn rollouts: on trees, and on every rollout by itself.

    python examples/grpo.py        # writes grpo.png

The advantage of a rollout is its reward, standardised in its group. Its loss is the clipped policy gradient over the
tokens the policy wrote (not the tools' answers). The old log-probabilities are taken anew every four steps, where the
loss jumps back. A token that several rollouts share has one log-probability, but in each a ratio that is clipped by the
sign of that rollout's advantage. No weight a token says that, so ``PackedBatch.log_probs`` computes each
log-probability once and gathers it for every rollout.
"""

from __future__ import annotations

from statistics import fmean, pstdev

import torch
from common import Result, main, path_log_probs, train_both
from torch import Tensor, nn

from tree_attn import pack
from tree_attn.integrations.transformers import model_inputs
from tree_attn.rollouts import Rollout

CLIP = 0.2
STEPS_PER_BATCH = 4


def advantages_of(rollouts: list[Rollout]) -> list[float]:
    rewards = {r.group: [s.reward or 0.0 for s in rollouts if s.group == r.group] for r in rollouts}
    return [((r.reward or 0.0) - fmean(rewards[r.group])) / (pstdev(rewards[r.group]) + 1e-4) for r in rollouts]


def compare(steps: int, rollouts: list[Rollout]) -> Result:
    advantages = advantages_of(rollouts)
    tokens = [list(r.tokens) for r in rollouts]
    masks = [torch.tensor(r.loss_mask[1:]) for r in rollouts]
    written = sum(int(mask.sum()) for mask in masks)

    def policy_loss(log_probs: list[Tensor], old: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for new, before, mask, advantage in zip(log_probs, old, masks, advantages, strict=True):
            ratio = (new - before)[mask].exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum()
        return total / written

    batch = pack(tokens)

    def on_tree(model: nn.Module) -> list[Tensor]:
        return batch.log_probs(model(**model_inputs(batch)).logits)

    def on_paths(model: nn.Module) -> list[Tensor]:
        return [path_log_probs(model, sequence) for sequence in tokens]

    def step_of(log_probs_of):  # type: ignore[no-untyped-def]
        old: list[Tensor] = []

        def loss(model: nn.Module, step: int) -> Tensor:
            log_probs = log_probs_of(model)
            if step % STEPS_PER_BATCH == 0:
                old[:] = [values.detach() for values in log_probs]
            return policy_loss(log_probs, old)

        return loss

    return train_both(step_of(on_tree), step_of(on_paths), steps)


if __name__ == "__main__":
    main("GRPO, groups of multi-turn rollouts", compare)
