"""``attn_implementation="tree_attn"`` for Hugging Face transformers.

>>> from tree_attn.integrations.transformers import model_inputs, register
>>> register()
>>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", attn_implementation="tree_attn")
>>> batch = tree_attn.pack(sequences)
>>> batch.loss(model(**model_inputs(batch)).logits).backward()

transformers asks an implementation for two functions. The mask function, once a forward pass, says in a small tensor
what stands between plain causal attention and the batch (padding, packed sequences); the attention function, once a
layer, turns that or the tree into a :class:`TreeMask`, which all layers share. What neither can say (a key/value cache,
bidirectional attention, a mask of the user's own) goes to the attention the model would have used itself.
docs/integrations.md has the whole story.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tree_attn.attention import tree_attention
from tree_attn.integrations._arrays import (
    mask_from_keywords,
    mask_from_padding,
    mask_from_segments,
    once,
    warn_untested,
)
from tree_attn.mask import TreeMask
from tree_attn.packing import PackedBatch

NAME = "tree_attn"
OLDEST, NEWEST = (5, 4), (5, 23)


def register() -> None:
    """Add ``attn_implementation="tree_attn"`` to transformers, for models made before or after. Idempotent.

    Warns:
        UserWarning: transformers is a version this was not tested with.
    """
    warn_untested("transformers", transformers.__version__, OLDEST, NEWEST)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a model call: token ids, depths as positions, the mask, and no cache.

    Example:
        >>> logits = model(**model_inputs(pack(sequences))).logits  # (1, N, vocab)
    """
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "tree_mask": batch.mask,
        "use_cache": False,
    }


# -- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
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
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    The tree comes from keyword arguments of the model call, the first of these that is there:

    - ``tree_mask``: a :class:`TreeMask` over all tokens of the batch (rows one after the other);
    - ``tree_dfs_order_start_q`` and ``tree_dfs_order_end_k``: depth-first indices, ``(batch, tokens)`` or flat, with
      ``cu_seq_lens_q`` where they restart;
    - ``cu_seq_lens_q``: sequences packed in one row, plain causal;
    - none: plain causal, with padding and packed position ids as transformers sees them.

    Args:
        query: ``(batch, heads, tokens, head_dim)``.
        key, value: ``(batch, kv_heads, tokens, head_dim)``.
        attention_mask: what :func:`attention_mask` returned.
        dropout: 0.
        sliding_window: along the path, in tokens.
        softcap: cap of the scores.
        s_aux: ``(heads,)`` sinks.

    Returns:
        ``(batch, tokens, heads, head_dim)`` and None.

    Raises:
        NotImplementedError: dropout, a position bias, pages, or a tree together with a key/value cache or another mask.
        ValueError: tree arguments that contradict one another, the batch or the position ids.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            f'continuous batching keeps keys and values in pages, which attn_implementation="{NAME}" does not read; '
            'call model.set_attn_implementation("sdpa") for it'
        )
    rows, _, tokens, _ = query.shape
    mask = mask_from_keywords(rows, tokens, query.device, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is not None:
        _refuse_other_masks(query, key, attention_mask, is_causal)
        check_positions(mask, kwargs.get("position_ids"))
    elif tokens != key.shape[2] or not is_causal or (attention_mask is not None and attention_mask.dim() != 2):
        options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
        options |= {"softcap": softcap, "s_aux": s_aux, "dropout": dropout, "is_causal": is_causal}
        return _stock(module, query, key, value, attention_mask, **options, **kwargs)
    else:
        mask = _causal(query, attention_mask)
    if dropout:
        raise NotImplementedError(
            f"attention dropout is {dropout}; tree attention has none: set config.attention_dropout = 0.0"
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f'{type(module).__name__} adds a position bias to the scores, which attn_implementation="{NAME}" does not; '
            'use "sdpa" or "eager" for this model'
        )
    deterministic = kwargs.get("deterministic")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = tree_attention(
        q,
        k,
        v,
        mask,
        scale=scaling,
        softcap=softcap or 0.0,
        window=sliding_window,
        sinks=s_aux,
        deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
    )
    return out.unflatten(0, (rows, tokens)), None


def flash_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """:func:`attention_forward` in the dtype that transformers would give flash-attn: float32 queries of a model in
    half precision (norms kept in float32, adapters) become half precision."""
    dtype = get_target_dtype(query, module) or query.dtype
    return attention_forward(module, query.to(dtype), key.to(dtype), value.to(dtype), *args, **kwargs)


def _refuse_other_masks(query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool) -> None:
    """A tree or offsets say the whole mask; nothing else may say another."""
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"a tree with a key/value cache: {query.shape[2]} queries and {key.shape[2]} keys. Run trees in one pass, "
            "with use_cache=False and without past_key_values"
        )
    if not is_causal:
        raise NotImplementedError("this attention layer is not causal, so tree arguments cannot apply to it")
    if attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 2:
        raise ValueError(
            "attention_mask has padding, and a tree (or cu_seq_lens_q) is given too. Leave attention_mask out: "
            "the tree says who sees whom; padding tokens become a tree of their own at the end"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            "the model or the caller asks for a mask of its own (a 4-dimensional attention_mask, image blocks, chunked "
            "or bidirectional attention), which cannot be combined with a tree"
        )


