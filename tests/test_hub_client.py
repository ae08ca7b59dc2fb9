"""The real Hub clients, over loopback: what `kernels` picks, refuses and keeps for offline, and what gets uploaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("kernels", reason="pip install 'tree-attn[hub]'")
pytest.importorskip("packaging")

import wheel_builds
from loopback_hub import Files, LoopbackHub
from wheel_builds import MATRIX, Built

from wheels import hub, hub_library

pytestmark = pytest.mark.slow

REPOSITORY = "org/tree-attn"
STABLE = "torch-stable-abi29-{}-x86_64-linux"
# A CPU build of torch stands for one with CUDA: `kernels` and the loader ask torch.version alone.
AS_CUDA = "import torch; torch.version.cuda = {!r}\n"
TRY = """
import json
mask = package.TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
torch.manual_seed(0)
q = torch.randn(7, 4, 16)
out = package.tree_attention(q, q, q, mask)
seen = mask.dense()
scores = torch.einsum("qhd,khd->hqk", q, q) * 16**-0.5
expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), q)
torch.testing.assert_close(out, expected)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return wheel_builds.built(tmp_path_factory)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources that nobody edits while the tests run."""
    return wheel_builds.small_checkout(tmp_path_factory.mktemp("sources") / "checkout")


@pytest.fixture(scope="module")
def stand_in(checkout: Path) -> Path:
    """What ci/build_wheel.sh leaves for the Hub, for every CUDA version, with no library in it."""
    dist = checkout / "dist"
    for row in MATRIX["cuda"]:
        folder = dist / "hub" / f"{row['label']}-x86_64"
        folder.mkdir(parents=True)
        (folder / hub.LIBRARY).write_bytes(b"stand-in for the library")
        facts = {"namespace": hub_library.namespace(checkout), "cuda": row["toolkit"], "archs": "80+PTX;90a"}
        (folder / "build.json").write_text(json.dumps(facts))
    return dist


@pytest.fixture(scope="module")
def files(stand_in: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    output = tmp_path_factory.mktemp("repository") / "repository"
    hub.assemble(stand_in, output, MATRIX, checkout)
    return read(output)


def read(folder: Path) -> Files:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def loopback(files: Files) -> Iterator[LoopbackHub]:
    """A Hub that has the kernel as version 1, from an organisation that it trusts."""
    with LoopbackHub() as served:
        served.trusted.add("org")
        served.commit(REPOSITORY, "v1", files)
        yield served


class Machine:
    """One user's machine: a cache of its own, and the Hub it asks."""

    def __init__(self, home: Path, served: LoopbackHub, checkout: Path):
        self.home, self.url, self.checkout = home, served.url, checkout

    def run(self, code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "TREE_ATTN_", "KERNELS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_TOKEN": "hf_loopback", "no_proxy": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=self.home.parent,
            env=inherited | own | {"PYTHONPATH": str(path or self.checkout)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def answer(self, code: str, path: Path | None = None, **environment: str) -> dict[str, object]:
        """What ``code`` prints last, as JSON."""
        done = self.run(code, path, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def machine(tmp_path: Path, loopback: LoopbackHub, checkout: Path) -> Machine:
    return Machine(tmp_path / "home", loopback, checkout)


GET = """
import kernels
package = kernels.get_kernel("org/tree-attn", version=1)
"""


# -- kernels.get_kernel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "chosen", "passed_over"),
    [
        ("13.0", STABLE.format("cu130"), {STABLE.format("cu126"): "CUDA version (12.6) is not compatible"}),
        ("12.8", STABLE.format("cu126"), {STABLE.format("cu130"): "CUDA version (13.0) is not compatible"}),
        (
            "11.8",
            "torch-universal",
            {
                STABLE.format("cu126"): "not compatible with system CUDA version (11.8)",
                STABLE.format("cu130"): "not compatible with system CUDA version (11.8)",
            },
        ),
        (None, "torch-universal", {STABLE.format("cu130"): ""}),
    ],
)
def test_variant_of_torchs_cuda_is_chosen_and_others_are_passed_over_with_a_reason(machine, cuda, chosen, passed_over):
    said = machine.answer(
        AS_CUDA.format(cuda) + GET + TRY + "trace = kernels.get_kernel_variants('org/tree-attn', version=1)\n"
        "print(json.dumps({'file': package.__file__, 'reasons': {d.variant.variant_str: d.reason for d in trace"
        " if isinstance(d, kernels.VariantRejected)}}))"
    )
    assert Path(said["file"]).parent.name == chosen
    assert "torch-universal" not in said["reasons"]
    for variant, reason in passed_over.items():
        assert reason in said["reasons"][variant]


def test_library_that_was_changed_is_refused_by_its_digest_and_the_fallback_answers(machine, loopback, files):
    changed = f"build/{STABLE.format('cu130')}/{hub.LIBRARY}"
    loopback.commit(REPOSITORY, "v1", files | {changed: b"something else"})
    said = machine.answer(
        AS_CUDA.format("13.0") + GET + TRY + "import importlib, pathlib\n"
        "found = importlib.import_module(package.__name__ + '._kernels').load()\n"
        "from kernels._rust import Digest, DigestValidationError, Metadata\n"
        "folder = pathlib.Path(package.__file__).parent\n"
        "said = Metadata.read_from_file(folder / 'metadata.json').digest\n"
        "try: said.validate(Digest.hash_variant(said.algorithm, folder))\n"
        "except DigestValidationError as error: theirs = str(error)\n"
        "print(json.dumps({'reason': found.reason, 'theirs': theirs}))"
    )
    assert said["reason"] == f"this Hub kernel is refused: {hub.LIBRARY} is not the file that its digest was made of"
    assert hub.LIBRARY in said["theirs"]  # the client's own comparison agrees


def test_digests_are_those_that_the_client_makes(files, tmp_path):
    from kernels._rust import Digest, Metadata

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for folder in (tmp_path / "build").iterdir():
        metadata = Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))
        assert metadata.version == hub.VERSION


