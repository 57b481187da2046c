"""The builder: its settings, its cache, setup.py's use of it, and what is inside a library built with nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_smartmoe.ops import _build

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: nothing to build CUDA code with")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SMARTMOE_CUDA", "SMARTMOE_REQUIRE_BUILD", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("9.0", ("90",)),
        ("8.0;9.0;10.0+PTX", ("80", "90", "100+PTX")),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ("75", "80", "86", "90", "100", "120+PTX")),  # as in NVIDIA's containers
        (" 9.0a ; 9.0a 12.1f", ("90a", "121f")),
        ("Ampere;Hopper", ("80", "86+PTX", "90+PTX")),
    ],
)
def test_archs_are_read_as_torch_does(text: str, archs: tuple[str, ...]) -> None:
    assert _build.parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("90", "'90' is not an architecture such as 9.0, 9.0a or 9.0+PTX (separated by ; or spaces)"),
        ("8.0,9.0", "'8.0,9.0' is not an architecture such as 9.0, 9.0a or 9.0+PTX (separated by ; or spaces)"),
        ("9.0;", "'' is not an architecture such as 9.0, 9.0a or 9.0+PTX (separated by ; or spaces)"),
        ("6.1;9.0", "'6.1' is older than 7.0, the first that the kernels can run on"),
        ("native", "'native' needs a GPU, and a build never asks for one"),
    ],
)
def test_bad_archs_are_refused(text: str, rule: str) -> None:
    with pytest.raises(_build.BuildError) as caught:
        _build.parse_archs(text)
    way_out = "Name your GPUs' architectures, or unset it (8.0;9.0;10.0+PTX)"
    assert str(caught.value) == f"TORCH_CUDA_ARCH_LIST = {text!r}: {rule}. {way_out}"


def test_gencode_adds_ptx_where_asked() -> None:
    assert _build.gencode(("80", "90a+PTX"))[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(_build.BuildError) as caught:
        _build.max_jobs()
    assert str(caught.value) == (
        f"MAX_JOBS = {text!r}: it must be a whole number of at least 1. Set MAX_JOBS=2, or unset it"
    )


def test_bad_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTMOE_CUDA", "yes")
    with pytest.raises(_build.BuildError) as caught:
        _build.find_cuda()
    assert str(caught.value) == (
        "SMARTMOE_CUDA = 'yes': it must be 0, 1 or auto. Unset it to build for CUDA where nvcc is"
    )


def test_cuda_asked_for_and_absent_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMARTMOE_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError) as caught:
        _build.find_cuda()
    assert str(caught.value) == (
        f"SMARTMOE_CUDA = '1': no CUDA toolkit (bin/nvcc and libcudart_static.a) in {tmp_path}. "
        "Set CUDA_HOME to the toolkit, or SMARTMOE_CUDA=0 for the CPU"
    )


def test_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(_build.BuildError) as caught:
        _build.find_toolchain()
    assert str(caught.value) == (
        "CXX = 'no-such-compiler': there is no such program. Install g++, or set CXX to a C++20 compiler"
    )


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> _build.Toolchain:
    """A CPU toolchain."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setenv("SMARTMOE_CUDA", "0")
    return _build.find_toolchain()


def objects(tools: _build.Toolchain, root: Path) -> dict[str, str]:
    return {str(job.source): job.object.name for job in _build.plan(tools, root, root / "cache")}


