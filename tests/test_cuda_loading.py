"""The library of CUDA kernels loads without a GPU, and every way it can fail to is a reason in explain() and no crash.

Cases that load a library, or stand in for one, run in a process of their own: operators cannot be unregistered.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tree_attn
from tree_attn import TreeMask, _kernels, registry
from tree_attn._backends.cuda import CudaBackend

REQUEST = registry.Request(torch.device("cuda", 0), torch.bfloat16, 8, 2, 64, 64)

needs_library = pytest.mark.skipif(
    not _kernels.LIBRARY.exists(), reason="the kernels are not built here: python csrc/build.py"
)
needs_cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None, reason="what a torch without CUDA does; this one has CUDA"
)

PRELUDE = """
import sys
from pathlib import Path
import torch
import tree_attn
from tree_attn import _kernels, registry

def reason():
    request = registry.Request(torch.device("cuda", 0), torch.bfloat16, 8, 2, 64, 64)
    return "; ".join(registry.explain_request(request, None).reasons["cuda"])
"""


def run(code: str, **environment: str) -> str:
    """The output of Python code in a process of its own; a crash or an exception fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture
def library_at(monkeypatch):
    """Make the loader look for its library elsewhere, as if nothing had been asked for yet."""

    def put(path: Path) -> None:
        monkeypatch.setattr(_kernels, "LIBRARY", path)
        monkeypatch.setattr(_kernels, "_loaded", None)
        # Another test of this process may have loaded the real one, and operators cannot be unregistered.
        monkeypatch.setattr(_kernels, "OP_NAMESPACE", "tree_attn_cuda_of_another_name")
        _kernels.unavailable.cache_clear()
        registry.reset()

    yield put
    monkeypatch.undo()
    _kernels.unavailable.cache_clear()
    registry.reset()


def reason() -> str:
    return "; ".join(registry.explain_request(REQUEST, None).reasons["cuda"])


def facts(**values: int) -> _kernels.DeviceFacts:
    """A machine that can run the kernels, but for what is given."""
    able = {"driver": 13000, "runtime": 13000, "count": 1, "count_error": 0, "major": 9, "minor": 0, "probe_error": 0}
    return _kernels.DeviceFacts(**{**able, **values})


# -- it loads --------------------------------------------------------------------------------------------------------


@needs_library
def test_loads_without_a_gpu_and_registers_its_operators():
    out = run("""
library = _kernels.load()
assert isinstance(library, _kernels.Kernels), library
for name in ("forward", "backward", "mask_from_dfs"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{_kernels.OP_NAMESPACE}::{name}", "CUDA"), name
    schema = getattr(library, name)._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None]
    print(name, *written, *(result.name for result in schema.returns))
assert library.build["version"] == tree_attn.__version__
""")
    assert out.splitlines() == [
        "forward out lse",
        "backward grad_q grad_k grad_v delta",
        "mask_from_dfs subtree_end depth end_bounds depth_bounds scratch",
    ]


@needs_library
def test_importing_and_running_on_the_cpu_does_not_load_it():
    out = run("""
mask = tree_attn.TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
x = torch.randn(7, 2, 16)
tree_attn.tree_attention(x, x, x, mask)
print(len(torch.ops.loaded_libraries))
""")
    assert out == "0"


