#!/usr/bin/env python3
"""Fit the planner's step model to measured training runs and predict others.

    python scripts/validation/validate_planner.py --fit a.csv --predict b.csv --json result.json

The CSV files have a header with at least cluster, gpus, system, layers, hidden, heads, seq, topk, experts, gate,
capacity, tp, pp, ep, gbs, mbs, median_ms_skip10: a training run each. A row that cannot be read (no median, a cell
that is empty or wrong, a launch that cannot be) is left out, with one line that says why, and counted. Nothing of the
second file is used for the fit. GPT runs and image runs are fitted apart: they differ in code, gates and data.
`--cross-validate` also holds back parts of the first file: each capacity, system and strategy (PP x EP) in turn, and
the runs on more GPUs than the smallest job's.

The result: `median_ape` (a fraction) and `rows` of the prediction, and for every setting of runs that compete the
fastest measured, the one predicted first, and by how much the latter is slower (`regret`). They are those of the GPT
runs; image runs have the same under `images`, or take their place where the file has no others.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, when the script is run by its path

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import load_cluster_spec, shipped_directory
from scripts.validation import command
from scripts.validation.fit import Machines, fit
from scripts.validation.measured import COLUMNS, MeasuredRun, run_of
from scripts.validation.splits import HEADER, Answers, held_out

ROWS = "measured training runs"
CLUSTERS = {"inky": "a100-sxm4-80gb.yaml", "nico": "v100-pcie.yaml", "": "a100-sxm4-80gb.yaml"}
NETWORK_UNKNOWN = ("inky", "")  # the file has the cards of another machine with the same GPUs
KINDS = {"GPT": False, "images": True}  # name -> whether it is an image model


def main(argv: Sequence[str] | None = None) -> int:
    """Fit one file, predict the other; returns the exit status."""
    return command.run(parse(argv), validate)


def validate(args: argparse.Namespace) -> dict[str, object]:
    """Read, fit, predict, print; returns the result."""
    clusters = clusters_of(args.cluster)
    fitted_to, left_out = read_runs(args.fit)
    to_predict, more = read_runs(args.predict)
    for line in left_out + more:
        print(f"left out: {line}")
    for name in sorted({run.cluster for run in fitted_to + to_predict} - set(clusters)):
        taken_for = clusters[""].spec.name
        print(f"cluster {name}: no file for it, so it is taken for {taken_for}; --cluster {name}=YAML gives one")
    lines, content = [], dict[str, object]()
    for kind, vision in KINDS.items():
        asked = [run for run in to_predict if run.vision == vision]
        if asked:
            seen = [run for run in fitted_to if run.vision == vision]
            found, summaries = result_of(kind, seen, asked, clusters, cross=args.cross_validate)
            content = {**content, kind: found} if content else found
            lines += summaries
    print("\n".join([HEADER, *lines]))
    print(f"left out: {len(left_out)} rows of --fit, {len(more)} of --predict")
    return {**content, "left_out": left_out + more}


def result_of(
    kind: str,
    seen: Sequence[MeasuredRun],
    asked: Sequence[MeasuredRun],
    clusters: Mapping[str, Machines],
    *,
    cross: bool,
) -> tuple[dict[str, object], list[str]]:
    """One kind of model: (its part of the result file, its lines of the table); prints its runs."""
    if not seen:
        print(f"{kind}: --fit has no such run, so the priors alone predict")
    model = fit(seen, clusters)
    predicted = Answers.of(model, asked)
    show(predicted)
    content: dict[str, object] = {**predicted.summary(), "settings": [asdict(one) for one in predicted.settings]}
    content |= {
        "constants": dict(model.values),
        "deviations": {" ".join(key): v for key, v in model.deviations.items()},
    }
    lines = []
    if seen:
        fitted = Answers.of(model, seen)
        content["fit"] = fitted.summary()
        lines.append(fitted.line(f"{kind}: fitted"))
    lines.append(predicted.line(f"{kind}: predicted"))
    if cross and seen:
        splits = dict(held_out(seen, clusters))
        lines += [answers.line(f"{kind}: {what}") for what, answers in splits.items()]
        content["cross_validation"] = {
            what: {**answers.summary(), "errors": answers.errors} for what, answers in splits.items()
        }
    return content, lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser_of(__doc__, ROWS)
    text = "cluster file, with its network, for runs of cluster NAME; =YAML alone: for any other; may be repeated"
    parser.add_argument("--cluster", action="append", default=[], metavar="NAME=YAML", help=text)
    text = "also hold back parts of the fitted runs in turn and predict them"
    parser.add_argument("--cross-validate", action="store_true", help=text)
    return parser.parse_args(argv)


def clusters_of(given: Sequence[str]) -> dict[str, Machines]:
    """Machines by the clusters' names in the CSV; the empty name is for all others. Given files know their network."""
    shipped = {name: load_cluster_spec(shipped_directory("clusters") / file) for name, file in CLUSTERS.items()}
    machines = {name: Machines(spec, knows_cards=name not in NETWORK_UNKNOWN) for name, spec in shipped.items()}
    for text in given:
        name, found, path = text.partition("=")
        if not found:
            raise ConfigError("--cluster", text, "must be NAME=YAML", "For example: inky=configs/clusters/mine.yaml.")
        machines[name] = Machines(load_cluster_spec(Path(path)))
    return machines


def read_runs(path: Path) -> tuple[list[MeasuredRun], list[str]]:
    """The file's runs, and what was left out and why.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or has no run.
    """
    runs, left_out = [], []
    for row in command.read_csv(path, COLUMNS, ROWS):
        try:
            runs.append(run_of(row))
        except ConfigError as error:
            left_out.append(str(error))
    if not runs:
        reason = f"has no run that can be read: {left_out[0]}" if left_out else "has no row"
        raise ConfigError(ROWS, str(path), reason, "Give a row for each run, with its median step.")
    return runs, left_out


def show(predicted: Answers) -> None:
    """Print a line a run and a line a setting."""
    for run, predicted_s, error in zip(predicted.runs, predicted.predicted_s, predicted.errors, strict=True):
        print(f"{run.key:46} {run.label:40} {run.time_s:7.3f} s  {predicted_s:7.3f} s {error:+7.1%}")
    for setting in predicted.settings:
        print(f"{setting.key:46} first: {setting.first_predicted:40} regret {setting.regret:.1%}")


if __name__ == "__main__":
    sys.exit(main())
