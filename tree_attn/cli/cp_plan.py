"""``tree-attn cp-plan``: how a forest would be split over ranks, what would travel, and how fast that would be."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tree_attn.cli.app import JsonFlag, _errors, _heads, _mask_of_nodes, _tree_of, app
from tree_attn.distributed._cost import CostModel, Explanation, Shapes, explain
from tree_attn.mask import TreeMask
from tree_attn.rollouts import read_rollouts

_WIDTH = 118  # of the table, in characters
_BYTES = 2  # of a number: float16 and bfloat16
_DEFAULTS = CostModel()
_FILE = "JSON lines of rollouts, or a .json of nodes: {'parents': [...], 'lengths': [...]} in depth-first order."


@app.command("cp-plan")
def cp_plan(
    file: Annotated[Path, typer.Argument(help=_FILE)],
    ranks: Annotated[list[int], typer.Option(min=1, help="Ranks; give it several times to compare.")] = [64],  # noqa: B006
    heads: Annotated[
        str, typer.Option(help="Query heads, key/value heads, head dim; numbers of 16 bits.")
    ] = "32,8,128",
    tflops: Annotated[
        float, typer.Option(help="TFLOP/s of one device, forward and backward together; tree-attn bench measures it.")
    ] = _DEFAULTS.tflops,
    bandwidth: Annotated[float, typer.Option(help="GB/s that a rank can send, and receive.")] = _DEFAULTS.bandwidth,
    latency: Annotated[float, typer.Option(help="Microseconds to start an exchange.")] = _DEFAULTS.latency * 1e6,
    as_json: JsonFlag = False,
) -> None:
    """How context parallelism would split a forest: balance, bytes against an all-gather, predicted efficiency."""
    with _errors():
        mask = _mask_of_nodes(file) if file.suffix == ".json" else _tree_of(file, read_rollouts(file))[1]
        query, shared, size = _heads(heads)
        cost = CostModel(tflops, bandwidth, latency * 1e-6)
        shapes = Shapes(query, shared, size, size, _BYTES)
        plans = [explain(mask, n, shapes, "auto", cost) for n in ranks]
    if as_json:
        print(json.dumps([_as_dict(plan) for plan in plans], indent=2))
    else:
        _print(file, mask, heads, plans)


def _as_dict(plan: Explanation) -> dict[str, Any]:
    return {**asdict(plan), "estimates": {name: asdict(e) for name, e in plan.estimates.items()}}


def _print(file: Path, mask: TreeMask, heads: str, plans: list[Explanation]) -> None:
    out = Console(highlight=False, soft_wrap=True, width=max(_WIDTH, Console().width))  # a cut number says nothing
    cost = plans[0].cost
    deepest = int(mask.depth.max()) + 1 if mask.total else 0
    pairs = plans[0].pairs
    out.print(f"{file.name}: {mask.total:,} tokens, {pairs:,} visible pairs, longest path {deepest:,}", markup=False)
    out.print(
        f"assumed: heads {heads}, {cost.tflops:g} TFLOP/s and {cost.bandwidth:g} GB/s a rank, "
        f"{cost.latency * 1e6:g} us an exchange; one layer, forward and backward; MB are of the forward pass",
        markup=False,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = (
        "ranks",
        "balance",
        "tokens",
        "pieces",
        "mode",
        "MB received",
        "of all-gather",
        "MB busiest",
        "ms",
        "efficiency",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        tokens = plan.most_tokens * plan.world_size / max(plan.tokens, 1)
        for name, e in plan.estimates.items():
            share = f"{e.bytes / plan.all_gather_bytes:.3f}" if plan.all_gather_bytes else "-"
            table.add_row(
                str(plan.world_size),
                f"{e.balance:.3f}",
                f"{tokens:.2f}",
                str(plan.most_pieces),
                name + " *" * (name == plan.chosen),
                f"{e.bytes / 1e6:,.0f}",
                share,
                f"{e.busiest_bytes / 1e6:,.1f}",
                f"{e.seconds * 1e3:,.1f}",
                f"{e.efficiency:.0%}",
            )
    out.print(table)
    out.print(
        "balance: largest share of the attention over the mean; tokens: largest share over the mean; *: mode='auto'"
    )
