"""The shipped rollouts are what the generator makes, and the reader takes what the format promises and nothing else."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from tree_attn.data import make_rollouts
from tree_attn.rollouts import SHIPPED, Rollout, read_rollouts


@pytest.fixture(scope="module")
def shipped():
    return read_rollouts()


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TestShippedFile:
    def test_generator_makes_it_byte_for_byte(self):
        assert make_rollouts.as_jsonl() == SHIPPED.read_bytes()

    def test_generator_runs_as_a_script_and_writes_where_told(self, tmp_path):
        out = tmp_path / "again.jsonl"
        script = SHIPPED.with_name("make_rollouts.py")
        subprocess.run([sys.executable, "-I", str(script), "-o", str(out)], check=True, capture_output=True)
        assert out.read_bytes() == SHIPPED.read_bytes()

    def test_check_tells_a_changed_file(self, tmp_path):
        changed = tmp_path / "changed.jsonl"
        changed.write_bytes(SHIPPED.read_bytes().replace(b"Cork", b"York", 1))
        assert make_rollouts.main(["--check"]) == 0
        assert make_rollouts.main(["--check", "-o", str(changed)]) == 1

    def test_at_least_40_different_sequences_over_5_prompts_each_with_a_reward(self, shipped):
        groups = Counter(r.group for r in shipped)
        assert len({r.tokens for r in shipped}) == len(shipped) >= 40
        assert len(groups) >= 5
        assert min(groups.values()) >= 4
        assert all(r.reward is not None and 0 <= r.reward <= 1 for r in shipped)
        assert len({r.reward for r in shipped}) > 5

    def test_every_group_branches_at_more_than_one_turn(self, shipped):
        for group in {r.group for r in shipped}:
            family = sorted(r.tokens for r in shipped if r.group == group)
            # How many tools had answered when two neighbours in sorted order parted.
            answered = {bytes(a[: common(a, b)]).count(b"<|tool|>") for a, b in pairwise(family)}
            assert len(answered) >= 2, f"{group} branches after {answered} tool calls only"

    def test_readme_beside_it_has_its_numbers(self, shipped):
        readme = SHIPPED.with_name("README.md").read_text("utf-8")
        prefixes = {hash(r.tokens[: i + 1]) for r in shipped for i in range(len(r.tokens))}
        for number in (sum(len(r.tokens) for r in shipped), len(prefixes)):
            assert f"{number:,}".replace(",", " ") in readme

    def test_loss_counts_the_agents_turns_and_nothing_else(self, shipped):
        for r in shipped:
            raw = bytes(r.tokens)
            said = [raw[begin:end] for begin, end in r.loss_spans]
            assert len(said) == raw.count(b"<|agent|>\n")
            for (begin, end), turn in zip(r.loss_spans, said, strict=True):
                assert raw[:begin].endswith(b"<|agent|>\n")
                assert b"<|" not in turn.removesuffix(b"<|end|>\n")
                assert end == len(raw) or raw[end:].startswith(b"<|tool|>\n")
            assert sum(r.loss_mask) == sum(map(len, said))

    def test_replies_are_the_tools_own(self, shipped):
        db, _, _ = make_rollouts.shop()
        tool, checked = make_rollouts.sql_tool(db), 0
        for r in shipped:
            for turn in r.text.split("<|agent|>\n")[1:]:
                call, _, reply = turn.partition("\n<|tool|>\n")
                _, found, query = call.partition("\nsql: ")
                if found:
                    assert tool(query)[0] == reply.removesuffix("\n")
                    checked += 1
        assert checked > 20


class TestReader:
    def read(self, tmp_path, *lines):
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return read_rollouts(path)

    def test_text_becomes_its_utf8_bytes(self, tmp_path):
        (r,) = self.read(tmp_path, {"text": "né"})
        assert r == Rollout(tokens=(110, 195, 169), text="né")
        assert r.loss_mask == [True, True, True]

    def test_token_ids_and_optional_fields(self, tmp_path):
        a, b = self.read(
            tmp_path,
            {"tokens": [5, 70000, 5], "group": "g", "reward": 1, "loss_spans": [[1, 3]], "extra": None},
            "",
            {"tokens": [0]},
        )
        assert a.tokens == (5, 70000, 5)
        assert (a.group, a.reward) == ("g", 1)
        assert a.loss_mask == [False, True, True]
        assert (b.group, b.reward, b.text) == (None, None, None)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "line 2"),
            ("[1]", "a list; each line is a JSON object"),
            ({}, "either 'text' or 'tokens'"),
            ({"text": "a", "tokens": [1]}, "either 'text' or 'tokens'"),
            ({"text": 3}, "'text' is a int"),
            ({"text": ""}, "empty"),
            ({"tokens": []}, "empty"),
            ({"tokens": [1, -2]}, "none negative"),
            ({"tokens": [1.5]}, "list of integers"),
            ({"tokens": [True]}, "list of integers"),
            ({"text": "ab", "reward": "high"}, "'reward' is 'high'"),
            ('{"text": "ab", "reward": NaN}', "finite"),
            ({"text": "ab", "group": 3}, "'group' is 3"),
            ({"text": "ab", "loss_spans": [[0, 3]]}, "0 <= begin < end <= 2"),
            ({"text": "ab", "loss_spans": [[1, 1]]}, "begin < end"),
            ({"text": "ab", "loss_spans": 4}, "'loss_spans' is a int"),
            ({"tokens": [1]}, "one kind"),
        ],
    )
    def test_bad_line_is_named_with_what_would_be_right(self, tmp_path, line, says):
        with pytest.raises(ValueError, match="line 2") as error:
            self.read(tmp_path, {"text": "good"}, line)
        assert says in str(error.value)

    def test_file_without_rollouts_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="holds no rollouts"):
            self.read(tmp_path, "", "  ")
