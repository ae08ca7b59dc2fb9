"""docs/migration.md: every example runs as it stands, and the picture is of the mask it says."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tree_attn import TreeMask

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
if not PAGE.is_file():
    pytest.skip(f"{PAGE} is not here: the tests run outside a checkout", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in TEXT.split("\n## ")[1:])
# Packages that a block says it needs. Blocks of a section share their names.
NEEDS = {"transformers": "5.4", "trl": "1.16"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def blocks(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.DOTALL)


def test_the_page_has_examples_in_every_section():
    assert len(SECTIONS) == 5
    assert all(blocks(section) for section in SECTIONS)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("section", "package"),
    [(s, p) for s in SECTIONS for p in (None, *NEEDS) if p is None or f"# needs: {p}\n" in SECTIONS[s]],
)
def test_the_examples_run(section: str, package: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if package is not None:
        pytest.importorskip(package, minversion=NEEDS[package], reason=f"{package} is not installed")
    module = types.ModuleType("migration")  # torch.compile, which flex_attention uses, looks a function's module up
    monkeypatch.setitem(sys.modules, "migration", module)
    ran = 0
    for block in blocks(section):
        needed = re.match(r"# needs: (\w+)\n", block)
        if needed is None or needed[1] == package:
            exec(compile(block, str(PAGE), "exec"), vars(module))
            ran += 1
    assert ran or package is None  # a section may be for a package alone


def test_the_picture_is_of_the_mask() -> None:
    section = SECTIONS["One tree in all the forms"]
    rows = [line.split() for line in section.split("\n") if re.fullmatch(r"    [pabcd](  ?[x.])+", line)]
    seen = torch.tensor([[entry == "x" for entry in row[1:]] for row in rows])
    table = {}
    for line in section.split("\n"):
        numbers = re.match(r"    (\w+) {3,}((?:\d+ +){8}\d+)", line)
        if numbers:
            table[numbers[1]] = [int(n) for n in numbers[2].split()]
    mask = TreeMask.from_dfs(table["start_q"], table["end_k"])
    assert torch.equal(mask.dense(), seen)
    assert mask.subtree_end.tolist() == table["subtree_end"]
    assert mask.depth.tolist() == table["depth"]
    q, k = torch.arange(9)[:, None], torch.arange(9)
    start, end = torch.tensor(table["start_q"]), torch.tensor(table["end_k"])
    assert torch.equal((k <= q) & (start[:, None] <= end), seen)
