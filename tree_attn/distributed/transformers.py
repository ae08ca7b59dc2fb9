"""A Hugging Face transformers model on a forest whose tokens are split over ranks.

>>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
>>> register(mesh["cp"])
>>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", attn_implementation="tree_attn_cp")
>>> fully_shard(model, mesh=mesh["dp", "cp"]._flatten("dp_cp"))       # parameters over all ranks
>>> logits = model(**model_inputs(batch, mesh["cp"])).logits          # of this rank's tokens
>>> (mesh.size() * local_loss(batch, logits, mesh["cp"])).backward()  # FSDP takes the mean over ranks

Only attention mixes tokens, so every other layer runs on a rank's own. Each ``dp`` rank has its own batch, which its
``cp`` ranks share. For a loss made of ``log_probs``, which all ``cp`` ranks compute alike, the last line is
``(mesh.size() * loss / mesh["cp"].size()).backward()``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface

from tree_attn.distributed._attention import Mode, tree_attention_cp
from tree_attn.distributed._cost import CostModel
from tree_attn.distributed._losses import local_loss, log_probs
from tree_attn.distributed._tokens import group_of, scatter_tokens
from tree_attn.mask import TreeMask
from tree_attn.packing import PackedBatch

__all__ = ["NAME", "local_loss", "log_probs", "model_inputs", "register"]

NAME = "tree_attn_cp"


def register(mesh: DeviceMesh, *, mode: Mode = "auto", cost: CostModel | None = None, validate: bool = True) -> None:
    """Add ``attn_implementation="tree_attn_cp"`` to transformers, over one dimension of a mesh. The last call counts.

    Args:
        mesh, mode, cost, validate: as for ``tree_attention_cp``.
    """
    group_of(mesh)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        options: dict[str, Any] = {"mode": mode, "cost": cost, "validate": validate}
        return _attention(query, key, value, mesh, options, **kwargs), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def model_inputs(batch: PackedBatch, mesh: DeviceMesh) -> dict[str, Any]:
    """Keyword arguments of a model call on this rank: its token ids and their depths, the whole mask, and no cache."""
    return {
        "input_ids": scatter_tokens(batch.input_ids, batch.mask, mesh)[None],
        "position_ids": scatter_tokens(batch.position_ids, batch.mask, mesh)[None],
        "tree_mask": batch.mask,
        "use_cache": False,
    }


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: DeviceMesh,
    options: dict[str, Any],
    tree_mask: TreeMask | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: Any,
) -> Tensor:
    """``(1, heads, tokens, head_dim)`` in, ``(1, tokens, heads, head_dim)`` out, this rank's tokens.

    Raises:
        ValueError: no tree, or more than one row of tokens.
        NotImplementedError: dropout, or a key/value cache.
    """
    if tree_mask is None:
        raise ValueError(f'attn_implementation="{NAME}" needs tree_mask; call the model with model_inputs(batch, mesh)')
    if query.shape[0] != 1:
        raise ValueError(f"the batch has {query.shape[0]} rows; pack it into one, (1, tokens)")
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError("a key/value cache does not go with split tokens; pass use_cache=False")
    if dropout:
        raise NotImplementedError(f"attention dropout is {dropout}; set config.attention_dropout = 0.0")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = tree_attention_cp(
        q, k, v, tree_mask, mesh, scale=scaling, softcap=softcap or 0.0, window=sliding_window, sinks=s_aux, **options
    )
    assert isinstance(out, Tensor)  # lse was not asked for
    return out[None]


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The tree is the whole mask; transformers need not make one."""
