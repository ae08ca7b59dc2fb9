"""attn_implementation="tree_attn": models of transformers compute on a tree what they compute on every path alone."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tree_attn
from tree_attn import TreeMask, pack

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")

import hf_models
from hf_models import (
    ARCHITECTURES,
    SEQUENCES,
    gradients,
    make_model,
    path_loss,
    paths_of,
    relative_error,
    run_paths,
    with_attention,
)

from tree_attn.integrations import transformers as integration
from tree_attn.integrations.transformers import model_inputs

every_architecture = pytest.mark.parametrize("model_type", list(ARCHITECTURES))
# float32 sums of a few hundred terms in another order; the bound the project promises
FLOAT32 = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _registered_and_one_thread() -> Iterator[None]:
    """Models this small lose time by threads."""
    integration.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dfs_arrays(batch: tree_attn.PackedBatch) -> tuple[Tensor, Tensor]:
    """Depth-first indices in which every token is a node."""
    return torch.arange(batch.num_tokens), batch.mask.subtree_end.long() - 1


# -- the same numbers as every path alone ----------------------------------------------------------------------------


@every_architecture
def test_logits_and_every_gradient_equal_the_paths_run_alone_with_eager_attention(model_type):
    eager = make_model(model_type)
    expected_logits = run_paths(eager)
    expected = gradients(eager, path_loss(expected_logits))
    batch = pack(SEQUENCES)
    tree = with_attention(eager, "tree_attn")
    logits = tree(**model_inputs(batch)).logits
    found = gradients(tree, batch.loss(logits))
    assert relative_error(paths_of(batch, logits), torch.cat(expected_logits)) < FLOAT32
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < FLOAT32, name
    attention = [n for n in expected if "self_attn" in n]
    assert all(expected[n].abs().max() > 0 for n in attention)


@every_architecture
def test_bfloat16_is_as_exact_as_the_paths_run_alone(model_type):
    # A ratio of two rounding errors varies by a factor of four either way for a gradient of four numbers, so each
    # ratio is the geometric mean over models and over the layers that hold the parameter; those of four numbers (sinks
    # and routers' biases) are taken together. All experts run: bfloat16 would choose others than float64 does.
    changes = {"num_experts_per_tok": 4} if model_type == "gpt_oss" else {}
    batch = pack(SEQUENCES)
    log_ratios: dict[str, list[float]] = defaultdict(list)
    for seed in range(30):
        eager = make_model(model_type, seed=seed, **changes).bfloat16()
        tree, exact = with_attention(eager, "tree_attn"), with_attention(eager, "eager").double()
        results = []
        for model in (exact, eager):
            logits = run_paths(model)
            results.append({"logits": torch.cat(logits), **gradients(model, path_loss(logits))})
        logits = tree(**model_inputs(batch)).logits
        results.append({"logits": paths_of(batch, logits), **gradients(tree, batch.loss(logits))})
        truth, alone, packed = results
        for name, value in truth.items():
            errors = relative_error(packed[name], value), relative_error(alone[name], value)
            kind = "four numbers" if value.numel() == 4 else re.sub(r"layers\.\d+\.", "", name)
            log_ratios[kind].append(math.log(errors[0] / errors[1]))
    ratios = {kind: math.exp(sum(values) / len(values)) for kind, values in log_ratios.items()}
    assert {kind: ratio for kind, ratio in ratios.items() if ratio > 1.2} == {}


def test_a_softcap_on_the_scores_is_kept():
    eager = make_model("gemma2", sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    batch = pack(SEQUENCES)
    logits = with_attention(eager, "tree_attn")(**model_inputs(batch)).logits
    assert relative_error(paths_of(batch, logits), torch.cat(run_paths(eager))) < FLOAT32


@every_architecture
def test_the_tokens_of_a_sibling_change_nothing(model_type):
    model = make_model(model_type, "tree_attn")
    other = [5, 6, 7, 8, 9, 10, 11]
    batches = [pack([[5, 6, 7, 8, *sibling], other]) for sibling in ([20, 21, 22, 23], [24, 25, 26, 27])]
    first, second = (paths_of(b, model(**model_inputs(b)).logits).split([8, 7]) for b in batches)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0][4:], second[0][4:])


# -- the ways of saying the tree -------------------------------------------------------------------------------------


def ways_of_saying_it(batch: tree_attn.PackedBatch) -> dict[str, dict]:
    start, end = dfs_arrays(batch)
    cu = torch.tensor([*batch.mask.roots, batch.num_tokens], dtype=torch.int32)
    tree = torch.searchsorted(cu, torch.arange(batch.num_tokens), right=True) - 1
    restarting = {"tree_dfs_order_start_q": start - cu[tree], "tree_dfs_order_end_k": end - cu[tree]}
    return {
        "arrays": {"tree_dfs_order_start_q": start, "tree_dfs_order_end_k": end},
        "arrays of one row": {"tree_dfs_order_start_q": start[None], "tree_dfs_order_end_k": end[None].int()},
        "arrays that restart": {**restarting, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone()},
    }


@pytest.mark.parametrize("way", ["arrays", "arrays of one row", "arrays that restart"])
def test_every_way_of_saying_the_tree_gives_the_same_bits(way):
    batch = pack(SEQUENCES)
    model = make_model("llama", "tree_attn")
    inputs = model_inputs(batch)
    expected = model(**inputs).logits
    del inputs["tree_mask"]
    assert torch.equal(model(**inputs, **ways_of_saying_it(batch)[way]).logits, expected)


def test_a_batch_of_rows_is_read_row_after_row():
    rows = [pack([[1, 2, 3, 4], [1, 2, 5, 6]]), pack([[7, 8, 9, 9], [7, 3, 9]])]
    model = make_model("mistral", "tree_attn")
    expected = torch.cat([model(**model_inputs(row)).logits for row in rows])
    start, end = (torch.stack(arrays) for arrays in zip(*map(dfs_arrays, rows), strict=True))
    inputs = {
        "input_ids": torch.stack([row.input_ids for row in rows]),
        "position_ids": torch.stack([row.position_ids for row in rows]),
    }
    found = model(**inputs, tree_dfs_order_start_q=start, tree_dfs_order_end_k=end).logits
    assert relative_error(found, expected) < 1e-6
    ends = torch.cat([rows[0].mask.subtree_end, rows[1].mask.subtree_end + 6])
    mask = TreeMask.from_dfs(torch.arange(12), ends - 1)
    assert torch.equal(model(**inputs, tree_mask=mask).logits, found)


@every_architecture
def test_offsets_alone_pack_sequences_causally(model_type):
    eager = make_model(model_type)
    lengths = torch.tensor([len(s) for s in SEQUENCES])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids = torch.tensor([[token for s in SEQUENCES for token in s]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 11, "max_length_k": 11}
    model = with_attention(eager, "tree_attn")
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert relative_error(model(**inputs, **offsets).logits[0], torch.cat(run_paths(eager))) < FLOAT32
    # Without offsets transformers finds the sequences by their position ids (in gpt-oss it does not look for them).
    assert relative_error(model(**inputs).logits, eager(**inputs).logits) < FLOAT32


# -- no tree: what the model does without this library ---------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured(model_type, side):
    eager = make_model(model_type)
    width = max(map(len, SEQUENCES))
    rows = [[0] * (width - len(s)) + s if side == "left" else s + [0] * (width - len(s)) for s in SEQUENCES]
    keep = torch.tensor([[bool(t) for t in row] for row in rows])
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": keep.long()}
    if side == "left":
        inputs["position_ids"] = (keep.cumsum(-1) - 1).clamp(min=0)
    logits = with_attention(eager, "tree_attn")(**inputs).logits
    assert relative_error(logits[keep], eager(**inputs).logits[keep]) < FLOAT32
    assert relative_error(logits[keep], torch.cat(run_paths(eager))) < FLOAT32


@every_architecture
def test_an_unpadded_batch_is_plain_causal(model_type):
    eager = make_model(model_type)
    ids = torch.arange(3, 27).reshape(2, 12)
    model = with_attention(eager, "tree_attn")
    expected = eager(input_ids=ids).logits
    assert relative_error(model(input_ids=ids).logits, expected) < FLOAT32
    assert relative_error(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected) < FLOAT32


@every_architecture
def test_generate_with_a_cache_gives_the_tokens_of_eager_attention(model_type):
    eager = make_model(model_type).eval()
    model = with_attention(eager, "tree_attn")
    for padding in (0, 2):
        ids = torch.tensor([[4, 5, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]])
        ids[0, :padding] = 0
        options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        for cache in ("dynamic", "static"):
            outputs = [m.generate(ids, cache_implementation=cache, **options) for m in (eager, model)]
            assert outputs[0].shape == (2, 13)
            assert torch.equal(*outputs)


def test_masks_that_no_tree_can_say_are_those_of_the_model_itself():
    ids = torch.arange(3, 27).reshape(2, 12)
    keep = torch.ones_like(ids)
    keep[0, :3] = 0
    own = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)).ge(0.5) | torch.eye(12, dtype=torch.bool)
    own_float = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
    llama4 = {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]}
    llama4 |= {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48}
    cases = [
        ("gemma3_text", {"use_bidirectional_attention": True}, {}),
        ("gemma3_text", {"use_bidirectional_attention": True}, {"attention_mask": keep}),
        ("llama4_text", llama4, {"attention_mask": keep}),
        ("llama", {}, {"attention_mask": own_float}),
        ("gpt_oss", {}, {"attention_mask": own_float}),
    ]
    for model_type, changes, inputs in cases:
        eager = make_model(model_type, **changes)
        expected, found = (m(input_ids=ids, **inputs).logits for m in (eager, with_attention(eager, "tree_attn")))
        rows = keep.bool() if inputs.get("attention_mask") is keep else torch.ones_like(keep).bool()
        assert relative_error(found[rows], expected[rows]) < FLOAT32, (model_type, changes)
        with pytest.raises(NotImplementedError, match=r"cannot be combined with a tree|not causal"):
            with_attention(eager, "tree_attn")(
                input_ids=ids, **inputs, tree_mask=TreeMask.from_nodes([-1, -1], [12, 12])
            )


def test_a_model_that_demands_a_mask_gets_one():
    # Falcon adds its position bias to it.
    mask = integration.attention_mask(batch_size=2, q_length=3, kv_length=3, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 1, 3, 3))


def test_blocks_that_see_one_another_keep_the_mask_the_model_makes():
    from transformers.masking_utils import create_causal_mask

    if "block_sequence_ids" not in inspect.signature(create_causal_mask).parameters:
        pytest.skip("this version of transformers has no blocks")
    embeddings = torch.zeros(1, 6, 32)
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]])  # an image of three tokens, say
    masks = []
    for implementation in ("sdpa", "tree_attn"):
        config = make_model("llama", implementation).config
        masks.append(create_causal_mask(config, embeddings, None, None, block_sequence_ids=blocks))
    assert torch.equal(*masks)
    assert masks[0][0, 0, 1, 3]


# -- training machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [None, "arrays"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, way):
    batch = pack(SEQUENCES)
    model = make_model("qwen3", "tree_attn")
    inputs = model_inputs(batch)
    if way is not None:
        del inputs["tree_mask"]
        inputs.update(ways_of_saying_it(batch)[way])
    expected = gradients(model, batch.loss(model(**inputs).logits))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, batch.loss(model(**inputs).logits))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_mask_is_derived_once_a_step_however_many_layers_there_are(monkeypatch):
    derived = []
    original = TreeMask._from_subtree_end.__func__
    monkeypatch.setattr(
        TreeMask, "_from_subtree_end", classmethod(lambda cls, end: derived.append(1) or original(cls, end))
    )
    batch = pack(SEQUENCES)
    model = make_model("llama", "tree_attn", num_hidden_layers=6)
    model.gradient_checkpointing_enable()
    inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "use_cache": False}
    for _step in range(2):
        derived.clear()
        start, end = dfs_arrays(batch)
        model(**inputs, tree_dfs_order_start_q=start, tree_dfs_order_end_k=end).logits.sum().backward()
        assert len(derived) == 1
    derived.clear()
    model(input_ids=torch.ones(2, 8, dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert len(derived) == 1


def test_arrays_written_anew_in_place_give_a_new_mask():
    batches = [pack([[1, 2, 3, 4], [1, 2, 5, 6]]), pack([[1, 2, 3, 4, 5], [1, 6]])]
    model = make_model("llama", "tree_attn")
    start, end = dfs_arrays(batches[0])
    for batch in batches:
        end.copy_(dfs_arrays(batch)[1])
        inputs = model_inputs(batch)
        expected = model(**inputs).logits
        del inputs["tree_mask"]
        found = model(**inputs, tree_dfs_order_start_q=start, tree_dfs_order_end_k=end).logits
        assert torch.equal(found, expected)


def test_arrays_first_used_in_inference_mode_train_afterwards():
    batch = pack(SEQUENCES)
    model = make_model("llama", "tree_attn")
    inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], "use_cache": False}
    inputs.update(ways_of_saying_it(batch)["arrays"])
    with torch.inference_mode():
        expected = model(**inputs).logits.clone()
    logits = model(**inputs).logits
    logits.sum().backward()
    assert torch.equal(logits.detach(), expected)


@pytest.mark.gpu
@every_architecture
def test_the_kernels_make_a_model_as_exact_as_its_paths(model_type):
    changes = {"num_experts_per_tok": 4} if model_type == "gpt_oss" else {}
    eager = make_model(model_type, head_dim=64, **changes).bfloat16()
    exact = with_attention(eager, "eager").double()
    results = []
    for model in (exact, eager):
        logits = run_paths(model)
        results.append({"logits": torch.cat(logits), **gradients(model, path_loss(logits))})
    batch = pack(SEQUENCES).to("cuda")
    tree = with_attention(eager, "tree_attn").to("cuda")
    logits = tree(**model_inputs(batch)).logits
    results.append({"logits": paths_of(batch, logits).cpu(), **gradients(tree, batch.loss(logits))})
    truth, alone, packed = results
    logs = [
        math.log(relative_error(packed[name].cpu(), value) / relative_error(alone[name], value))
        for name, value in truth.items()
    ]
    # One model: rounding errors of a gradient vary by a factor of two, their mean over thirty gradients by far less.
    assert math.exp(sum(logs) / len(logs)) < 1.5


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["mask", "arrays", "offsets"])
def test_only_the_first_layer_synchronises(way):
    batch = pack(SEQUENCES).to("cuda")
    arrays = {"tree_dfs_order_start_q": torch.arange(batch.num_tokens, device="cuda")}
    arrays["tree_dfs_order_end_k"] = batch.mask.subtree_end - 1
    cu = torch.tensor([0, 5, batch.num_tokens], dtype=torch.int32, device="cuda")
    arguments = {"mask": {"tree_mask": batch.mask}, "arrays": arrays, "offsets": {"cu_seq_lens_q": cu}}[way]
    arguments["position_ids"] = batch.position_ids[None]
    q, k, v = (torch.randn(1, h, batch.num_tokens, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    module = nn.Linear(1, 1)
    first, _ = integration.attention_forward(module, q, k, v, None, **arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, _ = integration.attention_forward(module, q, k, v, None, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(first, second)


class Layer(nn.Module):
    """One decoder layer with its rotary embedding, to compile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = model.model.layers[0], model.model.rotary_emb

    def forward(self, x: Tensor, position_ids: Tensor, **tree: object) -> Tensor:
        out = self.layer(x, position_ids=position_ids, position_embeddings=self.rotary(x, position_ids), **tree)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("way", ["mask", "arrays"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same_numbers(way):
    torch.compiler.reset()
    layer = Layer(make_model("qwen3", "tree_attn"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for extra in range(5):
        batch = pack([*SEQUENCES, [5, 6, 7, *range(8, 9 + extra)]])
        inputs = {"tree_mask": batch.mask} if way == "mask" else ways_of_saying_it(batch)["arrays"]
        x = torch.randn(1, batch.num_tokens, 32, generator=torch.Generator().manual_seed(extra))
        results = []
        for run in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf, batch.position_ids[None], **inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, layer.layer.self_attn.q_proj.weight])))
        for found, expected in zip(*results, strict=True):
            assert relative_error(found, expected) < 1e-6
    assert counter.frame_count <= 2  # the second time with symbolic sizes, and then no more


