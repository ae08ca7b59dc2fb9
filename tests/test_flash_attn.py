"""flash-attn's function for trees, and the two-line patch for code written for flash-attn.

flash-attn needs a GPU. Where it is absent a package of that name with flash-attn 2.8's signatures, computed by torch,
stands in for it: that shows what is called with which arguments, and that transformers' own code reaches it; not that
flash-attn's kernels and this library agree, which the test marked ``gpu`` shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor

from tree_attn import TreeMask, pack
from tree_attn.integrations import flash_attn as integration
from tree_attn.integrations.flash_attn import (
    flash_attn_varlen_func,
    patch_FA_tree_attn,
    patch_flash_attn,
    unpatch_flash_attn,
)

# Two packed trees of nodes, with indices that restart in the second.
PARENTS = [[-1, 0, 0, 2, 2, 0], [-1, 0, 0]]
LENGTHS = [[5, 3, 2, 4, 1, 2], [4, 3, 6]]
TOTAL = sum(map(sum, LENGTHS))
CU = torch.tensor([0, sum(LENGTHS[0]), TOTAL], dtype=torch.int32)
SEEN = TreeMask.from_nodes([*PARENTS[0], -1, 6, 6], [*LENGTHS[0], *LENGTHS[1]])


def arrays() -> dict[str, Tensor]:
    start, end = [], []
    for parents, lengths in zip(PARENTS, LENGTHS, strict=True):
        last = list(range(len(parents)))
        for node in reversed(range(1, len(parents))):
            last[parents[node]] = max(last[parents[node]], last[node])
        for node, length in enumerate(lengths):
            start += [node] * length
            end += [last[node]] * length
    return {"tree_dfs_order_start_q": torch.tensor(start), "tree_dfs_order_end_k": torch.tensor(end)}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOTAL, heads, 8, generator=generator, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]


def offsets() -> dict[str, Any]:
    return {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 17, "max_seqlen_k": 17}


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` by the definition."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    # float64 sums of at most 13 terms
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = [torch.autograd.grad(out, leaves, cotangent) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# -- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_scale": 0.7},
        {"softcap": 1.5},
        {"window_size": (3, 0)},
        {"window_size": (3, 3)},
        {"window_size": (0, -1)},
        {"deterministic": True},
    ],
)
@pytest.mark.parametrize("tree", [True, False])
def test_every_argument_of_flash_attn_that_a_tree_has_is_honoured(tree, options):
    q, k, v = inputs()
    seen = SEEN.dense() if tree else TreeMask.from_nodes([-1, -1], [*CU.diff().tolist()]).dense()
    depth = SEEN.depth if tree else torch.arange(TOTAL)
    left = options.get("window_size", (-1, -1))[0]
    if left >= 0:
        seen = seen & (depth[:, None] - depth <= left)
    expected, _ = dense(q, k, v, seen, options.get("softmax_scale"), options.get("softcap", 0.0))
    found = flash_attn_varlen_func(q, k, v, **offsets(), causal=True, **options, **(arrays() if tree else {}))
    assert_same(found, expected, [q, k, v])


def test_the_log_sum_exp_comes_with_return_attn_probs():
    q, k, v = inputs()
    out, lse, probs = flash_attn_varlen_func(q, k, v, **offsets(), causal=True, return_attn_probs=True, **arrays())
    expected, expected_lse = dense(q, k, v, SEEN.dense())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert probs is None


def test_the_signature_is_that_of_flash_attn_and_two_keywords():
    ours = list(inspect.signature(flash_attn_varlen_func).parameters.values())
    theirs = list(inspect.signature(stand_in_varlen).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default) for p in ours[len(theirs) :]] == [
        ("tree_dfs_order_start_q", None),
        ("tree_dfs_order_end_k", None),
    ]


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (NotImplementedError, "dropout_p is 0.1", {"dropout_p": 0.1}),
        (NotImplementedError, "causal is False", {"causal": False}),
        (NotImplementedError, "alibi_slopes is given", {"alibi_slopes": torch.ones(4)}),
        (NotImplementedError, "block_table is given", {"block_table": torch.zeros(2, 1, dtype=torch.int32)}),
        (ValueError, "window_size is", {"window_size": (-2, 0)}),
        (ValueError, "without tree_dfs_order_end_k", {"tree_dfs_order_end_k": None}),
        (ValueError, "shape", {"tree_dfs_order_end_k": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "differ", {"cu_seqlens_k": torch.tensor([0, 3, TOTAL], dtype=torch.int32)}),
        (ValueError, "not depth-first", {"cu_seqlens_q": CU[[0, 2]], "cu_seqlens_k": CU[[0, 2]]}),
        (ValueError, "cu_seqlens", {"cu_seqlens_q": CU[:2], "cu_seqlens_k": CU[:2]}),
    ],
)
def test_what_a_tree_does_not_have_is_refused_by_name(error, match, options):
    with pytest.raises(error, match=match):
        flash_attn_varlen_func(*inputs(), **{**offsets(), "causal": True, **arrays(), **options})


def test_importing_the_library_imports_no_training_stack():
    code = (
        "import sys, tree_attn, tree_attn.integrations, tree_attn.integrations.flash_attn as f\n"
        "assert not {'transformers', 'trl', 'flash_attn', 'accelerate', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the patch -------------------------------------------------------------------------------------------------------


def stand_in_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Packed causal attention by torch."""
    calls.append(sorted({name for name, value in locals().items() if value is not None}))
    lengths = cu_seqlens_q.diff().tolist()
    seen = TreeMask.from_nodes([-1] * len(lengths), lengths).dense()
    return dense(q, k, v, seen, softmax_scale, softcap)[0]


