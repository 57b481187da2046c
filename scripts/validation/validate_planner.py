#!/usr/bin/env python3
"""Fit the planner's step model to measured training runs and predict others.

    python scripts/validation/validate_planner.py --fit a.csv --predict b.csv --json result.json

The CSV files have a header with at least cluster, gpus, system, layers, hidden, heads, seq, topk, experts, gate,
capacity, tp, pp, dp, ep, edp, gbs, mbs, shadow, median_ms_skip10: a training run each. Rows that are not GPT are left
out and listed. Nothing of the second file is used for the fit. `--cross-validate` also leaves out each capacity and
each system of the first file in turn and predicts it from the rest.

The result: `median_ape` (a fraction) and `rows` of the prediction, and for every setting of runs that compete the
fastest measured, the one predicted first, and by how much the latter is slower (`regret`).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec, shipped_directory
from scripts.validation import command
from scripts.validation.fit import Fitted, fit, fit_settings
from scripts.validation.measured import COLUMNS, MeasuredRun, run_of

ROWS = "measured training runs"
CLUSTERS = {"inky": "a100-sxm4-80gb.yaml", "nico": "v100-pcie.yaml", "": "a100-sxm4-80gb.yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Fit one file, predict the other; returns the exit status."""
    return command.run(parse(argv), validate)


def validate(args: argparse.Namespace) -> dict[str, object]:
    """Read, fit, predict, print; returns the result."""
    clusters = clusters_of(args.cluster)
    fitted_to, left_out = read_runs(args.fit)
    to_predict, more = read_runs(args.predict)
    model = fit(fitted_to, clusters)
    content = result_of(model, to_predict)
    content |= {"fit": summary(model, fitted_to), "constants": dict(model.values), "left_out": left_out + more}
    content["deviations"] = {f"{cluster} {name}": v for (cluster, name), v in model.deviations.items()}
    if args.cross_validate:
        content["cross_validation"] = cross_validate(fitted_to, clusters)
    show(model, to_predict, content)
    return content


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of(__doc__, ROWS)
    text = "cluster file for the runs of cluster NAME; may be repeated"
    parser.add_argument("--cluster", action="append", default=[], metavar="NAME=YAML", help=text)
    text = "also leave out each capacity and each system of the fitted runs in turn and predict it"
    parser.add_argument("--cross-validate", action="store_true", help=text)
    return parser.parse_args(argv)


def clusters_of(given: Sequence[str]) -> dict[str, ClusterSpec]:
    """Machines by the clusters' names in the CSV; the empty name is for all others."""
    paths = {name: shipped_directory("clusters") / file for name, file in CLUSTERS.items()}
    for text in given:
        name, found, path = text.partition("=")
        if not found:
            raise ConfigError("--cluster", text, "must be NAME=YAML", "For example: inky=configs/clusters/mine.yaml.")
        paths[name] = Path(path)
    return {name: load_cluster_spec(path) for name, path in paths.items()}


def read_runs(path: Path) -> tuple[list[MeasuredRun], list[str]]:
    """The file's GPT runs, and what was left out and why."""
    runs, left_out = [], []
    for row in command.read_csv(path, COLUMNS, ROWS):
        try:
            runs.append(run_of(row))
        except ConfigError as error:
            left_out.append(str(error))
    if not runs:
        raise ConfigError(ROWS, str(path), "has no GPT run", "Give rows with a number under hidden and under seq.")
    return runs, left_out


def errors_of(model: Fitted, runs: Sequence[MeasuredRun]) -> list[float]:
    """Predicted over measured, less one."""
    return [model.predict(run).total_s / run.time_s - 1 for run in runs]


def summary(model: Fitted, runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """Median and worst error of the runs."""
    errors = np.abs(errors_of(model, runs))
    return {"median_ape": float(np.median(errors)), "worst_ape": float(errors.max()), "rows": len(runs)}


def result_of(model: Fitted, runs: Sequence[MeasuredRun]) -> dict[str, object]:
    """The result file's part about the prediction."""
    predicted_s = [model.predict(run).total_s for run in runs]
    settings = [asdict(setting) for setting in fit_settings(runs, predicted_s)]
    return {**summary(model, runs), "settings": settings}


def cross_validate(runs: Sequence[MeasuredRun], clusters: dict[str, ClusterSpec]) -> dict[str, object]:
    """Median error of each capacity and each system when its rows were not fitted."""
    fields: dict[str, Callable[[MeasuredRun], object]] = {
        "capacity": lambda run: run.capacity,
        "system": lambda run: run.system,
    }
    content: dict[str, object] = {}
    for name, of in fields.items():
        errors: dict[str, list[float]] = {}
        for value in {of(run): None for run in runs}:
            model = fit([run for run in runs if of(run) != value], clusters)
            errors[str(value)] = errors_of(model, [run for run in runs if of(run) == value])
        everything = np.abs(np.concatenate(list(errors.values())))
        content[name] = {"median_ape": float(np.median(everything)), "errors": errors}
    return content


def show(model: Fitted, runs: Sequence[MeasuredRun], content: dict[str, object]) -> None:
    """Print a line a run and a line a setting."""
    for run in runs:
        predicted_s = model.predict(run).total_s
        error = predicted_s / run.time_s - 1
        print(f"{run.key:46} {run.label:40} {run.time_s:7.3f} s  {predicted_s:7.3f} s {error:+7.1%}")
    for setting in fit_settings(runs, [model.predict(run).total_s for run in runs]):
        print(f"{setting.key:46} first: {setting.first_predicted:40} regret {setting.regret:.1%}")
    print(f"fitted {content['fit']}\npredicted {content['rows']} rows, median error {content['median_ape']:.2%}")


if __name__ == "__main__":
    sys.exit(main())
