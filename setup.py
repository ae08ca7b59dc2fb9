"""Builds the pure package, or with TREE_ATTN_CUDA=1 the package with the CUDA kernels (csrc/build.py).

A pure build imports neither torch nor the kernel build, and runs no compiler.
"""

import importlib.util
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
WITH_KERNELS = os.environ.get("TREE_ATTN_CUDA", "0").strip().lower() not in ("", "0", "false", "no", "off")


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
        spec = importlib.util.spec_from_file_location("tree_attn_build", ROOT / "csrc" / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.build(ROOT / LIBRARY if self.editable_mode else Path(self.build_lib) / LIBRARY)
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

    def find_data_files(self, package, src_dir):
        return [f for f in super().find_data_files(package, src_dir) if not f.endswith(".so")]


class Package(Distribution):
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
