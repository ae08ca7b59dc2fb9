"""The kernels from the Hugging Face Hub, for an install that has none: off unless asked for, at a pinned revision.

``TREE_ATTN_HUB=org/name@revision`` or ``tree_attn.use_hub("org/name@revision")``. Only the library of the Hub kernel
is loaded, after its files were compared with the digests it was published with; whatever fails is a reason in
``explain()``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "TREE_ATTN_HUB"
METADATA = "metadata.json"  # lies beside the library in a Hub kernel, in a wheel it does not
_LIBRARY = "libtree_attn_cuda.so"


class HubLibrary(NamedTuple):
    """A library from the Hub and the namespace of its operators."""

    path: Path
    namespace: str


_asked: tuple[str, bool] | None = None  # source, trust_remote_code


def use_hub(source: str | None, *, trust_remote_code: bool = False) -> None:
    """Take the CUDA kernels from the Hub where this install has none of its own.

    Args:
        source: ``"org/name@revision"``, the revision a branch, tag or commit; None: no longer.
        trust_remote_code: also from organisations that the Hub does not list as trusted publishers.

    Raises:
        ValueError: no revision, or no organisation.

    Example:
        >>> tree_attn.use_hub("org/tree-attn@v1")
    """
    global _asked
    if source is not None:
        _split(source)
    _asked = None if source is None else (source, trust_remote_code)
    from tree_attn import _kernels, registry

    _kernels.forget_absence()
    registry.reset()


def find() -> HubLibrary | str | None:
    """The library that was asked for, in words why it cannot be had, or None when none was asked for."""
    source, trust = _asked or (os.environ.get(VARIABLE), False)
    if not source:
        return None
    try:
        repository, revision = _split(source)
    except ValueError as error:
        return str(error)
    try:
        kernels: Any = importlib.import_module("kernels")
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        return f"the Hub kernel {source} needs the package `kernels` (pip install 'tree-attn[hub]'): {error}"
    offline = hub.constants.HF_HUB_OFFLINE
    try:
        folder = kernels.install_kernel(
            repository, revision=revision, trust_remote_code=trust, local_files_only=offline
        )
        if not offline:  # a cache with one variant of several is incomplete, which counts as absent once offline
            hub.snapshot_download(repository, repo_type="kernel", revision=revision)
        return _checked(Path(folder), source)
    except Exception as error:  # of many kinds, of three packages; the text is the reason that explain() shows
        return f"the Hub kernel {source} cannot be had: {type(error).__name__}: {error}"


def _split(source: str) -> tuple[str, str]:
    repository, _, revision = source.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")) or not revision:
        raise ValueError(f"the Hub kernel is {source!r}; name it as org/name@revision, the revision is mandatory")
    return repository, revision


def altered(folder: Path) -> str | None:
    """What in ``folder`` is not as it was published, by the digests of its metadata; None when everything is."""
    digest = json.loads((folder / METADATA).read_text())["digest"]
    if digest["algorithm"] != "sha256" or _LIBRARY not in digest["files"]:
        return f"its metadata has no sha256 digest of {_LIBRARY}"
    for name, expected in digest["files"].items():
        path = folder / name
        found = base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() if path.exists() else None
        if found != expected:
            return f"{name} is not the file that its digest was made of"
    return None


def _checked(folder: Path, source: str) -> HubLibrary | str:
    """The library in ``folder``, after a look at every digest of its metadata."""
    if not (folder / _LIBRARY).exists():
        return f"the Hub kernel {source} has no kernels for this machine, only {folder.name}"
    refusal = altered(folder)
    if refusal:
        return f"the Hub kernel {source} is refused: {refusal}"
    return HubLibrary(folder / _LIBRARY, json.loads((folder / METADATA).read_text())["id"])
