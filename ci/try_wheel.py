"""Tries out the wheel that is installed here, on a machine without a GPU: the library loads, and the answers are right.

    python ci/try_wheel.py cu130.sm90      python ci/try_wheel.py pure

Called so, from whatever folder, it imports the installed package and not the one of the checkout.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

import tree_attn
from tree_attn import _kernels


def try_library(label: str) -> None:
    """The version ends in the label, and this torch can load what was built with another."""
    version, _, local = importlib.metadata.version("tree-attn").partition("+")
    found = _kernels.load()
    if label == "pure":
        assert not local, f"a pure wheel is labelled {local}"
        assert isinstance(found, _kernels.Unavailable), f"a pure wheel has a library: {found}"
        return
    assert isinstance(found, _kernels.Kernels), f"the library does not load with torch {torch.__version__}: {found}"
    assert local == label, f"the wheel is labelled {local}, not {label}"
    assert found.build["version"] == version, (found.build, version)
    assert "cu" + str(found.build["cuda"]).replace(".", "") == label.partition(".")[0], (found.build, label)
    print("library:", found.build)


def try_answers() -> None:
    """Three branches of one prompt get what each path gets by itself."""
    torch.manual_seed(0)
    mask = tree_attn.TreeMask.from_nodes(parents=[-1, 0, 0, 0], lengths=[7, 3, 4, 2])
    q, k, v = (torch.randn(mask.total, heads, 16) for heads in (4, 2, 2))
    out = tree_attn.tree_attention(q, k, v, mask)
    for path in ([*range(7), 7, 8, 9], [*range(7), *range(10, 14)], [*range(7), 14, 15]):
        q1, k1, v1 = (x[path].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        alone = torch.nn.functional.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[path], alone[0].transpose(0, 1))  # float32's own tolerance
    print("answers:", tree_attn.explain(q, k, v, mask).chosen)


def main() -> None:
    label = sys.argv[1]
    package = Path(tree_attn.__file__).resolve()
    assert "site-packages" in package.parts, f"this is no installed wheel: {package}"
    installed = importlib.metadata.version("tree-attn")
    print(f"tree_attn {installed}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    try_library(label)
    try_answers()


if __name__ == "__main__":
    main()
