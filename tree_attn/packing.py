"""Merge token sequences on their shared prefixes into one depth-first sequence, and take results apart again.

``pack`` makes a :class:`PackedBatch` of sequences that share prefixes (rollouts of one prompt, turns of one dialogue),
``plan`` spreads sequences over batches under a budget of tokens. docs/packing.md draws the two ways of a branch point.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tree_attn._logprobs import next_token_log_probs
from tree_attn._prefix import (
    Branch,
    PrefixOrder,
    Tokens,
    integer_vector,
    mask_vector,
    prefix_order,
    read_per_token,
    read_sequences,
)
from tree_attn.mask import TreeMask

# The label of a token that is no target, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackingSummary:
    """What packing saves; ``str()`` of it is a small table.

    Attributes:
        sequences, trees: how many sequences went in, and how many trees (prompts) they form.
        tokens_before, tokens_after: tokens of all sequences, and of the packed one; what layers other than attention
            compute.
        pairs_before, pairs_after: (query, key) pairs that attention computes, path by path and packed.
    """

    sequences: int
    trees: int
    tokens_before: int
    tokens_after: int
    pairs_before: int
    pairs_after: int

    @property
    def token_saving(self) -> float:
        """Share of the work per token (linear layers, norms, embeddings) that is saved, 0 to 1."""
        return 1 - self.tokens_after / self.tokens_before

    @property
    def pair_saving(self) -> float:
        """Share of the work of attention that is saved, 0 to 1."""
        return 1 - self.pairs_after / self.pairs_before

    def __str__(self) -> str:
        def row(name: str, before: int, after: int, saving: float) -> str:
            return f"{name:<7}{before:>16,} ->{after:>16,}   {saving:6.1%} saved, {before / after:.2f}x less"

        return "\n".join(
            [
                f"{self.sequences} sequences in {self.trees} trees",
                row("tokens", self.tokens_before, self.tokens_after, self.token_saving) + " in linear layers",
                row("pairs", self.pairs_before, self.pairs_after, self.pair_saving) + " in attention",
            ]
        )


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """Sequences merged on their shared prefixes; made by :func:`pack`. N packed tokens, S tokens in the sequences.

    Attributes:
        input_ids: int64 ``(N,)`` token ids in depth-first order.
        position_ids: int64 ``(N,)`` depth of each token, its index in every sequence through it; for RoPE.
        parent: int64 ``(N,)`` packed position of the token before it on the path, -1 for the first of a tree.
        mask: :class:`TreeMask` over the N tokens.
        flat_index: int64 ``(S,)`` packed position of every token of every sequence, end to end in input order.
        lengths: tokens of each sequence, in input order.
        logit_index: int64 ``(M,)`` packed positions whose logits predict a target. Every pair (position, next token)
            that a sequence supervises occurs once, so with ``branch="gather"`` a branch point occurs once for each
            branch.
        labels: int64 ``(M,)`` the token to predict there.
        loss_weights: float32 ``(M,)`` the sum of the weights of the sequences that supervise the pair (their number,
            without ``sequence_weights``).
        branch: ``"gather"`` or ``"fork"``.
    """

    input_ids: Tensor
    position_ids: Tensor
    parent: Tensor
    mask: TreeMask
    flat_index: Tensor
    lengths: tuple[int, ...]
    logit_index: Tensor
    labels: Tensor
    loss_weights: Tensor
    branch: Branch

    @cached_property
    def token_index(self) -> list[Tensor]:
        """For each sequence, in input order, the int64 packed positions of its tokens:
        ``input_ids[token_index[i]]`` is sequence i."""
        return list(self.flat_index.split(list(self.lengths)))

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def num_tokens(self) -> int:
        """Packed tokens, N."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            parent=move(self.parent),
            mask=self.mask.to(device, non_blocking=non_blocking),
            flat_index=move(self.flat_index),
            logit_index=move(self.logit_index),
            labels=move(self.labels),
            loss_weights=move(self.loss_weights),
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor) -> Tensor:
        """Supervised next-token loss: ``sum(loss_weights * cross_entropy(logits[logit_index], labels))``.

        Loss and gradient equal the SUM over the sequences run alone, each with the sum of the cross-entropies of its
        targets (times its entry of ``sequence_weights``). Give ``pack`` weights of 1 / targets for a mean per sequence,
        or divide by ``batch.loss_weights.sum()`` for a mean over all targets.

        Args:
            logits: ``(N, vocab)`` or ``(1, N, vocab)``, unshifted, floating point.

        Returns:
            A scalar, float32 (float64 for float64 logits). No second ``(N, vocab)`` tensor is kept for the backward,
            which can be taken once (no second derivative).

        Raises:
            ValueError: logits of another number of tokens.
        """
        log_probs = next_token_log_probs(self._check_logits(logits), self.logit_index, self.labels)
        return -(log_probs * self.loss_weights).sum()

    def log_probs(self, logits: Tensor) -> list[Tensor]:
        """For each sequence, the log-probability of its token t + 1 given its tokens up to t; for policy gradients.

        Each (position, next token) pair is computed once and then gathered, so a shared token may carry the ratio and
        advantage of every sequence through it. Differentiable once. Memory and dtype as for :meth:`loss`.

        Args:
            logits: ``(N, vocab)`` or ``(1, N, vocab)``, unshifted, floating point.

        Returns:
            A list in input order; entry i is ``(lengths[i] - 1,)``, of token 1, 2, ... of sequence i.
        """
        position, row, token = self._edges
        log_probs = next_token_log_probs(self._check_logits(logits), row, token)
        per_token = torch.zeros(self.num_tokens, dtype=log_probs.dtype, device=log_probs.device)
        per_token = per_token.index_copy(0, position, log_probs)
        drop = slice(1, None) if self.branch == "gather" else slice(0, -1)  # which token an edge is kept at: see _edges
        return [values[drop] for values in self.gather(per_token)]

    def token_labels(self) -> tuple[Tensor, Tensor]:
        """``branch="fork"`` alone: the one label of every position, for losses that take no index.

        Returns:
            ``(labels, weights)``, int64 and float32 ``(N,)``: position p predicts ``labels[p]`` (already shifted), -100
            with weight 0 where nothing is a target.

        Raises:
            ValueError: with ``branch="gather"``, where a branch point has several labels.
        """
        if self.branch != "fork":
            raise ValueError(
                f'this batch was packed with branch="{self.branch}", where a branch point has several labels; use '
                'logit_index, labels and loss_weights, or pack(..., branch="fork")'
            )
        labels = torch.full_like(self.input_ids, IGNORE_INDEX).index_copy_(0, self.logit_index, self.labels)
        weights = torch.zeros(self.num_tokens, device=self.device).index_copy_(0, self.logit_index, self.loss_weights)
        return labels, weights

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor, Tensor]:
        return _edges(self.input_ids, self.parent, self.branch)

    def _check_logits(self, logits: Tensor) -> Tensor:
        rows = logits[0] if logits.dim() == 3 and logits.shape[0] == 1 else logits
        if rows.dim() != 2 or rows.shape[0] != self.num_tokens:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}; give ({self.num_tokens}, vocab) or (1, {self.num_tokens}, "
                "vocab), one row for each packed token"
            )
        if not rows.is_floating_point():
            raise TypeError(f"logits are {rows.dtype}; give a floating point tensor")
        return rows

    # -- back to sequences ---------------------------------------------------------------------------------------------

    def gather(self, values: Tensor) -> list[Tensor]:
        """Per-token values of the packed sequence as one tensor for each sequence, in input order.

        Args:
            values: ``(N, ...)``, any dtype. Gradients of shared tokens add up.

        Returns:
            A list; entry i is ``(lengths[i], ...)``. ``torch.nn.utils.rnn.pad_sequence`` makes one padded tensor of it.

        Raises:
            ValueError: another number of tokens.
        """
        if values.dim() == 0 or values.shape[0] != self.num_tokens:
            raise ValueError(
                f"values have shape {tuple(values.shape)}; give ({self.num_tokens}, ...), one entry for each packed "
                "token (take [0] of a batch of one)"
            )
        return list(values.index_select(0, self.flat_index).split(list(self.lengths)))

    def unpack(self, outputs: Any) -> list[Any]:
        """:meth:`gather` for a tensor, or dicts, lists and tuples of tensors, as a model returns them.

        Args:
            outputs: ``(N, ...)`` tensors in any nesting of dict, list and tuple; None stays None.

        Returns:
            A list in input order; entry i is like ``outputs`` with ``(lengths[i], ...)`` tensors.

        Raises:
            TypeError: something else among the outputs.
            ValueError: a tensor of another number of tokens.
        """
        if isinstance(outputs, Tensor):
            return list(self.gather(outputs))
        if outputs is None:
            return [None] * len(self.lengths)
        if isinstance(outputs, dict):
            columns = [self.unpack(value) for value in outputs.values()]
            return [dict(zip(outputs, row, strict=True)) for row in _rows(columns, len(self.lengths))]
        if isinstance(outputs, (list, tuple)):
            kind = list if isinstance(outputs, list) else tuple
            return [kind(row) for row in _rows([self.unpack(value) for value in outputs], len(self.lengths))]
        raise TypeError(f"outputs hold a {type(outputs).__name__}; give tensors, or dicts, lists and tuples of tensors")

    # -- looking -------------------------------------------------------------------------------------------------------

    def summary(self) -> PackingSummary:
        """Tokens and attention pairs before and after, and what that saves. Synchronises on a GPU."""
        return PackingSummary(
            sequences=len(self.lengths),
            trees=len(self.mask.roots),
            tokens_before=sum(self.lengths),
            tokens_after=self.num_tokens,
            pairs_before=sum(n * (n + 1) // 2 for n in self.lengths),
            pairs_after=self.mask.visible_pairs(),
        )

    def __repr__(self) -> str:
        before = sum(self.lengths)
        return (
            f"PackedBatch({len(self.lengths)} sequences of {before} tokens in {self.num_tokens} packed tokens "
            f"({before / self.num_tokens:.2f}x fewer), branch={self.branch!r}, device={str(self.device)!r})"
        )


def _rows(columns: list[list[Any]], count: int) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=True)) if columns else [()] * count


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(
    sequences: Iterable[Any],
    *,
    labels: Iterable[Any] | None = None,
    loss_mask: Iterable[Any] | None = None,
    sequence_weights: Sequence[float] | Tensor | None = None,
    branch: Branch = "gather",
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Merge sequences on their shared prefixes into one sequence in depth-first order.

    Siblings are ordered by first appearance in the input, so sequences that share nothing stay in input order.
    Sequences without a common first token become separate trees. Identical sequences are merged completely.

    Args:
        sequences: one entry for each sequence, of at least one token: list, tuple or range of ints, numpy array or
            tensor of any integer dtype and device, mixed as they come. Token ids are 0 or more.
        labels: one entry for each sequence, of its length, NOT shifted: the token itself where it is a target, -100
            where it is not. Everything is a target when None.
        loss_mask: one entry for each sequence, of its length: True (or 1) where the token is a target. Sequences may
            differ on a token they share. With ``labels``, a token is a target when both say so. The first token of a
            sequence has nothing before it and is never a target, whatever either says.
        sequence_weights: ``(sequences,)`` finite factors of each sequence's loss, 1 when None.
        branch: what happens where sequences part. ``"gather"``: one token for each distinct prefix; the last shared
            token predicts several next ones. ``"fork"``: a token is shared only by sequences that agree on the next one
            too (its end counting as a next one), so that every position has one label; one token more for each branch.
        max_tokens: the most packed tokens allowed.
        device: where the result lies; when None, the device of the first tensor among the sequences, else the CPU.

    Raises:
        TypeError: tokens that are no integers (floats, bools, strings), or one array in place of a list of sequences.
        ValueError: no sequences, an empty one, a negative id, not one-dimensional, labels or masks of another length,
            labels that are not the token, or more than ``max_tokens``.

    Example:
        >>> batch = pack([[5, 6, 7], [5, 6, 8, 9]])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3])
        >>> [index.tolist() for index in batch.token_index]
        [[0, 1, 2], [0, 1, 3, 4]]
        >>> batch.logit_index.tolist(), batch.labels.tolist(), batch.loss_weights.tolist()
        ([0, 1, 1, 3], [6, 7, 8, 9], [2.0, 1.0, 1.0, 1.0])
    """
    _check_branch(branch)
    budget = None if max_tokens is None else _check_budget(max_tokens)
    tokens = read_sequences(sequences)
    targets = _targets(tokens, labels, loss_mask, sequence_weights)
    tree = prefix_order(tokens, branch)
    new = [tokens.lengths[i] - shared for i, shared in zip(tree.order, tree.shared, strict=True)]
    total = sum(new)
    if budget is not None and total > budget:
        raise ValueError(
            f"the sequences have {total} unique tokens, more than max_tokens={budget}; plan(sequences, {budget}) "
            "spreads them over several batches"
        )
    input_ids, position_ids, parent, flat_index, heads = _merge(tokens, tree, new)

    # Targets of a sequence to edges of the tree: an edge is kept at one token (see _edges), and a sequence passes that
    # token at the target itself (gather) or one before it (fork). The first token of a sequence is no target: its entry
    # lands on a root (gather) or, rolled, on the last token of another sequence (fork), and no edge is kept at either.
    if branch == "fork":
        targets = targets.roll(-1)
    weights = torch.zeros(total, dtype=torch.float64).index_add_(0, flat_index, targets)
    position, row, token = _edges(input_ids, parent, branch)
    supervised = weights[position].nonzero().squeeze(1)

    batch = PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        parent=parent,
        mask=_tree_mask(parent, heads),
        flat_index=flat_index,
        lengths=tuple(tokens.lengths),
        logit_index=row[supervised],
        labels=token[supervised],
        loss_weights=weights[position[supervised]].float(),
        branch=branch,
    )
    device = tokens.device if device is None else torch.device(device)
    return batch if device.type == "cpu" else batch.to(device)


def _merge(tokens: Tokens, tree: PrefixOrder, new: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """input_ids, position_ids, parent ``(N,)``, flat_index ``(S,)``, and the first packed position of the tokens that
    each sequence adds, where it adds any (all int64)."""
    flat_index = torch.empty_like(tokens.flat)
    longest = max(tokens.lengths)
    path = torch.empty(longest, dtype=torch.int64)  # packed positions of the sequence at hand
    depths = torch.arange(longest)
    ids, positions, heads, head_parents = [], [], [], []
    starts = accumulate(new[:-1], initial=0)
    for i, shared, start, count in zip(tree.order, tree.shared, starts, new, strict=True):
        begin, length = tokens.begins[i], tokens.lengths[i]
        if count:
            ids.append(tokens.flat[begin + shared : begin + length])
            positions.append(depths[shared:length])
            heads.append(start)
            head_parents.append(int(path[shared - 1]) if shared else -1)
            torch.arange(start, start + count, out=path[shared:length])
        flat_index[begin : begin + length] = path[:length]
    parent = torch.arange(-1, sum(new) - 1)
    head = torch.tensor(heads)
    parent[head] = torch.tensor(head_parents)
    return torch.cat(ids), torch.cat(positions), parent, flat_index, head


def _tree_mask(parent: Tensor, heads: Tensor) -> TreeMask:
    """The mask by nodes: a run of tokens ends where a sequence adds its own, and where one of those branches off."""
    begin = torch.unique(torch.cat([heads, parent[heads] + 1]))  # sorted; a root gives 0, the first head
    end = torch.cat([begin[1:], begin.new_tensor([len(parent)])])
    node_parent = torch.searchsorted(begin, parent[begin], right=True) - 1  # the node that holds it; -1 stays -1
    return TreeMask.from_nodes(node_parent, end - begin, validate=False)


def _edges(input_ids: Tensor, parent: Tensor, branch: Branch) -> tuple[Tensor, Tensor, Tensor]:
    """Every (position, next token) pair of the tree once: ``(position, row, token)``, each int64 ``(edges,)``.

    The logits of ``row`` predict ``token``. ``position`` is the packed token that stands for this edge and no other:
    with gather the next token itself, which has one parent; with fork the row, which has one next token.
    """
    child = (parent >= 0).nonzero().squeeze(1)
    if branch == "gather":
        return child, parent[child], input_ids[child]
    following = torch.full_like(input_ids, -1)
    following[parent[child]] = input_ids[child]  # children of one parent are the same token here
    row = (following >= 0).nonzero().squeeze(1)
    return row, row, following[row]


def _targets(
    tokens: Tokens,
    labels: Iterable[Any] | None,
    loss_mask: Iterable[Any] | None,
    sequence_weights: Sequence[float] | Tensor | None,
) -> Tensor:
    """float64 ``(S,)``: the weight of each token as a target of its sequence, 0 where it is none. Entries of first
    tokens mean nothing."""
    lengths = torch.tensor(tokens.lengths)
    weights = _read_weights(sequence_weights, len(lengths))
    result = weights.repeat_interleave(lengths, output_size=len(tokens.flat))
    if labels is not None:
        given = read_per_token(labels, "labels", tokens.lengths, integer_vector)
        supervised = given != IGNORE_INDEX
        wrong = (supervised & (given != tokens.flat)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            i = max(i for i, begin in enumerate(tokens.begins) if begin <= at)
            t = at - tokens.begins[i]
            raise ValueError(
                f"labels[{i}][{t}] is {int(given[at])} and sequences[{i}][{t}] is {int(tokens.flat[at])}; a label is "
                f"the token itself or {IGNORE_INDEX}. Labels are not shifted: entry t is for token t"
            )
        result *= supervised
    if loss_mask is not None:
        result *= read_per_token(loss_mask, "loss_mask", tokens.lengths, mask_vector)
    return result


def _read_weights(sequence_weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    if sequence_weights is None:
        return torch.ones(count, dtype=torch.float64)
    weights = torch.as_tensor(sequence_weights, dtype=torch.float64, device="cpu").detach()
    if weights.shape != (count,):
        raise ValueError(f"sequence_weights have shape {tuple(weights.shape)}; give ({count},), one for each sequence")
    if not weights.isfinite().all():
        i = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(f"sequence_weights[{i}] is {float(weights[i])}; give finite numbers")
    return weights


def _check_branch(branch: str) -> None:
    if branch not in ("gather", "fork"):
        raise ValueError(f'branch is {branch!r}; give "gather" or "fork"')


def _check_budget(max_tokens: int) -> int:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens is {max_tokens!r}; give an integer")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 1")
    return max_tokens


# -- planning ----------------------------------------------------------------------------------------------------------


def plan(sequences: Iterable[Any], max_tokens: int, *, branch: Branch = "gather") -> list[list[int]]:
    """Spread sequences over batches of at most ``max_tokens`` packed tokens, relatives together.

    A tree that fits the budget is never divided. A larger one is cut between sequences, in depth-first order, where the
    fewest tokens are computed twice. The pieces then fill batches best fit first, largest first.

    Args:
        sequences: as for :func:`pack`.
        max_tokens: the most packed (unique) tokens of a batch.
        branch: as for the :func:`pack` that follows.

    Returns:
        A list of batches, each an ascending list of indices into ``sequences``; every index occurs once. Batches are
        ordered by their first index.

    Raises:
        ValueError: a sequence longer than ``max_tokens``; and whatever :func:`pack` raises.

    Example:
        >>> plan([[1, 2, 3], [7, 8], [1, 2, 4], [9, 9]], max_tokens=4)
        [[0, 2], [1, 3]]
    """
    _check_branch(branch)
    budget = _check_budget(max_tokens)
    tokens = read_sequences(sequences)
    for i, length in enumerate(tokens.lengths):
        if length > budget:
            raise ValueError(
                f"sequences[{i}] has {length} tokens, more than max_tokens={budget}; a sequence is never divided: "
                "raise max_tokens or truncate it"
            )
    order, shared = prefix_order(tokens, branch)
    lengths = [tokens.lengths[i] for i in order]
    roots = [j for j, common in enumerate(shared) if common == 0]
    pieces: list[tuple[int, list[int]]] = []  # (packed tokens, sequences)
    for begin, end in zip(roots, [*roots[1:], len(order)], strict=True):
        cuts = _cut_tree(lengths[begin:end], shared[begin:end], budget)
        for first, last in zip(cuts, [*cuts[1:], end - begin], strict=True):
            run = range(begin + first, begin + last)
            size = lengths[run[0]] + sum(lengths[j] - shared[j] for j in run[1:])
            pieces.append((size, [order[j] for j in run]))

    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, batch), sorted
    for size, members in sorted(pieces, key=lambda piece: -piece[0]):
        fit = bisect_left(rooms, (size, 0))
        room, batch = rooms.pop(fit) if fit < len(rooms) else (budget, len(batches))
        if batch == len(batches):
            batches.append([])
        batches[batch] += members
        insort(rooms, (room - size, batch))
    return sorted(sorted(batch) for batch in batches)


def _cut_tree(lengths: list[int], shared: list[int], budget: int) -> list[int]:
    """Where to cut a tree into runs of at most ``budget`` tokens so that all runs together have the fewest tokens.

    The run i..j has ``lengths[i] + added[j] - added[i]`` tokens, with ``added`` the running sum of what each sequence
    adds to the one before: it grows with j and shrinks with i. So the best first sequence of the last run is a minimum
    over a sliding window.
    """
    fewest = [(0, 0)]  # (tokens, runs) of the first j sequences
    run_begin: list[int] = []
    added: list[int] = []
    window: deque[tuple[int, int, int]] = deque()  # (tokens less added, runs, first sequence), rising
    for j, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        added.append((added[-1] if added else 0) + length - common)
        candidate = (fewest[j][0] + length - added[j], fewest[j][1] + 1, j)
        while window and window[-1][:2] >= candidate[:2]:
            window.pop()
        window.append(candidate)
        while lengths[window[0][2]] + added[j] - added[window[0][2]] > budget:
            window.popleft()
        tokens, runs, begin = window[0]
        fewest.append((tokens + added[j], runs))
        run_begin.append(begin)
    cuts = []
    end = len(lengths)
    while end:
        end = run_begin[end - 1]
        cuts.append(end)
    return cuts[::-1]
