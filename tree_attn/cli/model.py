"""The small transformer that the demo trains: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Attention is an argument of the forward pass, so one model runs on a tree and on a single path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

# q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim) -> (tokens, heads, head_dim)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate(x: Tensor, position_ids: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves layout. x ``(tokens, heads, head_dim)``; the angle of a token
    depends on its position id alone, which for a tree is its depth."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position_ids[:, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)  # gate and value, 2 * width each
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """x ``(tokens, width)``."""
        h = self.norm_attention(x)
        q = self.q(h).view(-1, self.heads, self.head_dim)
        k, v = self.kv(h).view(-1, 2 * self.kv_heads, self.head_dim).split(self.kv_heads, dim=1)
        o = attend(rotate(q, position_ids).to(v.dtype), rotate(k, position_ids).to(v.dtype), v)
        x = x + self.out(o.flatten(1))
        gate, value = self.up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * value)


class SmallTransformer(nn.Module):
    """A language model of 2 layers.

    Args:
        vocab: number of token ids.
        width, layers, heads, kv_heads, head_dim: its size; heads is a multiple of kv_heads, head_dim even.
    """

    def __init__(
        self, vocab: int, width: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Logits ``(tokens, vocab)`` of input_ids ``(tokens,)``."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, position_ids, attend)
        return self.head(self.norm(x))
