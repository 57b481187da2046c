"""Builds the kernels of csrc/cuda for the CPU, with the headers of cuda_emulator in the place of CUDA's.

It makes two things of them: a program without torch, which can be built with a sanitizer (`check_program`), and a
library with torch.ops.smartmoe_emulated (`ops_library`). Objects are cached by their content: a test compiles only what
changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_smartmoe.ops import _build

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator")
CACHE = ROOT / "build" / "emulator"
KERNELS = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
MODES = {
    "plain": ("-O1",),
    "thread": ("-O1", "-fsanitize=thread"),
    "address": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
# -w: attributes and pragmas of CUDA mean nothing to a host compiler
FLAGS = ("-std=c++20", "-g1", "-w", "-ffp-contract=off", f"-I{EMULATOR}")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One compilation: a source and the flags of its compiler."""

    source: Path
    flags: tuple[str, ...]


@functools.cache
def _headers() -> bytes:
    paths = [*(ROOT / "csrc").rglob("*"), *EMULATOR.glob("*")]
    return b"".join(path.read_bytes() for path in sorted(paths) if path.suffix in _build.HEADERS)


def compile_unit(unit: Unit, replaced: str | None = None) -> Path:
    """The object of a unit, from the cache if nothing changed; `replaced` is compiled in place of the file's text."""
    text = (unit.source.read_text() if replaced is None else replaced).encode()
    command = [os.environ.get("CXX", "g++"), *unit.flags, "-x", "c++", "-c"]
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), unit.source.name.encode(), text, _headers()]))
    made = CACHE / f"{unit.source.stem}-{key.hexdigest()[:24]}.o"
    if made.exists():
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    source = unit.source
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if replaced is not None:
            source = Path(folder) / unit.source.name
            source.write_text(replaced)
        partial = Path(folder) / "made.o"
        # headers beside the file are found also when a replaced text lies elsewhere
        _run([*command, str(source), "-iquote", str(unit.source.parent), "-o", str(partial)])
        partial.replace(made)
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _link(objects: list[Path], flags: tuple[str, ...], out: Path) -> Path:
    names = " ".join(path.name for path in objects)
    out = out.with_name(f"{out.name}-{hashlib.sha256((names + ' '.join(flags)).encode()).hexdigest()[:24]}")
    if not out.exists():
        partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
        _run([os.environ.get("CXX", "g++"), *map(str, objects), *flags, "-o", str(partial)])
        partial.replace(out)
    return out


def kernel_unit(name: str, mode: str) -> Unit:
    """The compilation of one .cu file."""
    return Unit(source=ROOT / "csrc" / "cuda" / name, flags=(*FLAGS, *MODES[mode]))


def check_program(mode: str, replaced: dict[str, str] | None = None) -> Path:
    """The program of check.cpp in a mode, with the texts of some .cu files replaced."""
    flags = (*FLAGS, *MODES[mode], f"-I{ROOT / 'csrc' / 'cuda'}")
    units = [kernel_unit(name, mode) for name in KERNELS] + [Unit(source=EMULATOR / "check.cpp", flags=flags)]
    changed = replaced or {}
    with ThreadPoolExecutor(_build.max_jobs()) as pool:
        objects = list(pool.map(lambda unit: compile_unit(unit, changed.get(unit.source.name)), units))
    return _link(objects, MODES[mode], CACHE / f"check-{mode}")


def ops_library() -> Path:
    """The library with torch.ops.smartmoe_emulated."""
    torch, _ = _build.find_torch()
    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*_build.TORCH_TARGET)
    includes = (f"-I{ROOT / 'csrc'}", "-isystem", f"{torch}/include", "-include", str(EMULATOR / "emulated_context.h"))
    glue_flags = (*FLAGS, "-O1", "-fPIC", target, *includes)
    kernel_flags = (*FLAGS, "-O2", "-fPIC")
    folder = ROOT / "csrc" / "cuda"
    units = [Unit(source=folder / name, flags=kernel_flags) for name in KERNELS]
    units += [Unit(source=path, flags=glue_flags) for path in [*sorted(folder.glob("*.cpp")), EMULATOR / "ops.cpp"]]
    with ThreadPoolExecutor(_build.max_jobs()) as pool:
        objects = list(pool.map(compile_unit, units))
    torch_flags = ("-shared", f"-L{torch}/lib", "-ltorch", "-ltorch_cpu")
    return _link(objects, torch_flags, CACHE / "emulated_ops.so")
