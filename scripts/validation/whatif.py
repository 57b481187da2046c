#!/usr/bin/env python3
"""Whether `smartmoe whatif` is right: one CPU run, settings predicted from it, then each of them run.

    .venv/bin/python scripts/validation/whatif.py --trace T.npz --out DIR [--rounds 5] [--steps 20]

Real training on gloo ranks with one thread each; only the routers' choices come from a trace, since routers that have
just been initialised are nearly balanced. The run that predictions are made from (`base`) records its routing and the
CPU time of each rank; the settings, and `base` again as a control, are then run in turns, whose order turns round from
one round to the next, because a machine drifts. Measured is the CPU time of the busiest rank, all its threads: what a
step would take with a core for each rank. A setting's value is the median over rounds of the median over the counted
steps. It is inside where it lies in the error bar that was printed for it.

A run that DIR has already is not repeated. --predict-only makes the table from what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cli.main import main as smartmoe
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from scripts.training_bench import rank
from scripts.training_bench.start import run_ranks
from scripts.training_bench.variants import Shape

RANKS, SAMPLES = 4, 16  # of a step: two micro-batches of two for each rank
WARM_UP = 5  # steps of a run that do not count
SHAPE = Shape(layers=2, hidden=256, ffn=768, tokens=256, experts=32, top_k=2, micro_batches=SAMPLES // RANKS)
BASE: Mapping[str, int | str] = {"ep": 4, "micro_batch": 2, "spare_slots": 0, "replicas": "off", "homes_interval": 10}
# Name of the setting -> what differs from BASE.
SETTINGS: Mapping[str, Mapping[str, int | str]] = {
    "homes never move": {"homes_interval": 0},
    "1 spare slot, history": {"spare_slots": 1, "replicas": "history"},
    "1 spare slot, exact": {"spare_slots": 1, "replicas": "exact"},
    "2 spare slots, auto": {"spare_slots": 2, "replicas": "auto"},
    "EP 2": {"ep": 2},
    "EP 2, 1 spare slot, exact": {"ep": 2, "spare_slots": 1, "replicas": "exact"},
    "micro-batch 1": {"micro_batch": 1},
    "micro-batch 4": {"micro_batch": 4},
}


def flags_of(setting: Mapping[str, int | str], steps: int) -> list[str]:
    """The command line of a run."""
    flags = SHAPE.flags(int(setting["ep"]), steps)
    for flag, value in (("--micro-batch-size", setting["micro_batch"]), ("--global-batch-size", SAMPLES)):
        flags[flags.index(flag) + 1] = str(value)
    interval, spare = int(setting["homes_interval"]), int(setting["spare_slots"])
    flags += [
        "--smartmoe",
        *(["--smartmoe-homes-interval", str(interval)] if interval else ["--smartmoe-homes", "off"]),
    ]
    if spare:
        flags += ["--smartmoe-spare-slots", str(spare), "--smartmoe-replicas", str(setting["replicas"])]
    return flags


def train(flags: Sequence[str], folder: Path) -> FloatArray:
    """Train; returns CPU seconds by step and rank."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = [*flags, "--smartmoe-run-dir", str(folder)]
    times = run_ranks("run", RANKS, flags, folder, name=" ".join(flags))
    return np.asarray(times[:, :, rank.FIELDS.index("cpu_s")])


def slug(name: str) -> str:
    """A setting's name in file names."""
    return name.replace(",", "").replace(" ", "-")


def measure(out: Path, rounds: int, steps: int) -> None:
    """The runs that are not there yet."""
    routing = ["--smartmoe-replay-trace", str(out / "routing.npz")]
    # Step 1: the run that predictions are made from.
    base = out / "base"
    if not (base / "step_times.csv").exists():
        recorded = ["--smartmoe-record-trace", str(base / "trace.npz")]
        cpu_s = train([*flags_of(BASE, steps), *routing, *recorded], base)
        lines = [
            f"{step + 1},{number},{cpu_s[step, number]:.6f}"
            for step in range(WARM_UP, steps)
            for number in range(RANKS)
        ]
        (base / "step_times.csv").write_text("\n".join(["iteration,rank,seconds", *lines]) + "\n")
    # Step 2: the settings, and the same setting again.
    names = ["base", *SETTINGS]
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            path = out / f"round{number}-{slug(name)}.npy"
            if not path.exists():
                flags = [*flags_of({**BASE, **SETTINGS.get(name, {})}, steps), *routing]
                np.save(path, train(flags, out / "run"))
                print(f"round {number + 1} of {rounds}: {name} done", file=sys.stderr, flush=True)


