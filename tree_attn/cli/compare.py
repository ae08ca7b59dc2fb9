"""Train the same model on the same rollouts both ways, tree and path by path, and compare: the demo without its output.

The tree way is this project: ``pack``, ``tree_attention``, ``PackedBatch.loss``. The path way is written with torch
alone (one causal ``scaled_dot_product_attention`` and one ``cross_entropy`` a sequence), so that an error of the
project cannot be on both sides. Each way steps its own copy of the model with its own optimizer.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tree_attn.attention import explain, tree_attention
from tree_attn.cli.model import SmallTransformer
from tree_attn.packing import PackedBatch, pack, plan
from tree_attn.registry import Explanation
from tree_attn.rollouts import Rollout

# float32 carries 24 bits: one rounding is 6e-8, and the sums behind a gradient have up to some ten thousand terms, in
# another order on each side. Random walks of that length stay below 100 roundings.
FLOAT32_BOUND = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Losses and seconds have one entry a step."""

    sequences: int
    groups: int
    weighting: str  # how rewards enter the loss, in words
    batches: int
    tokens_paths: int
    tokens_tree: int
    pairs_paths: int
    pairs_tree: int
    parameters: int
    loss_tree: list[float]
    loss_paths: list[float]
    seconds_tree: list[float]
    seconds_paths: list[float]
    gradient_difference: float
    gradient_bound: float
    device: str
    dtype: str
    explanation: Explanation

    @property
    def same(self) -> bool:
        """Is the largest difference of any gradient below the bound? A NaN is not."""
        return self.gradient_difference < self.gradient_bound


