"""Direct preference optimisation of pairs that share a prompt: on trees, and on every sequence by itself.

    python examples/dpo.py        # writes dpo.png

The loss of a pair (Rafailov et al. 2023) is ``-log sigmoid(beta * (chosen - rejected))``, each the log-probability of
the response under the model less that under the frozen start. All pairs of a task share its prompt, so one tree holds
them; ``PackedBatch.log_probs`` gives every sequence its own log-probabilities back.
"""

from __future__ import annotations

import torch
from common import Result, main, make_model, path_log_probs, train_both
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tree_attn import pack
from tree_attn.integrations.transformers import model_inputs, register
from tree_attn.rollouts import Rollout

BETA = 0.1


def pairs_of(rollouts: list[Rollout]) -> list[tuple[Rollout, Rollout]]:
    """(chosen, rejected): the best with the worst, the second best with the second worst, of every task."""
    pairs = []
    for group in dict.fromkeys(r.group for r in rollouts):
        ranked = sorted((r for r in rollouts if r.group == group), key=lambda r: -(r.reward or 0.0))
        pairs += [(a, b) for a, b in zip(ranked, reversed(ranked), strict=True) if (a.reward or 0) > (b.reward or 0)]
    return pairs


def compare(steps: int, rollouts: list[Rollout]) -> Result:
    sequences = [r for pair in pairs_of(rollouts) for r in pair]  # chosen, rejected, chosen, ...
    tokens = [list(r.tokens) for r in sequences]
    masks = [torch.tensor(r.loss_mask[1:]) for r in sequences]

    def loss_of(log_probs: list[Tensor], reference: Tensor) -> Tensor:
        gain = responses(log_probs) - reference
        return -logsigmoid(BETA * (gain[0::2] - gain[1::2])).mean()

    def responses(log_probs: list[Tensor]) -> Tensor:
        return torch.stack([values[mask].sum() for values, mask in zip(log_probs, masks, strict=True)])

    batch = pack(tokens)

    def on_tree(model: nn.Module) -> list[Tensor]:
        return batch.log_probs(model(**model_inputs(batch)).logits)

    def on_paths(model: nn.Module) -> list[Tensor]:
        return [path_log_probs(model, sequence) for sequence in tokens]

    register()
    start = make_model()
    with torch.no_grad():  # each way computes its own reference
        reference_paths = responses(on_paths(start))
        start.set_attn_implementation("tree_attn")
        reference_tree = responses(on_tree(start))

    return train_both(
        lambda model, step: loss_of(on_tree(model), reference_tree),
        lambda model, step: loss_of(on_paths(model), reference_paths),
        steps,
    )


if __name__ == "__main__":
    main("DPO, pairs that share a prompt", compare)
