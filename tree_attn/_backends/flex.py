"""placeholder"""
from tree_attn.registry import Backend


class FlexBackend(Backend):
    name = "flex"
    priority = 200
    traced = True

    def supports(self, request):
        return ["placeholder"]
