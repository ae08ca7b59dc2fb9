"""The README's example runs as it stands, and what it names exists."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (18, 8, 64)  # type: ignore[attr-defined]
    assert names["lse"].shape == (8, 18)  # type: ignore[attr-defined]
    assert [len(x) for x in names["log_probs"]] == [4, 3, 2]  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    assert "-> " in printed
    assert "3 sequences in 1 trees" in printed


def test_the_two_commands_are_there_and_can_be_run() -> None:
    commands = re.search(r"## Try it\n.*?\n\n((?:    [^\n]+\n)+)", README, flags=re.DOTALL)
    assert commands is not None
    assert commands[1].split() == ["ci/demo", "ci/test"]
    for command in (*commands[1].split(), ".ci/run"):
        assert os.access(ROOT / command, os.X_OK), f"{command} is not executable"


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_every_link_to_a_file_leads_to_one(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert missing == []
