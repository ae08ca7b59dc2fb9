"""Supervised fine-tuning on trajectories that share prefixes: on trees, and on every trajectory by itself.

    python examples/sft.py        # writes sft.png

The loss is the mean cross-entropy over all tokens that the trajectories supervise. Several trajectories supervise a
token they share: ``pack`` gives it a weight, their number, and where they part it predicts every branch's first token.
"""

from __future__ import annotations

from common import Result, main, path_log_probs, train_both
from torch import Tensor, nn

from tree_attn import pack
from tree_attn.integrations.transformers import model_inputs
from tree_attn.rollouts import Rollout


def compare(steps: int, rollouts: list[Rollout]) -> Result:
    sequences = [list(r.tokens) for r in rollouts]
    masks = [r.loss_mask for r in rollouts]
    targets = sum(sum(mask[1:]) for mask in masks)

    batch = pack(sequences, loss_mask=masks)

    def tree_loss(model: nn.Module, step: int) -> Tensor:
        return batch.loss(model(**model_inputs(batch)).logits) / targets

    def paths_loss(model: nn.Module, step: int) -> Tensor:
        total = 0.0
        for tokens, mask in zip(sequences, masks, strict=True):
            total = total - path_log_probs(model, tokens)[mask[1:]].sum()
        return total / targets

    return train_both(tree_loss, paths_loss, steps)


if __name__ == "__main__":
    main("SFT on multi-turn trajectories", compare)
