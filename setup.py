"""Builds the compiled ops together with the package; everything else about the package is in pyproject.toml.

CUDA where a toolkit is, CPU otherwise; never asks for a GPU, never imports torch. The compiler is optional: without the
library the ops run on plain torch and say so. SMARTMOE_REQUIRE_BUILD=1 makes a failed build fatal.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILDER = Path(__file__).resolve().parent / "megatron_smartmoe" / "ops" / "_build.py"


def load_builder() -> ModuleType:
    """The builder, by its path: the package itself needs torch, which pip's build environment does not have."""
    spec = importlib.util.spec_from_file_location("smartmoe_build", BUILDER)
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
        builder = load_builder()
        try:
            builder.build(Path(self.get_ext_fullpath(ext.name)))
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


setup(
    # optional: setuptools accepts that the file may be missing after the build
    ext_modules=[Extension("megatron_smartmoe.ops._smartmoe", [], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
)
