"""Builds the compiled ops and copies configs/ into the package; everything else about it is in pyproject.toml.

The ops are built for CUDA where a toolkit is and for the CPU otherwise; the build never asks for a GPU and never
imports torch. The compiler is optional: without the library the ops run on plain torch and say so.
SMARTMOE_REQUIRE_BUILD=1 makes a failed build fatal; SMARTMOE_LIBRARY names a library that was built elsewhere and is
taken as it is.

A wheel with the library needs no compiler where it is installed, and its name says where that is: any Python 3.12 or
later (the library does not know Python), this processor, and the glibc that the library asks for, which is no newer
than torch's own (see ops/_build.py). A wheel without it is for every machine. Both carry the models, clusters and runs
of configs/, so that `--config quickstart` works without a checkout; a checkout and an editable installation read the
folder itself.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPython(build_py):
    """Copies the modules, and configs/ with them unless the installation is editable."""

    def run(self) -> None:
        """Copy into an empty folder: what an earlier build left there would become part of the wheel."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "megatron_smartmoe"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for kind in ("models", "clusters", "runs", "scale"):
            shutil.copytree(ROOT / "configs" / kind, package / "configs" / kind)


def load_builder() -> ModuleType:
    """Import the builder by its path: the package itself needs torch, which pip's build environment does not have."""
    spec = importlib.util.spec_from_file_location("smartmoe_build", ROOT / "megatron_smartmoe" / "ops" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Builds one plain shared library instead of a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path in the package: no Python ABI tag, since torch loads it."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Runs the builder; a failure ends the installation only when SMARTMOE_REQUIRE_BUILD=1."""
        library = Path(self.get_ext_fullpath(ext.name))
        if built := os.environ.get("SMARTMOE_LIBRARY"):
            library.parent.mkdir(parents=True, exist_ok=True)
            if library.resolve() != Path(built).resolve():  # the same file in an editable installation
                shutil.copyfile(built, library)
            return
        builder = load_builder()
        try:
            builder.build(library)
        except (builder.BuildError, OSError) as error:
            if os.environ.get("SMARTMOE_REQUIRE_BUILD") == "1":
                raise
            print(
                f"smartmoe: WARNING: the compiled ops were NOT built: {error}\n"
                "smartmoe: the ops will be served by the torch reference, slowly, and say so when imported. "
                "Build them later: python megatron_smartmoe/ops/_build.py",
                file=sys.stderr,
                flush=True,
            )


class BuildWheel(bdist_wheel):
    """Names the wheel by what its library needs."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform: `py3-none-manylinux_2_17_x86_64`, or `py3-none-any` without the library."""
        build = self.get_finalized_command("build_ext")
        library = Path(build.get_ext_fullpath("megatron_smartmoe.ops._smartmoe"))
        if not library.exists():
            return "py3", "none", "any"
        major, minor = load_builder().needed_glibc(library)
        return "py3", "none", f"manylinux_{major}_{minor}_{platform.machine()}"


setup(
    # optional: setuptools accepts that the file may be missing after the build
    ext_modules=[Extension("megatron_smartmoe.ops._smartmoe", [], optional=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
