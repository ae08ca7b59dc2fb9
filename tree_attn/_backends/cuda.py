"""The project's CUDA kernels: makes the tensors fit and calls the library.

Memory is that of torch's allocator and nothing waits for the GPU, so calls can be captured in CUDA graphs. Two
environment variables, read at every call, are for tests and measurements: ``TREE_ATTN_CUDA_PATH`` (``portable`` or
``hopper``) forces one set of kernels, ``TREE_ATTN_CUDA_SMEM`` limits the shared memory of a block, in bytes, to that of
a smaller GPU. Where the Hopper set lacks a kernel the portable one runs: for a scale that is not positive, for repeated
rows (``expand``), for more than 128 query heads a key/value head, and in the backward for head dims above 128, for more
than 64 query heads a key/value head and for deterministic calls.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tree_attn import _kernels
from tree_attn._backends.layout import loadable
from tree_attn.mask import RowRanges
from tree_attn.registry import Backend, BackendUnavailable, Options, Request, read_environment

PATH_VARIABLE = "TREE_ATTN_CUDA_PATH"
SMEM_VARIABLE = "TREE_ATTN_CUDA_SMEM"
MAX_HEAD_DIM = 256
_MAX_INT = 2**31 - 1


class CudaBackend(Backend):
    name = "cuda"
    priority = 300

    def supports(self, request: Request) -> list[str]:
        reasons = _reasons_of_inputs(request)
        if request.device.type != "cuda":
            return [f"runs on NVIDIA GPUs; the tensors are on {request.device.type}", *reasons]
        problem = _kernels.unavailable(_index(request.device))
        if problem is not None:
            reasons.append(problem.reason)
        elif not reasons:
            reasons += _reasons_of_path(request)
        return reasons

    def remedy(self, request: Request) -> str | None:
        if request.device.type != "cuda" or torch.version.hip or _reasons_of_inputs(request):
            return None
        if torch.cuda.get_device_capability(request.device) < (8, 0):
            return None
        problem = _kernels.unavailable(_index(request.device))
        return problem.remedy if problem else None

    def detail(self, request: Request) -> str:
        library = _kernels.load()
        if isinstance(library, _kernels.Unavailable) or self.supports(request):
            return ""
        path = _path_name(_index(request.device), request[2:6], *_config())
        archs = ", ".join(library.build["archs"])  # type: ignore[arg-type]
        return f"{path} kernels, CUDA {library.build['cuda']} build for {archs}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        rows, heads, _ = q.shape
        if rows == 0 or k.shape[0] == 0:
            return q.new_zeros(rows, heads, v.shape[2]), q.new_full((heads, rows), float("-inf"), dtype=torch.float32)
        return _library().forward(
            loadable(q), loadable(k), loadable(v), _float32(sinks), *_mask(mask, options), *_scalars(options)
        )

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
        mask: RowRanges,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if q.shape[0] == 0 or k.shape[0] == 0:
            grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
            return grad_q, grad_k, grad_v, None if sinks is None else torch.zeros_like(sinks)
        grad_q, grad_k, grad_v, delta = _library().backward(
            loadable(grad_out),
            _float32(grad_lse),
            loadable(q),
            loadable(k),
            loadable(v),
            _float32(sinks),
            loadable(out),
            lse,
            *_mask(mask, options),
            *_scalars(options),
            options.deterministic,
        )
        return grad_q, grad_k, grad_v, None if sinks is None else _grad_sinks(sinks, lse, delta)


# -- what it can run -------------------------------------------------------------------------------------------------


def _reasons_of_inputs(request: Request) -> list[str]:
    reasons = []
    if request.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"runs float16 and bfloat16, not {str(request.dtype).removeprefix('torch.')}")
    for name, dim in (("head_dim", request.head_dim), ("value_dim", request.value_dim)):
        if dim % 8 or dim > MAX_HEAD_DIM:
            reasons.append(f"{name} is {dim}; the kernels take multiples of 8 up to {MAX_HEAD_DIM}")
    return reasons


def _reasons_of_path(request: Request) -> list[str]:
    path, max_smem = _config()
    if path != _kernels.PATHS["hopper"]:
        return []
    if _path_name(_index(request.device), request[2:6], path, max_smem).startswith("hopper"):
        return []
    return [f"{PATH_VARIABLE} is hopper, and this build or this GPU has no Hopper kernels for these heads"]


def _config() -> tuple[int, int]:
    """What the environment forces: the path (``_kernels.PATHS``) and the shared memory of a block, 0 for all."""
    path, smem = read_environment(PATH_VARIABLE) or "auto", read_environment(SMEM_VARIABLE) or "0"
    if path not in _kernels.PATHS:
        raise ValueError(f"{PATH_VARIABLE} is {path!r}; set it to portable or hopper, or leave it unset")
    if not smem.isdecimal():
        raise ValueError(f"{SMEM_VARIABLE} is {smem!r}; set it to a number of bytes, or leave it unset")
    return _kernels.PATHS[path], int(smem)


@functools.lru_cache(maxsize=256)
def _path_name(device: int, heads: tuple[int, int, int, int], path: int, max_smem: int) -> str:
    with torch.cuda.device(device):
        return _library().functions.tree_attn_path_name(device, *heads, path, max_smem).decode()


def _library() -> _kernels.Kernels:
    library = _kernels.load()
    if isinstance(library, _kernels.Unavailable):
        raise BackendUnavailable(f"the CUDA kernels cannot run: {library.reason}")
    return library


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# -- arguments -------------------------------------------------------------------------------------------------------


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _mask(mask: RowRanges, options: Options) -> tuple[Tensor | None, ...]:
    """The tensors of the mask that the kernels read. Depths serve windows alone, and a tensor costs host time."""
    if options.window is not None:
        return mask
    return mask.row_begin, mask.row_end, None, None, mask.begin_bounds, mask.end_bounds, None, None


def _scalars(options: Options) -> tuple[float, float, int, int, int]:
    window = 0 if options.window is None else min(options.window, _MAX_INT)
    return options.scale, options.softcap, window, *_config()


def _grad_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """``-sum_q p_sink[q] <grad_out[q], out[q]>``, with p_sink the sink's share of each row's denominator."""
    sink = sinks.detach().to(torch.float32)[:, None]
    p_sink = torch.exp(sink - torch.logaddexp(lse, sink))
    return -(p_sink * delta).sum(1).to(sinks.dtype)