@needs_library
def test_two_threads_that_ask_at_once_get_one_library():
    out = run("""
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: _kernels.load(), range(64)))
print(len({id(library) for library in found}), type(found[0]).__name__)
""")
    assert out == "1 Kernels"


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads the library's tables; binutils is missing")
def test_depends_on_nothing_that_one_torch_or_python_has_and_another_lacks():
    def read(option: str) -> list[str]:
        text = subprocess.run(
            ["readelf", "-W", option, str(_kernels.LIBRARY)], capture_output=True, text=True, check=True
        )
        return text.stdout.splitlines()

    needed = {line.split("[")[1].rstrip("]") for line in read("--dynamic") if "(NEEDED)" in line}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [n for n in needed if n.startswith(("libc10", "libcuda", "libpython", "libtorch_cuda"))]

    symbols = [line.split() for line in read("--dyn-syms") if len(line.split()) == 8]
    undefined = {s[7].split("@")[0] for s in symbols if s[6] == "UND"}
    # The stable ABI of torch 2.9 is the functions named aoti_torch_*; later ones are named torch_*.
    assert not [name for name in undefined if name.startswith(("torch_", "Py", "cuda", "cu"))]
    assert not [name for name in undefined if "c10" in name or "2at6" in name]
    weak = {s[7] for s in symbols if s[6] == "UND" and s[4] == "WEAK"}
    assert "aoti_torch_get_current_cuda_stream" in weak
    exported = {s[7].split("@")[0] for s in symbols if s[6] != "UND" and s[4] == "GLOBAL"}
    assert exported
    assert not [name for name in exported if not name.startswith("tree_attn_")]


# -- ways it can fail ------------------------------------------------------------------------------------------------


def test_not_built(library_at, tmp_path):
    library_at(tmp_path / "missing.so")
    assert reason() == "not built: this install has no CUDA kernels"
    assert "TREE_ATTN_CUDA=1 pip install" in _kernels.load().remedy


def test_file_that_is_no_library(library_at, tmp_path):
    path = tmp_path / "broken.so"
    path.write_text("no library")
    library_at(path)
    assert reason().startswith("broken.so does not load on this platform: ")
    assert str(path) in reason()  # the loader's own words


def test_library_for_another_processor(library_at, tmp_path):
    content = bytearray(Path(torch._C.__file__).read_bytes())
    content[18:20] = (243).to_bytes(2, sys.byteorder)  # e_machine: RISC-V
    path = tmp_path / "foreign.so"
    path.write_bytes(content)
    library_at(path)
    assert reason().startswith("foreign.so does not load on this platform: ")


def test_library_that_is_something_else(library_at):
    library_at(Path(torch._C.__file__))
    assert "is another library than this package needs" in reason()


@needs_library
def test_library_of_another_version():
    out = run("""
_kernels.__version__ = "99.0"
print(reason())
""")
    assert out.endswith(f"was built for tree_attn {tree_attn.__version__}, this is 99.0")


def test_operators_that_are_there_already(tmp_path):
    path = tmp_path / "second.so"
    path.write_text("never opened")
    out = run(f"""
taken = torch.library.Library(_kernels.OP_NAMESPACE, "DEF")
taken.define("forward(Tensor x) -> Tensor")
_kernels.LIBRARY = Path({str(path)!r})
print(reason())
""")
    assert out.startswith(f"the operator {_kernels.OP_NAMESPACE}::forward is there already")


@needs_library
def test_second_copy_of_the_library():
    out = run("""
torch.ops.load_library(str(_kernels.LIBRARY))
print(reason())
""")
    assert "is there already, from another copy of the library" in out


@needs_library
@needs_cpu_torch
def test_torch_without_cuda():
    out = run("""
print(reason())
torch.version.hip = "6.4"
_kernels.unavailable.cache_clear()
print(reason())
""")
    without, rocm = out.splitlines()
    assert "is built without CUDA" in without
    assert "is built for ROCm 6.4" in rocm


@needs_library
@needs_cpu_torch
def test_stream_function_missing_under_a_torch_with_cuda():
    out = run("""
torch.version.cuda = "13.0"
print(reason())
""")
    assert "is built with CUDA 13.0 but the library found no function for torch's current stream" in out


@needs_library
@needs_cpu_torch
def test_no_driver():
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    out = run("""
facts = _kernels.load().device_facts(0)
print(facts.driver, _kernels._judge(0, facts, _kernels.load().functions.tree_attn_error_text).reason)
""")
    assert out == "0 no NVIDIA driver is installed"


