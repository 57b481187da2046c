"""What the soak runs must show, each claim with its figure and its limit; judged by the program, not by eye.

What a process holds is compared between two windows of one process: the second tenth of its steps, after everything
that is allocated once, and the last tenth. Step times are CPU time, because the machine may be shared; the two halves
of the steps after the first tenth are compared, by their medians.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.reliability import soak_plot

MEMORY_BYTES_PER_STEP = 2048  # more than what a run keeps of each step for its summary, less than any tensor that leaks
STEP_TIME_GROWTH = 1.10  # other programs on the machine change CPU time by a few percent
LAST_STEPS = 200  # whose mean loss is compared
T_TWO_DEGREES = 4.303  # Student's t, 97.5%, of three runs: a fourth like them lies within, 95 times in 100
ROUNDED = ("off", "rounded-1", "rounded-2")
MOVES_PER_STEPS = 500  # at least one migration in so many steps, or the load did not drift


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement about the runs, the figure that was found, the limit, and whether it holds."""

    name: str
    found: str
    limit: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class SoakRun:
    """One run as its files tell it.

    Attributes:
        name: of the run.
        losses: by iteration; of an iteration that was trained twice, the later one.
        samples: by rank; each list by iteration.
        decisions: the lines of smartmoe.jsonl.
        copies: replicas that took tokens, summed over layers and micro-batches, by iteration.
    """

    name: str
    losses: Mapping[int, float]
    samples: Sequence[Sequence[Mapping[str, Any]]]
    decisions: Sequence[Mapping[str, Any]]
    copies: Mapping[int, int]