def test_a_whole_model_compiles():
    torch.compiler.reset()
    batch = pack(SEQUENCES)
    model = make_model("mistral", "tree_attn")
    expected = model(**model_inputs(batch)).logits
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(compiled(**model_inputs(batch)).logits, expected) < 1e-6
    ids = torch.arange(3, 27).reshape(2, 12)
    assert relative_error(compiled(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-6


# -- errors and warnings ---------------------------------------------------------------------------------------------

BATCH = pack(SEQUENCES)
START, END = dfs_arrays(BATCH)
N = BATCH.num_tokens
PADDED = torch.arange(N)[None] > 1


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "without tree_dfs_order_end_k", {"tree_dfs_order_start_q": START}),
        (ValueError, "without tree_dfs_order_start_q", {"tree_dfs_order_end_k": END}),
        (ValueError, "give one of them", {"tree_mask": BATCH.mask, "tree_dfs_order_end_k": END}),
        (ValueError, "shape", {"tree_dfs_order_start_q": START[1:], "tree_dfs_order_end_k": END}),
        (TypeError, "give a tensor", {"tree_dfs_order_start_q": START.tolist(), "tree_dfs_order_end_k": END}),
        (TypeError, "give a tree_attn.TreeMask", {"tree_mask": BATCH.mask.dense()}),
        (ValueError, "3 tokens", {"tree_mask": TreeMask.from_nodes([-1], [3])}),
        (ValueError, "end_k >= start_q", {"tree_dfs_order_start_q": START, "tree_dfs_order_end_k": START.flip(0)}),
        (ValueError, "keys", {"cu_seq_lens_k": torch.tensor([0, N])}),
        (ValueError, "differ", {"cu_seq_lens_q": torch.tensor([0, N]), "cu_seq_lens_k": torch.tensor([0, 2, N])}),
        (ValueError, "cu_seqlens", {"cu_seq_lens_q": torch.tensor([0, N - 1])}),
        (
            ValueError,
            "Leave attention_mask out",
            {"tree_mask": BATCH.mask, "attention_mask": PADDED},
        ),
        (NotImplementedError, "dropout is 0.1", {"tree_mask": BATCH.mask, "dropout": 0.1}),
    ],
)
def test_arguments_that_contradict_are_an_error_that_says_what_to_do(error, match, arguments):
    arguments = dict(arguments)
    model = make_model("llama", "tree_attn", attention_dropout=arguments.pop("dropout", 0.0))
    with pytest.raises(error, match=match):
        model(input_ids=BATCH.input_ids[None], position_ids=BATCH.position_ids[None], use_cache=False, **arguments)


