"""``torch.nn.attention.flex_attention`` over block lists made from the row ranges, for any GPU torch.compile serves.

The lists come from the (min, max) of every tile by a handful of tensor operations: no mask over tokens, no
synchronisation. Eager calls run one compiled function per kind of call; a call that is already being traced puts
flex_attention into the caller's graph.

Rows and keys are filled up to whole tiles, by tokens that see nothing and that nobody sees: the compiler then knows
that any number of tokens is a multiple of TILE, and leaves out the kernels' bounds checks. Where the number is one
already nothing is copied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.utils._python_dispatch as python_dispatch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

from tree_attn.mask import RowRanges
from tree_attn.registry import Backend, Options, Request

TILE = 128  # rows and keys per entry of the block lists, what flex_attention's own create_block_mask uses
MIN_HEAD_DIM = 16  # Triton's dot product refuses smaller ones


class FlexBackend(Backend):
    """Compiles at the first call of a kind (dtype, heads, head dims, options) and once more at the second number of
    tiles (again for a single tile, which torch.compile takes for a kind of its own); then neither another tree nor
    another number of tokens compiles anything.

    ``backward(retain_graph=True)`` needs ``torch._functorch.config.donated_buffer = False`` as with every compiled
    function; torch says so when it is missing. Gradients are the same bits in every run: the kernels have no atomics.

    Args:
        compiler: the ``backend`` of torch.compile. Only "inductor" is fast; "aot_eager" runs the same graphs through
            dense operations on any device, for tests.
    """

    name = "flex"
    priority = 200
    traced = True

    def __init__(self, compiler: str | Callable = "inductor") -> None:
        self._compiler = compiler
        self._compiled: dict[tuple, Callable] = {}

    def supports(self, request: Request) -> list[str]:
        device = request.device
        if device.type != "cuda":
            return [f"needs a GPU (CUDA or ROCm), and the tensors are on {device.type}"]
        reasons = []
        if not torch.cuda.is_available():
            reasons.append("torch sees no GPU on this machine")
        elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append("needs compute capability 8.0 (Ampere) or newer: Triton generates no code for older GPUs")
        if importlib.util.find_spec("triton") is None:
            reasons.append("needs the triton package, which torch.compile generates GPU code with")
        if not torch._dynamo.is_dynamo_supported():
            reasons.append("torch.compile does not run on this version of Python or this platform")
        elif torch._dynamo.config.disable:
            reasons.append("torch.compile is disabled (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE)")
        if request.dtype == torch.float64:
            reasons.append("float64 is not supported; give float16, bfloat16 or float32")
        most = 256 if torch.cuda.is_available() and _has_small_shared_memory(device) else 512
        for name, size in (("head_dim", request.head_dim), ("value_dim", request.value_dim)):
            if not MIN_HEAD_DIM <= size <= most:
                reasons.append(f"{name} is {size}, and must be from {MIN_HEAD_DIM} to {most} on this device")
        return reasons

    def remedy(self, request: Request) -> str | None:
        needs_triton = request.device.type == "cuda" and importlib.util.find_spec("triton") is None
        return "Install it with: pip install triton" if needs_triton else None

    def detail(self, request: Request) -> str:
        return "torch.compile: the first calls take seconds"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        if q.shape[0] == 0 or k.shape[0] == 0:
            return _nothing(q, k, v, sinks)
        rows = q.shape[0]
        if torch.compiler.is_compiling():
            tiled = (_in_tiles(q), _in_tiles(k), _in_tiles(v))
            out, lse = _attend(*tiled, sinks, tile_lists(mask, options.window), options.scale, options.softcap)
            return out[:rows], lse[:, :rows]
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "the flex backend does not run inside a torch.func transform; force another one with backend='sdpa'"
            )
        lists = _cached_tile_lists(mask, options.window)
        function = self._function(q, k, v, sinks, lists, options)
        out, lse = self._call(function, _in_tiles(q), _in_tiles(k), _in_tiles(v), sinks, lists)
        return (out, lse) if rows % TILE == 0 else (out[:rows], lse[:, :rows])

    @staticmethod
    def _call(function: Callable, *args: Any) -> tuple[Tensor, Tensor]:
        if not python_dispatch.is_in_any_mode_without_ignore_compile_internals():
            return function(*args)
        # torch.compile steps aside for such modes (FLOP counters, loggers) and would leave a dense computation.
        with python_dispatch._disable_current_modes():
            if python_dispatch.is_in_any_mode_without_ignore_compile_internals():  # torch 2.9 sees them even so
                raise NotImplementedError(
                    f"torch {torch.__version__} cannot compile the flex backend under a dispatch mode (a FLOP counter, "
                    "selective checkpointing); upgrade torch, or force another backend, such as backend='sdpa'"
                )
            return function(*args)

    def _function(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: TileLists, options: Options
    ) -> Callable:
        """The compiled function for calls of this kind.

        Everything that compiles again besides sizes is in the key, so that no function nears torch.compile's limit of
        recompilations and few guards are tried in a call.
        """
        shape = (options.scale, options.softcap, q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype, q.device)
        grads = (torch.is_grad_enabled(), q.requires_grad, k.requires_grad, v.requires_grad)
        present = (lists.row_begin is None, lists.q_depth is None, sinks is not None and (sinks.requires_grad,))
        key = (*shape, *grads, *present)
        function = self._compiled.get(key)
        if function is None:
            name = "flex_" + "_".join(map(str, shape))
            function = torch.compile(
                _own_code(_attend_with(options.scale, options.softcap), name), fullgraph=True, backend=self._compiler
            )
            self._compiled[key] = function
        return function


# -- attention -------------------------------------------------------------------------------------------------------


def _in_tiles(x: Tensor) -> Tensor:
    """``(n, ...)`` -> ``(tiles, TILE, ...)``, filled up with zeros; a view where n is a multiple of TILE.

    In a traced graph, where n may be a symbol, every tensor is filled up, perhaps by nothing.
    """
    n = x.shape[0]
    tiles = (n + TILE - 1) // TILE
    if torch.compiler.is_compiling() or n % TILE:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, tiles * TILE - n))
    return x.view(tiles, TILE, *x.shape[1:])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: TileLists, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of whole tiles; to be compiled. q, k and v are ``(tiles, TILE, heads, dim)``."""
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    row_end = lists.row_end.flatten()
    row_begin, q_depth, depth_limit = (
        None if x is None else x.flatten() for x in (lists.row_begin, lists.q_depth, lists.depth_limit)
    )

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        begin = key if row_begin is None else row_begin[key]
        seen = (begin <= row) & (row < row_end[key])
        if q_depth is not None and depth_limit is not None:
            seen = seen & (q_depth[row] < depth_limit[key])
        return seen

    def cap(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    out, aux = flex_attention(
        q.transpose(0, 1)[None],  # (1, heads, rows, head_dim)
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        score_mod=cap if softcap else None,
        block_mask=lists.block_mask(q.shape[0], k.shape[0], sees),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_kernel_options(q, v.shape[2]),
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None  # asked for
    out, lse = out.squeeze(0).transpose(0, 1), aux.lse.squeeze(0)
    if sinks is not None:
        # The sink only enlarges the denominator: exp(lse) / (exp(lse) + exp(sink)) of the softmax without it is left.
        kept = torch.sigmoid(lse - sinks.float()[:, None])  # (heads, rows)
        out = (out * kept.T[..., None]).to(q.dtype)
    return out, lse


def _attend_with(scale: float, softcap: float) -> Callable:
    """:func:`_attend` with its numbers bound, which torch.compile then takes for constants."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: TileLists) -> tuple[Tensor, Tensor]:
        return _attend(q, k, v, sinks, lists, scale, softcap)

    return attend


def _own_code(function: Callable, name: str) -> Callable:
    """The same function with a code object of its own: torch.compile counts recompilations, and learns which sizes
    vary, per code object."""
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def _kernel_options(q: Tensor, value_dim: int) -> Any:
    """flex_attention picks tile sizes by head_dim alone, and knows few of those; where its tiles would overflow shared
    memory (compiling for compute capabilities 8.0, 8.9 and 9.0 tells), give smaller ones."""
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}  # its other kernel, for few rows, takes fewer shapes
    head_dim, small = q.shape[2], _has_small_shared_memory(q.device)
    if q.dtype == torch.float32:
        fits = value_dim <= max(head_dim, 64) and (head_dim <= 64 or (head_dim in (128, 256) and not small))
        rows, tile, stages = 32, 16, 1
    else:
        fits = (value_dim <= 128 or head_dim == 256) and (head_dim <= 128 or not small)
        rows, tile, stages = 64, 32, 2
    if not fits:
        options.update(fwd_BLOCK_M=rows, fwd_BLOCK_N=32, fwd_num_stages=stages, bwd_num_stages=1, num_warps=4)
        options.update({f"bwd_BLOCK_{side}": tile for side in ("M1", "N1", "M2", "N2")})
    return options


def _has_small_shared_memory(device: torch.device) -> bool:
    """NVIDIA cards whose thread blocks have some 100 KiB of shared memory, not the 160 KiB or more of data centers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < 160 * 1024


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which takes a second.
_has_small_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """No rows or no keys: zeros and -inf, still differentiable (by zeros) in every input."""
    total = sum(x.sum() for x in (q, k, v, sinks) if x is not None)
    zero = torch.where(torch.ones((), dtype=torch.bool, device=q.device), 0.0, total)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) + zero.to(q.dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32) + zero
    return out, lse


# -- block lists -----------------------------------------------------------------------------------------------------


class TileLists(NamedTuple):
    """Which tiles of TILE rows by TILE keys are computed, in the form of BlockMask, and the mask in them.

    Index 0 of the first dimension of the lists is for tiles that need a mask, index 1 for those that every row of sees
    every key of. The arrays of the mask are filled up to whole tiles with zeros.
    """

    kv_num: Tensor  # int32 (2, row tiles)
    kv_indices: Tensor  # int32 (2, row tiles, key tiles)
    q_num: Tensor  # int32 (2, key tiles)
    q_indices: Tensor  # int32 (2, key tiles, row tiles)
    row_begin: Tensor | None  # int32 (key tiles, TILE); None for row_begin[k] = k
    row_end: Tensor  # int32 (key tiles, TILE)
    q_depth: Tensor | None  # int32 (row tiles, TILE), with a window
    depth_limit: Tensor | None  # int32 (key tiles, TILE), with a window: rows see the key that are less deep than this

    def block_mask(self, rows: int, keys: int, mask_mod: Callable) -> BlockMask:
        """The BlockMask of flex_attention, with lists for one batch and one head that broadcast."""
        kv_num, kv_indices, q_num, q_indices = (x[:, None, None] for x in self[:4])
        return BlockMask(
            (rows, keys),
            kv_num[0],
            kv_indices[0],
            kv_num[1],
            kv_indices[1],
            q_num[0],
            q_indices[0],
            q_num[1],
            q_indices[1],
            (TILE, TILE),
            mask_mod,
        )


def tile_lists(mask: RowRanges, window: int | None = None) -> TileLists:
    """The lists of a mask, by tensor operations on its row ranges; no synchronisation.

    Keys that fill up the last tile end at row 0, so nobody sees them; rows that fill it up lie at or after every end.
    """
    row_end = _in_tiles(mask.row_end.detach())  # a view would keep alive what the lists are kept with
    row_begin = q_depth = depth_limit = None
    row_tiles, key_tiles = (mask.q_depth.shape[0] + TILE - 1) // TILE, row_end.shape[0]
    first_row = torch.arange(row_tiles, dtype=torch.int32, device=row_end.device)[:, None] * TILE
    end_row = first_row + TILE
    min_end, max_end = torch.aminmax(row_end, dim=1)
    if mask.row_begin is None:
        min_begin = torch.arange(key_tiles, dtype=torch.int32, device=row_end.device) * TILE
        max_begin = min_begin + (TILE - 1)
    else:
        row_begin = _in_tiles(mask.row_begin)
        min_begin, max_begin = torch.aminmax(row_begin, dim=1)
    needed = (max_end > first_row) & (min_begin < end_row)
    full = (max_begin <= first_row) & (min_end >= end_row)
    if window is not None:
        window = min(window, 1 << 30)  # no path is that long, and the sums stay within int32
        q_depth, k_depth = _in_tiles(mask.q_depth), _in_tiles(mask.k_depth)
        min_row, max_row = torch.aminmax(q_depth, dim=1)
        min_key, max_key = torch.aminmax(k_depth, dim=1)
        needed &= min_row[:, None] - max_key < window
        full &= max_row[:, None] - min_key < window
        depth_limit = k_depth + window
    tiles = torch.stack([needed ^ full, full])  # full tiles are all needed
    return TileLists(*_ordered(tiles), *_ordered(tiles.mT), row_begin, row_end, q_depth, depth_limit)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool ``(2, n, m)`` -> how many are set in each row, int32 ``(2, n)``, and their columns first, ``(2, n, m)``."""
    tiles = tiles.to(torch.uint8, memory_format=torch.contiguous_format)  # the kernels read contiguous lists
    columns = torch.argsort(tiles, dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), columns.to(torch.int32)


# One build serves every layer of a model: lists are kept for as long as the row_end they were made from.
_built: WeakIdKeyDictionary = WeakIdKeyDictionary()
_MAX_KEPT = 16  # of one row_end: windows, streams, other tensors of a rectangular mask


def _cached_tile_lists(mask: RowRanges, window: int | None) -> TileLists:
    """:func:`tile_lists`, remembered by the identity of the mask's tensors."""
    row_end = mask.row_end
    stream = 0
    if row_end.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a CUDA graph must make its lists anew at every replay
            return _build(mask, window)
        stream = torch.cuda.current_stream(row_end.device).cuda_stream  # on another one they may not be ready yet
    if row_end.is_inference():  # a change in place could not be seen
        return _build(mask, window)
    sources = (row_end,) if mask.row_begin is None else (row_end, mask.row_begin, mask.q_depth, mask.k_depth)
    key = (window, stream, *map(id, sources[1:]))
    versions = [x._version for x in sources]
    entries = _built.setdefault(row_end, {})
    found = entries.get(key)
    if found is not None and found[0] == versions:
        return found[1]
    lists = _build(mask, window)
    if len(entries) >= _MAX_KEPT:
        entries.clear()
    entries[key] = (versions, lists, sources[1:])  # holding the other sources keeps their ids from being used again
    return lists


def _build(mask: RowRanges, window: int | None) -> TileLists:
    lists = tile_lists(mask, window)
    for x in lists[:4]:
        # The number of tiles varies with that of tokens, but need not change between the first two.
        torch._dynamo.maybe_mark_dynamic(x, list(range(1, x.dim())))
    return lists