@needs_library
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to make a driver that is too old")
def test_driver_too_old(tmp_path):
    source = tmp_path / "driver.c"
    source.write_text(
        "int cuDriverGetVersion(int* v) { *v = 11080; return 0; }\nint cuInit(unsigned f) { return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    out = run(
        """
facts = _kernels.load().device_facts(0)
found = _kernels._judge(0, facts, _kernels.load().functions.tree_attn_error_text)
print(found.reason, found.remedy, sep="\\n")
""",
        LD_LIBRARY_PATH=str(tmp_path),
    )
    why, remedy = out.splitlines()
    assert why.startswith("the NVIDIA driver is for CUDA 11.8, too old for this build, which needs CUDA ")
    assert remedy.startswith("Update the driver")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (facts(), None),
        (facts(major=12), None),
        (facts(driver=0, count_error=35), "no NVIDIA driver is installed"),
        (facts(driver=12040, count_error=35), "the NVIDIA driver is for CUDA 12.4, too old for this build"),
        (facts(count=0, count_error=100), "CUDA sees 0 GPUs, none with index 0"),
        (facts(major=7, minor=5, probe_error=209), "the GPU is sm_75; the kernels need sm_80"),
        (facts(major=10, probe_error=209), "this build has no code that the GPU, sm_100, can run"),
        (facts(major=12, probe_error=222), "this build has no code that the GPU, sm_120, can run"),
        (facts(probe_error=46), "CUDA does not start: busy (error 46)"),
        (facts(count_error=803), "CUDA does not start: busy (error 803)"),
    ],
    ids=lambda x: f"major{x.major}-error{x.count_error or x.probe_error}" if hasattr(x, "major") else "",
)
def test_driver_and_gpu(found, expected):
    judged = _kernels._judge(0, found, lambda error: b"busy")
    if expected is None:
        assert judged is None
    else:
        assert judged.reason.startswith(expected)


def test_gpu_without_code_is_told_which_architecture_to_build():
    judged = _kernels._judge(0, facts(major=10, probe_error=209), lambda error: b"")
    assert 'TREE_ATTN_CUDA_ARCHS="100" TREE_ATTN_CUDA=1 pip install' in judged.remedy


# -- requests it cannot run, and what happens then -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": torch.device("cpu")}, "runs on NVIDIA GPUs; the tensors are on cpu"),
        ({"dtype": torch.float32}, "runs float16 and bfloat16, not float32"),
        ({"head_dim": 20}, "head_dim is 20; the kernels take multiples of 8 up to 256"),
        ({"value_dim": 264}, "value_dim is 264; the kernels take multiples of 8 up to 256"),
    ],
)
def test_requests_beyond_the_kernels_get_a_reason(change, expected, library_at, tmp_path):
    library_at(tmp_path / "missing.so")
    backend = CudaBackend()
    assert expected in backend.supports(REQUEST._replace(**change))
    assert backend.remedy(REQUEST._replace(**change)) is None  # no build would help


def test_a_library_that_cannot_run_falls_back(library_at, tmp_path):
    path = tmp_path / "broken.so"
    path.write_text("no library")
    library_at(path)
    mask = TreeMask.from_nodes([-1, 0, 0], [3, 2, 2])
    x = torch.randn(7, 2, 16)
    out = tree_attn.tree_attention(x, x, x, mask)
    torch.testing.assert_close(out, tree_attn.tree_attention(x, x, x, mask, backend="reference"))
    with pytest.raises(tree_attn.BackendUnavailable, match="runs on NVIDIA GPUs"):
        tree_attn.tree_attention(x, x, x, mask, backend="cuda")


@pytest.mark.parametrize(("variable", "value"), [("TREE_ATTN_CUDA_PATH", "fastest"), ("TREE_ATTN_CUDA_SMEM", "99 KB")])
def test_environment_variable_with_a_bad_value_is_an_error(variable, value, monkeypatch):
    from tree_attn._backends import cuda

    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is '{value}'; set it to"):
        cuda._config()
