#!/usr/bin/env python3
"""Account for five runs on CPU ranks, each against its force-balanced twin: how much stays unexplained.

    .venv/bin/python scripts/validation/regret_account.py --out DIR [--ranks 4] [--iterations 40]

    homes     homes move, no replicas
    history   one spare slot per rank, replicas planned from earlier iterations
    exact     one spare slot per rank, replicas planned from each micro-batch's counts
    chunks    all-to-alls in two chunks, no balancing
    stock     Megatron's own MoE layer

Real training on gloo ranks, one thread each, through the real entry. The routers' choices are those of random logits
with a bias that all ranks share and that lasts (`--moe-router-force-biased`), so that experts differ in load by
several times; the twin has `--moe-router-force-load-balancing` in its place, and no balancing. A run that DIR has
already is not repeated: an interrupted program goes on where it was. Prints the table of docs/report.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.report.account import read_account
from scripts.training_bench.variants import Shape

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(layers=2, hidden=256, ffn=1024, tokens=512, experts=16, top_k=2, micro_batches=2)
BIAS = "-1.0"  # standard deviation of the logits' bias; negative: the same in every iteration
OFF = ("--smartmoe", "--smartmoe-homes", "off")
SPARE = (*OFF, "--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "0")
CHUNKS = (*OFF, "--smartmoe-overlap-degree", "2")
RUNS = {
    "homes": ("--smartmoe", "--smartmoe-homes-interval", "10"),
    "history": (*SPARE, "--smartmoe-replicas", "history"),
    "exact": (*SPARE, "--smartmoe-replicas", "exact"),
    "chunks": CHUNKS,
    "stock": (),
}
TWINS = {"off": OFF, "chunks": CHUNKS, "stock": ()}
TWIN_OF = {"homes": "off", "history": "off", "exact": "off", "chunks": "chunks", "stock": "stock"}
TERMS = {
    "machine": "machine",
    "imbalance": "imbalance",
    "shapes": "shapes",
    "all_to_all": "all-to-all",
    "replicas": "replicas",
    "migration": "migration",
    "planning": "planning",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    args = parse(argv)
    launches = {f"ideal-{name}": (*flags, "--moe-router-force-load-balancing") for name, flags in TWINS.items()}
    launches |= {name: (*flags, "--moe-router-force-biased", BIAS) for name, flags in RUNS.items()}
    wanted = [name for name in args.only or launches if not (args.out / name / "summary.json").is_file()]
    for name in wanted:
        train(args.out / name, args.ranks, args.iterations, launches[name])
        print(f"{name} done", file=sys.stderr, flush=True)
    if not args.only:
        print(table(args.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs; what it has is not repeated")
    add("--ranks", type=int, default=4, metavar="N", help="ranks, all in one expert-parallel group (default: 4)")
    add("--iterations", type=int, default=40, metavar="N", help="of each run (default: 40)")
    names = [*(f"ideal-{name}" for name in TWINS), *RUNS]
    add("--only", nargs="+", choices=names, help="make these runs and print no table")
    return parser.parse_args(argv)


def train(run_dir: Path, ranks: int, iterations: int, flags: Sequence[str]) -> None:
    """One run, in a process per rank."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command += ["-m", "megatron_smartmoe.adapter.pretrain", *SHAPE.flags(ranks, iterations), *flags]
    command += ["--smartmoe-run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (run_dir / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{run_dir.name}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


def table(out: Path) -> str:
    """A row per run: the step, the ideal's, and the terms in percent of the step."""
    lines = [
        f"| run | step, ms | ideal, ms | reached | {' | '.join(TERMS.values())} | unexplained |",
        f"|---|{'---:|' * (len(TERMS) + 4)}",
    ]
    for name in RUNS:
        found = read_account(out / name, out / f"ideal-{TWIN_OF[name]}")
        assert found is not None, f"{out / name} has no account"
        account = found.account
        assert account.ideal_s is not None
        assert account.unexplained_s is not None
        seconds = {term.name: term.seconds for term in account.terms}
        shares = [percent(seconds[term] / account.step_s) for term in TERMS]
        cells = [name, f"{account.step_s * 1e3:.0f}", f"{account.ideal_s * 1e3:.0f}", f"{account.share:.1%}", *shares]
        lines.append(f"| {' | '.join(cells)} | {percent(account.unexplained_s / account.step_s)} |")
    return "\n".join(lines)


def percent(share: float) -> str:
    """One decimal, and no -0.0%."""
    return f"{round(share, 3) + 0.0:.1%}"


if __name__ == "__main__":
    main()
