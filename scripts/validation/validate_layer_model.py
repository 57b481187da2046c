#!/usr/bin/env python3
"""Fit the MoE layer model to measured layer times and predict others.

    scripts/validation/validate_layer_model.py --trace trace.npz --fit a.csv --predict b.csv --json result.json

The CSV files have a header with at least `gpus,mbs,iter,layer,real_ms`: a layer's forward and backward on `gpus`
GPUs at micro-batch size `mbs`, replaying the trace's record `iter` of `layer`. Rows that the trace has no record of
are left out. Experts are at home in contiguous order; source ranks 0 to gpus - 1 and micro-batch 0 route as recorded,
scaled to mbs x 1024 x 2 assignments per rank (sequences of 1024, top-2). Nothing of the second file is used for the
fit.

Constants that the first file cannot tell (links between nodes, if all its runs were on one) stay at what the cluster
file says. The result: `mape` (a fraction), `r2` and `rows` of the prediction, and the same of the fit under `fit`.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import LayerConstants, LayerFlow, constants_of, layer_time
from megatron_smartmoe.errors import ConfigError, SmartMoEError
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from scripts.validation.layer_fit import Measurement, calibrate, residuals

COLUMNS = ("gpus", "mbs", "iter", "layer", "real_ms")
ASSIGNMENTS_PER_SEQUENCE = 1024 * 2  # tokens x top-k
CLUSTER = Path(__file__).resolve().parents[2] / "configs" / "clusters" / "v100-pcie.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Read, fit, predict, write."""
    args = parse(argv)
    try:
        trace, cluster = load_trace(args.trace), load_cluster_spec(args.cluster)
        fitted_to = measurements(args.fit, trace, cluster.gpus_per_node)
        to_predict = measurements(args.predict, trace, cluster.gpus_per_node)
        fit = calibrate(fitted_to, prior_of(cluster, args.hidden, args.ffn))
    except SmartMoEError as error:
        print(f"validate_layer_model: {error}", file=sys.stderr)
        return 2
    found = residuals(to_predict, fit.constants)
    content = {**asdict(found), "fit": asdict(fit.residuals), "constants": asdict(fit.constants)}
    args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"fitted    {fit.residuals.rows:5} rows: mape {fit.residuals.mape:.2%}, r2 {fit.residuals.r2:.3f}")
    print(f"predicted {found.rows:5} rows: mape {found.mape:.2%}, r2 {found.r2:.3f}, bias {found.bias:+.2%}")
    print(f"the first predicted row:\n{layer_time(to_predict[0].flow, fit.constants).explain()}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="routing trace (.npz) that the runs replayed")
    parser.add_argument("--fit", type=Path, required=True, help="CSV of measured layer times to fit")
    parser.add_argument("--predict", type=Path, required=True, help="CSV of measured layer times to predict")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--cluster", type=Path, default=CLUSTER, help="cluster that it starts from (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size that it starts from (%(default)s)")
    parser.add_argument("--ffn", type=int, default=2048, help="expert's inner size that it starts from (%(default)s)")
    return parser.parse_args(argv)


def prior_of(cluster: ClusterSpec, hidden: int, ffn: int) -> LayerConstants:
    """Constants before any measurement: two-matrix experts, GPUs that share their node's network card."""
    expert = ExpertShape(hidden=hidden, ffn=ffn, gated=False)
    return constants_of(cluster, expert, shared_network_card=True)


def measurements(path: Path, trace: RoutingTrace, gpus_per_node: int) -> list[Measurement]:
    """The file's rows that the trace has a record of."""
    record_of = {int(iteration): at for at, iteration in enumerate(trace.iteration)}
    layer_of = {int(layer): at for at, layer in enumerate(trace.layer)}
    found = []
    for row in read_rows(path):
        record, layer = record_of.get(int(row["iter"])), layer_of.get(int(row["layer"]))
        if record is None or layer is None:
            continue
        gpus = int(row["gpus"])
        if gpus > trace.num_sources or trace.num_experts % gpus:
            rule = f"the trace has {trace.num_sources} source ranks and {trace.num_experts} experts"
            raise ConfigError(f"{path.name}: gpus", gpus, rule, "Give a trace that was recorded on as many ranks.")
        counts_RE = trace.counts[record, layer, :gpus].astype(np.float64)
        counts_RE = counts_RE[:, 0] if trace.has_micro_batches else counts_RE
        counts_RE *= int(row["mbs"]) * ASSIGNMENTS_PER_SEQUENCE / counts_RE.sum(axis=1, keepdims=True)
        home = Placement.contiguous(num_layers=1, num_experts=trace.num_experts, num_ranks=gpus)
        flow = LayerFlow.equal_split(counts_RE, home.slots_LRS[0], num_nodes=-(-gpus // gpus_per_node))
        found.append(Measurement(flow=flow, time_s=float(row["real_ms"]) * 1e-3))
    if not found:
        way_out = f"The trace has iterations {trace.iteration[0]} to {trace.iteration[-1]}, layers {trace.layer}."
        raise ConfigError("layer times", str(path), "has no row whose iter and layer are in the trace", way_out)
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """The CSV file's rows, its columns checked."""
    if not path.is_file():
        raise ConfigError("layer times", str(path), "does not exist", "Give a CSV file.")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            way_out = f"It needs {', '.join(COLUMNS)}."
            raise ConfigError("layer times", str(path), f"lacks column {', '.join(missing)}", way_out)
        return list(reader)


if __name__ == "__main__":
    sys.exit(main())
