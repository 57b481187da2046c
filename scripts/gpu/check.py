"""Run the steps of the GPU check, each with its own limit, and write what they found as JSON and as a table.

A step is a command. Its output goes to a log; lines that start with `result: ` are one measurement each, in JSON with
`what`, `value` and `unit`. A step that fails, hangs or cannot be started is noted, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = "result: "
OPS_TESTS = "tests/gpu/test_ops_gpu.py"
GRAPHS_TESTS = "tests/gpu/test_graphs_gpu.py"
TRAINING_TESTS = "tests/gpu/test_training_on_one_gpu.py"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the check.

    Attributes:
        name: in the table, and of its log.
        limit_s: seconds after which it is ended.
        command: `{python}` and `{device}` are replaced.
        on_cpu: whether it can run where there is no GPU.
        needs: a program without which it is skipped.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    on_cpu: bool = False
    needs: str | None = None


@dataclass(kw_only=True)
class Outcome:
    """What became of a step.

    Attributes:
        name: of the step.
        status: passed, failed, timed out, or skipped with the reason.
        seconds: that it took.
        results: measurements, each with `what`, `value` and `unit`.
    """

    name: str
    status: str
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _sanitizer(tool: str) -> Step:
    return Step(
        name=f"compute-sanitizer {tool}",
        limit_s=60,
        command=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *_pytest(OPS_TESTS, "-k", "tiny")),
        needs="compute-sanitizer",
    )


SHORT_LIST = "kernels_are or many_choices or packed or graph or placement or gradients or tiny"
STEPS = (  # in the order of what each second tells
    Step(
        name="grouped GEMM",
        limit_s=60,
        command=("{python}", "-m", "scripts.gpu.grouped_gemm", "--device", "{device}"),
        on_cpu=True,
    ),
    Step(name="kernels, the short list", limit_s=60, command=_pytest(OPS_TESTS, GRAPHS_TESTS, "-k", SHORT_LIST)),
    Step(name="ranks on one GPU", limit_s=100, command=_pytest("tests/gpu/test_ranks_on_one_gpu.py")),
    Step(name="training on one GPU", limit_s=160, command=_pytest(TRAINING_TESTS, "-k", "not where_a_step_goes")),
    Step(
        name="where a step goes, by CUDA events",
        limit_s=60,
        command=_pytest(TRAINING_TESTS, "-s", "-k", "where_a_step_goes"),
    ),
    Step(name="kernels, all", limit_s=90, command=_pytest(OPS_TESTS)),
    _sanitizer("memcheck"),  # not initcheck: a kernel reads what it then overwrites, by design
    _sanitizer("racecheck"),
    Step(
        name="dispatch ops",
        limit_s=60,
        command=("{python}", *"scripts/bench_ops.py --device cuda --tokens 8192 --hidden 7168 --top-k 8".split()),
    ),
    Step(
        name="a layer's trace",
        limit_s=90,
        command=("{python}", "-m", "scripts.gpu.trace_layer", "--device", "{device}"),
        on_cpu=True,
    ),
    Step(name="the launcher, NCCL", limit_s=100, command=_pytest("tests/gpu/test_training_gpu.py")),
)


def run_step(step: Step, *, device: str, out: Path) -> Outcome:
    """Run one step. Whatever happens in it, it returns within its limit and a few seconds."""
    if device == "cpu" and not step.on_cpu:
        return Outcome(name=step.name, status="skipped: needs a GPU")
    if step.needs is not None and shutil.which(step.needs) is None:
        return Outcome(name=step.name, status=f"skipped: {step.needs} is not on PATH")
    command = [part.replace("{python}", sys.executable).replace("{device}", device) for part in step.command]
    log = out / f"{step.name.replace(' ', '-').replace(',', '')}.log"
    begin = time.monotonic()
    try:
        with log.open("w") as output:  # a session of its own: ranks that hang are ended with their parent
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(timeout=step.limit_s)
                status = "passed" if code == 0 else f"failed: exit status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"timed out after {step.limit_s:g} s"
    except OSError as error:
        status = f"failed: {error}"
    results = _results(log)
    return Outcome(name=step.name, status=status, seconds=round(time.monotonic() - begin, 1), results=results)


def _results(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = []
    for line in lines:
        if line.startswith(RESULT):
            try:
                found.append(json.loads(line.removeprefix(RESULT)))
            except json.JSONDecodeError:  # the process was ended within a line
                continue
    return found


def machine() -> dict[str, str]:
    """Hardware, driver, versions, commit and date."""
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": _said("git", "rev-parse", "--short", "HEAD")}
    gpu = _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    facts["GPU, driver, memory"] = gpu.splitlines()[0] if gpu else "none"
    facts["CPU"] = f"{platform.machine()}, {os.cpu_count()} cores"
    versions = "import torch, megatron.core as m; from megatron_smartmoe import ops; "
    versions += "print(f'torch {torch.__version__}, megatron-core {m.__version__}, ops {ops.backend()}')"
    facts["software"] = f"Python {platform.python_version()}, {_said(sys.executable, '-W', 'ignore', '-c', versions)}"
    return facts


def _said(*command: str) -> str:
    """What a command prints; empty if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(facts: dict[str, str], outcomes: Sequence[Outcome]) -> str:
    """The results as Markdown, for docs/benchmarks.md."""
    lines = ["; ".join(f"{name}: {value}" for name, value in facts.items()), ""]
    lines += ["| step | status | seconds |", "|---|---|---:|"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:g} |" for one in outcomes]
    measured = [(one.name, result) for one in outcomes for result in one.results]
    if measured:
        lines += ["", "| step | what | value |", "|---|---|---:|"]
        lines += [f"| {name} | {r['what']} | {r['value']:g} {r['unit']} |" for name, r in measured]
    return "\n".join(lines) + "\n"


def check(steps: Sequence[Step], *, device: str, out: Path) -> list[Outcome]:
    """Run the steps and write the results after each, so that what was measured survives the end of the machine."""
    out.mkdir(parents=True, exist_ok=True)
    facts, outcomes = machine(), list[Outcome]()
    print("; ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    for step in steps:
        outcome = run_step(step, device=device, out=out)
        outcomes.append(outcome)
        print(f"{outcome.seconds:7.1f} s  {outcome.name}: {outcome.status}", flush=True)
        for result in outcome.results:
            print(f"           {result['what']}: {result['value']:g} {result['unit']}", flush=True)
        content = {"machine": facts, "device": device, "steps": [asdict(each) for each in outcomes]}
        (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        (out / "results.md").write_text(table(facts, outcomes))
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; 1 if a step failed or timed out."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only what runs without a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for results and logs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"steps to run: {', '.join(s.name for s in STEPS)}")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no step is called {', '.join(sorted(unknown))}")
    steps = [step for step in STEPS if args.only is None or step.name in args.only]
    outcomes = check(steps, device=args.device, out=args.out)
    print(f"results: {args.out / 'results.json'}, {args.out / 'results.md'}", flush=True)
    return int(any(one.status.startswith(("failed", "timed out")) for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
