"""``tree-attn cp-plan`` prints what the plans are: for rollouts and for nodes, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tree_attn import TreeMask
from tree_attn.cli import cp_plan, main
from tree_attn.cli.app import app
from tree_attn.distributed._schedule import schedule

NODES = {"parents": [-1, *[0] * 40], "lengths": [200, *[100] * 40]}


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(NODES))
    return file


def run(*arguments: object) -> str:
    assert cp_plan.cp_plan  # its import adds the command
    result = CliRunner().invoke(app, ["cp-plan", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_the_numbers_of_the_plan(nodes: Path) -> None:
    (plan,) = json.loads(run(nodes, "--ranks", 4, "--json"))
    mask = TreeMask.from_nodes(NODES["parents"], NODES["lengths"])
    key = 8 * (128 + 128) * 2  # bytes of one token's keys and values
    assert plan["pairs"] == mask.visible_pairs()
    assert plan["estimates"]["ring"]["bytes"] == int(schedule(mask, 4).seen.sum()) * key
    assert plan["all_gather_bytes"] == 3 * mask.total * key
    pairs = [int((mask.depth[x].long() + 1).sum()) for x in mask.shard(4)]
    assert plan["estimates"]["ring"]["balance"] == pytest.approx(max(pairs) * 4 / sum(pairs))


def test_table_has_a_row_for_every_mode_and_number_of_ranks(nodes: Path) -> None:
    lines = run(nodes, "--ranks", 2, "--ranks", 8).splitlines()
    assert [line.split()[0] for line in lines if "ring" in line or "ulysses" in line] == ["2", "2", "8", "8"]
    assert "..." not in "".join(lines)
    assert "…" not in "".join(lines)


def test_slower_wires_are_never_more_efficient(nodes: Path) -> None:
    def efficiency(bandwidth: float) -> list[float]:
        (plan,) = json.loads(run(nodes, "--ranks", 8, "--bandwidth", bandwidth, "--json"))
        return [e["efficiency"] for e in plan["estimates"].values()]

    assert all(slow <= fast for slow, fast in zip(efficiency(1), efficiency(100), strict=True))


def test_rollouts_that_ship_with_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    from tree_attn.rollouts import SHIPPED

    assert main(["cp-plan", str(SHIPPED), "--ranks", "2"]) == 0
    assert "visible pairs" in capfd.readouterr().out


@pytest.mark.parametrize("option", [("--bandwidth", "0"), ("--heads", "8"), ("--tflops", "-1")])
def test_impossible_options_are_errors(nodes: Path, option: tuple[str, str]) -> None:
    assert main(["cp-plan", str(nodes), *option]) == 1