def judge(directory: Path, steps: int, names: Iterable[str]) -> int:
    """Judge the runs, print a table, write soak.json and soak.svg; returns 1 if a claim does not hold."""
    runs = {name: read(directory / name) for name in names}
    claims = [*(claim for run in runs.values() for claim in holdings(run)), *comparisons(directory, runs, steps)]
    width = max(len(claim.name) for claim in claims)
    for claim in claims:
        print(f"{'yes' if claim.holds else 'NO ':3}  {claim.name:{width}}  {claim.found}  ({claim.limit})")
    content = {"steps": steps, "claims": [asdict(claim) for claim in claims], "means": means(runs)}
    (directory / "soak.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    soak_plot.draw(runs, directory / "soak.svg")
    print(f"soak: figures in {directory / 'soak.json'}, plot in {directory / 'soak.svg'}")
    return 0 if all(claim.holds for claim in claims) else 1


def read(run_dir: Path) -> SoakRun:
    """Read a run's files; of an iteration that was trained again after a resume, the last line counts."""
    samples = []
    for file in sorted(run_dir.glob("rank*.jsonl")):
        samples.append(list({line["iteration"]: line for line in lines_of(file)}.values()))
    balance = run_dir / "balance-stage0-group0.jsonl"
    return SoakRun(
        name=run_dir.name,
        losses={x["iteration"]: x["lm loss"] for x in lines_of(run_dir / "metrics.jsonl") if "lm loss" in x},
        samples=samples,
        decisions=lines_of(run_dir / "smartmoe.jsonl"),
        copies={line["iteration"]: sum(map(sum, line["copies"])) for line in lines_of(balance)},
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if it does not exist. A line that an interruption cut short is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def holdings(run: SoakRun) -> list[Claim]:
    """What the processes of one run hold, and their step time."""
    memory, step_time = list[float](), list[float]()
    threads, files, groups = list[int](), list[int](), list[int]()
    for process in processes(run):
        early, late = tenth(process, 1), tenth(process, 9)
        apart = (late[0]["iteration"] + late[-1]["iteration"] - early[0]["iteration"] - early[-1]["iteration"]) / 2
        grown = statistics.median(x["rss_bytes"] for x in late) - statistics.median(x["rss_bytes"] for x in early)
        memory.append(grown / apart)
        for key, differences in (("threads", threads), ("files", files), ("groups", groups)):
            differences.append(max(x[key] for x in late) - max(x[key] for x in early))
        times = cpu_ms(process[len(process) // 10 :])
        first, second = times[: len(times) // 2], times[len(times) // 2 :]
        step_time.append(statistics.median(second) / statistics.median(first))
    counted = {"threads": threads, "open files": files, "process groups": groups}
    return [
        Claim(
            name=f"{run.name}: memory",
            found=f"{max(memory):.0f} bytes per step in the fastest growing of {len(memory)} processes",
            limit=f"at most {MEMORY_BYTES_PER_STEP}",
            holds=max(memory) <= MEMORY_BYTES_PER_STEP,
        ),
        *(
            Claim(name=f"{run.name}: {name}", found=f"{max(more):+d}", limit="at most +0", holds=max(more) <= 0)
            for name, more in counted.items()
        ),
        Claim(
            name=f"{run.name}: CPU time per step",
            found=f"x {max(step_time):.3f}, {statistics.median(cpu_ms(run.samples[0])):.1f} ms on rank 0",
            limit=f"at most x {STEP_TIME_GROWTH}",
            holds=max(step_time) <= STEP_TIME_GROWTH,
        ),
    ]


def processes(run: SoakRun) -> list[list[Mapping[str, Any]]]:
    """The samples of each process that lasted for at least a quarter of the run."""
    found = []
    for samples in run.samples:
        for pid in dict.fromkeys(line["pid"] for line in samples):
            of_process = [line for line in samples if line["pid"] == pid]
            if len(of_process) >= len(samples) // 4:
                found.append(of_process)
    return found


def tenth(process: list[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """The samples of one tenth of a process's steps, counted from 0."""
    return process[len(process) * number // 10 : len(process) * (number + 1) // 10]


def cpu_ms(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Milliseconds of CPU time per step, between neighbouring samples of one process."""
    return [
        1e3 * (after["cpu_s"] - before["cpu_s"]) / (after["iteration"] - before["iteration"])
        for before, after in pairwise(samples)
        if after["pid"] == before["pid"] and after["iteration"] > before["iteration"]
    ]


def means(runs: Mapping[str, SoakRun]) -> dict[str, float]:
    """The mean loss of the last steps of each run."""
    return {name: statistics.fmean(list(run.losses.values())[-LAST_STEPS:]) for name, run in runs.items()}


def comparisons(directory: Path, runs: Mapping[str, SoakRun], steps: int) -> list[Claim]:
    """What the runs say about each other, and that something happened in them."""
    off, homes, everything = runs["off"], runs["homes"], runs["all"]
    equal = sum(homes.losses.get(i) == loss for i, loss in off.losses.items())
    mean = means(runs)
    three = [mean[name] for name in ROUNDED]
    middle, reach = statistics.fmean(three), T_TWO_DEGREES * statistics.stdev(three) * (1 + 1 / 3) ** 0.5
    within = min(three) <= mean["all"] <= max(three)
    moves = {name: sum(x["kind"] == "homes" and x["moved_bytes"] > 0 for x in runs[name].decisions) for name in runs}
    switches = sum(x["kind"] == "pool" and x["taken"] for x in everything.decisions)
    busy = sum(count > 0 for count in everything.copies.values()) / steps
    claims = [
        Claim(
            name="homes: losses with the bits of off",
            found=f"{equal} of {steps}",
            limit="all",
            holds=equal == steps == len(off.losses) == len(homes.losses),
        ),
        checkpoints_agree(directory, steps),
        Claim(
            name=f"all: mean loss of the last {LAST_STEPS} steps",
            found=f"{mean['all'] - middle:+.1e} from {middle:.6f}, the mean of three runs without balancing that "
            f"differ by rounding; {'within' if within else 'outside'} their range of {max(three) - min(three):.1e}",
            limit=f"+-{reach:.1e}, within which a fourth such run lies 95 times in 100",
            holds=abs(mean["all"] - middle) <= reach,
        ),
        Claim(
            name="all: steps with replicas",
            found=f"{busy:.0%}, {switches} switches of the pool",
            limit="at least 25%, at least 3",
            holds=busy >= 0.25 and switches >= 3,
        ),
    ]
    least = steps // MOVES_PER_STEPS
    for name in ("homes", "all"):
        found, limit = f"{moves[name]} migrations", f"at least {least}"
        claims.append(Claim(name=f"{name}: experts move", found=found, limit=limit, holds=moves[name] >= least))
    return claims


def checkpoints_agree(directory: Path, steps: int) -> Claim:
    """Every weight, main weight and moment after the last step, with the bits of the run without balancing."""
    from tests.support.checkpoints import different, tensors

    saved = {name: tensors(directory / name / "checkpoints", steps) for name in ("off", "homes")}
    names = list(different(saved["homes"], saved["off"]))
    found = f"{len(names)} of {len(saved['off'])} tensors differ" + (f", first {names[0]}" if names else "")
    return Claim(name="homes: checkpoint with the bits of off", found=found, limit="0", holds=not names)
