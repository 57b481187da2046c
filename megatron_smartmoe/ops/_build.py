"""Compiles csrc/ into one shared library, megatron_smartmoe/ops/_smartmoe.so.

Method: plain g++ and nvcc commands, objects cached by the hash of everything that went into them. The library uses
torch's stable ABI, links the CUDA runtime statically, takes its one symbol of libtorch_cuda weakly and asks for no
newer glibc than torch's own wheel, so the same file loads under any Python and any torch since TORCH_TARGET, with or
without CUDA: a wheel carries it to machines without compilers.
Alternative: torch.utils.cpp_extension. It cannot build CUDA code where torch has no CUDA, takes a wrapper script for a
toolkit, wants torch at build time, and makes one binary per version of torch and Python.
Reason: a machine without a GPU must build and link the very library that a GPU machine loads.

With SMARTMOE_CUDA=auto, the default, a CUDA toolkit that cannot build the kernels is treated like none: the library is
built for the CPU, with one warning that names the log of what failed. The same inputs are not tried twice.

This file imports nothing of the project or of torch: setup.py runs it by its path, where neither may be importable. It
is a program too: `python megatron_smartmoe/ops/_build.py`. Its options are environment variables: SMARTMOE_CUDA (0, 1
or auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST (torch's syntax), MAX_JOBS, CXX.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "megatron_smartmoe" / "ops" / "_smartmoe.so"
CACHE = ROOT / "build" / "smartmoe"
HEADERS = (".h", ".cuh")

TORCH_TARGET = (2, 10)  # the oldest torch whose stable ABI has what csrc uses
CUDA_OLDEST = (12, 0)  # the first toolkit whose nvcc reads C++20
GLIBC = (2, 28)  # the newest that the library may ask for: the one of torch's own wheels since 2.6
DEFAULT_ARCHS = ("80", "90", "100")  # A100, Hopper, B200: those of them that nvcc knows, and PTX of the last
FIRST_ARCH = (7, 0)  # the first with __match_any_sync
_INPUTS = "Inputs, which are not tried again while this file is there: "
_OTHER_TOOLKIT = "Repair it, set CUDA_HOME to another toolkit, or SMARTMOE_CUDA=0 for the CPU"
NAMED_ARCHS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}


class BuildError(Exception):
    """The library cannot be built: names the field, its value, the rule that it breaks and the way out."""

    def __init__(self, field: str, value: object, rule: str, way_out: str) -> None:
        super().__init__(f"{field} = {value!r}: {rule}. {way_out}")


class ToolError(BuildError):
    """A tool is missing or fails, where the settings are right: another library, or none, may do as well."""


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
        way_out = "Name your GPUs' architectures, or unset it for those of A100, H100 and B200"
        raise BuildError("TORCH_CUDA_ARCH_LIST", text, rule, way_out)
    return tuple(archs)


def choose_archs(text: str, known: Sequence[str], toolkit: str) -> tuple[str, ...]:
    """The architectures to build for: the user's, else the defaults that the toolkit knows, with PTX of the last.

    PTX is compiled by the driver when a later GPU loads it.

    Args:
        text: TORCH_CUDA_ARCH_LIST; empty for the defaults.
        known: numbers of the architectures that nvcc knows.
        toolkit: its version.

    Raises:
        BuildError: an entry is no architecture, too old, or unknown to the toolkit.
    """
    if not text:
        usable = [arch for arch in DEFAULT_ARCHS if arch in known]
        if not usable:
            rule = f"nvcc knows {', '.join(known)}, and none of {', '.join(DEFAULT_ARCHS)}"
            raise ToolError("CUDA toolkit", toolkit, rule, "Set TORCH_CUDA_ARCH_LIST to your GPUs' architectures")
        return (*usable[:-1], f"{usable[-1]}+PTX")
    archs = parse_archs(text)
    unknown = [arch for arch in archs if re.sub(r"[af]?(\+PTX)?$", "", arch) not in known]
    if unknown:
        rule = (
            f"CUDA toolkit {toolkit} does not know sm_{unknown[0].removesuffix('+PTX')} (it knows {', '.join(known)})"
        )
        way_out = "Name only architectures that this CUDA toolkit knows, or install a newer one"
        raise BuildError("TORCH_CUDA_ARCH_LIST", text, rule, way_out)
    return archs


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


def toolkit_version(nvcc: Path) -> tuple[int, int]:
    """The toolkit's version, by nvcc itself.

    Raises:
        ToolError: nvcc does not run, or the toolkit is too old.
    """
    match = re.search(r"release (\d+)\.(\d+)", _output_of(nvcc, "--version"))
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < CUDA_OLDEST:
        found = f"{version[0]}.{version[1]}" if match else "unknown"
        rule = f"{CUDA_OLDEST[0]}.{CUDA_OLDEST[1]} or newer is needed ({nvcc})"
        raise ToolError("CUDA toolkit", found, rule, "Set CUDA_HOME to a newer toolkit, or SMARTMOE_CUDA=0 for the CPU")
    return version


def known_archs(nvcc: Path) -> tuple[str, ...]:
    """Numbers of the architectures that nvcc can build for, such as 90."""
    return tuple(sorted(set(re.findall(r"compute_(\d+)\b", _output_of(nvcc, "--list-gpu-arch"))), key=int))


def _output_of(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError("CUDA toolkit", str(command[0]), f"nvcc cannot be run: {error}", _OTHER_TOOLKIT) from error
    if done.returncode:
        rule = f"`nvcc {command[1]}` failed: {(done.stdout + done.stderr).strip()[-2000:] or done.returncode}"
        raise ToolError("CUDA toolkit", str(command[0]), rule, _OTHER_TOOLKIT)
    return done.stdout


def find_toolchain(cuda: Path | None = None) -> Toolchain:
    """Everything else that the environment decides, read once and checked.

    Args:
        cuda: directory of the CUDA toolkit; None for a CPU build.
    """
    program, *arguments = shlex.split(_env("CXX", "g++")) or ["g++"]
    cxx = shutil.which(program)
    if cxx is None:
        raise ToolError("CXX", program, "there is no such program", "Install g++, or set CXX to a C++20 compiler")
    torch, version = find_torch()
    archs: tuple[str, ...] = ()
    if cuda:
        nvcc = cuda / "bin" / "nvcc"
        toolkit = "{}.{}".format(*toolkit_version(nvcc))
        archs = choose_archs(_env("TORCH_CUDA_ARCH_LIST", ""), known_archs(nvcc), toolkit)
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
    toolkit: list[str] = []  # the version of nvcc, for what includes CUDA's headers
    sources: list[tuple[Path, tuple[str, ...]]] = []
    folders = ["csrc", "csrc/cpu"]
    if tools.cuda:
        nvcc = (f"{tools.cuda}/bin/nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
        nvcc += (*gencode(tools.archs), *(("-ccbin", tools.cxx[0]) if len(tools.cxx) == 1 else ()))
        toolkit.append(_stamp(nvcc[0]))
        sources += [(path, nvcc) for path in sorted((root / "csrc/cuda").glob("*.cu"))]
        folders.append("csrc/cuda")
    # only the registrations differ with CUDA: builds with and without it share all other objects
    registrations = (*cxx, "-DSMARTMOE_WITH_CUDA") if tools.cuda else cxx
    for folder in folders:
        for path in sorted((root / folder).glob("*.cpp")):
            sources.append((path, registrations if path == root / "csrc/ops.cpp" else cxx))
    if not sources:
        raise BuildError("csrc", str(root / "csrc"), "it has no sources", "Build in a checkout of the repository")
    paths = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in HEADERS)
    headers = [part for path in paths for part in (path.name, path.read_bytes())]
    jobs = []
    for path, compiler in sources:
        source = path.relative_to(root)  # commands run in the root, so messages are short
        command = (*compiler, "-c", str(source))
        versions = stamps + (toolkit if path.parent.name == "cuda" else [])
        key = _digest(*command, *versions, path.read_bytes(), *headers)
        name = "_".join(source.parts[1:]).replace(".", "_")
        jobs.append(Job(source=source, command=command, object=cache / f"{name}-{key[:16]}.o"))
    return jobs


def _run(command: list[str], root: Path, what: str) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    output = (done.stdout + done.stderr)[-8000:].strip()
    if done.returncode:
        way_out = f"The command:\n{shlex.join(command)}\nand its output:\n{output}"
        raise ToolError("exit status", done.returncode, f"{what} could not be built", way_out)
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


def link_command(tools: Toolchain, objects: Iterable[Path], runtime: Path | None) -> list[str]:
    """The link, without its output.

    Args:
        tools: what it is linked with.
        objects: the compiled sources.
        runtime: the static CUDA runtime; None for a CPU build.
    """
    command = [*tools.cxx, "-shared", *map(str, objects), "-Wl,-z,defs"]  # a missing symbol shows here, not at load
    # libtorch has no symbol that is used: it brings libtorch_cuda, where there is one, into the weak symbol's scope
    command += [f"-L{tools.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if runtime:
        command += [str(runtime), "-Wl,--exclude-libs,ALL", "-lrt", "-ldl", "-lpthread"]
    return command


def needed_glibc(library: Path) -> tuple[int, int]:
    """The newest version of glibc that a library asks for: the names of versions lie in it as text."""
    found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library.read_bytes())
    return max(((int(major), int(minor)) for major, minor in found), default=(0, 0))


def _version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def older_symbols(library: Path, libraries: Sequence[Path]) -> dict[str, str]:
    """Symbols that `library` takes from a glibc newer than `GLIBC`, each with its newest version that is old enough.

    glibc keeps the old versions of what it moves or changes: pthread_create@GLIBC_2.2.5 is the same function as
    pthread_create@GLIBC_2.34, which is in another file only. A symbol without an old version is left out.

    Args:
        library: that needs them.
        libraries: the parts of glibc that offer them.
    """
    undefined = _symbols(library, "--undefined-only")
    offered: dict[str, list[str]] = {}
    for part in libraries:
        for name, versions in _symbols(part, "--defined-only").items():
            offered.setdefault(name, []).extend(versions)
    found = {}
    for name, versions in undefined.items():
        if max(map(_version_of, versions)) > GLIBC:
            old = [version for version in offered.get(name, []) if _version_of(version) <= GLIBC]
            if old:
                found[name] = f"{name}@GLIBC_{max(old, key=_version_of)}"
    return found


def _symbols(file: Path, kind: str) -> dict[str, list[str]]:
    """The symbols of a shared library that have a version of glibc, with these versions."""
    command = ["nm", "--dynamic", "--with-symbol-versions", kind, str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r" (\w+)@{1,2}GLIBC_([\d.]+)$", listing, re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


def _link_for_older_glibc(tools: Toolchain, objects: Sequence[Path], library: Path, folder: Path, key: str) -> None:
    """Link `library` again with the old versions of what it takes from glibc, where the compiler's is newer.

    A linker takes the newest version of each symbol. It takes an older one where an object names it, and objcopy writes
    the name. On a machine without these tools, or for a symbol that has no older version, the library keeps its needs.
    """
    libc, libm = (_library_of_glibc(tools, name) for name in ("libc.so.6", "libm.so.6"))
    if needed_glibc(library) <= GLIBC or not libc.is_file() or not all(map(shutil.which, ("nm", "objcopy"))):
        return
    names = folder / "older_symbols"
    symbols = older_symbols(library, [part for part in (libc, libm) if part.is_file()])
    names.write_text("".join(f"{name} {older}\n" for name, older in symbols.items()))
    renamed = []
    for file in (*objects, *_runtime(tools)):
        renamed.append(folder / file.name)
        _run(["objcopy", f"--redefine-syms={names}", str(file), str(renamed[-1])], folder, file.name)
    runtime = renamed.pop() if tools.cuda else None
    # where old versions of these symbols were before they moved into libc.so.6
    beside = [libc.with_name(name) for name in ("libpthread.so.0", "libdl.so.2", "librt.so.1")]
    link = [
        *link_command(tools, renamed, runtime),
        "-Wl,--no-as-needed",
        *(str(path) for path in beside if path.exists()),
    ]
    _run([*link, f"-Wl,--build-id=0x{key}", "-o", str(library)], folder, library.name)


def _library_of_glibc(tools: Toolchain, name: str) -> Path:
    """The file that the compiler links for this part of glibc; it need not exist."""
    command = [tools.cxx[0], f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def _runtime(tools: Toolchain) -> list[Path]:
    """The static CUDA runtime, if this is a CUDA build."""
    found = cudart(tools.cuda) if tools.cuda else None
    return [found] if found else []


def build(out: Path = LIBRARY, cache: Path = CACHE, root: Path = ROOT) -> Path:
    """Builds csrc/ of `root` into the shared library `out`; does nothing when `out` was made from these very inputs.

    Raises:
        BuildError: a setting is wrong, a tool is missing or a command failed. Not for CUDA with SMARTMOE_CUDA=auto:
            then the library is built for the CPU, with a warning.
    """
    cuda = find_cuda()
    if cuda is None or _env("SMARTMOE_CUDA", "auto") == "1":
        return _build(find_toolchain(cuda), out, cache, root)
    log, inputs = cache / "cuda_build.log", ""
    try:
        tools = find_toolchain(cuda)
        inputs = _digest(*(job.object.name for job in plan(tools, root, cache)))
        if log.is_file() and log.read_text(encoding="utf-8").endswith(f"{_INPUTS}{inputs}\n"):
            why = log.read_text(encoding="utf-8")
        else:
            return _build(tools, out, cache, root)
    except ToolError as error:
        why = str(error)
        cache.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{why}\n\n{_INPUTS}{inputs}\n", encoding="utf-8")
    library = _build(find_toolchain(), out, cache, root)  # a compiler that fails here too is an error of its own
    _warn_of_cuda(why, cuda, log)
    return library


def _warn_of_cuda(why: str, toolkit: Path, log: Path) -> None:
    """Say in one line that the kernels for GPUs are missing, and why; the compilers' own words are in the log."""
    shown = why.splitlines()[0].removesuffix("The command:").strip()
    _say(
        f"WARNING: the toolkit in {toolkit} could not build the CUDA kernels, and the library is for the CPU only: "
        f"{shown[:300]} (the whole output: {log}). On a GPU the ops run on plain torch, slowly. Set CUDA_HOME or CXX "
        "to other tools and remove that file, or SMARTMOE_CUDA=0 to build for the CPU without a warning"
    )


