"""``flash_attn_forward`` and ``supports_flash_attn``: by this pair transformers knows a Hub kernel to call directly.

wheels/hub.py puts this into the Hub kernel. transformers drives the pair with its ``sdpa`` mask, a dense tensor of
one byte for each pair of tokens, and takes the depth positions of a tree for packed sequences. So the mask is ignored
wherever the model call carries a tree. ``register()`` of tree_attn.integrations.transformers, in the wheel, costs no
such tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tree_attn.attention import tree_attention
from tree_attn.integrations._arrays import END_K, START_Q, mask_from_keywords


def supports_flash_attn() -> bool:
    """True: transformers asks whether this exists."""
    return True


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        query: ``(batch, heads, tokens, head_dim)``; key and value with their own number of heads.
        attention_mask: used only without a tree.
        kwargs: ``tree_mask``, or ``tree_dfs_order_start_q`` and ``tree_dfs_order_end_k`` with ``cu_seq_lens_q``, make
            it a tree; without them this is torch's ``scaled_dot_product_attention``.

    Returns:
        ``(batch, tokens, heads, head_dim)`` and None.

    Raises:
        NotImplementedError: dropout with a tree, a tree with a key/value cache, softcap or sinks without one.
    """
    rows, heads, tokens, _ = query.shape
    if kwargs.get("tree_mask") is None and kwargs.get(START_Q) is None and kwargs.get(END_K) is None:
        if softcap or s_aux is not None:
            raise NotImplementedError("softcap and sinks need a tree here; use another attention for plain sequences")
        causal = attention_mask is None and tokens > 1 and getattr(module, "is_causal", True)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise NotImplementedError(f"dropout is {dropout}; attention on trees has none, set attention_dropout to 0")
    if key.shape[2] != tokens:
        raise NotImplementedError(f"{tokens} tokens and {key.shape[2]} keys: a tree with a cache; pass use_cache=False")
    mask = mask_from_keywords(rows, tokens, query.device, kwargs)
    assert mask is not None
    q, k, v = (x.transpose(1, 2).reshape(rows * tokens, x.shape[1], x.shape[3]) for x in (query, key, value))
    out = tree_attention(q, k, v, mask, scale=scaling, softcap=softcap or 0.0, window=sliding_window, sinks=s_aux)
    return out.view(rows, tokens, heads, value.shape[3]), None
