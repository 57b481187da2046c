#!/usr/bin/env python3
"""Fit the MoE layer model to measured layer times and predict others.

    python scripts/validation/validate_layer_model.py --trace trace.npz --fit a.csv --predict b.csv --json result.json

The CSV files have a header with at least `gpus,mbs,iter,layer,real_ms`: a layer's forward and backward on `gpus`
GPUs at micro-batch size `mbs`, replaying the trace's record `iter` of `layer`. Rows that the trace has no record of
are left out. Experts are at home in contiguous order; source ranks 0 to gpus - 1 and micro-batch 0 route as recorded,
scaled to mbs x 1024 x 2 assignments per rank (sequences of 1024, top-2). Nothing of the second file is used for the
fit.

Constants that the first file says nothing about (links between nodes, if all its runs were on one) stay at the values
of the cluster file. The result: `mape` (a fraction), `r2` and `rows` of the prediction, and the same of the fit under
`fit`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cost.compute import ExpertShape
from megatron_smartmoe.cost.moe_layer import APART_EXCHANGES, LayerConstants, LayerFlow, constants_of, layer_time
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec, shipped_directory
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace
from scripts.validation import command
from scripts.validation.layer_fit import Measurement, calibrate, residuals

COLUMNS = ("gpus", "mbs", "iter", "layer", "real_ms")
ASSIGNMENTS_PER_SEQUENCE = 1024 * 2  # tokens x top-k
ROWS = "measured layer times"


def main(argv: Sequence[str] | None = None) -> int:
    """Fit one file, predict the other; returns the exit status."""
    return command.run(parse(argv), validate)


def validate(args: argparse.Namespace) -> dict[str, object]:
    """Read, fit, predict, print; returns the result."""
    trace, cluster = load_trace(args.trace), load_cluster_spec(args.cluster)
    fitted_to = measurements(args.fit, trace, cluster.gpus_per_node)
    to_predict = measurements(args.predict, trace, cluster.gpus_per_node)
    fit = calibrate(fitted_to, prior_of(cluster, args.hidden, args.ffn))
    found = residuals(to_predict, fit.constants)
    print(f"fitted    {fit.residuals.rows:5} rows: mape {fit.residuals.mape:.2%}, r2 {fit.residuals.r2:.3f}")
    print(f"predicted {found.rows:5} rows: mape {found.mape:.2%}, r2 {found.r2:.3f}, bias {found.bias:+.2%}")
    print(f"the first predicted row:\n{layer_time(to_predict[0].flow, fit.constants).explain()}")
    return {**asdict(found), "fit": asdict(fit.residuals), "constants": asdict(fit.constants)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of(__doc__, ROWS)
    add, cluster = parser.add_argument, shipped_directory("clusters") / "v100-pcie.yaml"
    add("--trace", type=Path, required=True, metavar="NPZ", help="routing trace that the runs replayed")
    add("--cluster", type=Path, default=cluster, metavar="YAML", help="cluster of the prior (default: %(default)s)")
    add("--hidden", type=int, default=1024, help="hidden size of the prior (default: %(default)s)")
    add("--ffn", type=int, default=2048, help="intermediate size of an expert of the prior (default: %(default)s)")
    return parser.parse_args(argv)


def prior_of(cluster: ClusterSpec, hidden: int, ffn: int) -> LayerConstants:
    """Constants before any measurement: two-matrix experts, GPUs that share their node's network card."""
    expert = ExpertShape(hidden=hidden, ffn=ffn, gated=False)
    return constants_of(cluster, expert, shared_network_card=True, exchanges=APART_EXCHANGES)


def measurements(path: Path, trace: RoutingTrace, gpus_per_node: int) -> list[Measurement]:
    """The file's rows that the trace has a record of."""
    record_of = {int(iteration): at for at, iteration in enumerate(trace.iteration)}
    layer_of = {int(layer): at for at, layer in enumerate(trace.layer)}
    found = []
    for row in command.read_csv(path, COLUMNS, ROWS):
        record, layer = record_of.get(row.whole("iter")), layer_of.get(row.whole("layer"))
        if record is None or layer is None:
            continue
        gpus = row.whole("gpus", least=1)
        if gpus > trace.num_sources or trace.num_experts % gpus:
            rule = f"the trace has {trace.num_sources} source ranks and {trace.num_experts} experts"
            raise ConfigError(f"{row.where}: gpus", gpus, rule, f"Give a trace of {gpus} source ranks.")
        counts_RE = trace.counts[record, layer, :gpus].astype(np.float64)
        counts_RE = counts_RE[:, 0] if trace.has_micro_batches else counts_RE
        total_R = counts_RE.sum(axis=1, keepdims=True)
        if not total_R.all():
            rule = f"layer {row.text('layer')} has a source rank without assignments in iteration {row.text('iter')}"
            raise ConfigError(f"{row.where}: iter", row.text("iter"), rule, "Delete the row.")
        counts_RE *= row.whole("mbs", least=1) * ASSIGNMENTS_PER_SEQUENCE / total_R
        home = Placement.contiguous(num_layers=1, num_experts=trace.num_experts, num_ranks=gpus)
        flow = LayerFlow.equal_split(counts_RE, home.slots_LRS[0], num_nodes=-(-gpus // gpus_per_node))
        found.append(Measurement(flow=flow, time_s=row.number("real_ms") * 1e-3))
    if not found:
        way_out = f"The trace has iterations {trace.iteration[0]} to {trace.iteration[-1]}, layers {trace.layer}."
        raise ConfigError(ROWS, str(path), "has no row whose iter and layer are in the trace", way_out)
    return found


if __name__ == "__main__":
    sys.exit(main())