def _build(tools: Toolchain, out: Path, cache: Path, root: Path) -> Path:
    """What `build` says, with these tools."""
    start_s = time.monotonic()
    out, cache = out.resolve(), cache.resolve()
    jobs = plan(tools, root, cache)
    objects = [job.object for job in jobs]
    runtime = next(iter(_runtime(tools)), None)
    link = link_command(tools, objects, runtime)
    # the library carries the hash of its inputs as its build id: no second file that could disagree with it
    key = _digest(*link, *(_stamp(word) for word in link if Path(word).is_file() and not word.endswith(".o")))
    kind = " ".join(["cpu+cuda:", *(f"sm_{arch}" for arch in tools.archs)]) if tools.cuda else "cpu"
    if out.exists() and bytes.fromhex(key) in out.read_bytes():
        _say(f"{out.name} is up to date ({kind})")
        return out
    if platform.machine() != "x86_64":
        _say(f"wheels with a built library are for x86_64; this machine is {platform.machine()}: compiling here")
    cache.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, tools.jobs // len(jobs))  # nvcc's own processes, so that all together stay within jobs
    with concurrent.futures.ThreadPoolExecutor(tools.jobs) as pool:
        list(pool.map(lambda job: _compile(job, root, threads), jobs))
    partial = out.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*link, f"-Wl,--build-id=0x{key}", "-o", str(partial)], root, out.name)
        with tempfile.TemporaryDirectory(prefix="link-", dir=cache) as folder:
            _link_for_older_glibc(tools, objects, partial, Path(folder), key)
        partial.replace(out)  # never written in place: a process may have it mapped
    finally:
        partial.unlink(missing_ok=True)
    glibc = ".".join(map(str, needed_glibc(out)))
    _say(f"built {out.name} ({kind}) in {time.monotonic() - start_s:.1f} s; it needs glibc {glibc} or newer")
    return out


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        if not isinstance(error, ToolError) or os.environ.get("SMARTMOE_REQUIRE_BUILD") == "1":
            sys.exit(f"smartmoe: the library was not built: {error}")
        _say(f"WARNING: the library was not built, and ops without it run on plain torch, slowly: {error}")
