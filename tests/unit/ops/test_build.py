"""The builder: its settings, its cache, setup.py's use of it, and what is inside a library built with nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_smartmoe.ops import _build
from megatron_smartmoe.ops.library import LIBRARY
from tests.unit.ops.test_library import share_objects

ROOT = Path(__file__).resolve().parents[3]
REAL_NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(REAL_NVCC is None, reason="nvcc is not installed: nothing to build CUDA code with")
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
    way_out = "Name your GPUs' architectures, or unset it for those of A100, H100 and B200"
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


# --- toolkits that are not the one of this machine: a stand-in nvcc, the real g++ and linker

KNOWN_TO_12_4 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
NVCC = """#!/bin/sh
echo "$*" >>"$0.calls"
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.131"; exit ;;
  --list-gpu-arch) for arch in {known}; do echo "compute_$arch"; done; exit ;;
esac
{fault}
case "$*" in *compute_100*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'" >&2; exit 1 ;; esac
for word; do case "$word" in *.cu) source=$word ;; *.o) object=$word ;; esac; done
exec g++ -fPIC -x c++ -c "$source" -o "$object"
"""
REFUSED_COMPILER = (
    "echo 'host_config.h:143: error: #error -- unsupported GNU version! gcc versions later than 13' >&2; exit 1"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one source of each kind."""
    for name in ("ops.cpp", "cpu/on_cpu.cpp", "cuda/on_gpu.cu"):
        source = tmp_path / "csrc" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(f"int {source.stem}() {{ return 0; }}\n")
    return tmp_path


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a CUDA toolkit whose nvcc knows what it is told; returns the file with its calls."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")

    def make(*, release: str = "12.4", known: str = KNOWN_TO_12_4, fault: str = "") -> Path:
        nvcc, runtime = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "cuda" / "lib64" / "libcudart_static.a"
        for path in (nvcc, runtime):
            path.parent.mkdir(parents=True)
        nvcc.write_text(NVCC.format(release=release, known=known, fault=fault))
        nvcc.chmod(0o755)
        runtime.write_text("!<arch>\n")  # an archive without members
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return nvcc.with_suffix(".calls")

    return make


def build(checkout: Path) -> Path:
    return _build.build(checkout / "out.so", checkout / "cache", checkout)