def advantage_weights(rollouts: Sequence[Rollout]) -> list[float]:
    """How much each rollout counts: exp(reward - mean reward of its group), as in advantage-weighted regression
    (Peng et al. 2019); 1 for rollouts without a reward."""
    rewards: dict[str | None, list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            rewards.setdefault(rollout.group, []).append(rollout.reward)
    means = {group: fmean(values) for group, values in rewards.items()}
    # The cap keeps one outlier among a user's rewards from overflowing.
    return [1.0 if r.reward is None else math.exp(min(r.reward - means[r.group], 20.0)) for r in rollouts]


def compare(
    rollouts: Sequence[Rollout],
    *,
    steps: int = 3,
    max_tokens: int = 32768,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    on_step: Callable[[int, str], None] = lambda step, way: None,
) -> Comparison:
    """Train ``steps`` steps both ways, every rollout in every step.

    Args:
        rollouts: at least one, and at least one target among them.
        max_tokens: unique tokens in one packed batch; more rollouts become several batches whose gradients add up.
        dtype: one of ``DTYPES``. Below float32 both ways run under autocast, and both are compared with a float32 path
            way in the first step; the bound is then twice the rounding error of the low-precision path way itself.
        on_step: called with (step, "tree" or "paths") after each half.

    Returns:
        A :class:`Comparison`. The gradient difference is the largest over parameters and steps of
        ``norm(tree - paths) / norm(paths)``.

    Raises:
        ValueError: no steps, no targets, or a rollout longer than ``max_tokens``.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    vocabulary, sequences = _dense_ids([r.tokens for r in rollouts])
    weights = advantage_weights(rollouts)
    masks = [torch.tensor(r.loss_mask) for r in rollouts]
    targets = sum(w * int(mask[1:].sum()) for w, mask in zip(weights, masks, strict=True))
    if not targets:
        raise ValueError("no rollout has a token to learn; check 'loss_spans' (the first token is never a target)")
    batches = [
        pack([sequences[i] for i in members], loss_mask=[masks[i] for i in members],
             sequence_weights=[weights[i] for i in members], device=device)
        for members in plan(sequences, max_tokens)
    ]  # fmt: skip
    sequences, masks = [s.to(device) for s in sequences], [mask.to(device) for mask in masks]
    cast = torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "float32")

    torch.manual_seed(seed)
    model = {"tree": SmallTransformer(vocabulary).to(device)}
    model["paths"] = copy.deepcopy(model["tree"])
    optimizer = {way: torch.optim.AdamW(m.parameters(), lr=1e-3) for way, m in model.items()}
    losses: dict[str, list[float]] = {"tree": [], "paths": []}
    seconds: dict[str, list[float]] = {"tree": [], "paths": []}
    backward = {
        "tree": partial(_backward_tree, batches=batches, targets=targets),
        "paths": partial(_backward_paths, sequences=sequences, masks=masks, weights=weights, targets=targets),
    }
    difference, bound = 0.0, FLOAT32_BOUND
    exact = None
    if dtype != "float32":
        exact = copy.deepcopy(model["paths"])
        backward["paths"](exact)
    for step in range(steps):
        for way, run in backward.items():
            optimizer[way].zero_grad()
            _wait(device)
            begin = time.perf_counter()
            with cast:
                loss = run(model[way])
            losses[way].append(float(loss))  # waits for the device
            seconds[way].append(time.perf_counter() - begin)
            on_step(step, way)
        if exact is None:
            difference = _larger(difference, largest_difference(model["tree"], model["paths"]))
        elif step == 0:
            difference = largest_difference(model["tree"], exact)
            bound = 2 * largest_difference(model["paths"], exact)
        for each in optimizer.values():
            each.step()

    summaries = [batch.summary() for batch in batches]
    return Comparison(
        sequences=len(rollouts),
        groups=len({r.group for r in rollouts}),
        weighting="each weighs exp(reward - mean of its prompt)" if len(set(weights)) > 1 else "each weighs the same",
        batches=len(batches),
        tokens_paths=sum(s.tokens_before for s in summaries),
        tokens_tree=sum(s.tokens_after for s in summaries),
        pairs_paths=sum(s.pairs_before for s in summaries),
        pairs_tree=sum(s.pairs_after for s in summaries),
        parameters=sum(p.numel() for p in model["tree"].parameters()),
        loss_tree=losses["tree"],
        loss_paths=losses["paths"],
        seconds_tree=seconds["tree"],
        seconds_paths=seconds["paths"],
        gradient_difference=difference,
        gradient_bound=bound,
        device=device,
        dtype=dtype,
        explanation=_explain(model["tree"], batches[0], DTYPES[dtype]),
    )


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest over parameters of ``norm(a.grad - b.grad) / norm(b.grad)``, summed in float64; NaN if any is."""
    largest = 0.0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        norm = float(q.grad.double().norm())
        gap = float((p.grad.double() - q.grad.double()).norm())
        largest = _larger(largest, gap / norm if norm else gap)
    return largest


# -- the two ways ----------------------------------------------------------------------------------------------------


def _backward_tree(model: SmallTransformer, *, batches: list[PackedBatch], targets: float) -> Tensor:
    """Adds the gradient of the mean loss to the parameters and returns the loss: every distinct prefix once."""
    total = torch.zeros((), device=model.head.weight.device)
    for batch in batches:

        def attend(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch = batch) -> Tensor:
            return tree_attention(q, k, v, batch.mask)

        logits = model(batch.input_ids, batch.position_ids, attend)
        loss = batch.loss(logits.float()) / targets
        loss.backward()
        total += loss.detach()
    return total


def _backward_paths(
    model: SmallTransformer, *, sequences: list[Tensor], masks: list[Tensor], weights: list[float], targets: float
) -> Tensor:
    """The same, with every sequence by itself."""
    total = torch.zeros((), device=model.head.weight.device)
    for tokens, mask, weight in zip(sequences, masks, weights, strict=True):
        logits = model(tokens, torch.arange(len(tokens), device=tokens.device), _causal)
        each = cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
        loss = weight * (each * mask[1:]).sum() / targets
        loss.backward()
        total += loss.detach()
    return total


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


# -- parts -----------------------------------------------------------------------------------------------------------


def _dense_ids(sequences: Sequence[Sequence[int]]) -> tuple[int, list[Tensor]]:
    """Token ids renumbered to those that occur, so that a file of a large vocabulary needs no large embedding."""
    tensors = [torch.tensor(s) for s in sequences]
    known, ids = torch.unique(torch.cat(tensors), return_inverse=True)
    return len(known), list(ids.split([len(t) for t in tensors]))


def _explain(model: SmallTransformer, batch: PackedBatch, dtype: torch.dtype) -> Explanation:
    tokens = batch.num_tokens
    q = torch.empty(tokens, model.heads, model.head_dim, device=batch.device, dtype=dtype)
    k = torch.empty(tokens, model.kv_heads, model.head_dim, device=batch.device, dtype=dtype)
    return explain(q, k, k, batch.mask)


def _larger(a: float, b: float) -> float:
    """max that keeps a NaN wherever it stands."""
    return b if math.isnan(b) or b > a else a


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
