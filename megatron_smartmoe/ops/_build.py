"""Compiles csrc/ into one shared library, megatron_smartmoe/ops/_smartmoe.so.

Method: plain g++ and nvcc commands, objects cached by the hash of everything that went into them. The library uses
torch's stable ABI, links the CUDA runtime statically and takes its one symbol of libtorch_cuda weakly, so the same file
loads under any Python and any torch since TORCH_TARGET, with or without CUDA.
Alternative: torch.utils.cpp_extension. It cannot build CUDA code where torch has no CUDA, takes a wrapper script for a
toolkit, wants torch at build time, and makes one binary per version of torch and Python.
Reason: a machine without a GPU must build and link the very library that a GPU machine loads.

This file imports nothing of the project or of torch: setup.py runs it by its path, where neither may be importable. It
is a program too: `python megatron_smartmoe/ops/_build.py`. Its options are environment variables: SMARTMOE_CUDA (0, 1
or auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST (torch's syntax), MAX_JOBS, CXX.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "megatron_smartmoe" / "ops" / "_smartmoe.so"
CACHE = ROOT / "build" / "smartmoe"
HEADERS = (".h", ".cuh")

TORCH_TARGET = (2, 10)  # the oldest torch whose stable ABI has what csrc uses
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"  # A100, Hopper, B200; PTX lets later GPUs compile it when they load it
FIRST_ARCH = (7, 0)  # the first with __match_any_sync
NAMED_ARCHS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}


class BuildError(Exception):
    """The library cannot be built: names the field, its value, the rule that it breaks and the way out."""

    def __init__(self, field: str, value: object, rule: str, way_out: str) -> None:
        super().__init__(f"{field} = {value!r}: {rule}. {way_out}")


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """The compilers, the libraries and what they build for.

    Attributes:
        cxx: path of the C++ compiler, then the arguments that CXX adds.
        torch: directory of the torch package.
        torch_version: version of that torch.
        cuda: directory of the CUDA toolkit, None for a CPU build.
        archs: GPU architectures in nvcc's numbers: "90", "90a", "100+PTX".
        jobs: compiler processes that may run at a time.
    """

    cxx: tuple[str, ...]
    torch: Path
    torch_version: str
    cuda: Path | None
    archs: tuple[str, ...]
    jobs: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One compilation: a source relative to the root, its command without output, and the object that it makes."""

    source: Path
    command: tuple[str, ...]
    object: Path


def _env(name: str, default: str) -> str:
    return os.environ.get(name) or default


def _say(text: str) -> None:
    print(f"smartmoe: {text}", file=sys.stderr, flush=True)


def parse_archs(text: str) -> tuple[str, ...]:
    """GPU architectures in torch's syntax ("8.0;9.0 10.0+PTX", or a family's name) as nvcc's numbers.

    Raises:
        BuildError: an entry is no architecture, or too old.
    """
    entries = [e for word in re.split(r"[;\s]+", text.strip()) for e in NAMED_ARCHS.get(word, word).split(";")]
    archs: dict[str, None] = {}
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match and (int(match[1]), int(match[2])) >= FIRST_ARCH:
            archs["".join(match.groups(""))] = None
            continue
        rule = f"{entry!r} is not an architecture such as 9.0, 9.0a or 9.0+PTX (separated by ; or spaces)"
        if entry == "native":
            rule = "'native' needs a GPU, and a build never asks for one"
        elif match:
            rule = f"{entry!r} is older than {FIRST_ARCH[0]}.{FIRST_ARCH[1]}, the first that the kernels can run on"
        way_out = f"Name your GPUs' architectures, or unset it ({DEFAULT_ARCHS})"
        raise BuildError("TORCH_CUDA_ARCH_LIST", text, rule, way_out)
    return tuple(archs)


def gencode(archs: Iterable[str]) -> list[str]:
    """The nvcc flags for archs: machine code for each, PTX for those that end in +PTX."""
    flags: list[str] = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch != number:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def max_jobs() -> int:
    """How many compiler processes may run at a time: MAX_JOBS, else one per core."""
    text = _env("MAX_JOBS", str(os.cpu_count() or 1))
    if not re.fullmatch(r"[1-9]\d*", text):
        raise BuildError("MAX_JOBS", text, "it must be a whole number of at least 1", "Set MAX_JOBS=2, or unset it")
    return int(text)


