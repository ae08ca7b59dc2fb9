"""Training stacks that reach tree attention: one module each, imported only when it is asked for.

transformers   ``attn_implementation="tree_attn"``
flash_attn     ``flash_attn_varlen_func`` with the tree arrays, and the patch for code written for flash-attn
trl            TRL's trainer on prefix trees, with this library's attention
"""