def check_positions(mask: TreeMask, position_ids: Tensor | None) -> None:
    """Refuse position ids that nobody chose: those a model counts for itself, where the tree branches.

    One synchronisation for each mask, not for each layer.

    Raises:
        ValueError: they count the packed tokens.
    """
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return
    if mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return

    def counted_along_branches() -> bool:
        index = torch.arange(mask.total, device=mask.device)
        root = torch.where(mask.depth == 0, index, 0).cummax(0).values
        packed = position_ids.to(mask.device).expand(mask.total // position_ids.shape[1], -1)
        offset = packed.flatten() - mask.depth  # constant in a tree: distances are right
        return bool((packed.diff(dim=-1) == 1).all() & (offset != offset[root]).any())

    if mask.total and once("positions", (mask.subtree_end, position_ids), counted_along_branches):
        raise ValueError(
            "position_ids count the packed tokens (0, 1, 2, ...), as a model does when it gets none, so branches would "
            "sit at wrong distances: pass position_ids=mask.depth[None] (model_inputs(batch) does)"
        )


def _causal(query: Tensor, attention_mask: Tensor | None) -> TreeMask:
    """Plain causal attention for what :func:`attention_mask` said."""
    rows, _, tokens, _ = query.shape
    if attention_mask is None:
        return mask_from_segments(torch.zeros(rows, tokens, dtype=torch.int32, device=query.device))
    if attention_mask.shape != (rows, tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and the batch has {rows} x {tokens} tokens"
        )

    def build() -> TreeMask:
        on_device = attention_mask.to(query.device)
        return mask_from_padding(on_device) if on_device.dtype == torch.bool else mask_from_segments(on_device)

    return once(("causal", query.device), (attention_mask,), build)


def _stock(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention the model has without this library: sdpa, or its own eager function where sdpa lacks an option."""
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} where {query.shape[2]} queries meet "
            f"{key.shape[2]} keys; give two dimensions (batch, tokens) to the model, or four"
        )
    if kwargs["softcap"] is None and kwargs["s_aux"] is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} has a softcap or sinks and no eager attention to serve a key/value cache; call "
            'model.set_attn_implementation("eager") for this call'
        )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    return eager(module, query, key, value, attention_mask, **kwargs)[0], None


# -- the mask function -----------------------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls once for each kind of layer in a forward pass. It cannot see the tree.

    Returns:
        bool ``(batch, tokens)``, False for padding; or int32 ``(batch, tokens)``, the packed sequence of every token,
        from 1 (``generate()`` may give the result to the model again, which then reads it as "no padding"); or,
        where these cannot say the mask, bool ``(batch, 1, queries, keys)`` (None where all see all). The sliding window
        is not in the first two: the attention function gets it from the layer.
    """

    def spelled_out() -> Tensor | None:
        # Without the option to leave out a causal mask: eager attention would see the future.
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    chunk = getattr(kwargs.get("config"), "attention_chunk_size", None)
    chunked = chunk is not None and local_size == chunk and kv_length > chunk
    demanded = not allow_is_causal_skip and mask_function is causal_mask_function
    if q_length != kv_length or use_vmap or chunked or demanded:
        return spelled_out()
    segment = torch.ones(batch_size, q_length, dtype=torch.int32, device=device)
    if not allow_is_causal_skip:
        # Packed sequences, or a mask that is not causal: neighbours tell, without a look at all pairs.
        row = torch.arange(batch_size, device=device)[:, None]
        left = torch.arange(q_length - 1, device=device)[None]
        backward, forward = (
            mask_function(row, 0, q, k).expand(batch_size, -1) for q, k in ((left + 1, left), (left, left + 1))
        )
        if torch.compiler.is_compiling():
            torch._assert_async(
                ~forward.any(), "this model's mask is not causal; compile it with attn_implementation='sdpa'"
            )
        elif forward.any():
            return spelled_out()
        segment[:, 1:] += (~backward).cumsum(-1)
    if attention_mask is None:
        return segment
    padding = attention_mask[:, -kv_length:].to(device=device, dtype=torch.bool)
    return segment if not torch.compiler.is_compiling() and padding.all() else padding
