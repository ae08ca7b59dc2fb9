"""Which backend runs a request, and why the others do not.

A backend answers one question, :meth:`Backend.supports`: the reasons it cannot run a request. The registry takes the
first in priority order that has none. A choice may be forced by the ``backend`` argument, :func:`use_backend` or the
environment variable ``TREE_ATTN_BACKEND`` (in that precedence); a forced backend never falls back.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tree_attn.mask import RowRanges

ENVIRONMENT_VARIABLE = "TREE_ATTN_BACKEND"
ENTRY_POINT_GROUP = "tree_attn.backends"


class BackendUnavailable(RuntimeError):  # noqa: N818  part of the public interface
    """No backend, or not the forced one, can run the request; the message lists every reason."""


class Request(NamedTuple):
    """What a backend decides on. Token counts are left out on purpose: a choice that changed with them would make a
    model's numbers depend on the batch."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    softcap: bool = False
    window: bool = False
    sinks: bool = False
    deterministic: bool = False
    rectangular: bool = False


@dataclass(frozen=True)
class Options:
    """The scalar arguments of one attention call, defaults filled in."""

    scale: float
    softcap: float = 0.0  # 0: none
    window: int | None = None
    deterministic: bool = False


class Backend:
    """Base class of backends.

    Tensors are ``q (rows, heads, head_dim)``, ``k (keys, kv_heads, head_dim)``, ``v (keys, kv_heads, value_dim)``,
    ``sinks (heads,)`` or None, ``out (rows, heads, value_dim)``, ``lse (heads, rows)`` without the sink; already
    validated, with a contiguous last dimension (``grad_out`` too) and any other strides. Autocast is off in every call.
    A backend implements :meth:`forward` and :meth:`backward`, or sets ``traced`` and implements :meth:`attend`.
    """

    name: str
    priority: int  # higher runs first
    traced = False  # True: a differentiable function of torch operations, put into a traced graph as it is

    def supports(self, request: Request) -> list[str]:
        """The reasons this backend cannot run ``request``; empty when it can."""
        raise NotImplementedError

    def remedy(self, request: Request) -> str | None:
        """What the user could install so that this backend runs here; None when nothing would help."""
        return None

    def detail(self, request: Request) -> str:
        """A few words for ``explain()`` on how it would run ``request``."""
        return ""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``."""
        raise NotImplementedError

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
        """Return the gradients of ``q, k, v, sinks``."""
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: RowRanges, options: Options
    ) -> tuple[Tensor, Tensor]:
        """For ``traced`` backends: ``(out, lse)``, differentiable by autograd."""
        raise NotImplementedError


# -- the list of backends --------------------------------------------------------------------------------------------

_backends: dict[str, Backend] = {}
_load_errors: dict[str, str] = {}
_chosen: dict[tuple[Request, str | None], Backend] = {}
_warned: set[str] = set()
_entry_points_loaded = False
generation = "0"  # counts changes of the list; traced code guards on it, and an int would become symbolic there


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Add a backend. Packages may instead name one in the entry-point group ``tree_attn.backends``.

    Raises:
        TypeError: not a :class:`Backend` instance, or one without a name or a priority.
        ValueError: the name is taken and ``replace`` is False.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"register_backend takes an instance of tree_attn.Backend, not {type(backend).__name__}")
    if not isinstance(getattr(backend, "name", None), str) or not isinstance(getattr(backend, "priority", None), int):
        raise TypeError(f"{type(backend).__name__} needs a name (str) and a priority (int)")
    if backend.name in _backends and not replace:
        raise ValueError(f"a backend named {backend.name!r} is registered; pass replace=True to replace it")
    _backends[backend.name] = backend
    reset()


def unregister_backend(name: str) -> None:
    """Remove a backend by name.

    Raises:
        ValueError: no backend has that name.
    """
    _named(name)
    del _backends[name]
    reset()


def reset() -> None:
    """Forget the choices made so far, for instance after a library was loaded that a backend waits for."""
    global generation
    generation = str(int(generation) + 1)
    _chosen.clear()


def backends() -> tuple[Backend, ...]:
    """Every registered backend, best first."""
    _load_entry_points()
    return tuple(sorted(_backends.values(), key=lambda b: -b.priority))


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
            register_backend(loaded() if isinstance(loaded, type) else loaded)
        except Exception as error:  # a broken plug-in must not take attention down; explain() shows it
            _load_errors[entry.name] = f"entry point {entry.value!r} failed to load: {type(error).__name__}: {error}"
            warnings.warn(f"tree_attn backend {entry.name!r}: {_load_errors[entry.name]}", stacklevel=2)


def _named(name: str, context: str = "") -> Backend:
    _load_entry_points()
    if name not in _backends:
        known = ", ".join(b.name for b in backends())
        raise ValueError(f"{context}there is no backend {name!r}; choose one of: {known}")
    return _backends[name]


# -- forcing a choice ------------------------------------------------------------------------------------------------

# Plain threading.local, not a ContextVar and not a subclass: torch.compile can read it, and its guards look at the
# thread that calls.
_in_thread = threading.local()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for every call that this thread makes inside a ``with`` block; None lifts an outer block.

    Code compiled by ``torch.compile`` obeys it, inside and around the compiled function. A backward pass runs the
    backend that its forward pass was forced to, wherever it is called.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> with tree_attn.use_backend("reference"):
        ...     out = tree_attn.tree_attention(q, k, v, mask)
    """
    if name is not None:
        _named(name)
    before = forced_in_thread()
    _force_in_thread(name)
    try:
        yield
    finally:
        _force_in_thread(before)


