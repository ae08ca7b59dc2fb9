"""TreeMask says who sees whom: all constructors agree with each other and with the definition, and refuse the rest."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.utils._pytree as pytree
from forests import SHAPES, Forest, ancestors, dense, forests, token_parents
from hypothesis import given, settings

from tree_attn import TreeMask
from tree_attn import mask as mask_module

SETTINGS = settings(deadline=None, max_examples=80, derandomize=True)


def dfs_arrays(forest: Forest) -> tuple[list[int], list[int]]:
    """Node index and last node of the subtree for each token, by following parents."""
    parents, lengths = forest
    last = list(range(len(parents)))
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            last[parents[node]] = max(last[parents[node]], last[node])
    start = [node for node, length in enumerate(lengths) for _ in range(length)]
    return start, [last[node] for node in start]


def subtree_end_by_definition(parent: list[int]) -> list[int]:
    """One past the last token that has the token among its ancestors."""
    end = [0] * len(parent)
    for token, path in enumerate(ancestors(parent)):
        for ancestor in path:
            end[ancestor] = token + 1
    return end


def first_offence(parent: list[int]) -> int | None:
    """The first entry that is no depth-first order by the definition with a stack, None when there is none."""
    stack: list[int] = []
    for i, p in enumerate(parent):
        if p != -1 and p not in stack:
            return i
        while stack and stack[-1] != p:
            stack.pop()
        stack.append(i)
    return None


def check_against_definition(mask: TreeMask, parent: list[int]) -> None:
    paths = ancestors(parent)
    assert mask.subtree_end.tolist() == subtree_end_by_definition(parent)
    assert mask.depth.tolist() == [len(path) - 1 for path in paths]
    assert torch.equal(mask.dense(), dense(parent))
    assert mask.visible_pairs() == sum(map(len, paths))
    assert mask.roots == [i for i, p in enumerate(parent) if p == -1]
    sizes = [b - a for a, b in itertools.pairwise([*mask.roots, len(parent)])]
    assert mask.max_seqlen == max(sizes, default=0)
    assert mask.total == len(parent)


# -- the constructors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_constructor_gives_the_mask_of_the_definition(name: str) -> None:
    forest = SHAPES[name]
    parent = token_parents(forest)
    mask = TreeMask.from_nodes(*forest)
    check_against_definition(mask, parent)
    assert TreeMask.from_token_parents(parent) == mask
    assert TreeMask.from_dfs(*dfs_arrays(forest)) == mask


@given(forests())
@SETTINGS
def test_constructors_agree_on_any_forest(forest: Forest) -> None:
    parent = token_parents(forest)
    mask = TreeMask.from_nodes(*forest)
    check_against_definition(mask, parent)
    start, end = dfs_arrays(forest)
    for other in (
        TreeMask.from_token_parents(parent),
        TreeMask.from_token_parents(torch.tensor(parent, dtype=torch.int32), validate=False),
        TreeMask.from_nodes(parent, [1] * len(parent)),
        TreeMask.from_nodes(*forest, validate=False),
        TreeMask.from_nodes(*forest, validate=False, total=len(parent)),
        TreeMask.from_dfs(start, end),
        TreeMask.from_dfs(torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32), validate=False),
        TreeMask.from_dfs(start, end, cu_seqlens=[0, len(parent)]),
    ):
        assert other == mask
        for field in ("depth", "end_bounds", "depth_bounds"):
            assert torch.equal(getattr(other, field), getattr(mask, field))


@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, -1, 0), (1, -3, 3), (2, -2, 4), (3, -2, 4), (4, -2, 4), (5, -1, 4)]
)
def test_exhaustive_parents_are_accepted_or_refused_by_the_stack_definition(count: int, low: int, high: int) -> None:
    """Every array of parents: the node path, the token path of the CPU (runs) and that of the GPU (tokens)."""
    accepted = 0
    for parent in itertools.product(range(low, high + 1), repeat=count):
        offence = first_offence(list(parent))
        tensor = torch.tensor(parent, dtype=torch.int64)
        doubled = mask_module._subtree_end_of_parents(tensor)
        assert bool(mask_module._is_preorder(tensor, doubled)) == (offence is None)
        if offence is None:
            accepted += 1
            expected = subtree_end_by_definition(list(parent))
            assert doubled.tolist() == expected
            assert TreeMask.from_token_parents(tensor).subtree_end.tolist() == expected
            assert TreeMask.from_nodes(tensor, [1] * count).subtree_end.tolist() == expected
        else:
            with pytest.raises(ValueError, match=rf"^parent\[{offence}\] is {parent[offence]}:"):
                TreeMask.from_token_parents(tensor)
            with pytest.raises(ValueError, match=rf"^parents\[{offence}\] is {parent[offence]}:"):
                TreeMask.from_nodes(tensor, [1] * count)
    assert accepted == [1, 1, 2, 5, 14, 42][count]  # ordered forests of n nodes: the Catalan numbers


def test_exhaustive_depth_first_indices_mean_what_the_contract_says() -> None:
    """q sees k when k <= q and start_q[q] <= end_k[k]; refused when these sets are no tree."""
    n, accepted = 4, 0
    for start in itertools.combinations_with_replacement(range(4), n):
        for end in itertools.product(range(4), repeat=n):
            sees = [[k <= q and start[q] <= end[k] for k in range(n)] for q in range(n)]
            stop = [1 + max((q for q in range(n) if sees[q][k]), default=-1) for k in range(n)]
            offence = next(
                (i for i in range(n) if end[i] < start[i] or any(i < stop[k] < stop[i] for k in range(i))), None
            )
            if offence is None:
                accepted += 1
                assert TreeMask.from_dfs(start, end).dense().tolist() == sees
            else:
                with pytest.raises(ValueError, match=rf"^end_k\[{offence}\] is {end[offence]}, "):
                    TreeMask.from_dfs(start, end)
    assert accepted > 500


@given(st.lists(forests(max_nodes=6, max_tokens=40), min_size=1, max_size=4), st.integers(-5, 1000))
@SETTINGS
def test_depth_first_indices_may_restart_in_every_sequence(packed: list[Forest], offset: int) -> None:
    """Indices of each sequence count from anywhere; a sequence may be a forest, or empty."""
    starts, ends, parents, cu_seqlens = [], [], [], [0, 0]
    for number, forest in enumerate(packed):
        start, end = dfs_arrays(forest)
        shift = offset * number
        starts += [s + shift for s in start]
        ends += [e + shift for e in end]
        parents += [-1 if p == -1 else p + cu_seqlens[-1] for p in token_parents(forest)]
        cu_seqlens += [len(starts), len(starts)]
    expected = TreeMask.from_token_parents(parents)
    assert TreeMask.from_dfs(starts, ends, cu_seqlens) == expected
    assert TreeMask.from_dfs(starts, ends, torch.tensor(cu_seqlens, dtype=torch.int32), validate=False) == expected


def test_an_end_beyond_every_token_means_the_rest_of_the_sequence() -> None:
    far = 2**63 - 1
    assert TreeMask.from_dfs([0, 1, 1], [far, 1, 1]).subtree_end.tolist() == [3, 3, 3]
    two = TreeMask.from_dfs([0, 1, 2, 0, 1], [far, 1, 2, far, far], [0, 3, 5])
    assert two.subtree_end.tolist() == [3, 2, 3, 5, 5]


@given(forests(max_tokens=150))
@SETTINGS
def test_bounds_are_the_extremes_of_each_32_entries(forest: Forest) -> None:
    mask = TreeMask.from_nodes(*forest)
    for values, bounds in ((mask.subtree_end, mask.end_bounds), (mask.depth, mask.depth_bounds)):
        assert bounds.tolist() == [[tile.min().item(), tile.max().item()] for tile in values.split(32)]


def test_all_fields_are_int32_of_the_documented_shapes() -> None:
    for forest in SHAPES.values():
        mask = TreeMask.from_nodes(*forest)
        n, tiles = mask.total, -(-mask.total // 32)
        shapes = {"subtree_end": (n,), "depth": (n,), "end_bounds": (tiles, 2), "depth_bounds": (tiles, 2)}
        for name, shape in shapes.items():
            field = getattr(mask, name)
            assert field.dtype == torch.int32
            assert field.shape == shape


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = {
    # parents and lengths
    "parent after child": (
        lambda: TreeMask.from_nodes([-1, 2, 0], [1, 1, 1]),
        ValueError,
        r"parents\[1\] is 2: a parent comes before its child\. Here it can be 0",
    ),
    "own parent": (lambda: TreeMask.from_nodes([0], [1]), ValueError, r"parents\[0\] is 0: .* can only be -1"),
    "parent below -1": (lambda: TreeMask.from_nodes([-1, -2], [1, 1]), ValueError, r"parents\[1\] is -2"),
    "parent out of range": (lambda: TreeMask.from_nodes([-1, 99], [1, 1]), ValueError, r"parents\[1\] is 99"),
    "not depth-first": (
        lambda: TreeMask.from_nodes([-1, 0, 0, 1], [1, 1, 1, 1]),
        ValueError,
        r"parents\[3\] is 1: not depth-first, the subtree of node 1 ended before node 3\. Here it can be 2 .*",
    ),
    "child of an ended tree": (
        lambda: TreeMask.from_nodes([-1, -1, 0], [1, 1, 1]),
        ValueError,
        r"parents\[2\] is 0: not depth-first",
    ),
    "zero length": (
        lambda: TreeMask.from_nodes([-1, 0, 0], [3, 0, -1]),
        ValueError,
        r"lengths\[1\] is 0; a node has at least 1 token",
    ),
    "negative length": (lambda: TreeMask.from_nodes([-1, 0], [3, -4]), ValueError, r"lengths\[1\] is -4"),
    "huge length": (
        lambda: TreeMask.from_nodes([-1, 0], [3, 2**40]),
        ValueError,
        r"lengths\[1\] is 1099511627776; a mask holds fewer than 2\*\*31",
    ),
    "huge sum": (
        lambda: TreeMask.from_nodes([-1, 0], [2**30, 2**30]),
        ValueError,
        r"lengths add up to 2147483648; a mask holds fewer",
    ),
    "other number of lengths": (
        lambda: TreeMask.from_nodes([-1, 0], [3]),
        ValueError,
        r"parents has 2 entries and lengths has 1",
    ),
    "wrong total": (lambda: TreeMask.from_nodes([-1], [3], total=4), ValueError, r"total is 4 and lengths add up to 3"),
    "float parents": (
        lambda: TreeMask.from_nodes([-1.0], [3]),
        TypeError,
        r"parents holds torch\.float32; give integers",
    ),
    "float lengths": (lambda: TreeMask.from_nodes([-1], torch.ones(1)), TypeError, r"lengths holds torch\.float32"),
    "bool parents": (lambda: TreeMask.from_nodes(torch.tensor([True]), [3]), TypeError, r"parents holds torch\.bool"),
    "complex parents": (
        lambda: TreeMask.from_nodes(torch.tensor([1j]), [3]),
        TypeError,
        r"parents holds torch\.complex64",
    ),
    "text": (lambda: TreeMask.from_nodes(["root"], [3]), TypeError, r"parents cannot become a tensor of integers"),
    "None": (lambda: TreeMask.from_token_parents(None), TypeError, r"parent cannot become a tensor of integers"),
    "two dimensions": (
        lambda: TreeMask.from_nodes([[-1]], [3]),
        ValueError,
        r"parents has shape \(1, 1\); give one dimension",
    ),
    "no dimension": (lambda: TreeMask.from_token_parents(torch.tensor(-1)), ValueError, r"parent has shape \(\)"),
    "ragged": (lambda: TreeMask.from_token_parents([[-1], [0, 1]]), TypeError, r"parent cannot become a tensor"),
    "two devices": (
        lambda: TreeMask.from_nodes(torch.tensor([-1]), torch.ones(1, dtype=torch.int64, device="meta")),
        ValueError,
        r"parents is on cpu, lengths is on meta; put all on one device",
    ),
    # tokens
    "token order": (
        lambda: TreeMask.from_token_parents([-1, 0, 1, 0, 2]),
        ValueError,
        r"parent\[4\] is 2: not depth-first, the subtree of token 2 ended before token 4",
    ),
    "token after itself": (
        lambda: TreeMask.from_token_parents(torch.tensor([-1, 5], dtype=torch.int32)),
        ValueError,
        r"parent\[1\] is 5",
    ),
    # depth-first indices
    "start decreases": (
        lambda: TreeMask.from_dfs([0, 2, 1], [2, 2, 2]),
        ValueError,
        r"start_q\[2\] is 1, below start_q\[1\] \(2\): not depth-first\. Pass cu_seqlens",
    ),
    "start decreases in a sequence": (
        lambda: TreeMask.from_dfs([0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 4]),
        ValueError,
        r"start_q\[3\] is 0, below start_q\[2\] \(1\): not depth-first\. Sort",
    ),
    "end before start": (
        lambda: TreeMask.from_dfs([0, 1], [1, 0]),
        ValueError,
        r"end_k\[1\] is 0, below start_q\[1\] \(1\): a token sees itself",
    ),
    "crossing": (
        lambda: TreeMask.from_dfs([0, 1, 2, 3], [1, 2, 2, 3]),
        ValueError,
        r"end_k\[1\] is 2, beyond end_k\[0\] \(1\) whose subtree holds token 1: subtrees cross\. It can be at most 1",
    ),
    "one node, two ends": (
        lambda: TreeMask.from_dfs([0, 0, 1], [0, 1, 1]),
        ValueError,
        r"end_k\[1\] is 1, beyond end_k\[0\] \(0\)",
    ),
    "index too large": (
        lambda: TreeMask.from_dfs([0, 2**31], [2**31, 2**31]),
        ValueError,
        r"start_q\[1\] is 2147483648; depth-first indices are below 2\*\*31",
    ),
    "index too small": (
        lambda: TreeMask.from_dfs([-(2**63), 0], [0, 0]),
        ValueError,
        r"start_q\[0\] is -9223372036854775808",
    ),
    "other number of ends": (
        lambda: TreeMask.from_dfs([0, 1], [1]),
        ValueError,
        r"start_q has 2 entries and end_k has 1",
    ),
    "float start": (lambda: TreeMask.from_dfs(torch.zeros(2), [1, 1]), TypeError, r"start_q holds torch\.float32"),
    "offsets empty": (lambda: TreeMask.from_dfs([0], [0], []), ValueError, r"cu_seqlens is empty"),
    "offsets start late": (
        lambda: TreeMask.from_dfs([0, 0], [0, 0], [1, 2]),
        ValueError,
        r"cu_seqlens\[0\] is 1; the first offset is 0",
    ),
    "offsets decrease": (
        lambda: TreeMask.from_dfs([0, 0], [0, 0], [0, 2, 1, 2]),
        ValueError,
        r"cu_seqlens\[2\] is 1, below the one before \(2\)",
    ),
    "offsets end early": (
        lambda: TreeMask.from_dfs([0, 0], [0, 0], [0, 1]),
        ValueError,
        r"cu_seqlens\[1\] is 1; the last offset is the number of tokens \(2\)",
    ),
    "offsets end late": (
        lambda: TreeMask.from_dfs([0, 0], [0, 0], [0, 1, 3]),
        ValueError,
        r"cu_seqlens\[2\] is 3; the last offset",
    ),
    "float offsets": (lambda: TreeMask.from_dfs([0], [0], [0.0, 1.0]), TypeError, r"cu_seqlens holds torch\.float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_and_the_first_offence_named(name: str) -> None:
    build, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        build()


@given(forests(max_nodes=10, max_tokens=60), st.data())
@SETTINGS
def test_one_wrong_entry_in_a_valid_forest_is_named_or_still_a_forest(forest: Forest, data: st.DataObject) -> None:
    parent = token_parents(forest)
    where = data.draw(st.integers(0, len(parent) - 1))
    parent[where] = data.draw(st.integers(-2, len(parent)))
    offence = first_offence(parent)
    if offence is None:
        check_against_definition(TreeMask.from_token_parents(parent), parent)
    else:
        with pytest.raises(ValueError, match=re.escape(f"parent[{offence}] is {parent[offence]}:")):
            TreeMask.from_token_parents(parent)


def test_long_inputs_in_wrong_order_are_told_about_without_a_quadratic_search() -> None:
    """The messages come from plain loops, one step a token; searching the path at each would take minutes."""
    n = 300_000
    chain = torch.arange(-1, n - 1)
    chain[-1] = n
    with pytest.raises(ValueError, match=rf"parent\[{n - 1}\]"):
        TreeMask.from_token_parents(chain)
    start, end = torch.arange(n), torch.full((n,), n - 1)
    end[-1] = 0
    with pytest.raises(ValueError, match=rf"end_k\[{n - 1}\] is 0"):
        TreeMask.from_dfs(start, end)


# -- devices ---------------------------------------------------------------------------------------------------------


def test_validate_false_reads_nothing_back_to_the_host() -> None:
    """A meta tensor has no values: whatever the host would have to know raises."""
    parents, lengths = (torch.zeros(5, dtype=torch.int64, device="meta") for _ in range(2))
    tokens = torch.zeros(70, dtype=torch.int32, device="meta")
    offsets = torch.zeros(4, dtype=torch.int32, device="meta")
    for mask in (
        TreeMask.from_nodes(parents, lengths, validate=False, total=70),
        TreeMask.from_token_parents(tokens, validate=False),
        TreeMask.from_dfs(tokens, tokens, validate=False),
        TreeMask.from_dfs(tokens, tokens, offsets, validate=False),
    ):
        assert mask.device.type == "meta"
        assert mask.total == 70
        assert repr(mask) == "TreeMask(70 tokens, device='meta')"


def test_lists_follow_the_device_that_is_asked_for_or_that_tensors_are_on() -> None:
    assert TreeMask.from_nodes([-1], [3], device="meta", validate=False, total=3).device.type == "meta"
    lengths = torch.ones(1, dtype=torch.int64, device="meta")
    assert TreeMask.from_nodes([-1], lengths, validate=False, total=3).device.type == "meta"
    assert TreeMask.from_nodes([-1], [3]).to("meta").device.type == "meta"


def test_construction_leaves_its_inputs_alone() -> None:
    parents, lengths = torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1])
    tokens, start = torch.tensor([-1, 0, 0]), torch.tensor([0, 1, 2])
    TreeMask.from_nodes(parents, lengths)
    TreeMask.from_token_parents(tokens)
    TreeMask.from_dfs(start, start, torch.tensor([0, 1, 3]))
    assert parents.tolist() == tokens.tolist() == [-1, 0, 0]
    assert start.tolist() == [0, 1, 2]


# -- as an object ----------------------------------------------------------------------------------------------------

EXAMPLE = ([-1, 0, 0, -1], [3, 2, 1, 4])
FIELDS = ("subtree_end", "end_bounds", "depth_bounds", "depth")


def test_equal_means_the_same_tree_on_the_same_device() -> None:
    mask = TreeMask.from_nodes(*EXAMPLE)
    assert mask == TreeMask.from_token_parents(token_parents(EXAMPLE))
    assert mask != TreeMask.from_nodes([-1, 0, 0, -1], [3, 2, 2, 3])
    assert mask != TreeMask.from_nodes([-1], [9])
    assert mask != mask.to("meta")
    assert mask != "a mask"
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


def test_repr_is_one_line_a_person_can_read() -> None:
    mask = TreeMask.from_nodes(*EXAMPLE)
    assert repr(mask) == (
        "TreeMask(10 tokens, 2 trees, longest path 5, 29 visible pairs, 52.7% of causal, device='cpu')"
    )
    assert repr(TreeMask.from_nodes([], [])) == (
        "TreeMask(0 tokens, 0 trees, longest path 0, 0 visible pairs, device='cpu')"
    )


def test_copies_pickles_and_checkpoints_keep_the_tree() -> None:
    mask = TreeMask.from_nodes(*EXAMPLE)
    assert mask.roots == [0, 6]  # cached in the object; a copy keeps or recomputes it
    stream = io.BytesIO()
    torch.save({"mask": mask}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)["mask"]
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), loaded, mask.to("cpu")):
        assert type(other) is TreeMask
        assert other == mask
        assert other.roots == [0, 6]
        assert torch.equal(other.depth_bounds, mask.depth_bounds)
    deep = copy.deepcopy(mask)
    assert deep.subtree_end.data_ptr() != mask.subtree_end.data_ptr()


def test_it_is_immutable() -> None:
    mask = TreeMask.from_nodes(*EXAMPLE)
    with pytest.raises(AttributeError):
        mask.depth = mask.subtree_end  # type: ignore[misc]


def test_it_is_a_pytree_of_its_four_tensors() -> None:
    mask = TreeMask.from_nodes(*EXAMPLE)
    leaves, spec = pytree.tree_flatten({"mask": mask})
    assert len(leaves) == 4
    assert all(leaf is getattr(mask, name) for leaf, name in zip(leaves, FIELDS, strict=True))
    assert pytree.tree_unflatten(leaves, spec)["mask"] == mask
    doubled = pytree.tree_map(lambda x: x * 2, mask)
    assert doubled.subtree_end.tolist() == (mask.subtree_end * 2).tolist()


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_built_from_gpu_tensors_it_stays_there_and_synchronises_at_most_once(name: str) -> None:
    forest = SHAPES[name]
    expected = TreeMask.from_nodes(*forest)
    start, end = dfs_arrays(forest)

    def on_gpu(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    parents, lengths, parent = on_gpu(forest[0]), on_gpu(forest[1]), on_gpu(token_parents(forest))
    start_q, end_k, offsets = on_gpu(start), on_gpu(end), on_gpu([0, 0, len(start)])
    builds = {
        "nodes": lambda validate: TreeMask.from_nodes(parents, lengths, validate=validate, total=expected.total),
        "tokens": lambda validate: TreeMask.from_token_parents(parent, validate=validate),
        "dfs": lambda validate: TreeMask.from_dfs(start_q, end_k, validate=validate),
        "dfs, offsets": lambda validate: TreeMask.from_dfs(start_q, end_k, offsets, validate=validate),
    }
    for build in builds.values():
        build(True)  # load every kernel before counting
        for validate, allowed in ((True, 1), (False, 0)):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as synchronisations:
                    warnings.simplefilter("always")
                    mask = build(validate)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(synchronisations) <= allowed, [str(w.message) for w in synchronisations]
            assert mask.device.type == "cuda"
            assert mask.to("cpu") == expected