def test_an_edit_recompiles_what_it_touches(tools: _build.Toolchain, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    first = objects(tools, tmp_path)
    assert set(first) >= {"csrc/ops.cpp", "csrc/cpu/permute.cpp"}
    assert not any("cuda" in source for source in first)

    with (tmp_path / "csrc" / "cpu" / "permute.cpp").open("a") as source:
        source.write("// edited\n")
    second = objects(tools, tmp_path)
    assert {s for s in first if first[s] != second[s]} == {"csrc/cpu/permute.cpp"}

    for name in ("checks.h", "cuda/rows.cuh"):
        with (tmp_path / "csrc" / name).open("a") as header:
            header.write("// edited\n")
        third = objects(tools, tmp_path)
        assert all(second[s] != third[s] for s in second)
        second = third


def test_a_checkout_without_sources_is_refused(tools: _build.Toolchain, tmp_path: Path) -> None:
    with pytest.raises(_build.BuildError) as caught:
        _build.plan(tools, tmp_path, tmp_path)
    rule = f"csrc = '{tmp_path}/csrc': it has no sources. Build in a checkout of the repository"
    assert str(caught.value) == rule


def test_a_compiler_error_shows_the_command_and_leaves_nothing(tools: _build.Toolchain, tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("this is no C++\n")
    with pytest.raises(
        _build.BuildError, match=r"csrc/broken\.cpp could not be built\. The command:\n.*-c csrc/broken\.cpp"
    ):
        _build.build(tmp_path / "out.so", tmp_path / "cache", tmp_path)
    assert not (tmp_path / "out.so").exists()
    assert list((tmp_path / "cache").iterdir()) == []


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "99.0")
    with pytest.raises(
        _build.BuildError, match=r"TORCH_CUDA_ARCH_LIST = '99\.0': .*Name only architectures that this CUDA"
    ):
        _build.build(tmp_path / "out.so", tmp_path / "cache")


@needs_compiler
@pytest.mark.slow
def test_setup_builds_the_library_or_says_that_it_did_not(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).touch()
    for name in ("csrc", "megatron_smartmoe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    made = tmp_path / "megatron_smartmoe" / "ops" / "_smartmoe.so"

    def setup(**env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = {**os.environ, "SMARTMOE_CUDA": "0", **env}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    failed = setup(CXX="no-such-compiler")
    assert failed.returncode == 0, failed.stderr
    assert "WARNING: the compiled ops were NOT built: CXX = 'no-such-compiler'" in failed.stderr
    assert not made.exists()
    assert setup(CXX="no-such-compiler", SMARTMOE_REQUIRE_BUILD="1").returncode != 0
    done = setup(SMARTMOE_REQUIRE_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert made.exists()


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as the defaults build it; objects come from the checkout's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX"):
            patch.delenv(name, raising=False)
        patch.setenv("SMARTMOE_CUDA", "1")
        return _build.build(tmp_path_factory.mktemp("cuda") / "_smartmoe.so", _build.CACHE)


def output_of(*command: str, **env: str) -> str:
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout


def cuobjdump() -> str:
    """NVIDIA's disassembler: not in every toolkit, but triton carries one. It calls nvdisasm, which lies beside it."""
    triton = _build.find_torch()[0].parent / "triton" / "backends" / "nvidia" / "bin"
    program = shutil.which("cuobjdump", path=f"{os.environ['PATH']}:/usr/local/cuda/bin:{triton}")
    if program is None:
        pytest.skip("there is no cuobjdump, neither in the CUDA toolkit nor in triton")
    return program


@needs_nvcc
def test_library_has_code_for_every_default_gpu(cuda_library: Path) -> None:
    listing = output_of(cuobjdump(), "--list-elf", "--list-ptx", str(cuda_library))
    assert set(re.findall(r"dispatch_map\.(sm_\w+)\.cubin", listing)) == {"sm_80", "sm_90", "sm_100"}
    assert set(re.findall(r"dispatch_map\.(sm_\w+)\.ptx", listing)) == {"sm_100"}


@needs_nvcc
def test_kernels_use_no_local_memory(cuda_library: Path) -> None:
    program = cuobjdump()
    path = f"{Path(program).parent}:{os.environ['PATH']}"
    usage = re.findall(
        r"STACK:(\d+) .*LOCAL:(\d+)", output_of(program, "--dump-resource-usage", str(cuda_library), PATH=path)
    )
    assert len(usage) >= 3 * 5  # architectures, .cu files
    assert set(usage) == {("0", "0")}


@needs_nvcc
def test_library_links_as_intended(cuda_library: Path) -> None:
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    symbols = output_of("nm", "-C", str(cuda_library))
    assert "smartmoe::cuda::launch_dispatch_map(" in symbols
    assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE)
    assert not re.search(r"^\s+U (cuda|cu[A-Z])", symbols, re.MULTILINE)  # the CUDA runtime is inside
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", str(cuda_library))))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not any("cuda" in name or "python" in name for name in needed)
    exported = output_of("nm", "-D", "--defined-only", str(cuda_library))
    assert "cudart" not in exported
    assert "cudaLaunch" not in exported


@needs_nvcc
def test_a_second_cuda_build_does_nothing(cuda_library: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = cuda_library.stat().st_mtime_ns
    _build.build(cuda_library, _build.CACHE)
    assert cuda_library.stat().st_mtime_ns == before
    assert capfd.readouterr().err == "smartmoe: _smartmoe.so is up to date (cpu+cuda: sm_80 sm_90 sm_100+PTX)\n"
