"""The project's CUDA kernels."""

from __future__ import annotations

from tree_attn.registry import Backend, Request


class CudaBackend(Backend):
    name = "cuda"
    priority = 300

    def supports(self, request: Request) -> list[str]:
        return ["not built: this install has no CUDA kernels"]
