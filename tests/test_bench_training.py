"""The end-to-end benchmark: its arms compute the same step, and the attention it compares with is right."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

CI = Path(__file__).parent.parent / "ci"
if not CI.is_dir():
    pytest.skip(f"{CI} is not here: the tests run outside a checkout", allow_module_level=True)


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(CI))
    yield
    for name in ("bench_training", "training_attention", "gpu_bench"):
        sys.modules.pop(name, None)


@pytest.fixture
def attention(_scripts: None) -> ModuleType:
    return importlib.import_module("training_attention")


# -- the attention of the other arms ---------------------------------------------------------------------------------

LENGTHS = [300, 1, 256, 77]
PARENTS, NODES = [-1, 0, 1, 1, 0, -1], [130, 20, 1, 40, 260, 5]


def cases(attention: ModuleType) -> dict[str, tuple[Any, Tensor | None]]:
    device = torch.device("cpu")
    return {
        "sequences": (attention.packed(LENGTHS, device), None),
        "sequences of one length": (attention.packed([70, 70, 70], device), None),
        "paths of nodes": attention.paths_of_nodes(PARENTS, NODES, device),
    }


def random_qkv(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def varlen_stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function of CUDA alone, on offsets."""
    assert window_size == (-1, 0)  # causal
    assert enable_gqa
    lengths = [x.diff().tolist() for x in (cu_seq_q, cu_seq_k)]
    assert [max_q, max_k] == list(map(max, lengths))
    module = importlib.import_module("training_attention")
    return module.one_by_one(module.Segments(*lengths, q.device))(q, k, v)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", ["sequences", "sequences of one length", "paths of nodes"])
