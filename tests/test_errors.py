"""Every call that cannot be right raises, and the message says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tree_attn
from tree_attn import BackendUnavailable, TreeMask, explain, tree_attention

TOKENS = 6


def call(**changes: Any) -> Any:
    """A valid call with some arguments replaced."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(TOKENS, 4, 8),
        "k": torch.zeros(TOKENS, 2, 8),
        "v": torch.zeros(TOKENS, 2, 5),
        "mask": TreeMask.from_nodes([-1, 0, 0], [3, 2, 1]),
    }
    return {**arguments, **changes}


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # tensors
    "q is no tensor": (call(q=[[1.0]]), TypeError, "q, k and v are list, Tensor, Tensor; give three tensors"),
    "v is None": (call(v=None), TypeError, "q, k and v are Tensor, Tensor, NoneType"),
    "a batch dimension": (call(q=zeros(1, TOKENS, 4, 8)), ValueError, r"q \(1, 6, 4, 8\), .* a batch is packed"),
    "no head dimension": (call(k=zeros(TOKENS, 8)), ValueError, r"k \(6, 8\), .* give three dimensions"),
    "integers": (call(q=zeros(TOKENS, 4, 8, dtype=torch.int64)), TypeError, "q is torch.int64; supported are float16"),
    "complex": (call(q=zeros(TOKENS, 4, 8, dtype=torch.complex64)), TypeError, "q is torch.complex64"),
    "float8": (call(q=zeros(TOKENS, 4, 8).to(torch.float8_e4m3fn)), TypeError, "q is torch.float8_e4m3fn"),
    "mixed dtypes": (
        call(k=zeros(TOKENS, 2, 8, dtype=torch.bfloat16)),
        TypeError,
        "q is torch.float32, k is torch.bfloat16, v is torch.float32; give all three one dtype",
    ),
    "k on another device": (
        call(k=zeros(TOKENS, 2, 8, device="meta")),
        ValueError,
        "q is on cpu, k on meta, v on cpu, mask on cpu; put all on one device",
    ),
    "mask on another device": (
        call(mask=call()["mask"].to("meta")),
        ValueError,
        r"mask on meta; put all on one device \(mask.to\('cpu'\)\)",
    ),
    "mask for another length": (
        call(mask=TreeMask.from_nodes([-1], [7])),
        ValueError,
        "q has 6 tokens, k 6, v 6, and mask is for 7; all must agree",
    ),
    "k of another length": (call(k=zeros(5, 2, 8)), ValueError, "q has 6 tokens, k 5, v 6"),
    "v of another length": (call(v=zeros(7, 2, 5)), ValueError, "q has 6 tokens, k 6, v 7"),
    "k and v of other heads": (call(v=zeros(TOKENS, 1, 5)), ValueError, "k has 2 heads and v has 1"),
    "heads no multiple": (
        call(q=zeros(TOKENS, 3, 8)),
        ValueError,
        "q has 3 heads and k has 2; heads must be a positive multiple of kv_heads",
    ),
    "fewer heads": (call(q=zeros(TOKENS, 1, 8)), ValueError, "q has 1 heads and k has 2"),
    "no heads": (call(q=zeros(TOKENS, 0, 8)), ValueError, "q has 0 heads and k has 2"),
    "no key heads": (call(k=zeros(TOKENS, 0, 8), v=zeros(TOKENS, 0, 5)), ValueError, "q has 4 heads and k has 0"),
    "head dims differ": (call(k=zeros(TOKENS, 2, 9)), ValueError, "q has head_dim 8 and k has 9; they must agree"),
    "head dim 0": (call(q=zeros(TOKENS, 4, 0), k=zeros(TOKENS, 2, 0)), ValueError, "head_dim is 0 and value_dim is 5"),
    "value dim 0": (call(v=zeros(TOKENS, 2, 0)), ValueError, "head_dim is 8 and value_dim is 0"),
    # the mask
    "a dense mask": (
        call(mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
        TypeError,
        "mask is Tensor; build a TreeMask with TreeMask.from_nodes, from_dfs or from_token_parents",
    ),
    "no mask": (call(mask=None), TypeError, "mask is NoneType; build a TreeMask"),
    # options
    "scale of text": (call(scale="auto"), TypeError, "scale is str; give a number, or None"),
    "scale NaN": (call(scale=float("nan")), ValueError, "scale is nan; give a finite number"),
    "scale infinite": (call(scale=float("inf")), ValueError, "scale is inf; give a finite number"),
    "softcap None": (call(softcap=None), TypeError, "softcap is NoneType; give a number, 0 for none"),
    "softcap negative": (call(softcap=-1.0), ValueError, "softcap is -1.0; give a positive number, or 0 for none"),
    "softcap infinite": (call(softcap=float("inf")), ValueError, "softcap is inf"),
    "softcap NaN": (call(softcap=float("nan")), ValueError, "softcap is nan"),
    "window float": (call(window=4.0), TypeError, "window is float; give an integer, or None for no window"),
    "window bool": (call(window=True), TypeError, "window is bool"),
    "window 0": (call(window=0), ValueError, r"window is 0; give at least 1 \(a token sees itself\)"),
    "window negative": (call(window=-1), ValueError, "window is -1"),
    "deterministic of text": (call(deterministic="yes"), TypeError, "deterministic is str; give True or False"),
    # sinks
    "sinks a list": (call(sinks=[0.0] * 4), TypeError, "sinks is list; give a tensor of one logit a head, or None"),
    "sinks of kv_heads": (call(sinks=zeros(2)), ValueError, r"sinks has shape \(2,\); give one logit a head, \(4,\)"),
    "sinks a scalar": (call(sinks=torch.tensor(0.0)), ValueError, r"sinks has shape \(\)"),
    "sinks integers": (call(sinks=zeros(4, dtype=torch.int32)), TypeError, "sinks is torch.int32; give a floating"),
    "sinks elsewhere": (call(sinks=zeros(4, device="meta")), ValueError, "sinks is on meta and q on cpu"),
    # the backend
    "unknown backend": (call(backend="fa9"), ValueError, "there is no backend 'fa9'; choose one of: .*reference"),
}


@pytest.mark.parametrize("function", [tree_attention, explain], ids=["tree_attention", "explain"])
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_says_what_is_wrong(name: str, function: Callable[..., object]) -> None:
    arguments, error, message = CASES[name]
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_the_errors_are_the_same(name: str) -> None:
    if name == "mixed dtypes":  # there they are cast to one
        return
    arguments, error, message = CASES[name]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=message.replace("torch.float32", ".*")):
        tree_attention(**arguments)


def test_options_are_keywords_only() -> None:
    arguments = call()
    with pytest.raises(TypeError, match="positional"):
        tree_attention(arguments["q"], arguments["k"], arguments["v"], arguments["mask"], 0.5)


def test_a_forced_backend_that_cannot_run_says_why_and_what_was_asked() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        tree_attention(**call(backend="cuda"))
    text = str(caught.value)
    assert "the forced backend 'cuda' cannot run torch.float32 on cpu, 4 heads, 2 key/value heads" in text
    assert "head_dim 8, value_dim 5" in text
    assert text.splitlines()[1].startswith("  cuda: ")
    assert isinstance(caught.value, RuntimeError)
    assert explain(**call(backend="cuda")).reasons["cuda"][0] in text


def test_the_valid_call_of_these_tests_is_valid() -> None:
    assert tree_attention(**call()).shape == (TOKENS, 4, 5)
    assert tree_attn.explain(**call()).chosen is not None