def _force_in_thread(name: str | None) -> None:
    """None is no attribute, as in a new thread: one state, and so one guard, for all that is not forced."""
    if name is not None or torch.compiler.is_compiling():  # torch.compile cannot trace the deletion
        _in_thread.name = name
    elif hasattr(_in_thread, "name"):
        del _in_thread.name


def forced_in_thread() -> str | None:
    """The name that :func:`use_backend` forces in this thread."""
    return getattr(_in_thread, "name", None)


def forced_in_environment() -> str | None:
    """The name that the environment forces, read anew at every call.

    torch.compile cannot guard on it. A compiled call obeys a change all the same, because the operator chooses when it
    runs; only away from a traced backend (flex) does a change go unseen, and towards one it is an error.
    """
    name = read_environment(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in _backends:
        _named(name, f"{ENVIRONMENT_VARIABLE} is {name!r}, but ")
    return name


def read_environment(name: str) -> str | None:
    """``os.environ.get(name)``, which takes 0.7 us for a variable that is not set, because it raises and catches two
    exceptions. A call reads three."""
    variables = getattr(os.environ, "_data", None)  # by bytes where the system's names are bytes, else by strings
    if variables is not None and name not in variables and name.encode() not in variables:
        return None
    return os.environ.get(name)


def forced(argument: str | None = None) -> str | None:
    """The backend that the argument, the thread or the environment forces, in that precedence."""
    return argument or forced_in_thread() or forced_in_environment()


# -- choosing --------------------------------------------------------------------------------------------------------


def select(request: Request, name: str | None) -> Backend:
    """The backend for ``request``; ``name`` is what :func:`forced` returned.

    Raises:
        BackendUnavailable: the forced backend, or every backend, has a reason not to run.
        ValueError: no backend has that name.
    """
    key = (request, name)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _search(request, name)
    return found


def _search(request: Request, name: str | None) -> Backend:
    candidates = backends() if name is None else (_named(name),)
    reasons: dict[str, list[str]] = {}
    for backend in candidates:
        reasons[backend.name] = backend.supports(request)
        if not reasons[backend.name]:
            _warn_of_better(candidates, reasons, request)
            return backend
    what = "no backend can" if name is None else f"the forced backend {name!r} cannot"
    raise BackendUnavailable(f"{what} run {_describe(request)}\n{_list_reasons(reasons)}")


def _warn_of_better(candidates: tuple[Backend, ...], reasons: dict[str, list[str]], request: Request) -> None:
    """Say once in a process that this machine could run a better backend than it has."""
    for backend in candidates[: len(reasons) - 1]:  # those that cannot run, best first
        remedy = backend.remedy(request)
        if remedy:
            if backend.name not in _warned:
                _warned.add(backend.name)
                why = "; ".join(reasons[backend.name])
                message = f"tree_attn: the {backend.name!r} backend would be faster here, but: {why}. {remedy}"
                warnings.warn(message, stacklevel=6)  # the caller of tree_attention
            return


def _describe(request: Request) -> str:
    options = [f for f in ("softcap", "window", "sinks", "deterministic", "rectangular") if getattr(request, f)]
    return (
        f"{request.dtype} on {request.device}, {request.heads} heads, {request.kv_heads} key/value heads, "
        f"head_dim {request.head_dim}, value_dim {request.value_dim}" + (f", with {', '.join(options)}" * bool(options))
    )


def _list_reasons(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {'; '.join(why) if why else 'can run'}" for name, why in reasons.items())


@dataclass(frozen=True)
class Explanation:
    """What :func:`tree_attn.explain` returns; ``print`` it.

    Attributes:
        request: what was asked for, in words.
        chosen: the name of the backend that would run, or None.
        forced: the name that was forced, or None.
        reasons: for each backend, best first, why it cannot run; empty lists can.
        details: for each backend that can run, a few words on how it would.
    """

    request: str
    chosen: str | None
    forced: str | None
    reasons: dict[str, list[str]]
    details: dict[str, str]

    def __str__(self) -> str:
        lines = [f"tree_attention: {self.request}"]
        if self.forced:
            lines.append(f"forced: {self.forced}")
        for name, why in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            state = "; ".join(why) if why else ("runs" if name == self.chosen else "could run")
            detail = f" ({self.details[name]})" if self.details.get(name) and not why else ""
            lines.append(f"{mark} {name:<10} {state}{detail}")
        if self.chosen is None:
            lines.append("nothing can run this request")
        return "\n".join(lines)


def explain_request(request: Request, name: str | None) -> Explanation:
    """Every backend's reasons for ``request``."""
    if name is not None:
        _named(name)
    everything = backends()
    reasons = {b.name: b.supports(request) for b in everything}
    reasons.update({broken: [why] for broken, why in _load_errors.items() if broken not in reasons})
    able = [b for b, why in reasons.items() if not why and name in (None, b)]
    details = {b.name: b.detail(request) for b in everything if not reasons[b.name]}
    return Explanation(_describe(request), able[0] if able else None, name, reasons, details)