def find_torch() -> tuple[Path, str]:
    """Directory and version of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    # pip's isolated build environment hides site-packages from imports, sysconfig still names it
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("purelib", "platlib")]
    for place in places:
        version_file = place / "version.py"
        if not version_file.exists() or not (place / "include").is_dir():
            continue
        match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version_file.read_text())
        version = match[1] if match else "unknown"
        if not match or (int(match[2]), int(match[3])) < TORCH_TARGET:
            rule = f"the stable ABI of torch {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or newer is needed"
            raise BuildError("torch", version, rule, "Install the torch that pyproject.toml names")
        return place, version
    way_out = "Install torch into this environment first, then use pip install --no-build-isolation"
    raise BuildError("torch", None, f"it is not installed for {sys.executable}", way_out)


def cudart(toolkit: Path) -> Path | None:
    """The static CUDA runtime of a toolkit, wherever its packager put it."""
    names = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return next((p for name in names if (p := toolkit / name / "libcudart_static.a").exists()), None)


def find_cuda() -> Path | None:
    """The CUDA toolkit to build with, None for a CPU build.

    Raises:
        BuildError: SMARTMOE_CUDA is not 0, 1 or auto, or is 1 and there is no toolkit.
    """
    mode = _env("SMARTMOE_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise BuildError("SMARTMOE_CUDA", mode, "it must be 0, 1 or auto", "Unset it to build for CUDA where nvcc is")
    if mode == "0":
        return None
    nvcc = shutil.which("nvcc")  # may be a wrapper script far from its toolkit, hence the usual place after it
    places = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places = [Path(home)] if (home := os.environ.get("CUDA_HOME")) else [*places, Path("/usr/local/cuda")]
    for place in places:
        if (place / "bin" / "nvcc").exists() and cudart(place):
            return place
    rule = f"no CUDA toolkit (bin/nvcc and libcudart_static.a) in {', '.join(map(str, places))}"
    if mode == "1":
        raise BuildError("SMARTMOE_CUDA", mode, rule, "Set CUDA_HOME to the toolkit, or SMARTMOE_CUDA=0 for the CPU")
    _say(f"{rule}: building for the CPU only. Set CUDA_HOME if there is one elsewhere")
    return None


def find_toolchain() -> Toolchain:
    """Everything that the environment decides, read once and checked."""
    program, *arguments = shlex.split(_env("CXX", "g++")) or ["g++"]
    cxx = shutil.which(program)
    if cxx is None:
        raise BuildError("CXX", program, "there is no such program", "Install g++, or set CXX to a C++20 compiler")
    torch, version = find_torch()
    cuda = find_cuda()
    archs = parse_archs(_env("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)) if cuda else ()
    return Toolchain(cxx=(cxx, *arguments), torch=torch, torch_version=version, cuda=cuda, archs=archs, jobs=max_jobs())


def _stamp(program: Path | str) -> str:
    """Identifies an installed file by its place, size and time: running `--version` would cost more."""
    path = Path(program).resolve()
    return f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}"


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def plan(tools: Toolchain, root: Path, cache: Path) -> list[Job]:
    """The compilations that make the library, the slow ones first.

    An object's name carries the hash of its command, its source, all headers of csrc and the versions of the tools.
    """
    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
    cxx = (*tools.cxx, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", target)
    # no fused multiply-add: the CPU kernels round as torch does, so that their twins give the same bits
    cxx += ("-ffp-contract=off", "-isystem", f"{tools.torch}/include")
    stamps = [tools.torch_version, _stamp(tools.cxx[0])]
    sources: list[tuple[Path, tuple[str, ...]]] = []
    folders = ["csrc", "csrc/cpu"]
    if tools.cuda:
        nvcc = (f"{tools.cuda}/bin/nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
        nvcc += (*gencode(tools.archs), *(("-ccbin", tools.cxx[0]) if len(tools.cxx) == 1 else ()))
        stamps.append(_stamp(nvcc[0]))
        sources += [(path, nvcc) for path in sorted((root / "csrc/cuda").glob("*.cu"))]
        folders.append("csrc/cuda")
        cxx += ("-DSMARTMOE_WITH_CUDA",)
    sources += [(path, cxx) for folder in folders for path in sorted((root / folder).glob("*.cpp"))]
    if not sources:
        raise BuildError("csrc", str(root / "csrc"), "it has no sources", "Build in a checkout of the repository")
    paths = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in HEADERS)
    headers = [part for path in paths for part in (path.name, path.read_bytes())]
    jobs = []
    for path, compiler in sources:
        source = path.relative_to(root)  # commands run in the root, so messages are short
        command = (*compiler, "-c", str(source))
        key = _digest(*command, *stamps, path.read_bytes(), *headers)
        name = "_".join(source.parts[1:]).replace(".", "_")
        jobs.append(Job(source=source, command=command, object=cache / f"{name}-{key[:16]}.o"))
    return jobs


def _run(command: list[str], root: Path, what: str) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    output = (done.stdout + done.stderr)[-8000:].strip()
    if done.returncode and "nsupported gpu architecture" in output:
        way_out = "Name only architectures that this CUDA toolkit knows, or install a newer one"
        raise BuildError("TORCH_CUDA_ARCH_LIST", _env("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS), output, way_out)
    if done.returncode:
        way_out = f"The command:\n{shlex.join(command)}\nand its output:\n{output}"
        raise BuildError("exit status", done.returncode, f"{what} could not be built", way_out)
    if output:
        print(output, file=sys.stderr)


def _compile(job: Job, root: Path, threads: int) -> None:
    if job.object.exists():
        return
    _say(f"compiling {job.source}")
    partial = job.object.with_suffix(f".{os.getpid()}.tmp.o")
    # added here, not in the hashed command: it changes nothing in the object
    extra = ["--threads", str(threads)] if job.source.suffix == ".cu" else []
    try:
        _run([*job.command, *extra, "-o", str(partial)], root, str(job.source))
        partial.replace(job.object)
    finally:
        partial.unlink(missing_ok=True)


def link_command(tools: Toolchain, objects: Iterable[Path]) -> list[str]:
    """The link, without its output."""
    command = [*tools.cxx, "-shared", *map(str, objects), "-Wl,-z,defs"]  # a missing symbol shows here, not at load
    # libtorch has no symbol that is used: it brings libtorch_cuda, where there is one, into the weak symbol's scope
    command += [f"-L{tools.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if tools.cuda:
        command += [str(cudart(tools.cuda)), "-Wl,--exclude-libs,ALL", "-lrt", "-ldl", "-lpthread"]
    return command


def build(out: Path = LIBRARY, cache: Path = CACHE, root: Path = ROOT) -> Path:
    """Builds csrc/ of `root` into the shared library `out`; does nothing when `out` was made from these very inputs.

    Raises:
        BuildError: a setting is wrong, a tool is missing or a command failed.
    """
    start_s = time.monotonic()
    tools = find_toolchain()
    out, cache = out.resolve(), cache.resolve()
    jobs = plan(tools, root, cache)
    link = link_command(tools, [job.object for job in jobs])
    # the library carries the hash of its inputs as its build id: no second file that could disagree with it
    key = _digest(*link, *(_stamp(word) for word in link if Path(word).is_file() and not word.endswith(".o")))
    kind = " ".join(["cpu+cuda:", *(f"sm_{arch}" for arch in tools.archs)]) if tools.cuda else "cpu"
    if out.exists() and bytes.fromhex(key) in out.read_bytes():
        _say(f"{out.name} is up to date ({kind})")
        return out
    cache.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, tools.jobs // len(jobs))  # nvcc's own processes, so that all together stay within jobs
    with concurrent.futures.ThreadPoolExecutor(tools.jobs) as pool:
        list(pool.map(lambda job: _compile(job, root, threads), jobs))
    partial = out.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*link, f"-Wl,--build-id=0x{key}", "-o", str(partial)], root, out.name)
        partial.replace(out)  # never written in place: a process may have it mapped
    finally:
        partial.unlink(missing_ok=True)
    _say(f"built {out.name} ({kind}) in {time.monotonic() - start_s:.1f} s")
    return out


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"smartmoe: the library was not built: {error}")
