"""What serves the ops in a fresh process: no library, a CPU library, a broken one, one of another version.

Each case is a small copy of the checkout, because what serves the ops is decided once per process, at import.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron_smartmoe.ops import _build, fake, library, reference

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def copy_checkout(to: Path) -> Path:
    """The files that the ops need, without any compiled library, and with the objects of this checkout's builds."""
    shutil.copytree(ROOT / "csrc", to / "csrc")
    package = to / "megatron_smartmoe"
    shutil.copytree(
        ROOT / "megatron_smartmoe" / "ops", package / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "megatron_smartmoe" / name, package)
    share_objects(to)
    return to


def share_objects(checkout: Path) -> None:
    """Let builds in a copied checkout take from this one's cache what they would compile from the same sources."""
    _build.CACHE.mkdir(parents=True, exist_ok=True)
    (checkout / "build").mkdir()
    (checkout / "build" / _build.CACHE.name).symlink_to(_build.CACHE)


def python(checkout: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on a copied checkout, with none of the variables that the build and the ops look at, but `env`."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SMARTMOE_", "CUDA_HOME", "TORCH_CUDA", "LOCAL_RANK"))
    }
    clean |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=clean, capture_output=True, text=True, timeout=300
    )


def build(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return python(checkout, "megatron_smartmoe/ops/_build.py", **env)


@pytest.mark.parametrize("name", library.SCHEMAS)
def test_twins_and_fake_kernels_have_the_arguments_of_the_schema(name: str) -> None:
    schema = library.SCHEMAS[name].split(" -> ")[0]
    arguments = re.findall(r"(\w+)[,)]", schema)
    for module in (fake,) if name in library.HOST_OPS else (fake, reference):
        assert list(inspect.signature(getattr(module, name)).parameters) == arguments


CHECK = """
import torch
from megatron_smartmoe import ops
from megatron_smartmoe.ops import reference
seed = torch.seed()
for dtype in (torch.int32, torch.int64):
    for num_tokens, num_experts in ((0, 1), (1, 1), (1000, 7), (50000, 256)):
        ids, slot_of = torch.randint(-2, num_experts + 2, (num_tokens, 3), dtype=dtype), torch.randperm(num_experts)
        for view in (ids, ids.t(), ids[::2]):
            args = (view, slot_of, num_experts)
            for found, expected in zip(ops.dispatch_map(*args), reference.dispatch_map(*args), strict=True):
                assert torch.equal(found, expected), (seed, dtype, num_tokens, num_experts)
torch.library.opcheck(torch.ops.smartmoe.dispatch_map.default, (torch.tensor([[0, 1], [-1, 5]]), torch.arange(3), 3))
print(ops.backend())
"""


@pytest.fixture(scope="module")
def cpu_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied checkout where the library was built on a machine without nvcc."""
    checkout = copy_checkout(tmp_path_factory.mktemp("cpu"))
    done = build(checkout, CUDA_HOME=str(checkout))
    assert done.returncode == 0, done.stderr
    assert f"no CUDA toolkit (bin/nvcc and libcudart_static.a) in {checkout}: building for the CPU only" in done.stderr
    assert "built _smartmoe.so (cpu)" in done.stderr
    return checkout


@needs_compiler
@pytest.mark.slow
def test_without_nvcc_the_library_is_built_for_the_cpu_and_right(cpu_checkout: Path) -> None:
    done = python(cpu_checkout, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled (cpu)\n"
    assert "SlowOpsWarning" not in done.stderr


@needs_compiler
@pytest.mark.slow
def test_a_second_build_does_nothing(cpu_checkout: Path) -> None:
    made = cpu_checkout / "megatron_smartmoe" / "ops" / "_smartmoe.so"
    before = made.stat()
    done = build(cpu_checkout, SMARTMOE_CUDA="0")
    assert done.stderr == "smartmoe: _smartmoe.so is up to date (cpu)\n"
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@needs_compiler
@pytest.mark.slow
def test_a_library_of_another_version_is_refused(cpu_checkout: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(cpu_checkout, checkout, symlinks=True)
    registrations = checkout / "csrc" / "ops.cpp"
    registrations.write_text(registrations.read_text().replace("int num_slots", "int slots"))
    assert build(checkout, SMARTMOE_CUDA="0").returncode == 0
    done = python(checkout, "-c", "import megatron_smartmoe.ops")
    assert done.returncode != 0
    assert "CompatError" in done.stderr
    assert (
        "has smartmoe::dispatch_map(Tensor ids_TK, Tensor slot_of_E, int slots) -> (Tensor, Tensor) for "
        "smartmoe::dispatch_map(Tensor ids_TK, Tensor slot_of_E, int num_slots) -> (Tensor, Tensor): "
        "it is of another version. "
        "Rebuild it: python megatron_smartmoe/ops/_build.py (or delete it to use the torch reference)"
    ) in done.stderr


@pytest.mark.slow
def test_a_broken_library_is_refused(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    (checkout / "megatron_smartmoe" / "ops" / "_smartmoe.so").write_text("not a library")
    done = python(checkout, "-c", "import megatron_smartmoe.ops")
    assert done.returncode != 0
    assert "CompatError" in done.stderr
    assert "cannot be loaded" in done.stderr
    assert "Rebuild it: python megatron_smartmoe/ops/_build.py" in done.stderr


@pytest.mark.slow
def test_without_a_library_torch_serves_the_ops_and_says_so(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    done = python(checkout, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch reference\n"
    warning = (
        "SlowOpsWarning: _smartmoe.so is not built: the ops are served by the torch reference, slowly. "
        "Build it: python megatron_smartmoe/ops/_build.py"
    )
    assert done.stderr.count("SlowOpsWarning") == 1
    assert warning in done.stderr
    assert python(checkout, "-c", CHECK, LOCAL_RANK="1").stderr == ""  # one warning per node


def test_a_cpu_library_says_once_that_torch_serves_gpu_tensors() -> None:
    serve = library.warn_on_first_call("permute", reference.permute)
    args = torch.tensor([[5], [7]]), torch.tensor([[1], [0]], dtype=torch.int32), 2
    text = (
        r"_smartmoe\.so has no CUDA kernels: smartmoe::permute on a GPU is served by the torch reference\. "
        r"Build it where nvcc is: SMARTMOE_CUDA=1 python megatron_smartmoe/ops/_build\.py"
    )
    with pytest.warns(library.SlowOpsWarning, match=text):
        assert serve(*args).tolist() == [[7], [5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        serve(*args)
