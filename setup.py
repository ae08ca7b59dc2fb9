"""Builds the pure package, or with TREE_ATTN_CUDA=1 the package with the CUDA kernels (csrc/build.py).

A pure build imports neither torch nor the kernel build, and runs no compiler. TREE_ATTN_WHEEL names a variant of
wheels/matrix.toml and makes a wheel for publishing: its architectures, and a version that ends in the label of the
toolkit that builds it ("0.1.0+cu130"). The matrix is baked into the package, for `tree-attn doctor`.
"""

import importlib.util
import json
import os
from pathlib import Path

import setuptools
from setuptools import Command, Distribution, setup

# Without build isolation pip does not look at what pyproject.toml demands.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"setuptools is {setuptools.__version__}; run: pip install 'setuptools>=77' ninja")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "tree_attn/libtree_attn_cuda.so"
MATRIX = "tree_attn/_matrix.json"
VARIANT = os.environ.get("TREE_ATTN_WHEEL")
WITH_KERNELS = os.environ.get("TREE_ATTN_CUDA", "0").strip().lower() not in ("", "0", "false", "no", "off")


def load(path):
    spec = importlib.util.spec_from_file_location(f"tree_attn_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_row():
    """The row of the matrix that this toolkit and TREE_ATTN_WHEEL make: label, toolkit, archs."""
    matrix, build_kernels = load(ROOT / "wheels" / "matrix.py"), load(ROOT / "csrc" / "build.py")
    try:
        toolkit = ".".join(map(str, build_kernels.find_nvcc().version))
        return matrix.build_row(matrix.load(), matrix.label_of(toolkit), VARIANT)
    except (build_kernels.BuildError, ValueError) as error:
        raise SystemExit(f"\ntree_attn: {error}") from None


class BuildKernels(Command):
    """Compiles csrc/ into the package: beside the sources for an editable install, else into the build folder."""

    description = "build the CUDA kernels"
    user_options = []  # noqa: RUF012  # what setuptools wants

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        module = load(ROOT / "csrc" / "build.py")
        output = ROOT / LIBRARY if self.editable_mode else Path(self.build_lib) / LIBRARY
        try:
            if VARIANT:
                row = wheel_row()  # each wheel keeps its objects apart
                folder = ROOT / "build" / f"kernels-{row['cuda']}-{VARIANT}"
                module.build(output, row["archs"], folder=folder, release=True)
            else:
                module.build(output)
        except module.BuildError as error:
            raise SystemExit(f"\ntree_attn: {error}") from None

    def get_outputs(self):
        return [str(Path(self.build_lib) / LIBRARY)]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []  # MANIFEST.in names them


class Build(build):
    sub_commands = build.sub_commands + ([("build_kernels", None)] if WITH_KERNELS else [])


class BuildPy(build_py):
    def finalize_options(self):
        super().finalize_options()
        # A library that an earlier build left behind is no part of this one.
        if not self.editable_mode:
            Path(self.build_lib, LIBRARY).unlink(missing_ok=True)

    def run(self):
        super().run()
        source = ROOT / "wheels" / "matrix.py"
        if source.exists():  # without it the package advises building from source
            module = load(source)
            baked = ROOT / MATRIX if self.editable_mode else Path(self.build_lib) / MATRIX
            baked.write_text(json.dumps(module.load(), indent=1) + "\n")

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / MATRIX)]

    def find_data_files(self, package, src_dir):
        left_behind = (".so", Path(MATRIX).name)
        return [f for f in super().find_data_files(package, src_dir) if not f.endswith(left_behind)]


class Package(Distribution):
    def parse_config_files(self, *arguments, **options):
        super().parse_config_files(*arguments, **options)
        if VARIANT and WITH_KERNELS and "+" not in self.metadata.version:
            self.metadata.version += f"+{wheel_row()['label']}"

    def has_ext_modules(self):
        return WITH_KERNELS  # then the wheel is for one platform


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        # The library needs no Python of its own: one wheel serves every version.
        return ("py3", "none", platform) if WITH_KERNELS else (python, abi, platform)


setup(
    distclass=Package,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "build_py": BuildPy, "bdist_wheel": Wheel},
)