def predict(out: Path) -> dict[str, Any]:
    """What `smartmoe whatif` says about every setting; by name, the run itself as `base`."""
    lists = ["--ep", "2,4", "--spare-slots", "0,1,2", "--replicas", "history,exact,auto"]
    lists += ["--homes-interval", "0,10", "--micro-batch-size", "1,2,4"]
    path = out / "predicted.json"
    command = ["whatif", str(out / "base"), "--step-times", str(out / "base" / "step_times.csv")]
    with contextlib.redirect_stdout(io.StringIO()):
        status = smartmoe([*command, *lists, "--json", str(path)])
    if status:
        raise SystemExit(status)
    settings = json.loads(path.read_text())["settings"]
    return {name: _found(settings, {**BASE, **SETTINGS.get(name, {})}) for name in ("base", *SETTINGS)}


def _found(settings: Sequence[Mapping[str, Any]], wanted: Mapping[str, int | str]) -> Mapping[str, Any]:
    return next(one for one in settings if all(one["launch"][name] == value for name, value in wanted.items()))


def compare(out: Path, rounds: int) -> list[dict[str, Any]]:
    """Predicted and measured, a row per setting."""
    rows = []
    for name, predicted in predict(out).items():
        runs = [np.load(path) for n in range(rounds) if (path := out / f"round{n}-{slug(name)}.npy").exists()]
        medians_s = [float(np.median(run[WARM_UP:].max(axis=1))) for run in runs]
        if not medians_s:
            continue
        measured_s, step_s = float(np.median(medians_s)), predicted["step_s"]
        rows.append(
            {
                "setting": name,
                "predicted_ms": step_s * 1e3,
                "bar": predicted["bar"],
                "measured_ms": measured_s * 1e3,
                "range_ms": [min(medians_s) * 1e3, max(medians_s) * 1e3],
                "error": measured_s / step_s - 1,
                "inside": abs(measured_s / step_s - 1) <= predicted["bar"],
                "runs": len(medians_s),
            }
        )
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = ["| setting | predicted ms | bar | measured ms | range | off | inside |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["range_ms"]
        lines.append(
            f"| {row['setting']} | {row['predicted_ms']:.0f} | ±{row['bar']:.1%} | {row['measured_ms']:.0f} | "
            f"{low:.0f} to {high:.0f} | {row['error']:+.1%} | {'yes' if row['inside'] else 'no'} |"
        )
    judged = [row for row in rows if row["setting"] != "base"]
    inside, widest = sum(row["inside"] for row in judged), max(row["bar"] for row in judged)
    return "\n".join([*lines, "", f"{inside} of {len(judged)} settings are inside; the widest bar is ±{widest:.1%}."])


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="routing trace whose choices all runs replay")
    add("--first", type=int, default=100, metavar="RECORD", help="record that they begin with (default: 100)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs; what it has is not repeated")
    add("--rounds", type=int, default=5, metavar="N", help="runs of each setting (default: 5)")
    add("--steps", type=int, default=20, metavar="N", help=f"of a run, the first {WARM_UP} not counted (default: 20)")
    add("--predict-only", action="store_true", help="run nothing, compare what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.predict_only:
        trace = load_trace(args.trace)
        part = slice(args.first, args.first + args.steps)
        part_of = RoutingTrace(
            counts=trace.counts[part], iteration=trace.iteration[part], layer=trace.layer, meta=dict(trace.meta)
        )
        part_of.save(args.out / "routing.npz")
        measure(args.out, args.rounds, args.steps)
    rows = compare(args.out, args.rounds)
    machine = {"machine": platform.platform(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    (args.out / "compared.json").write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
