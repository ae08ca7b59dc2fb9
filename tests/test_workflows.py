"""The workflows build what the matrix says, hold no right they do not need, and only call scripts that run by hand."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wheels import jobs, matrix

yaml = pytest.importorskip("yaml", reason="PyYAML is in ci/workflow_tools.txt")

ROOT = Path(__file__).resolve().parent.parent
MATRIX = matrix.load()
PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in PATHS}
JOBS = [(f"{stem}.{name}", job) for stem, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()]
STEPS = [(name, step) for name, job in JOBS for step in job.get("steps", [])]
CIBUILDWHEEL = matrix.tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]

# Each right beyond reading, and the job that cannot do without.
WRITES = {
    "release.attest": {"id-token", "attestations"},
    "release.pypi": {"id-token"},
    "release.github": {"contents"},
    "release.pages": {"pages", "id-token"},
    "release.hub": {"id-token"},
}


def test_there_are_the_three_workflows():
    assert set(WORKFLOWS) == {"tests", "wheels", "release"}


def test_every_action_is_pinned_by_commit_and_says_its_version():
    used = [line.strip() for path in PATHS for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    foreign = [line for line in used if "$/" not in line]
    assert len(foreign) > 20
    for line in foreign:
        assert re.fullmatch(r"(- )?uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_has_one_pin():
    pins = {step["uses"].partition("@") for _, step in STEPS if "uses" in step}
    assert len({name for name, _, _ in pins}) == len(pins)


def test_no_job_has_a_right_that_it_does_not_need():
    assert all(workflow["permissions"] == {} for workflow in WORKFLOWS.values())
    writes = {
        name: {right for right, level in job["permissions"].items() if level != "read"}
        for name, job in JOBS
        if set(job["permissions"].values()) != {"read"}
    }
    assert writes == WRITES


def test_no_job_holds_a_stored_secret_or_keeps_the_token_of_its_checkout():
    assert not [path for path in PATHS if "secrets" in re.sub(r"#.*", "", path.read_text())]
    checkouts = [step for _, step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_every_job_ends():
    assert [name for name, job in JOBS if "steps" in job and job.get("timeout-minutes", 999) > 90] == []


def test_every_step_is_a_script_that_runs_by_hand():
    for name, step in STEPS:
        if "run" not in step:
            continue
        command = step["run"]
        assert "${{" not in command, f"{name}: {command} pastes a value into a script; pass it in env"
        script = re.fullmatch(r"(?:(\.?ci/\S+)|python (ci/\S+)|python3? -m (\S+))( [^\n;&|]*)?", command)
        assert script, f"{name}: {command}"
        path = script[1] or script[2]
        if path:
            assert (ROOT / path).is_file(), path
            assert script[2] or os.access(ROOT / path, os.X_OK), f"{path} cannot be executed"
        else:
            module = ROOT / (script[3].replace(".", "/") + ".py")
            assert script[3] == "pip" or module.is_file(), script[3]


def test_wheels_are_those_of_the_matrix():
    built = {(row["cuda"], row["variant"], row["machine"]) for row in jobs.wheels(MATRIX)}
    assert built == {
        (cuda["label"], variant["name"], platform["machine"])
        for cuda in MATRIX["cuda"]
        if cuda["published"]
        for variant in MATRIX["variant"]
        for platform in MATRIX["platform"]
    }
    job = WORKFLOWS["wheels"]["jobs"]["cuda"]
    assert job["strategy"]["matrix"] == "${{ fromJSON(needs.jobs.outputs.wheels) }}"
    assert job["runs-on"] == "${{ matrix.runner }}"
    named = {value for row in jobs.wheels(MATRIX) for value in (row["cuda"], row["variant"], row["machine"])}
    for path in PATHS:
        assert not named & set(re.findall(r"\w+", path.read_text())), f"{path.name} has a copy of the matrix"


def test_jobs_have_the_columns_that_the_workflows_ask_for():
    rows = {"wheels": jobs.wheels(MATRIX), "tests": jobs.tests(MATRIX)}
    for stem, found in rows.items():
        text = (ROOT / ".github" / "workflows" / f"{stem}.yml").read_text()
        asked = set(re.findall(r"\$\{\{ matrix\.(\w+)", text))
        assert asked, stem
        assert all(asked <= set(row) for row in found), stem


def test_tests_run_at_both_ends_of_what_is_supported():
    oldest, newest = jobs.tests(MATRIX)
    assert oldest == {"python": MATRIX["python"], "torch": f"torch=={MATRIX['torch']}.*"}
    assert newest["torch"] == "torch"
    assert tuple(map(int, newest["python"].split("."))) > tuple(map(int, oldest["python"].split(".")))


def test_one_row_more_in_the_matrix_is_built_attested_and_published(tmp_path):
    changed = tmp_path / "matrix.toml"
    row = '[[cuda]]\nlabel = "cu140"\ntoolkit = "14.0"\ndriver = "700.0"\ndriver_cuda = "14.0"\npublished = true\n'
    changed.write_text(matrix.PATH.read_text() + row)
    more = {row["name"] for row in jobs.wheels(matrix.load(changed))} - {row["name"] for row in jobs.wheels(MATRIX)}
    expected = {f"cu140-{v['name']}-{p['machine']}" for v in MATRIX["variant"] for p in MATRIX["platform"]}
    assert more == expected


def test_output_is_what_the_workflows_read():
    done = subprocess.run(
        [sys.executable, "-m", "wheels.jobs", "github"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for stem in ("tests", "wheels"):
        outputs = WORKFLOWS[stem]["jobs"]["jobs"]["outputs"]
        assert set(outputs) <= set(lines)
    assert yaml.safe_load(lines["names"]) == ["pure", *(row["name"] for row in jobs.wheels(MATRIX))]


def test_nothing_is_published_before_every_file_is_attested():
    release = WORKFLOWS["release"]["jobs"]

    def before(name: str) -> set[str]:
        needs = release[name].get("needs", [])
        needs = [needs] if isinstance(needs, str) else needs
        return set(needs).union(*map(before, needs))

    for name in ("pypi", "github", "index", "pages", "hub"):
        assert {"sources", "wheels", "files", "attest"} <= before(name), name
    assert release["attest"]["strategy"]["matrix"] == {"name": "${{ fromJSON(needs.wheels.outputs.names) }}"}
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true


def test_only_the_pure_wheel_and_the_sdist_go_to_pypi():
    downloads = [step["with"] for name, step in STEPS if name == "release.pypi" and "with" in step]
    assert downloads == [{"name": f"wheel-{jobs.PURE}", "path": "dist"}]


def test_image_gets_every_variable_and_script_that_its_build_uses():
    exported = re.findall(r"\b([A-Z_]+)=", (ROOT / "ci" / "cibuildwheel.sh").read_text().partition("export")[2])
    assert set(CIBUILDWHEEL["environment-pass"]) == set(exported)
    commands = [CIBUILDWHEEL[k] for k in CIBUILDWHEEL if k.startswith(("before-", "test-", "repair-"))]
    assert len(commands) == 5
    for path in re.findall(r"ci/\w+\.(?:sh|py)", " ".join(commands)):
        assert (ROOT / path).is_file(), path
        assert path.endswith(".py") or os.access(ROOT / path, os.X_OK), path
    for asked in re.findall(r"\$(\w+)", " ".join(commands)):
        assert asked in CIBUILDWHEEL["environment-pass"], asked


def test_image_is_the_platform_of_the_matrix():
    for platform in MATRIX["platform"]:
        image = CIBUILDWHEEL[f"manylinux-{platform['machine']}-image"]
        assert platform["tag"] == f"{image}_{platform['machine']}"


def test_wheels_are_built_with_the_torch_that_tests_run_with():
    in_tests = re.search(r"(?m)^torch=\$\{TORCH:-(.+)\}$", (ROOT / "ci" / "environment.sh").read_text())
    in_builds = re.search(r"(?m)^torch=(torch==.+)$", (ROOT / "ci" / "install_torch.sh").read_text())
    assert in_tests
    assert in_builds
    assert in_tests[1] == in_builds[1]


def missing_tools() -> list[str]:
    modules = [name for name in ("check_jsonschema", "cibuildwheel") if importlib.util.find_spec(name) is None]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return modules + [name for name in ("zizmor", "shellcheck", "bash") if shutil.which(name, path=path) is None]


@pytest.mark.skipif(bool(missing_tools()), reason=f"ci/workflow_tools.txt: not installed: {', '.join(missing_tools())}")
def test_schemas_identifiers_security_and_shell_are_checked():
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["ci/check_workflows.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for platform in MATRIX["platform"]:
        assert f"cp311-manylinux_{platform['machine']}" in done.stdout
