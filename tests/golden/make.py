#!/usr/bin/env python3
"""Writes the golden files: what a commit of this project leaves behind, which every later commit must read.

    python tests/golden/make.py CHECKOUT tests/golden/COMMIT

CHECKOUT is a checkout of that commit with its compiled ops (`scripts/setup.sh` there); this Python must have the
packages that it needs. Two CPU ranks train a tiny model with mock data (fp32, EP 2, distributed optimizer, a random
migration every 2 iterations). Written are

```
run/             the run directory of a run that stopped after iteration 4 of 8: config.yaml, plan.json, smartmoe.jsonl,
                 metrics.jsonl, and checkpoints/ with a placement
losses.json      the losses of iterations 5 to 8 of the same run without a stop
trace.npz        the routing of the run that stopped
decisions.jsonl  from `smartmoe simulate --save-decisions` on that trace
cluster.yaml     from `smartmoe calibrate`
```

Paths are relative wherever the run may choose, so a checkpoint names nothing of the machine. What still names it is
changed afterwards: command.sh and environment.json get placeholders for the directory, the Python, the host and the
state of the checkout; train.log, arguments.txt and TensorBoard's file are left out. A last step refuses any path that
is left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ITERATIONS = 8
STOP = 4
MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 --seq-length 16 "
    "--max-position-embeddings 16 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type aux_loss --moe-router-dtype fp32"
)
TRAINING = (
    f"--micro-batch-size 1 --global-batch-size 4 --train-iters {ITERATIONS} --lr 1e-3 --lr-decay-style constant "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --eval-iters 0 --eval-interval 1000 "
    "--log-interval 1 --rerun-mode disabled --seed 1234 --split 90,10,0 --num-workers 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 8"
)
HOMES = "--smartmoe --smartmoe-homes shuffle --smartmoe-homes-interval 2 --smartmoe-record-trace {run_dir}/trace.npz"
PARALLEL = (
    "--parallel auto --nproc 2 --expert-model-parallel-size 2 --smartmoe-spare-slots 0 --smartmoe-overlap-degree 1"
)
CHECKPOINTS = "--save {run_dir}/checkpoints --load {run_dir}/checkpoints --save-interval 4"
KEPT = (
    "config.yaml",
    "command.sh",
    "environment.json",
    "plan.json",
    "metrics.jsonl",
    "smartmoe.jsonl",
)


def main() -> int:
    """Run everything in an empty folder, then copy what is kept."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    checkout, output = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = work / "run"
        flags = [*MODEL.split(), *TRAINING.split(), *HOMES.split(), *PARALLEL.split(), *CHECKPOINTS.split()]
        _module(
            checkout, work, "megatron_smartmoe.adapter.launch", "--run-dir", "run", *flags, "--exit-interval", str(STOP)
        )
        _module(checkout, work, "megatron_smartmoe.adapter.launch", "--run-dir", "whole", *flags)
        simulate = "--trace run/trace.npz --ep 2 --spare-slots 1 --homes-interval 2 --save-decisions decisions.jsonl"
        _module(checkout, work, "megatron_smartmoe.cli.main", "simulate", *simulate.split())
        small = "--nproc 2 --device cpu --repeats 3 --tokens 2,32 --sizes 1024,65536,1048576".split()
        _module(checkout, work, "megatron_smartmoe.cli.main", "calibrate", "--output", "cluster.yaml", *small)

        shutil.rmtree(output, ignore_errors=True)
        (output / "run").mkdir(parents=True)
        for name in KEPT:
            shutil.copy(run / name, output / "run")
        shutil.copytree(run / "checkpoints", output / "run" / "checkpoints")
        for path in (work / "cluster.yaml", work / "decisions.jsonl", run / "trace.npz"):
            shutil.copy(path, output)
        lines = [json.loads(line) for line in (work / "whole" / "metrics.jsonl").read_text().splitlines()]
        losses = {line["iteration"]: line["lm loss"] for line in lines if line.get("iteration", 0) > STOP}
        (output / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
        _remove_this_machine(output, work)
    return 0


def _module(checkout: Path, work: Path, module: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=work, env=environment, check=True)


def _remove_this_machine(output: Path, work: Path) -> None:
    """Placeholders for what names the machine, the folder and the state of its checkout.

    Raises:
        SystemExit: a file still holds a path of this machine.
    """
    run = output / "run"
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"host": "HOST", "git": output.name, "git_changes": "", "slurm": {}}
    (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    command = (run / "command.sh").read_text().replace(sys.executable, "PYTHON").replace(str(work), "FOLDER")
    (run / "command.sh").write_text(command)
    for path in (path for path in output.rglob("*") if path.is_file()):
        found = [text for text in (str(work), sys.prefix, str(Path.home()) + "/") if text.encode() in path.read_bytes()]
        if found:
            raise SystemExit(f"{path} still names {found[0]}")


if __name__ == "__main__":
    sys.exit(main())
