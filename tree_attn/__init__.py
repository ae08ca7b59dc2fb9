"""tree_attn: exact attention on trees. Every token sees its ancestors and itself, in one pass.

>>> import tree_attn
>>> mask = tree_attn.TreeMask.from_nodes(parents=[-1, 0, 0], lengths=[4096, 1024, 1024])
>>> out = tree_attn.tree_attention(q, k, v, mask)  # q (tokens, heads, head_dim)
>>> print(tree_attn.explain(q, k, v, mask))  # which backend runs, and why
"""

from tree_attn import _backends  # noqa: F401  registers them
from tree_attn._hub import use_hub
from tree_attn._version import __version__
from tree_attn.attention import explain, tree_attention
from tree_attn.mask import RowRanges, TreeMask
from tree_attn.packing import PackedBatch, pack, plan
from tree_attn.registry import (
    Backend,
    BackendUnavailable,
    Explanation,
    Options,
    Request,
    backends,
    register_backend,
    unregister_backend,
    use_backend,
)

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Explanation",
    "Options",
    "PackedBatch",
    "Request",
    "RowRanges",
    "TreeMask",
    "__version__",
    "backends",
    "explain",
    "pack",
    "plan",
    "register_backend",
    "tree_attention",
    "unregister_backend",
    "use_backend",
    "use_hub",
]