@pytest.mark.parametrize("way", ["one by one", "padded", "padded, heads repeated", "flex", "varlen"])
def test_every_way_gives_each_query_the_keys_of_its_path(attention, monkeypatch, way, case):
    segments, gathered = cases(attention)[case]
    ways = {
        "one by one": attention.one_by_one,
        "padded": lambda s: attention.padded(s, SDPBackend.MATH),
        "padded, heads repeated": lambda s: attention.repeated(attention.padded(s, SDPBackend.MATH)),
        "flex": lambda s: attention.flex(s, compiled=False),
        "varlen": attention.varlen,
    }
    if way.startswith("padded") and gathered is not None:
        with pytest.raises(NotImplementedError, match="own"):
            ways[way](segments)
        return
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_stand_in)
    leaves = random_qkv(sum(segments.q_lengths))
    if way == "flex":  # has no backward pass on a CPU
        leaves = [x.detach() for x in leaves]
    out = segments.run(ways[way](segments), gathered)(*leaves)
    # float32 sums of at most some hundred terms
    assert attention.error(segments, gathered, tuple(leaves), out.detach()) < 1e-6
    if way == "flex":
        return
    expected = segments.run(attention.one_by_one(segments), gathered)(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    found, wanted = (torch.autograd.grad(o, leaves, weights) for o in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["sequences", "sequences of one length", "paths of nodes"])
def test_no_block_that_is_seen_is_left_out_and_whole_ones_are(attention, case):
    segments, _ = cases(attention)[case]
    first, last = segments.visible()
    key = torch.arange(sum(segments.k_lengths))
    seen = (key >= first[:, None]) & (key <= last[:, None])
    for pair, (needed, whole) in enumerate(zip(*(x.flatten() for x in attention.block_pairs(segments)), strict=True)):
        row, column = divmod(pair, -(-len(key) // attention.BLOCK))
        block = seen.split(attention.BLOCK)[row].split(attention.BLOCK, dim=1)[column]
        assert needed or not block.any()
        assert not whole or (block.all() and block.shape == (attention.BLOCK, attention.BLOCK))
    assert not attention.block_pairs(segments)[0].all()


def test_the_paths_of_nodes_are_those_of_the_tree(attention):
    from tree_attn import TreeMask, tree_attention

    segments, gathered = cases(attention)["paths of nodes"]
    mask = TreeMask.from_nodes(PARENTS, NODES)
    leaves = random_qkv(mask.total)
    found = segments.run(attention.one_by_one(segments), gathered)(*leaves)
    torch.testing.assert_close(found, tree_attention(*leaves, mask), rtol=1e-4, atol=1e-5)


def test_the_fastest_that_is_right_is_taken_and_the_others_are_explained(attention, monkeypatch):
    segments, gathered = cases(attention)["paths of nodes"]

    def causal_over_all(s: Any) -> Any:
        return attention.one_by_one(attention.packed([sum(s.q_lengths)], s.device))

    def aligned_at_the_beginning(s: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = torch.ones(len(q), len(k), dtype=torch.bool).tril()
            k, v = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen)
            return out.transpose(0, 1)

        return attend

    def broken(s: Any) -> Any:
        raise ZeroDivisionError("no plan")

    slow_and_right = attention.one_by_one
    ways = {"wrong": aligned_at_the_beginning, "broken": broken, "slow": slow_and_right, "fast": slow_and_right}
    ways["slow-repeated"] = broken  # not tried, since "slow" runs
    monkeypatch.setattr(attention, "WAYS", {**ways, attention.LAST_RESORT: slow_and_right})
    times = iter([9.0, 4.0, 1.0])
    leaves = tuple(random_qkv(sum(segments.q_lengths)))
    choice = attention.choose(list(ways), segments, gathered, leaves, lambda run: next(times))
    assert choice.name == "fast"
    assert choice.tried["wrong"].startswith("wrong, by")
    assert choice.tried["broken"] == "ZeroDivisionError: no plan"
    assert (choice.tried["slow"], choice.tried["fast"]) == (9.0, 4.0)
    assert "slow-repeated" not in choice.tried
    last = attention.choose(["broken"], segments, gathered, leaves, lambda run: next(times))
    assert last.name == attention.LAST_RESORT


# -- the whole -------------------------------------------------------------------------------------------------------


def test_the_arms_compute_one_step_and_the_plot_is_made(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")
    script = importlib.import_module("bench_training")
    monkeypatch.setattr(script, "CHUNK", 50)  # so that there are several
    options = script.parse(["run", "--tiny", "--workloads", "b", "--json", str(tmp_path / "results.json")])
    result = script.run(options)
    assert "gradients" in capsys.readouterr().out
    found = result["workloads"]["b"]
    assert found["right"] == dict.fromkeys(found["right"], True)
    arms = found["arms"]
    assert arms["tree"]["tokens"] == arms["gather"]["tokens"] < arms["paths"]["tokens"] == found["useful_tokens"]
    assert found["ratio_of_operations"] > 2
    assert result == json.loads((tmp_path / "results.json").read_text())
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; the plot needs it")
    script.plot(result, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    rows = [line.split(" | ") for line in script.table(result).split("\n")]
    assert [row[1] for row in rows[2:]] == ["tree", "paths", "gather"]
    assert {len(row) for row in rows} == {7}


def test_the_operations_of_the_full_size_are_counted_by_hand():
    script = importlib.import_module("bench_training")
    from types import SimpleNamespace

    # 16 responses of 1024 on a prompt of 4096: parameters of the layers 440 401 920, of the logits 155 582 464
    def arm(tokens: int, pairs: int) -> Any:
        return script.Arm("", {"input_ids": torch.empty(1, tokens)}, torch.empty(16384), None, None, pairs, "", "")

    config = SimpleNamespace(**script.MODEL)
    tree_pairs = 4096 * 4097 // 2 + 16 * (1024 * 4096 + 1024 * 1025 // 2)
    expected = 8 * 440_401_920 * 20480 + 8 * 155_582_464 * 16384 + 28 * 18 * 2048 * tree_pairs
    assert script.operations(config, arm(20480, tree_pairs)) == expected
    paths = script.operations(config, arm(81920, 16 * 5120 * 5121 // 2))
    assert paths / expected == pytest.approx(3.0, abs=0.1)