def test_organisation_that_is_not_trusted_is_refused_unless_the_caller_trusts_it(machine, loopback, files):
    loopback.commit("stranger/tree-attn", "v1", files)
    ask = 'import kernels; kernels.get_kernel("stranger/tree-attn", version=1{}); print("loaded")'
    refused = machine.run(ask.format(""))
    assert refused.returncode == 1
    assert "is not from a trusted publisher" in refused.stderr
    assert not any("/resolve/" in request for request in loopback.requests)
    assert machine.run(ask.format(", trust_remote_code=True")).stdout.strip() == "loaded"


def test_offline_it_comes_from_the_cache_and_without_one_the_error_says_so(machine, loopback):
    code = AS_CUDA.format("13.0") + GET + TRY + "print(json.dumps({'file': package.__file__}))"
    empty = machine.run(code, HF_HUB_OFFLINE="1")
    assert empty.returncode == 1
    assert "is not available in the local cache" in empty.stderr
    online = machine.answer(code)
    # As docs/install.md says: get_kernel alone keeps one variant, and offline an incomplete snapshot is none.
    whole = 'snapshot_download("org/tree-attn", repo_type="kernel", revision="v1")'
    assert machine.run(f"from huggingface_hub import snapshot_download; {whole}").returncode == 0
    loopback.requests.clear()
    assert machine.answer(code, HF_HUB_OFFLINE="1") == online
    assert loopback.requests == []


# -- TREE_ATTN_HUB and use_hub ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pure(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An install without kernels."""
    folder = tmp_path_factory.mktemp("pure")
    zipfile.ZipFile(built.wheel(None)).extractall(folder)
    return folder


@pytest.fixture
def real(loopback: LoopbackHub, built: Built, tmp_path: Path) -> LoopbackHub:
    """The Hub with the library that was built here in the place of the stand-in."""
    if built.label not in [row["label"] for row in MATRIX["cuda"] if row["published"]]:
        pytest.skip(f"{built.label} is not published, so no Hub kernel has it")
    hub.assemble(built.dist, tmp_path / "repository", MATRIX, built.root)
    loopback.commit(REPOSITORY, "v1", read(tmp_path / "repository"))
    return loopback


def cuda_of(built: Built) -> str:
    return next(row["toolkit"] for row in MATRIX["cuda"] if row["label"] == built.label)


LOAD = """
import tree_attn as package
from tree_attn import _kernels
found = _kernels.load()
refused = isinstance(found, _kernels.Unavailable)
reason = _kernels.unavailable(0).reason
"""
REPORT = "print(json.dumps({'build': None if refused else found.build, 'reason': reason}))"


