"""Context-parallel tree attention on torch.distributed: one forest over several devices, each with its share of tokens.

>>> from tree_attn.distributed import scatter_tokens, tree_attention_cp
>>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("cp",))
>>> q, k, v = (scatter_tokens(x, mask, mesh) for x in (q, k, v))     # rank r keeps x[mask.shard(8)[r]]
>>> out = tree_attention_cp(q, k, v, mask, mesh)                     # this rank's rows

``local_loss`` and ``log_probs`` are those of a packed batch whose logits are split. docs/scaling.md says which mode to
take, and what a run of it costs at 8 to 512 ranks.
"""

from tree_attn.distributed._attention import explain_cp, tree_attention_cp
from tree_attn.distributed._cost import CostModel, Explanation
from tree_attn.distributed._losses import local_loss, log_probs
from tree_attn.distributed._tokens import gather_tokens, scatter_tokens

__all__ = [
    "CostModel",
    "Explanation",
    "explain_cp",
    "gather_tokens",
    "local_loss",
    "log_probs",
    "scatter_tokens",
    "tree_attention_cp",
]