def test_forgotten_position_ids_are_an_error_where_the_tree_branches():
    model = make_model("llama", "tree_attn")
    with pytest.raises(ValueError, match="position_ids count the packed tokens"):
        model(input_ids=BATCH.input_ids[None], tree_mask=BATCH.mask, use_cache=False)
    # Paths that follow one another have the right distances, and so does a tree that begins later.
    chains = TreeMask.from_nodes([-1, -1], [4, 3])
    ids = torch.arange(3, 10)[None]
    separate = [model(input_ids=ids[:, :4]).logits, model(input_ids=ids[:, 4:]).logits]
    together = model(input_ids=ids, tree_mask=chains, use_cache=False).logits
    assert relative_error(together, torch.cat(separate, dim=1)) < FLOAT32
    later = model_inputs(BATCH)
    later["position_ids"] = later["position_ids"] + 9
    assert relative_error(model(**later).logits, model(**model_inputs(BATCH)).logits) < FLOAT32


def test_a_tree_after_a_cache_is_an_error():
    model = make_model("llama", "tree_attn")
    cache = model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values
    inputs = {**model_inputs(BATCH), "use_cache": True, "past_key_values": cache}
    with pytest.raises(NotImplementedError, match="key/value cache"):
        model(**inputs)


@pytest.mark.parametrize(
    ("match", "options"),
    [("continuous batching", {"cache": object()}), ("position bias", {"position_bias": torch.zeros(1, 1, 3, 3)})],
)
def test_what_an_attention_function_cannot_do_is_not_left_out_silently(match, options):
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    with pytest.raises(NotImplementedError, match=match):
        integration.attention_forward(nn.Linear(1, 1), q, k, v, None, **options)


@pytest.mark.parametrize(
    ("version", "warns"), [("5.3.1", True), ("5.4.0", False), ("5.23.7", False), ("5.24.0.dev0", True), ("6", True)]
)
def test_a_version_outside_the_tested_range_warns_with_the_range(version, warns, monkeypatch, recwarn):
    monkeypatch.setattr(integration.transformers, "__version__", version)
    integration.register()
    messages = [str(w.message) for w in recwarn if "tree_attn is tested" in str(w.message)]
    assert len(messages) == warns
    assert all("5.4 to 5.23" in m and version in m for m in messages)


def test_registering_twice_changes_nothing():
    importlib.reload(hf_models)
    before = make_model("llama", "tree_attn")(**model_inputs(BATCH)).logits
    integration.register()
    assert torch.equal(make_model("llama", "tree_attn")(**model_inputs(BATCH)).logits, before)
