"""Every gate on the quickstart's text, beside Megatron's top-k: the table of docs/gates.md.

    .venv/bin/python -m scripts.validation.gates --data-prefix data/python-stdlib/corpus --json g.json
    .venv/bin/python -m scripts.validation.gates --data-prefix data/python-stdlib/corpus --json g.json --gates base

One rank trains a small model with each gate; seeds, data and learning rate are the same. A file that is there is added
to, so that gates can be trained one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smartmoe.adapter.gates.table import GATES, TOP_K
from megatron_smartmoe.adapter.launch.flags import merge
from megatron_smartmoe.spec.run import load_run_spec
from megatron_smartmoe.spec.trace import load_trace

_SMALLER = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --moe-ffn-hidden-size 128 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 4 --expert-model-parallel-size 1 "
    "--pipeline-model-parallel-size 1 --eval-iters 20 --log-interval 1 "
    "--no-smartmoe-homes-interval --no-save --no-load --no-save-interval --no-tensorboard-dir "
    "--no-dist-ckpt-optim-fully-reshardable --smartmoe-rehearsal off --smartmoe-device cpu --smartmoe-watchdog off"
).split()
_LAST = 50  # iterations whose load is averaged


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-prefix", type=Path, required=True, metavar="PREFIX", help="the quickstart's dataset")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the results are written")
    parser.add_argument("--gates", nargs="+", default=[TOP_K, *GATES], choices=[TOP_K, *GATES], help="default: all")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="default: 300")
    args = parser.parse_args(argv)
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    for gate in args.gates:
        results[gate] = train(gate, args.data_prefix, args.steps)
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"{gate}: {results[gate]}", flush=True)
    print(table(results))
    return 0


def train(gate: str, prefix: Path, steps: int) -> dict[str, Any]:
    """The results of one gate."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        flags = [*_flags(gate, prefix, steps), "--smartmoe-run-dir", folder, "--smartmoe-record-trace", str(trace)]
        command = [sys.executable, "-m", "megatron_smartmoe.adapter.pretrain", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{gate}: the training ended with exit status {done.returncode}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        counts = load_trace(trace).counts
    counts_NLE = counts.reshape(*counts.shape[:2], -1, counts.shape[-1]).sum(axis=2)
    return _result(lines, counts_NLE[-_LAST:].astype(float), _choices(flags))


def _flags(gate: str, prefix: Path, steps: int) -> list[str]:
    """The quickstart's flags for a model of one rank, with this gate."""
    spec = load_run_spec(Path("quickstart"))
    data = ["--data-path", str(prefix), "--tokenizer-type", "SentencePieceTokenizer"]
    data += ["--tokenizer-model", f"{prefix}.tokenizer.model"]
    layer = ["--smartmoe-homes", "off"] if gate in GATES and GATES[gate].needs_layer else ["--no-smartmoe"]
    length = ["--train-iters", str(steps), "--eval-interval", str(steps)]
    return merge(spec.flags, [*_SMALLER, *layer, *data, *length, "--smartmoe-gate", gate], known=())


def _choices(flags: Sequence[str]) -> int:
    """Choices of a micro-batch, dropped ones included."""
    from megatron_smartmoe.adapter.flags.parser import parse
    from megatron_smartmoe.adapter.pretrain import with_defaults

    args = parse(with_defaults(flags, cpu=True, say=False))
    return int(args.micro_batch_size * args.seq_length * args.moe_router_topk)


def _result(lines: Sequence[Mapping[str, Any]], counts_NLE: np.ndarray, choices: int) -> dict[str, Any]:
    losses = [line["lm loss"] for line in lines if "lm loss" in line]
    validation = next(line["validation"] for line in lines if "validation" in line)
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    loads_LE = counts_NLE.sum(axis=0)
    return {
        "training_loss": round(statistics.fmean(losses[-20:]), 4),
        "validation_loss": round(validation["lm loss"], 4),
        "load_cv": round(float((loads_LE.std(axis=1) / loads_LE.mean(axis=1)).mean()), 3),
        "dropped_percent": round(100 * (1 - float(counts_NLE.sum(axis=2).mean()) / choices), 2),
        "step_ms": round(1000 * statistics.median(seconds), 1),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| gate | validation loss | training loss | load CV | dropped | step |",
        "|---|---|---|---|---|---|",
    ]
    for gate in (name for name in (TOP_K, *GATES) if name in results):
        result = results[gate]
        losses = f"{result['validation_loss']:.4f} | {result['training_loss']:.4f}"
        rest = f"{result['load_cv']:.3f} | {result['dropped_percent']:.2f}% | {result['step_ms']:.0f} ms"
        lines.append(f"| `{gate}` | {losses} | {rest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
