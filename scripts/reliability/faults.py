#!/usr/bin/env python3
"""Strike trainings with faults drawn from a seed, and judge every outcome by the program.

    scripts/faults.sh [N] [--seed S] [--directory DIR]

Two ranks train a small model for nine steps, with migrations, replicas, evaluations and saves. A fault strikes one of
them at a drawn point (`fault_points`) or one file of its newest checkpoint (`fault_files`); then the same command is
given again. `fault_judge` says what is allowed. Every fault appends a line to DIR/faults.jsonl, and the same command
continues where it ended. The table at the end is the one of docs/reliability.md; the exit status is 1 if an outcome is
not allowed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from scripts.reliability import fault_files, fault_link, fault_mounts
from scripts.reliability.corpus import corpus_flags
from scripts.reliability.fault_job import End, losses_of, run_launcher_with, run_ranks_with
from scripts.reliability.fault_judge import BAD, GOOD, Verdict, judge
from scripts.reliability.fault_plan import KINDS, LONG, ON_FILES, ON_MOUNTS, Fault, Length, draw
from scripts.reliability.fault_points import Order

RANKS = 2
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 32 "
    "--max-position-embeddings 32 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--moe-router-load-balancing-type none --moe-router-dtype fp32"
).split()
TRAINING = (
    "--expert-model-parallel-size 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --clip-grad 0 "
    "--eval-iters 1 --log-interval 1 --logging-level 40 --rerun-mode disabled --seed 1234 --split 90,10,0 "
    "--num-workers 0 "
    "--smartmoe --smartmoe-homes shuffle --smartmoe-homes-interval 2 --smartmoe-spare-slots 1 "
    "--smartmoe-replicas-margin 0"
).split()
TOLERANCE = 0.0  # relative: what replicas were planned from is saved, so a resume has the same bits


class Suite:
    """The faults of one directory: what they share, and the way from a fault to its outcome."""

    def __init__(self, directory: Path, length: Length) -> None:
        self.directory, self.length = directory, length
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"faults: another run is at work in {directory}. Pass another --directory.") from None
        self._data = corpus_flags(directory)

    def argv(self, run_dir: Path, replicas: str) -> list[str]:
        """The command of a run."""
        checkpoints = str(run_dir / "checkpoints")
        steps, save_every = self.length.iterations, self.length.save_every
        length = ["--train-iters", str(steps), "--save-interval", str(save_every)]
        length += ["--eval-interval", str(save_every + 1)]
        places = ["--save", checkpoints, "--load", checkpoints, "--smartmoe-run-dir", str(run_dir)]
        return [*MODEL, *TRAINING, *length, *self._data, "--smartmoe-replicas", replicas, *places]

    def reference(self, replicas: str) -> dict[int, float]:
        """The losses of the uninterrupted run; its folder is where file faults start from."""
        run_dir = self.directory / f"reference-{replicas}"
        if not (run_dir / "complete").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            end = run_ranks_with(self.argv(run_dir, replicas), RANKS, run_dir / "logs", None)
            if not end.good:
                raise SystemExit("faults: the run without faults failed:\n" + "\n".join(end.lines[-30:]))
            (run_dir / "complete").touch()
        return dict(losses_of(run_dir))

    def strike(self, fault: Fault) -> dict[str, Any]:
        """Bring the fault about, give the command again where the job stopped, and judge."""
        started, reference = time.time(), self.reference(fault.replicas)
        work = self.directory / "work"
        fault_mounts.remove(work)
        with fault_mounts.place_for(work, own_file_system=fault.kind in ON_MOUNTS) as run_dir:
            if fault.kind in ON_FILES:
                end, resumed = self._on_file(fault, run_dir)
            else:
                end, resumed = self._on_process(fault, run_dir)
            losses = losses_of(run_dir)
        verdict = judge(fault, end, resumed, losses, reference, TOLERANCE)
        if verdict.outcome not in GOOD:
            (self.directory / f"bad-{fault.number}.log").write_text("\n".join(end.lines), encoding="utf-8")
        outcome = {**asdict(fault), **asdict(verdict), "stopped_s": end.seconds, "status": end.status}
        return outcome | {"slow_ranks": end.slow_ranks, "seconds_in_all": round(time.time() - started, 1)}

    def _on_process(self, fault: Fault, run_dir: Path) -> tuple[End, End | None]:
        marker = self.directory / "struck"
        marker.unlink(missing_ok=True)
        order = Order(
            action=fault.kind,
            point=fault.place,
            victim=fault.victim,
            iteration=fault.iteration,
            seconds=fault.seconds,
            mount=str(run_dir) if fault.kind in ON_MOUNTS else "",
            marker=str(marker),
        )
        start = run_launcher_with if fault.launched else run_ranks_with
        argv = self.argv(run_dir, fault.replicas)
        limits = ["--distributed-timeout-minutes", str(fault_link.TIMEOUT_MINUTES)]
        limits += ["--smartmoe-migration-timeout-s", str(60 * fault_link.TIMEOUT_MINUTES)]
        told = [*argv, *limits] if fault.kind == "cut the link" else argv
        end = start(told, RANKS, self.directory / "logs", order)
        if end.good:
            return end, None
        fault_mounts.repair(run_dir)
        return end, run_ranks_with(argv, RANKS, self.directory / "logs-resumed", None)

    def _on_file(self, fault: Fault, run_dir: Path) -> tuple[End, End | None]:
        """Damage a file of the newest checkpoint but one, as if training had been interrupted after it."""
        last = self.length.iterations - self.length.save_every
        fault_files.prepare(self.directory / f"reference-{fault.replicas}", run_dir, last)
        fault_files.damage(run_dir / "checkpoints", fault.kind, fault.place, fault.at)
        argv = self.argv(run_dir, fault.replicas)
        end = run_ranks_with(argv, RANKS, self.directory / "logs", None)
        if end.good:
            return end, None
        newest_whole = [*argv, "--smartmoe-resume", "newest-whole"]
        return end, run_ranks_with(newest_whole, RANKS, self.directory / "logs-resumed", None)


def run(directory: Path, faults: Sequence[Fault], length: Length) -> list[dict[str, Any]]:
    """Strike with every fault that has no outcome yet; returns all outcomes."""
    suite, file = Suite(directory, length), directory / "faults.jsonl"
    outcomes = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {outcome["number"] for outcome in outcomes}
    for fault in faults:
        if fault.number in done:
            continue
        try:
            outcome = suite.strike(fault)
        except Exception as error:  # of the harness: the others can be struck all the same, and this one counts as bad
            details = f"the harness failed: {type(error).__name__}: {error}"
            verdict = Verdict(outcome="did not strike", line="", details=details)
            outcome = {**asdict(fault), **asdict(verdict), "stopped_s": 0.0}
        outcomes.append(outcome)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(outcome) + "\n")
        where = f"{fault.kind}, {fault.place}, rank {fault.victim}, {fault.replicas}"
        text = outcome["details"] or outcome["line"]
        print(f"{fault.number + 1:4} {outcome['outcome']:15} {where}: {text[:160]}", flush=True)
    return outcomes


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Kinds and outcomes, as Markdown."""
    lines = [f"| fault | struck | {' | '.join(GOOD)} | not allowed | longest stop |", "|" + "---|" * 7]
    for kind in KINDS:
        mine = [outcome for outcome in outcomes if outcome["kind"] == kind]
        counts = [sum(outcome["outcome"] == name for outcome in mine) for name in GOOD]
        bad = sum(outcome["outcome"] in BAD for outcome in mine)
        stops = [outcome["stopped_s"] for outcome in mine if outcome["outcome"] in ("stopped", "refused")]
        longest = f"{max(stops):.0f} s" if stops else "-"
        lines.append(f"| {kind} | {len(mine)} | {' | '.join(map(str, counts))} | {bad} | {longest} |")
    return "\n".join(lines)


def main() -> int:
    """Draw, strike, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=200, metavar="N", help="faults in all. Default: 200.")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the draw. Default: 1.")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="Default: runs/faults-seedS.")
    parser.add_argument(
        "--launched-every", type=int, default=8, metavar="K", help="one of K through the launcher. Default: 8."
    )
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if kind not in fault_mounts.missing_kinds()]
    if left_out := sorted(set(KINDS) - set(kinds)):
        print(f"faults: this machine cannot bring about: {', '.join(left_out)}", flush=True)
    replicas, every = ("exact", "history"), args.launched_every
    faults = draw(args.count, args.seed, length=LONG, kinds=kinds, launched_every=every, replicas=replicas)
    outcomes = run(args.directory or Path(f"runs/faults-seed{args.seed}"), faults, LONG)
    print(table(outcomes))
    return 1 if any(outcome["outcome"] in BAD for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