def test_install_without_kernels_takes_them_from_the_hub_when_asked_and_then_offline_too(machine, real, built, pure):
    code = AS_CUDA.format(cuda_of(built)) + LOAD + TRY + REPORT
    assert machine.answer(code, pure)["build"] is None
    assert real.requests == []  # off unless asked for
    asked = {"TREE_ATTN_HUB": f"{REPOSITORY}@v1"}
    assert machine.answer(code, pure, **asked)["build"]["cuda"] == cuda_of(built)
    real.requests.clear()
    assert machine.answer(code, pure, **asked, HF_HUB_OFFLINE="1")["build"]["cuda"] == cuda_of(built)
    assert real.requests == []
    in_code = f"import tree_attn; tree_attn.use_hub({REPOSITORY + '@v1'!r})\n"
    assert machine.answer(AS_CUDA.format(cuda_of(built)) + in_code + LOAD + TRY + REPORT, pure)["build"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"TREE_ATTN_HUB": REPOSITORY}, "name it as org/name@revision, the revision is mandatory"),
        ({"TREE_ATTN_HUB": "stranger/tree-attn@v1"}, "is not from a trusted publisher"),
        ({"TREE_ATTN_HUB": f"{REPOSITORY}@v9"}, "cannot be had"),
        ({"TREE_ATTN_HUB": f"{REPOSITORY}@v1", "HF_HUB_OFFLINE": "1"}, "Cannot find a local snapshot"),
        ({"TREE_ATTN_HUB": f"{REPOSITORY}@v1", "HF_ENDPOINT": "http://127.0.0.1:9"}, "could not verify publisher"),
    ],
)
def test_refusals_and_offline_are_reasons_and_the_fallback_answers(machine, loopback, files, pure, asked, expected):
    loopback.commit("stranger/tree-attn", "v1", files)
    said = machine.answer(AS_CUDA.format("13.0") + LOAD + TRY + REPORT, pure, **asked)
    assert said["build"] is None
    assert said["reason"].startswith("not built, and the Hub kernel")
    assert expected in said["reason"]


def test_changed_library_is_refused_when_it_comes_from_the_hub(machine, loopback, files, pure):
    changed = f"build/{STABLE.format('cu130')}/{hub.LIBRARY}"
    loopback.commit(REPOSITORY, "v1", files | {changed: b"something else"})
    said = machine.answer(AS_CUDA.format("13.0") + LOAD + TRY + REPORT, pure, TREE_ATTN_HUB=f"{REPOSITORY}@v1")
    assert f"is refused: {hub.LIBRARY} is not the file" in said["reason"]


def test_wheel_and_hub_kernel_live_in_one_process_each_with_its_own_library(machine, real, built, tmp_path):
    wheel = tmp_path / "wheel"
    zipfile.ZipFile(built.wheel(built.label)).extractall(wheel)
    code = (
        AS_CUDA.format(cuda_of(built))
        + LOAD
        + "first, ours = package, found\n"
        + GET
        + TRY
        + """
import importlib
theirs = importlib.import_module(package.__name__ + "._kernels").load()
namespaces = [k.forward._schema.name.split("::")[0] for k in (ours, theirs)]
other = first.tree_attention(q, q, q, first.TreeMask.from_nodes([-1, 0, 0], [3, 2, 2]))
print(json.dumps({"namespaces": namespaces, "same": torch.equal(out, other), "name": package.__name__,
    "builds": [k.build["cuda"] for k in (ours, theirs)]}))
"""
    )
    said = machine.answer(code, wheel)
    assert said["namespaces"] == ["tree_attn_cuda", said["name"]]
    assert said["builds"] == [cuda_of(built)] * 2
    assert said["same"]


# -- --push ----------------------------------------------------------------------------------------------------------


def push(machine: Machine, stand_in: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = ["wheels.hub", str(stand_in), "-o", str(output), "--push", "maker/tree-attn", *arguments]
    return machine.run(f"import runpy, sys; sys.argv = {given!r}; runpy.run_module('wheels.hub', run_name='__main__')")


def test_dry_run_of_a_push_lists_the_files_and_sends_nothing(machine, loopback, stand_in, tmp_path):
    done = push(machine, stand_in, tmp_path / "output", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "files to maker/tree-attn, branch v1 (dry run: nothing is sent)" in done.stdout
    for variant in (STABLE.format("cu126"), STABLE.format("cu130")):
        assert f"build/{variant}/{hub.LIBRARY}\n" in done.stdout
    assert loopback.requests == []


def test_what_was_pushed_is_what_a_client_then_loads(machine, loopback, stand_in, files, tmp_path):
    loopback.trusted.add("maker")
    loopback.commit("maker/tree-attn", "main", {"build/torch-universal/old.py": b"of an earlier push"})
    done = push(machine, stand_in, tmp_path / "output")
    assert done.returncode == 0, done.stderr
    for branch in ("v1", "main"):
        _, held = loopback.files("maker/tree-attn", branch)
        assert {name: content for name, content in held.items() if name != ".gitattributes"} == files
    got = GET.replace("org/tree-attn", "maker/tree-attn")
    said = machine.answer(AS_CUDA.format("13.0") + got + TRY + "print(json.dumps({'file': package.__file__}))")
    assert Path(said["file"]).parent.name == STABLE.format("cu130")
