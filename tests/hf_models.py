"""Small random models of Hugging Face transformers, and what a training step on them gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tree_attn import PackedBatch, pack

VOCAB = 40
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# model_type of the config, and what is special about its attention. Windows are shorter than the sequences below.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# Two prompts; the first branches twice, and one sequence is a prefix of another.
SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11, 12],
    [5, 6, 7, 8, 13, 14, 15, 9, 9, 3],
    [5, 6, 7, 8, 13, 14, 20, 21, 22, 23, 24],
    [5, 6, 7, 8, 13],
    [30, 31, 32, 33, 34, 35, 36],
]


def make_model(model_type: str, implementation: str = "eager", seed: int = 1, **changes: Any) -> nn.Module:
    """A causal language model with large random weights (so that attention matters), float32, training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**_COMMON, **ARCHITECTURES.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **options)
    config._experts_implementation = "eager"  # the one that runs in float64 too
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            scale = 0.2 if parameter.dim() > 1 else 0.3
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return model.train()


def with_attention(model: nn.Module, implementation: str) -> nn.Module:
    """A copy with the same weights and another attention. ``set_attn_implementation`` would ask for packages."""
    other = copy.deepcopy(model)
    other.config._attn_implementation = implementation
    return other


def run_paths(model: nn.Module, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[Tensor]:
    """``(len, vocab)`` logits of each sequence run by itself."""
    return [model(input_ids=torch.tensor([list(s)]), use_cache=False).logits[0] for s in sequences]


def path_loss(logits: Sequence[Tensor], sequences: Sequence[Sequence[int]] = SEQUENCES) -> Tensor:
    """The sum of all next-token losses, with the same arithmetic as the loss of a packed batch."""
    losses = [pack([s]).loss(rows) for s, rows in zip(sequences, logits, strict=True) if len(s) > 1]
    return torch.stack(losses).sum()


def gradients(model: nn.Module, loss: Callable[[], Tensor] | Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, 0 where there is none."""
    model.zero_grad(set_to_none=True)
    (loss if isinstance(loss, Tensor) else loss()).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = expected.norm().item()
    return (found - expected).norm().item() / norm if norm else found.norm().item()


def paths_of(batch: PackedBatch, logits: Tensor) -> Tensor:
    """The packed logits ``(1, N, vocab)`` as those of every sequence, end to end."""
    return torch.cat(batch.gather(logits[0]))
