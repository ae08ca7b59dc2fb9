"""The benchmark compares like with like: the trees of the published figures, and the same attention by every peer."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

import tree_attn.cli
from tree_attn._backends.cuda import PATH_VARIABLE
from tree_attn.cli import bench
from tree_attn.cli.peers import PEERS, Problem
from tree_attn.cli.workloads import SMALL_WORKLOADS, WORKLOADS, leaf_paths, rollout_tree, tree_mask

CHAIN = [(-1, 300)]
TREE = rollout_tree(3, 700, (20, 90), (2, 3), 4)


def problem(nodes):
    generator = torch.Generator().manual_seed(0)
    mask = tree_mask(nodes)
    q, k, v = (torch.randn(mask.total, heads, 16, generator=generator) for heads in (4, 2, 2))
    return Problem(q, k, v, mask, nodes)


class TestWorkloads:
    @pytest.mark.parametrize(
        ("name", "tokens", "nodes", "share"),
        [
            ("causal16k", 16384, 1, 1.00),
            ("grpo4k_16x1k", 20480, 17, 0.40),
            ("dpo_8x(1k+2x512)", 16384, 24, 0.11),
            ("agent32k", 32768, 61, 0.18),
            ("mcts_512+256x120", 31232, 257, 0.036),
            ("rag24k+8x1k", 32768, 9, 0.95),
        ],
    )
    def test_are_those_of_the_published_figures(self, name, tokens, nodes, share):
        mask = tree_mask(WORKLOADS[name]())
        assert (mask.total, len(WORKLOADS[name]())) == (tokens, nodes)
        assert mask.visible_pairs() / (tokens * (tokens + 1) / 2) == pytest.approx(share, rel=0.02, abs=0.005)

    def test_random_rollouts_are_the_same_tree_everywhere(self):
        assert tree_mask(WORKLOADS["agent32k"]()).visible_pairs() == 98_584_234

    @pytest.mark.parametrize("name", SMALL_WORKLOADS)
    def test_small_ones_have_4096_tokens(self, name):
        assert tree_mask(SMALL_WORKLOADS[name]()).total == 4096

    def test_paths_are_the_roots_to_leaves(self):
        nodes = [(-1, 2), (0, 1), (1, 1), (1, 2), (0, 1), (-1, 1)]
        assert leaf_paths(nodes) == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6], [7]]


class TestPeers:
    @pytest.mark.parametrize("nodes", [CHAIN, TREE], ids=["chain", "tree"])
    @pytest.mark.parametrize("peer", ["tree_attn", "paths", "sdpa", "flex"])
    def test_computes_the_trees_attention(self, peer, nodes, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        posed = problem(nodes)
        with PEERS[peer](posed) as attention, torch.no_grad():
            assert bench.error(attention.run(), attention.rows, posed) < 1e-5

    def test_fa2_computes_a_chain_and_refuses_a_tree(self):
        posed = problem(CHAIN)
        with PEERS["fa2"](posed) as attention:
            assert bench.error(attention.run(), attention.rows, posed) < 1e-5
        with pytest.raises(NotImplementedError, match="branches"), PEERS["fa2"](problem(TREE)):
            pass

    @pytest.mark.parametrize("nodes", [CHAIN, TREE], ids=["chain", "tree"])
    @pytest.mark.usefixtures("stand_in_for_fa4")
    def test_fa4_is_told_the_tree(self, nodes):
        posed = problem(nodes)
        with PEERS["fa4"](posed) as attention, torch.no_grad():
            assert bench.error(attention.run(), attention.rows, posed) < 1e-5

    def test_a_forced_path_ends_with_its_peer(self, monkeypatch):
        monkeypatch.delenv(PATH_VARIABLE, raising=False)
        row = bench.measure(["dpo"], ["hopper"], bench.Setup("cpu", torch.float32, 1, 1, 8)).rows[0]
        assert "cannot run" in row.why_not
        assert PATH_VARIABLE not in os.environ


@pytest.fixture
def stand_in_for_fa4(monkeypatch):
    """FA4 needs a GPU. This computes what its arguments say, on the CPU."""

    def attention(q, k, v, causal=False, mask_mod=None, aux_tensors=None, block_sparse_tensors=None,
                  block_sparse_tensors_bwd=None, pack_gqa=None):  # fmt: skip
        tokens = q.shape[1]
        index = torch.arange(tokens)
        seen = index <= index[:, None]
        if not causal:
            assert pack_gqa is False
            columns = [mask_mod(None, None, index, index[key : key + 1], None, aux_tensors) for key in range(tokens)]
            seen = from_blocks(block_sparse_tensors, torch.stack(columns, 1))
            assert torch.equal(seen, from_blocks(block_sparse_tensors_bwd, torch.stack(columns, 0)).T)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2), None

    utils = SimpleNamespace(scalar_to_ssa=lambda scalar, dtype: scalar)
    cute = SimpleNamespace(jit=lambda function: function)
    modules = {
        "cutlass": SimpleNamespace(cute=cute, Int32=torch.int32),
        "cutlass.cute": cute,
        "flash_attn": SimpleNamespace(),
        "flash_attn.cute": SimpleNamespace(flash_attn_func=attention, utils=utils),
        "flash_attn.cute.block_sparsity": SimpleNamespace(BlockSparseTensorsTorch=SimpleNamespace),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    forget_fa4()
    yield
    forget_fa4()


def forget_fa4():
    """Let the next import of the module that imports FA4 be its first."""
    sys.modules.pop("tree_attn.cli.fa4", None)
    vars(tree_attn.cli).pop("fa4", None)


def from_blocks(lists, within):
    """The dense mask of block lists; ``within`` the blocks that are not full."""
    height, width = lists.block_size
    seen = torch.zeros_like(within)
    for full, counts, indices in (
        (True, lists.full_block_cnt, lists.full_block_idx),
        (False, lists.mask_block_cnt, lists.mask_block_idx),
    ):
        for i, count in enumerate(counts[0, 0].tolist()):
            for j in indices[0, 0, i, :count].tolist():
                block = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                seen[block] = full | within[block]
    return seen
