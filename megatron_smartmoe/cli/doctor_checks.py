"""What `smartmoe doctor` checks, and what it makes of what it finds. Imports neither torch nor Megatron."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

import megatron_smartmoe
from megatron_smartmoe.runtime.driver import Driver, TorchBuild, find_driver, why_unusable

State = Literal["ok", "warning", "error", "not applicable"]
Facts = Mapping[str, Any]

_MODULE = "megatron_smartmoe.adapter.doctor"
_LIMIT_S = 180.0  # for one probe: importing Megatron from a slow file system takes a minute
_GB = 1e9
_LEAST_MEMORY_GB, _LEAST_SHM_GB, _LEAST_DISK_GB, _LEAST_FILES = 4.0, 0.5, 5.0, 4096
_CLOCK_UNSYNCHRONIZED = 5  # TIME_ERROR of adjtimex(2)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table.

    Attributes:
        check: its name.
        state: whether training is affected.
        found: what is there.
        means: what it means for training.
        way_out: what to do.
    """

    check: str
    state: State
    found: str
    means: str = ""
    way_out: str = ""


def examine(name: str) -> Finding:
    """Run one check."""
    return CHECKS[name]()


@functools.cache
def probe(name: str) -> Facts:
    """What a probe saw in a process of its own; `error` where it could not look."""
    with tempfile.TemporaryDirectory(prefix="smartmoe-") as folder:
        file = Path(folder) / "facts.json"
        command = [sys.executable, "-m", _MODULE, name, str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {_LIMIT_S:.0f} s"}
        if file.is_file():
            facts: Facts = json.loads(file.read_text(encoding="utf-8"))
            return facts
    lines = done.stderr.strip().splitlines() or ["no output"]
    how = (
        f"was killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"ended: {lines[-1][:300]}"
    )
    return {"error": f"Python {how}"}


def check_python() -> Finding:
    """The version that the package is built for."""
    found = f"{platform.python_version()}, {sys.executable}"
    if tuple(int(part) for part in platform.python_version_tuple()[:2]) < (3, 12):
        means, way_out = "the package needs 3.12", "Run scripts/setup.sh, which finds one through pyenv or uv."
        return Finding(check="python", state="error", found=found, means=means, way_out=way_out)
    return Finding(check="python", state="ok", found=found)


def check_torch() -> Finding:
    """torch itself: it can be imported, and which CUDA it was built for."""
    facts = probe("torch")
    if "error" in facts:
        way_out = "Run scripts/setup.sh; or pip install torch==2.11.0, the build for your driver's CUDA."
        means = "torch cannot be imported"
        return Finding(check="torch", state="error", found=facts["error"], means=means, way_out=way_out)
    return Finding(check="torch", state="ok", found=_build(facts))


def check_gpu() -> Finding:
    """The GPUs, as torch and as the driver see them."""
    return judge_gpu(probe("torch"), find_driver())


def judge_gpu(torch: Facts, driver: Driver, environ: Mapping[str, str] = os.environ) -> Finding:
    """A GPU that the driver sees and torch does not is an error: training refuses to start."""
    if driver.error:
        found, repair = f"the driver does not answer: {driver.error}", "Restart the host or its driver"
        repair += "; --smartmoe-device cpu trains without."
        return Finding(check="gpu", state="error", found=found, means="no GPU can be used", way_out=repair)
    if torch.get("available"):
        return _judge_architectures(torch, ".".join(map(str, driver.cuda or ["unknown"])))
    if not driver.num_gpus:
        return Finding(check="gpu", state="not applicable", found="no GPU here: training runs on the CPU")
    found = f"{driver.num_gpus} GPU, {driver}, and torch can use none"
    means = "training does not start without --smartmoe-device cpu"
    if "error" in torch:
        return Finding(check="gpu", state="error", found=found, means=means, way_out="Mend torch first.")
    build = TorchBuild(version=torch["version"], cuda=torch["cuda"], why=torch.get("why"))
    return Finding(check="gpu", state="error", found=found, means=means, way_out=why_unusable(build, driver, environ))


def _build(torch: Facts) -> str:
    return f"{torch['version']}, {'built for CUDA ' + torch['cuda'] if torch['cuda'] else 'built without CUDA'}"


def _judge_architectures(torch: Facts, served: str) -> Finding:
    names = ", ".join(sorted({f"{name} ({arch})" for name, arch in torch["gpus"]}))
    found = f"{len(torch['gpus'])} GPU: {names}; driver for CUDA {served}"
    known = [arch for arch in torch.get("archs", []) if arch.removeprefix("sm_").isdigit()]
    majors = {arch.removeprefix("sm_")[:-1] for arch in known}
    alien = sorted({arch for _, arch in torch["gpus"] if arch.removeprefix("sm_")[:-1] not in majors})
    if majors and alien:
        means = f"torch has kernels for {', '.join(known)}, and none for {', '.join(alien)}"
        way_out = f"Install a build of torch for {alien[0]}, or leave such GPUs out with CUDA_VISIBLE_DEVICES."
        return Finding(check="gpu", state="error", found=found, means=means, way_out=way_out)
    return Finding(check="gpu", state="ok", found=found)


def check_ops() -> Finding:
    """The project's kernels: compiled, for which devices, and right."""
    return judge_ops(probe("ops"))


def judge_ops(facts: Facts) -> Finding:
    """Slow kernels are a warning, wrong or unusable ones an error."""
    build = "Build them: python megatron_smartmoe/ops/_build.py in a checkout, else install the package again."
    if "error" in facts:
        return Finding(
            check="ops", state="error", found=facts["error"], means="the kernels cannot be loaded", way_out=build
        )
    if facts["wrong"]:
        means = "the kernels do not work here; they may be built for other architectures"
        return Finding(
            check="ops",
            state="error",
            found="; ".join(facts["wrong"]),
            means=means,
            way_out=f"{build} TORCH_CUDA_ARCH_LIST names the architectures.",
        )
    found = f"{facts['backend']}, tried on {' and '.join(facts['devices'])}"
    if facts["backend"] == "torch reference" or ("cuda" in facts["devices"] and "cuda" not in facts["backend"]):
        means = "plain torch stands in for kernels: right, and slow"
        return Finding(check="ops", state="warning", found=found, means=means, way_out=build)
    return Finding(check="ops", state="ok", found=found)


def check_compiler() -> Finding:
    """A C++ compiler, and nvcc where there is a GPU; needed once, to build the kernels."""
    cxx = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++") or shutil.which("clang++")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if cxx is None:
        way_out = "Install one, for example apt-get install g++; or a wheel that has the kernels."
        means = "the kernels cannot be built here"
        return Finding(check="compiler", state="warning", found="no C++ compiler", means=means, way_out=way_out)
    done = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    found = f"{(done.stdout.splitlines() or [cxx])[0]}; {nvcc or 'no nvcc'}"
    if nvcc is None and find_driver().num_gpus and probe("ops").get("backend") != "compiled (cpu+cuda)":
        means, way_out = "kernels for the GPU cannot be built here", "Install the CUDA toolkit, or set CUDA_HOME to it."
        return Finding(check="compiler", state="warning", found=found, means=means, way_out=way_out)
    return Finding(check="compiler", state="ok", found=found)


def check_megatron() -> Finding:
    """Its release, and the names that the project hooks."""
    return judge_megatron(probe("megatron"))


def judge_megatron(facts: Facts) -> Finding:
    """Another release than the tested one is a warning as long as all hooked names are there."""
    if "error" in facts:
        way_out = "Run pip install megatron-core==0.19.2; where a package below is an error, mend that one first."
        return Finding(
            check="megatron", state="error", found=facts["error"], means="Megatron cannot be imported", way_out=way_out
        )
    found, tested = f"megatron-core {facts['version']}", facts["tested"]
    if facts["missing"]:
        means, way_out = facts["missing"].split(": ")[0], f"Run pip install megatron-core=={tested}."
        return Finding(check="megatron", state="error", found=found, means=means, way_out=way_out)
    if facts["version"] != tested:
        means = f"tested is {tested}; all names that the project hooks are there"
        way_out = f"Nothing, or pip install megatron-core=={tested}."
        return Finding(check="megatron", state="warning", found=found, means=means, way_out=way_out)
    return Finding(check="megatron", state="ok", found=f"{found}, all hooked names are there")


def check_collectives() -> Finding:
    """gloo between two processes; NCCL over the GPUs."""
    facts = probe("collectives")
    if "error" in facts:
        means = "ranks cannot send each other anything"
        way_out = (
            "Set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to the network's name, as `ip link` has it, for example lo."
        )
        return Finding(check="collectives", state="error", found=facts["error"], means=means, way_out=way_out)
    nccl = f"NCCL {facts['nccl version']} over {facts['nccl']} GPU" if "nccl" in facts else "NCCL: no GPU"
    return Finding(check="collectives", state="ok", found=f"gloo between 2 processes; {nccl}")


_PACKAGES = {
    "transformer_engine": (
        "pip install --no-build-isolation transformer-engine[pytorch], or pip uninstall transformer-engine",
        "Megatron's layers from TransformerEngine cannot be used, and its import stops Megatron's",
    ),
    "apex": (
        "pip uninstall apex; build NVIDIA's from its repository if you want it",
        "it is taken for NVIDIA's, and fused Adam and norms would be missing",
    ),
    "nvidia_resiliency_ext": (
        "pip uninstall nvidia-resiliency-ext, or install a release that has __version__ (0.5 or later)",
        "Megatron's checkpoints cannot be imported beside this release",
    ),
    "deep_ep": (
        "Install DeepEP 1.2.1, whose interface Megatron calls, or pip uninstall deep_ep",
        "Megatron's flex dispatcher (--moe-token-dispatcher-type flex) cannot use it",
    ),
}


def check_package(name: str) -> Finding:
    """A package that Megatron uses where it is there: whole, or not there at all."""
    if importlib.util.find_spec(name) is None:
        return Finding(check=name, state="not applicable", found="not installed, and not needed")
    return judge_package(name, probe(name))


def judge_package(name: str, facts: Facts) -> Finding:
    """What is missing of it, and what to do."""
    way_out, means = _PACKAGES[name]
    wrong = facts.get("error")
    if wrong is None and facts.get("is") == "another project":
        wrong = "installed, but it is another project of that name (PyPI's apex), not NVIDIA's"
    if wrong is None and facts.get("missing"):
        wrong = f"{facts.get('version') or 'installed'}, without {', '.join(facts['missing'])}"
    if wrong is None and name == "nvidia_resiliency_ext" and facts["version"] is None:
        wrong = "installed, without __version__"
    if wrong is None:
        return Finding(check=name, state="ok", found=facts.get("version") or "installed")
    state: State = "warning" if name == "deep_ep" else "error"
    return Finding(check=name, state=state, found=wrong, means=means, way_out=f"{way_out}.")


def check_slurm() -> Finding:
    """Its programs and its controller, where there is one."""
    if shutil.which("srun") is None:
        if "SLURM_JOB_ID" in os.environ:
            means = f"this is Slurm job {os.environ['SLURM_JOB_ID']}, and several nodes are started with srun"
            way_out = "Add Slurm's programs to PATH, or unset SLURM_JOB_ID to use this host alone."
            return Finding(check="slurm", state="error", found="srun is not on PATH", means=means, way_out=way_out)
        return Finding(check="slurm", state="not applicable", found="no Slurm here")
    done = _run(["sinfo", "--version"])
    answer = _run(["sinfo", "--noheader", "--format=%D nodes in %P"])
    found = (done.stdout.strip() or "Slurm") if done is not None else "Slurm"
    if answer is None or answer.returncode:
        why = (
            "no answer within 20 s" if answer is None else (answer.stderr.strip().splitlines() or ["sinfo failed"])[-1]
        )
        inside = "SLURM_JOB_ID" in os.environ
        means = "jobs cannot be started from here" + ("" if inside else "; training on this host alone can")
        way_out = "Ask whether this host is a Slurm client (SLURM_CONF, slurmctld), or use another one."
        return Finding(
            check="slurm",
            state="error" if inside else "warning",
            found=f"{found}; {why}",
            means=means,
            way_out=way_out,
        )
    return Finding(check="slurm", state="ok", found=f"{found}; {', '.join(answer.stdout.strip().splitlines())}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def check_write() -> Finding:
    """This folder, where runs/ and data/ go, and the folder of temporary files."""
    free = []
    for what, path in (("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=path):
                free.append((what, path, shutil.disk_usage(path).free / _GB))
        except OSError as error:
            means = "run directories, data and checkpoints are written here" if path == Path.cwd() else "torch needs it"
            way_out = "Go to a folder that you can write." if path == Path.cwd() else "Set TMPDIR to one."
            found = f"{path} ({what}): {error.strerror}"
            return Finding(check="write", state="error", found=found, means=means, way_out=way_out)
    found = ", ".join(f"{what} {path}: {size:.0f} GB free" for what, path, size in free)
    if min(size for _, _, size in free) < _LEAST_DISK_GB:
        means = "a checkpoint has 14 to 18 bytes for each parameter"
        way_out = "Make room, or put runs elsewhere with --run-dir and TMPDIR."
        return Finding(check="write", state="warning", found=found, means=means, way_out=way_out)
    return Finding(check="write", state="ok", found=found)


def check_memory() -> Finding:
    """Memory, shared memory and open files."""
    import resource

    memory = psutil.virtual_memory()
    shm = shutil.disk_usage("/dev/shm").total / _GB if Path("/dev/shm").is_dir() else 0.0
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = _cgroup_limit_gb()
    available = min(memory.available / _GB, limit or float("inf"))
    found = f"{available:.1f} of {memory.total / _GB:.1f} GB available, /dev/shm {shm:.1f} GB, {files} open files"
    found += f", cgroup limit {limit:.1f} GB" if limit else ""
    if available < _LEAST_MEMORY_GB:
        means, way_out = "a rank needs about 1 GB before its model", "End other programs, or ask for more memory."
    elif shm < _LEAST_SHM_GB:
        means, way_out = (
            "data workers and NCCL use shared memory",
            "Start the container with --shm-size=8g or --ipc=host.",
        )
    elif 0 <= files < _LEAST_FILES:
        means, way_out = "ranks, checkpoints and data keep many files open", "Run ulimit -n 65536."
    else:
        return Finding(check="memory", state="ok", found=found)
    return Finding(check="memory", state="warning", found=found, means=means, way_out=way_out)


def _cgroup_limit_gb() -> float | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            size = int(Path(path).read_text(encoding="ascii")) / _GB
        except (OSError, ValueError):
            continue
        if size < psutil.virtual_memory().total / _GB:
            return size
    return None


def check_clock() -> Finding:
    """A date that can be right, and a clock that is kept right."""
    newest = max(path.stat().st_mtime for path in Path(megatron_smartmoe.__file__).parent.glob("*.py"))
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    means = "run directories are named by it, and logs of several nodes are compared by it"
    way_out = "Start a time service, for example systemd-timesyncd or chrony."
    if time.time() < newest - 86_400:
        return Finding(
            check="clock",
            state="warning",
            found=f"{now}, before the files of this package",
            means=means,
            way_out=way_out,
        )
    buffer = ctypes.create_string_buffer(512)  # struct timex, of which nothing is set: adjtimex only reports
    state = ctypes.CDLL(None).adjtimex(buffer) if sys.platform == "linux" else 0
    kept = "not kept by a time service on this host" if state == _CLOCK_UNSYNCHRONIZED else "synchronized"
    return Finding(check="clock", state="ok", found=f"{now}, {kept}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "torch": check_torch,
    "gpu": check_gpu,
    "ops": check_ops,
    "compiler": check_compiler,
    "megatron": check_megatron,
    "collectives": check_collectives,
    **{name: functools.partial(check_package, name) for name in _PACKAGES},
    "slurm": check_slurm,
    "write": check_write,
    "memory": check_memory,
    "clock": check_clock,
}