def test_a_toolkit_builds_for_what_it_knows(
    toolkit: Callable[..., Path], checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = toolkit()
    build(checkout)
    compiled = next(line for line in calls.read_text().splitlines() if "-c csrc" in line)
    assert re.findall(r"arch=\S+", compiled) == _build.gencode(("80", "90+PTX"))[1::2]
    printed = capfd.readouterr().err
    assert "built out.so (cpu+cuda: sm_80 sm_90+PTX) in " in printed
    assert "WARNING" not in printed


def test_the_users_architectures_win(
    toolkit: Callable[..., Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = toolkit()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9;9.0a+PTX")
    build(checkout)
    assert re.findall(r"code=(\S+)", calls.read_text()) == ["sm_89", "sm_90a", "compute_90a"]


def test_an_architecture_that_nvcc_does_not_know(
    toolkit: Callable[..., Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(known="80 90")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;10.0a+PTX")
    with pytest.raises(_build.BuildError) as caught:
        build(checkout)
    assert str(caught.value) == (
        "TORCH_CUDA_ARCH_LIST = '9.0;10.0a+PTX': CUDA toolkit 12.4 does not know sm_100a (it knows 80, 90). "
        "Name only architectures that this CUDA toolkit knows, or install a newer one"
    )
    assert not (checkout / "out.so").exists()


def test_a_host_compiler_that_nvcc_refuses_leaves_a_cpu_library_and_one_warning(
    toolkit: Callable[..., Path], checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = toolkit(fault=REFUSED_COMPILER)
    library = build(checkout)
    assert library.exists()
    first = capfd.readouterr().err
    assert "built out.so (cpu) in " in first
    log = checkout / "cache" / "cuda_build.log"
    assert "unsupported GNU version" not in first  # the compilers' own words are in the log
    (warning,) = (line for line in first.splitlines() if "WARNING" in line)
    assert warning == (
        f"smartmoe: WARNING: the toolkit in {checkout / 'cuda'} could not build the CUDA kernels, and the library is "
        "for the CPU only: exit status = 1: csrc/cuda/on_gpu.cu could not be built. "
        f"(the whole output: {log}). On a GPU the ops "
        "run on plain torch, slowly. Set CUDA_HOME or CXX to other tools and remove that file, or SMARTMOE_CUDA=0 to "
        "build for the CPU without a warning"
    )
    assert "unsupported GNU version! gcc versions later than 13" in log.read_text()

    tried = calls.read_text().count("-c csrc")
    build(checkout)
    again = capfd.readouterr().err
    assert calls.read_text().count("-c csrc") == tried  # the same inputs are not tried twice
    assert again.count("WARNING") == 1
    assert "is up to date (cpu)" in again
    log.unlink()
    build(checkout)
    assert calls.read_text().count("-c csrc") == tried + 1


def test_cuda_that_is_asked_for_must_build(
    toolkit: Callable[..., Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(fault=REFUSED_COMPILER)
    monkeypatch.setenv("SMARTMOE_CUDA", "1")
    with pytest.raises(_build.ToolError, match="unsupported GNU version"):
        build(checkout)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"release": "11.8"}, "CUDA toolkit = '11.8': 12.0 or newer is needed"),
        ({"known": "50 70"}, "CUDA toolkit = '12.4': nvcc knows 50, 70, and none of 80, 90, 100"),
        ({"release": '"; exit 127; echo "'}, "`nvcc --version` failed: "),
    ],
)
def test_a_toolkit_that_cannot_be_used_is_like_none(
    toolkit: Callable[..., Path], checkout: Path, capfd: pytest.CaptureFixture[str], how: dict[str, str], why: str
) -> None:
    toolkit(**how)
    build(checkout)
    printed = capfd.readouterr().err
    assert printed.count("WARNING") == 1
    assert why in printed
    assert "built out.so (cpu) in " in printed


# --- a library that is carried to other machines


def newest(library: Path, name: str) -> tuple[int, ...]:
    """The newest version of a system library's interface that `library` asks for."""
    found = re.findall(rf"Name: {name}_([\d.]+) ", output_of("readelf", "--version-info", "--wide", str(library)))
    return max((tuple(map(int, version.split("."))) for version in found), default=(0,))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
@pytest.mark.parametrize("name", ["GLIBC", "GLIBCXX", "CXXABI"])
def test_the_library_asks_for_nothing_newer_than_torch(name: str) -> None:
    if not LIBRARY.exists():
        pytest.skip("the library is not built")
    torch_libraries = sorted((_build.find_torch()[0] / "lib").glob("lib*.so"))
    assert (0,) < newest(LIBRARY, name) <= max(newest(path, name) for path in torch_libraries)
    if name == "GLIBC":
        assert _build.needed_glibc(LIBRARY) == newest(LIBRARY, name)[:2] <= _build.GLIBC


@needs_compiler
def test_old_versions_are_taken_of_what_glibc_has_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pthread_create is in libc.so.6 since 2.34; linked as usual a library asks for that."""
    monkeypatch.setenv("SMARTMOE_CUDA", "0")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.cpp").write_text(
        '#include <pthread.h>\nextern "C" __attribute__((visibility("default")))\n'
        "int start(void *(*run)(void *)) { pthread_t one; return pthread_create(&one, nullptr, run, nullptr); }\n"
    )
    usual = tmp_path / "usual.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "csrc" / "ops.cpp"), "-o", str(usual)], check=True)
    library = build(tmp_path)
    assert _build.needed_glibc(library) <= _build.GLIBC
    if _build.needed_glibc(usual) > _build.GLIBC:
        assert re.search(r" pthread_create@GLIBC_2\.(2\.5|17)$", output_of("nm", "-D", str(library)), re.MULTILINE)
    assert ctypes.CDLL(str(library)).start


@needs_compiler
@pytest.mark.slow
def test_setup_builds_the_library_or_says_that_it_did_not(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).touch()
    for name in ("csrc", "megatron_smartmoe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    share_objects(tmp_path)
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
