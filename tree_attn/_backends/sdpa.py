"""placeholder"""
from tree_attn._backends.reference import ReferenceBackend


class SdpaBackend(ReferenceBackend):
    name = "sdpa"
    priority = 100