def stand_in_dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """``(batch, tokens, heads, head_dim)``, causal."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return torch.stack([dense(*row, seen, softmax_scale, softcap)[0] for row in zip(q, k, v, strict=True)])


calls: list[list[str]] = []


@pytest.fixture
def fake_flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package ``flash_attn`` made of torch, also for transformers; the patch is undone afterwards."""
    utilities = None
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module("transformers.modeling_utils")  # looks for flash-attn while it is not there
        utilities = importlib.import_module("transformers.modeling_flash_attention_utils")
    package, interface, padding = (
        types.ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
    )
    package.__version__ = "2.8.3"
    package.__spec__ = ModuleSpec("flash_attn", loader=None)
    for module in (package, interface):
        module.flash_attn_varlen_func = stand_in_varlen
        module.flash_attn_func = stand_in_dense
        module.flash_attn_with_kvcache = stand_in_dense
    padding.pad_input = padding.unpad_input = None
    for module in (package, interface, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if utilities is not None:
        monkeypatch.setattr(utilities, "_loaded_implementation", None)
        for version in (2, 3, 4):
            monkeypatch.setattr(utilities, f"is_flash_attn_{version}_available", lambda version=version: version == 2)
    calls.clear()
    yield package
    unpatch_flash_attn()


def test_the_patch_gives_flash_attn_the_keywords_and_leaves_other_calls_alone(fake_flash_attn):
    patch_flash_attn()
    q, k, v = inputs()
    assert (
        fake_flash_attn.flash_attn_varlen_func is sys.modules["flash_attn.flash_attn_interface"].flash_attn_varlen_func
    )
    plain = fake_flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 17, 17, causal=True)
    none = dict.fromkeys(arrays())
    assert torch.equal(fake_flash_attn.flash_attn_varlen_func(q, k, v, **offsets(), causal=True, **none), plain)
    assert len(calls) == 2
    found = fake_flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 17, 17, 0.0, None, True, **arrays())
    assert len(calls) == 2
    assert_same(found, dense(q, k, v, SEEN.dense())[0], [q, k, v])
    assert not torch.allclose(found, plain)
    parameters = inspect.signature(fake_flash_attn.flash_attn_varlen_func).parameters
    assert list(parameters) == list(inspect.signature(flash_attn_varlen_func).parameters)


def test_the_patch_can_be_repeated_and_undone_under_both_its_names(fake_flash_attn):
    assert patch_FA_tree_attn is patch_flash_attn
    for _round in range(2):
        patch_flash_attn()
        patched = fake_flash_attn.flash_attn_varlen_func
        patch_flash_attn()
        assert fake_flash_attn.flash_attn_varlen_func is patched is not stand_in_varlen
        unpatch_flash_attn()
        assert fake_flash_attn.flash_attn_varlen_func is stand_in_varlen
        assert sys.modules["flash_attn.flash_attn_interface"].flash_attn_varlen_func is stand_in_varlen
        unpatch_flash_attn()


def test_undoing_leaves_what_somebody_else_put_there(fake_flash_attn):
    patch_flash_attn()
    fake_flash_attn.flash_attn_varlen_func = stand_in_dense
    with pytest.warns(UserWarning, match=r"flash_attn.flash_attn_varlen_func was replaced"):
        unpatch_flash_attn()
    assert fake_flash_attn.flash_attn_varlen_func is stand_in_dense


def test_without_flash_attn_the_error_names_the_other_ways(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match='attn_implementation="tree_attn"'):
        patch_flash_attn()


