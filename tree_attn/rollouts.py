"""Rollouts in JSON lines: one sequence a line, as text (its UTF-8 bytes are the tokens) or as token ids.

    {"group": "task-1", "reward": 0.94, "text": "...", "loss_spans": [[746, 812], [1021, 1100]]}
    {"tokens": [101, 7592, 102]}

``group``, ``reward`` and ``loss_spans`` are optional. The file that ships with the package is :data:`SHIPPED`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "data" / "rollouts.jsonl"


@dataclass(frozen=True)
class Rollout:
    """One sequence.

    Attributes:
        tokens: token ids, at least one.
        group: the prompt or task it belongs to, or None.
        reward: or None.
        loss_spans: ``[begin, end)`` positions of the tokens that the loss counts, or None for all of them.
        text: what the tokens are the UTF-8 bytes of, or None for a line of token ids.
    """

    tokens: tuple[int, ...]
    group: str | None = None
    reward: float | None = None
    loss_spans: tuple[tuple[int, int], ...] | None = None
    text: str | None = None

    @property
    def loss_mask(self) -> list[bool]:
        """One flag a token: does the loss count it."""
        if self.loss_spans is None:
            return [True] * len(self.tokens)
        mask = [False] * len(self.tokens)
        for begin, end in self.loss_spans:
            mask[begin:end] = [True] * (end - begin)
        return mask


def read_rollouts(path: str | Path = SHIPPED) -> list[Rollout]:
    """Read a JSON-lines file of rollouts. Blank lines are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is not such an object, with its number and what would be right; a file without
            rollouts; lines of text and lines of token ids in one file.

    Example:
        >>> rollouts = read_rollouts()
        >>> rollouts[0].group, rollouts[0].reward
        ('sql-best-city', 0.94)
    """
    rollouts: list[Rollout] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rollouts.append(_rollout(json.loads(line)))
        except ValueError as error:  # json's and unicode's errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error
        if (rollouts[-1].text is None) != (rollouts[0].text is None):
            raise ValueError(
                f"{path}, line {number}: lines with 'text' and lines with 'tokens' in one file; use one kind"
            )
    if not rollouts:
        raise ValueError(f"{path} holds no rollouts; give one JSON object a line, with 'text' or 'tokens'")
    return rollouts


def _rollout(record: Any) -> Rollout:
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}; each line is a JSON object with 'text' or 'tokens'")
    if ("text" in record) == ("tokens" in record):
        raise ValueError("give either 'text' or 'tokens', not both and not neither")
    text, tokens = record.get("text"), record.get("tokens")
    if text is not None:
        if not isinstance(text, str):
            raise ValueError(f"'text' is a {type(text).__name__}; give a string")
        tokens = list(text.encode())
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise ValueError("'tokens' must be a list of integers, none negative")
    if not tokens:
        raise ValueError("the sequence is empty; leave it out")
    reward, group = record.get("reward"), record.get("group")
    if reward is not None and (type(reward) not in (int, float) or not math.isfinite(reward)):
        raise ValueError(f"'reward' is {reward!r}; give a finite number, or leave it out")
    if group is not None and not isinstance(group, str):
        raise ValueError(f"'group' is {group!r}; give a string, or leave it out")
    return Rollout(tuple(tokens), group, reward, _spans(record.get("loss_spans"), len(tokens)), text)


def _spans(spans: Any, length: int) -> tuple[tuple[int, int], ...] | None:
    if spans is None:
        return None
    right = f"give [begin, end) pairs with 0 <= begin < end <= {length} (the sequence's tokens)"
    if not isinstance(spans, list):
        raise ValueError(f"'loss_spans' is a {type(spans).__name__}; {right}")
    for span in spans:
        if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)):
            raise ValueError(f"'loss_spans' has {span!r}; {right}")
        if not 0 <= span[0] < span[1] <= length:
            raise ValueError(f"'loss_spans' has {span!r}; {right}")
    return tuple((begin, end) for begin, end in spans)
