"""Every command does its job, prints JSON that a script can read, and says what to install when an extra is missing."""

import importlib.metadata
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tree_attn
from tree_attn import TreeMask
from tree_attn.cli import COMMANDS, INSTALL_CLI, bench, main, picture
from tree_attn.cli import app as app_module
from tree_attn.cli.app import app
from tree_attn.rollouts import SHIPPED

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def few_threads():
    """The commands set torch's threads; other tests must not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs)


def without(modules, *command):
    """Run tree-attn in a process in which ``modules`` cannot be imported, as on an install without the extra."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from tree_attn.cli import main
sys.exit(main({list(map(str, command))!r}))
"""
    return python("-c", code)


def random_nodes(count, seed=0):
    """Parents and lengths of a random tree in depth-first order, every inner node with several children."""
    rng = random.Random(seed)
    parents, lengths, path = [-1], [40], [0]
    while len(parents) < count:
        del path[1 + rng.randrange(len(path)) :]
        for _ in range(min(2, count - len(parents))):
            parents.append(path[-1])
            lengths.append(rng.randint(2, 30))
        path.append(len(parents) - 1)
    return parents, lengths


class TestEntry:
    def test_installed_command_is_main(self):
        entries = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "tree-attn"]
        if not entries:
            pytest.skip("tree-attn is not installed here, only importable")
        assert entries[0].value == "tree_attn.cli:main"

    def test_main_returns_the_exit_code(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"tree-attn {tree_attn.__version__}\n"
        assert main(["show", "there-is-no-such-file.jsonl"]) == 1
        assert main(["no-such-command"]) == 2
        assert "Traceback" not in capsys.readouterr().err

    def test_importing_the_package_imports_no_extra(self):
        code = "import sys, tree_attn, tree_attn.cli; print({'typer', 'rich', 'matplotlib'} & set(sys.modules))"
        assert python("-c", code).stdout == "set()\n"


class TestDoctor:
    def test_text_says_what_every_backend_says(self):
        done = run("doctor")
        assert done.exit_code == 0
        for part in (
            f"tree_attn  {tree_attn.__version__}",
            f"torch      {torch.__version__}",
            "Python ",
            "driver ",
            "GPU",
        ):
            assert part in done.output
        explained = {b.name for b in tree_attn.backends()}
        assert explained <= set(done.output.split())
        assert "->" in done.output

    def test_json_holds_the_reasons_of_explain(self):
        said = json.loads(run("doctor", "--json").output)
        on_cpu = next(m for m in said["backends"] if (m["device"], m["dtype"]) == ("cpu", "float32"))
        q, k = torch.zeros(3, 8, 64), torch.zeros(3, 2, 64)
        explained = tree_attn.explain(q, k, k, TreeMask.from_nodes([-1], [3]))
        assert on_cpu["chosen"] == explained.chosen
        assert on_cpu["reasons"] == explained.reasons
        assert said["torch"]["version"] == torch.__version__
        assert said["extras"]["cli"]["typer"] == importlib.metadata.version("typer")

    def test_works_in_plain_text_without_any_extra(self):
        done = without(["typer", "rich", "matplotlib"], "doctor")
        assert done.returncode == 0, done.stderr
        assert "typer missing, rich missing, matplotlib missing" in done.stdout
        assert INSTALL_CLI in done.stdout

    def test_json_works_without_any_extra(self, monkeypatch, capsys):
        for module in ("typer", "rich", "matplotlib"):
            monkeypatch.setitem(sys.modules, module, None)
        assert main(["doctor", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["extras"]["cli"] == {"typer": None, "rich": None, "matplotlib": None}
        assert any(INSTALL_CLI in line for line in said["advice"])


class TestMissingExtra:
    @pytest.mark.parametrize("command", [c for c in COMMANDS if c != "doctor"])
    def test_command_says_what_to_install(self, command, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "typer", None)
        assert main([command, "--steps", "1"]) == 2
        said = capsys.readouterr().err
        assert INSTALL_CLI in said
        assert f"tree-attn {command} needs typer" in said

    @pytest.mark.parametrize("command", [["demo"], ["show"], ["bench", "-o", "plot.png"]])
    def test_pictures_need_matplotlib_and_say_so(self, command, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(command) == 2
        assert "needs matplotlib" in capsys.readouterr().err

    def test_in_a_process_of_its_own(self):
        done = without(["typer", "rich", "matplotlib"], "demo", "--steps", "1")
        assert done.returncode == 2
        assert INSTALL_CLI in done.stderr
        assert "Traceback" not in done.stderr


class TestDemo:
    def test_prints_what_it_promises_and_writes_the_picture(self, tmp_path):
        output = tmp_path / "demo.png"
        done = run("demo", "--limit", 5, "--steps", 1, "--threads", 1, "-o", output)
        assert done.exit_code == 0, done.output
        for part in ("5 sequences", "tokens", "attention pairs", "saved", "loss, step 1", "best step", "backend:",
                     "largest difference of any gradient", "The two ways train the same model."):  # fmt: skip
            assert part in done.output
        assert output.read_bytes().startswith(PNG)

    def test_module_prints_json_and_nothing_else(self, tmp_path):
        output = tmp_path / "demo.svg"
        done = python("-m", "tree_attn", "demo", "--limit", 5, "--steps", 2, "--threads", 1, "--json", "-o", output)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["same"] is True
        assert 0 < said["gradient_difference"] < 1e-5
        assert len(said["loss_tree"]) == len(said["loss_paths"]) == 2
        assert said["tokens_tree"] < said["tokens_paths"]
        assert said["explanation"]["chosen"] in said["explanation"]["reasons"]
        assert b"<svg" in output.read_bytes()[:2000]

    def test_difference_fails_with_a_plain_statement(self, tmp_path, monkeypatch):
        from tree_attn.cli import compare

        monkeypatch.setattr(
            compare, "tree_attention", lambda q, k, v, mask: 1.001 * tree_attn.tree_attention(q, k, v, mask)
        )
        done = run("demo", "--limit", 2, "--steps", 1, "--threads", 1, "-o", tmp_path / "x.png")
        assert done.exit_code == 1
        assert "THE GRADIENTS DIFFER" in done.output

    def test_takes_a_file_of_token_ids(self, tmp_path):
        file = tmp_path / "mine.jsonl"
        file.write_text('{"tokens": [3, 1, 4, 1, 5]}\n{"tokens": [3, 1, 4, 9]}\n')
        done = run("demo", file, "--steps", 1, "--json", "-o", tmp_path / "x.png")
        said = json.loads(done.output)
        assert (said["tokens_paths"], said["tokens_tree"], said["same"]) == (9, 6, True)

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["nowhere.jsonl"], "nowhere.jsonl"),
            (["--dtype", "float8"], "give one of float32"),
            (["--device", "nonsense"], "cannot use device 'nonsense'"),
            (["--limit", "2", "--steps", "1", "-o", "x.gif"], "must end with one of"),
            (["--limit", "2", "--max-tokens", "10"], "more than max_tokens=10"),
        ],
    )
    def test_mistakes_are_told_in_a_line(self, args, says, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = run("demo", *args)
        assert done.exit_code == 1
        assert "error: " in done.output
        assert says in done.output
        assert "Traceback" not in done.output


class TestShow:
    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    @pytest.mark.parametrize("count", [50, 5000])
    def test_draws_any_number_of_nodes_in_little_time(self, count, suffix, tmp_path):
        parents, lengths = random_nodes(count)
        file, output = tmp_path / "nodes.json", tmp_path / f"tree{suffix}"
        file.write_text(json.dumps({"parents": parents, "lengths": lengths}))
        begin = time.perf_counter()
        done = run("show", file, "-o", output, "--json")
        assert time.perf_counter() - begin < 20  # about 1 s here; a matrix of tokens times tokens would take minutes
        said = json.loads(done.output)
        assert said["tokens"] == sum(lengths)
        assert said["visible_pairs"] == TreeMask.from_nodes(parents, lengths).visible_pairs()
        head = output.read_bytes()[:2000]
        assert head.startswith(PNG) if suffix == ".png" else b"<svg" in head
        assert output.stat().st_size < 2_000_000

    def test_shipped_rollouts_with_the_name_of_every_prompt(self, tmp_path):
        output = tmp_path / "tree.svg"
        done = run("show", "-o", output)
        assert done.exit_code == 0, done.output
        assert "56 sequences of 7 prompts" in done.output
        _, _, labels = app_module._tree_of(SHIPPED, app_module.read_rollouts())
        assert len(labels) == 7

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.json", "[1]", "no JSON object with 'parents'"),
            ("a.json", '{"parents": [0], "lengths": [1]}', "parents[0] is 0"),
            ("a.json", '{"parents": [], "lengths": []}', "nothing to draw"),
            ("a.jsonl", "", "holds no rollouts"),
        ],
    )
    def test_bad_files_are_told_in_a_line(self, name, content, says, tmp_path):
        (tmp_path / name).write_text(content)
        done = run("show", tmp_path / name, "-o", tmp_path / "x.png")
        assert done.exit_code == 1
        assert done.output.startswith("error: ")
        assert says in done.output


class TestPicture:
    @pytest.mark.parametrize("pixels", [1, 7, 64, 200])
    def test_density_is_the_mean_of_the_dense_mask(self, pixels):
        mask = TreeMask.from_nodes(*random_nodes(12, seed=3))
        pixels = min(pixels, mask.total)
        end = mask.subtree_end.numpy().astype(np.int64)
        # Rows by area: repeat every row `pixels` times, then average `tokens` of them. Keys belong to one pixel each.
        rows = mask.dense().numpy().astype(float).repeat(pixels, axis=0).reshape(pixels, mask.total, mask.total).mean(1)
        column = np.arange(mask.total) * pixels // mask.total
        want = np.stack([rows[:, column == c].mean(1) for c in range(pixels)], axis=1)
        np.testing.assert_allclose(picture.mask_density(end, pixels), want, atol=1e-9)

    def test_nodes_and_branches_are_found_from_the_mask(self):
        parents, lengths = [-1, 0, 1, 1, 0, -1], [3, 2, 1, 4, 2, 1]
        mask = TreeMask.from_nodes(parents, lengths)
        end, depth = mask.subtree_end.numpy(), mask.depth.numpy()
        starts = [0, 3, 5, 6, 10, 12]
        assert picture.node_starts(end, depth).tolist() == starts
        assert picture.branches_below(end)[starts].tolist() == [3, 2, 1, 1, 1, 1]


class TestBench:
    QUICK = ("--device", "cpu", "--heads", "2,1,16", "--threads", 1)

    def test_every_peer_is_right_and_the_one_that_cannot_run_says_why(self, tmp_path):
        plot = tmp_path / "bench.png"
        done = run("bench", *self.QUICK, "--workloads", "dpo", "--json", "-o", plot)
        assert done.exit_code == 0, done.output
        rows = {row["peer"]: row for row in json.loads(done.output)["rows"]}
        assert list(rows) == ["tree_attn", "flex", "paths", "sdpa"]
        for peer in ("tree_attn", "paths", "sdpa"):
            assert rows[peer]["forward_ms"] > 0
            assert rows[peer]["backward_ms"] > 0
            assert rows[peer]["error"] < 1e-5  # float32
        assert rows["flex"]["forward_ms"] is None
        assert "backward" in rows["flex"]["why_not"]
        assert plot.read_bytes().startswith(PNG)

    def test_table_names_speed_and_reason(self):
        done = run("bench", *self.QUICK, "--workloads", "star,dpo", "--peers", "flex,paths")
        for workload in ("star", "dpo"):
            assert f"{workload}, 4,096 tokens" in done.output
        assert done.output.count("x as fast") == 2
        assert done.output.count("flex: cannot run here:") == 1  # one line, if the reason is the same everywhere

    def test_peer_that_is_not_installed_is_a_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cutlass", None)
        monkeypatch.delitem(sys.modules, "tree_attn.cli.fa4", raising=False)
        monkeypatch.delattr("tree_attn.cli.fa4", raising=False)
        done = run("bench", *self.QUICK, "--workloads", "dpo", "--peers", "fa4")
        assert done.exit_code == 0, done.output
        (line,) = (line for line in done.output.splitlines() if line.startswith("fa4"))
        assert "not installed" in line
        assert "pip install flash-attn-4" in line

    def test_runs_are_kept_and_their_medians_shown(self):
        done = run("bench", *self.QUICK, "--workloads", "dpo", "--peers", "", "--runs", 3, "--json")
        said = json.loads(done.output)
        times = sorted(rows[0]["forward_ms"] for rows in said["runs"])
        assert len(times) == 3
        assert said["rows"][0]["forward_ms"] == times[1]

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_plot_and_table_of_an_earlier_run(self, suffix, tmp_path):
        saved, plot = tmp_path / "bench.json", tmp_path / f"bench{suffix}"
        saved.write_text(results().to_json())
        done = run("bench", "--from", saved, "-o", plot)
        assert done.exit_code == 0, done.output
        assert "NVIDIA H100" in done.output
        assert "0123456789ab" in done.output
        assert "2.00x as fast" in done.output
        assert "fa2 on agent32k: cannot run here: it is causal" in done.output
        assert plot.read_bytes().startswith(PNG) or b"<svg" in plot.read_bytes()[:2000]
        assert run("bench", "--from", saved, "--json").output == results().to_json() + "\n"

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["--peers", "fa9"], "no peer 'fa9'"),
            (["--workloads", "ring"], "no workload 'ring'"),
            (["--heads", "3,2,64"], "first a multiple of the second"),
            (["--heads", "8"], "give query heads"),
            (["--from", "nowhere.json"], "nowhere.json"),
            (["--from", __file__], "not what `tree-attn bench --json` prints"),
        ],
    )
    def test_mistakes_are_told_in_a_line(self, args, says):
        done = run("bench", *args)
        assert done.exit_code == 1
        assert says in done.output


def results():
    """As if measured on a GPU: this project twice as fast as fa2, which cannot run on the second workload."""
    common = ("causal16k", 16384, 134_225_920), ("agent32k", 32768, 98_584_234)
    rows = []
    for name, tokens, pairs in common:
        rows.append(bench.Row(name, "tree_attn", tokens, pairs, 4.0, 12.0, 550.0, 460.0, 2e-3, "cuda (hopper)"))
        rows.append(bench.Row(name, "fa2", tokens, pairs, 8.0, 24.0, 275.0, 230.0, 2e-3))
    rows[-1] = bench.Row(name, "fa2", tokens, pairs, why_not="it is causal, and this tree branches")
    machine = ("NVIDIA H100", "2.11.0", "0.1.0", "0123456789ab")
    return bench.Results(*machine, "bfloat16", (32, 8, 128), 8192, 720.0, rows, [rows])


def test_threads_are_at_least_one_and_no_more_than_torch_has():
    assert 1 <= app_module.idle_cpus(0.05) <= torch.get_num_threads()
