"""Do all ranks make the same call? Found out before anything travels that would be waited for in vain."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from tree_attn.distributed._shard import once_per_mask
from tree_attn.mask import TreeMask

_FAILED = -1


def mask_checksum(mask: TreeMask) -> int:
    """A number that other masks hardly ever have; synchronises at the first call."""

    def make() -> int:
        index = torch.arange(1, mask.total + 1, device=mask.device)
        mixed = (mask.subtree_end.long() + 0x1E3779B97F4A7C15) * (2 * index + 1)  # wraps around
        return int(((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B).sum())

    return once_per_mask(mask, "checksum", make)


def agree(
    group: dist.ProcessGroup, device: torch.device, facts: dict[str, object] | None, error: Exception | None
) -> None:
    """Return if every rank brought the same ``facts``, and no error of its own.

    Costs one small all-gather; what differs is only asked for when something does.

    Raises:
        ValueError: facts that differ, each with its values and ranks.
        RuntimeError: other ranks' errors. This rank's own error, if it has one, is raised as it is.
    """
    code = _FAILED if facts is None else zlib.crc32(repr(sorted(facts.items())).encode())
    mine = torch.tensor([code], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    codes = torch.cat(everyone).tolist()
    if codes.count(codes[0]) == len(codes) and codes[0] != _FAILED:
        return
    told: list[tuple[dict[str, object] | None, str]] = [(None, "")] * group.size()
    said = "" if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (facts, said), group=group)
    if error is not None:
        raise error
    failed = [f"rank {r}: {why}" for r, (_, why) in enumerate(told) if why]
    if failed:
        raise RuntimeError("tree_attention_cp did not run, because other ranks failed:\n  " + "\n  ".join(failed))
    all_facts = [found for found, _ in told if found is not None]
    lines = []
    for name in all_facts[0]:
        ranks_of: dict[str, list[int]] = {}
        for r, found in enumerate(all_facts):
            ranks_of.setdefault(str(found[name]), []).append(r)
        if len(ranks_of) > 1:
            lines.append(f"{name} is " + ", ".join(f"{value} on {_ranks(r)}" for value, r in ranks_of.items()))
    raise ValueError(
        "tree_attention_cp did not run, because the ranks do not agree; give every rank the same mask, options and "
        "head shapes:\n  " + "\n  ".join(lines)
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def require_tokens(name: str, x: Tensor, mask: TreeMask, rank: int, world_size: int) -> None:
    """
    Raises:
        ValueError: ``x`` does not hold the tokens that ``rank`` takes.
    """
    expected = len(mask.shard(world_size)[rank])
    if x.dim() == 0 or x.shape[0] != expected:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} on rank {rank} of {world_size}, which takes {expected} of the mask's "
            f"{mask.total} tokens; give {name}[mask.shard({world_size})[{rank}]] (scatter_tokens does)"
        )