def test_another_version_of_flash_attn_warns_with_the_range(fake_flash_attn):
    fake_flash_attn.__version__ = "3.0.1"
    with pytest.warns(UserWarning, match=r"tested with flash_attn 2.8 to 2.8; found 3.0.1"):
        patch_flash_attn()


# -- models with attn_implementation="flash_attention_2" -------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_models import make_model, with_attention

    return with_attention(make_model("llama"), "flash_attention_2")


def model_arguments(batch: Any) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "use_cache": False,
        "tree_dfs_order_start_q": torch.arange(batch.num_tokens),
        "tree_dfs_order_end_k": batch.mask.subtree_end - 1,
    }


SIBLINGS = [pack([[5, 6, 7, 8, *sibling], [5, 6, 7, 8, 9, 10, 11]]) for sibling in ([20, 21, 22], [24, 25, 26])]


def other_path(model: Any, batch: Any) -> Tensor:
    """The logits of the sequence whose sibling changes."""
    return batch.gather(model(**model_arguments(batch)).logits[0])[1]


def test_a_patched_model_does_not_see_siblings_and_equals_its_paths(model, fake_flash_attn):
    from hf_models import gradients, path_loss, paths_of, relative_error, run_paths, with_attention

    patch_flash_attn()
    assert torch.equal(*(other_path(model, batch) for batch in SIBLINGS))
    assert not calls
    batch, sequences = SIBLINGS[0], [[5, 6, 7, 8, 20, 21, 22], [5, 6, 7, 8, 9, 10, 11]]
    eager = with_attention(model, "eager")
    alone = run_paths(eager, sequences)
    expected = gradients(eager, path_loss(alone, sequences))
    logits = model(**model_arguments(batch)).logits
    found = gradients(model, batch.loss(logits))
    assert relative_error(paths_of(batch, logits), torch.cat(alone)) < 1e-5  # float32, the bound the project promises
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-5


def test_patching_flash_attn_alone_would_be_silently_causal(model, fake_flash_attn, monkeypatch):
    # Why the attention function of transformers is replaced too: this is what happens when it is not.
    monkeypatch.setattr(integration, "_patch_transformers", lambda: None)
    patch_flash_attn()
    assert not torch.equal(*(other_path(model, batch) for batch in SIBLINGS))


def test_calls_of_a_patched_model_without_a_tree_reach_flash_attn(model, fake_flash_attn):
    from hf_models import relative_error, run_paths, with_attention

    sequences = [[5, 6, 7, 8, 9], [5, 6, 3]]
    cu = torch.tensor([0, 5, 8], dtype=torch.int32)
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 3]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": 5,
        "max_length_k": 5,
        "use_cache": False,
    }
    before = model(**packed).logits
    layers = len(calls)
    patch_flash_attn()
    assert torch.equal(model(**packed).logits, before)
    assert len(calls) == 2 * layers == 4
    assert relative_error(before[0], torch.cat(run_paths(with_attention(model, "eager"), sequences))) < 1e-5


def test_undoing_gives_transformers_its_function_back(model, fake_flash_attn):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    patch_flash_attn()
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is not original
    unpatch_flash_attn()
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is original
    # Code that puts its own function over the registered one (verl does) is wrapped, not lost.
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = stand_in_dense
    try:
        patch_flash_attn()
        assert torch.equal(*(other_path(model, batch) for batch in SIBLINGS))
        unpatch_flash_attn()
        assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is stand_in_dense
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is original


def test_transformers_refuses_the_model_where_flash_attn_is_absent():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_models import make_model
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available() or importlib.util.find_spec("kernels") is not None:
        pytest.skip("flash-attn (or its Hub kernel) is installed, so transformers accepts the model")
    with pytest.raises(ImportError, match="FlashAttention2"):
        make_model("llama", "flash_attention_2")


# -- the real package ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_flash_attn_itself_agrees_without_a_tree_and_takes_the_keywords():
    flash_attn = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    q, k, v = (x.detach().cuda().bfloat16().requires_grad_() for x in inputs())
    options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in offsets().items()}
    try:
        patch_flash_attn()
        theirs = flash_attn.flash_attn_varlen_func(q, k, v, **options, causal=True)
        ours = flash_attn_varlen_func(q, k, v, **options, causal=True)
        tree = {name: x.cuda() for name, x in arrays().items()}
        found = flash_attn.flash_attn_varlen_func(q, k, v, **options, causal=True, **tree)
    finally:
        unpatch_flash_attn()
    # bfloat16 of outputs near 1, rounded twice: P and the output
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
    expected = dense(q.double(), k.double(), v.double(), SEEN.dense().cuda())[0]
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
