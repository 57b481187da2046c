"""What a run trained and how it was launched, from the arguments in its directory."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.planner.arguments import model_from_arguments, parallel_from_arguments
from megatron_smartmoe.report.chosen import Chosen
from megatron_smartmoe.report.run_record import RunRecord
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.devices import fitting_cluster
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import FLAT, ParallelSpec


@dataclass(frozen=True, kw_only=True)
class RunLaunch:
    """A run as the planner describes it.

    Attributes:
        model: what it trained; its vocabulary is 0 where no argument has it.
        spec: its launch.
        cluster: the machine that it ran on, with the nodes of the run, as few as hold its ranks where it wrote none.
        replicas_margin: its --smartmoe-replicas-margin.
        homes: when its homes moved.
        notes: what was `auto`, and is taken to be in every setting.
    """

    model: ModelSpec
    spec: ParallelSpec
    cluster: ClusterSpec
    replicas_margin: float
    homes: PolicyOptions
    notes: tuple[str, ...] = ()


# Flags that may be `auto`, and what they are taken to have been where the run did not write it: as a plan has them
_ASSUMED = {"dispatch": FLAT, "overlap_degree": 1}
_BEFORE_THERE_WAS_A_FLAG = {"smartmoe_dispatch": FLAT}  # what earlier releases did, whose runs are read


def run_launch(record: RunRecord, cluster: Path | None = None) -> RunLaunch:
    """The model and the launch of a run.

    Args:
        record: of the run directory.
        cluster: cluster file of the machine that it ran on; None for the one of its flags, else the shipped one for
            CPU ranks.

    Raises:
        ConfigError: the run has no arguments, trained no experts, or ran on a machine that nobody has named.
    """
    values = _values(record.arguments)
    if values:
        values = _BEFORE_THERE_WAS_A_FLAG | values
    if not values:
        raise ConfigError("RUN", record.name, "has no arguments.txt", "Give a run that has begun to train.")
    if not values.get("num_experts"):
        raise ConfigError("RUN", record.name, "trained a model without experts", "Give a run with --num-experts.")
    if values.get("smartmoe_pool"):
        rule = "changes settings while training: the run's steps are not of one setting"
        raise ConfigError("--smartmoe-pool", values["smartmoe_pool"], rule, "Give a run without it.")
    chosen = record.chosen if values.get("smartmoe") else None  # else it is of an earlier start of the run
    try:
        model = model_from_arguments(values, record.name)
        if not model.vocab and values.get("padded_vocab_size"):
            model = replace(model, vocab=values["padded_vocab_size"])
        spec = _as_chosen(parallel_from_arguments(values, model, values["world_size"]), chosen)
    except KeyError as missing:
        rule = f"has no {missing.args[0]} in its arguments.txt, as another Megatron or another release wrote it"
        raise ConfigError("RUN", record.name, rule, "Give a run of this release.") from None
    nodes = None if chosen is None else -(-spec.gpus // chosen.ranks_per_node)
    return RunLaunch(
        model=model,
        spec=spec,
        cluster=on_ranks(_cluster(values, cluster), spec.gpus, nodes),
        replicas_margin=float(values.get("smartmoe_replicas_margin", 1.0)),
        homes=PolicyOptions(
            horizon_iterations=int(values.get("smartmoe_homes_horizon", PolicyOptions.horizon_iterations)),
            margin=float(values.get("smartmoe_homes_margin", PolicyOptions.margin)),
            cooldown_iterations=int(values.get("smartmoe_homes_interval", PolicyOptions.cooldown_iterations)),
        ),
        notes=tuple(_auto_notes(values, chosen)),
    )


def _as_chosen(spec: ParallelSpec, chosen: Chosen | None) -> ParallelSpec:
    """The launch, with what its ranks chose when they started."""
    if chosen is None:
        return spec
    return replace(spec, dispatch=chosen.dispatch, overlap_degree=chosen.overlap_degree)


def _auto_notes(values: Mapping[str, Any], chosen: Chosen | None) -> Iterator[str]:
    for name, assumed in _ASSUMED.items():
        if values.get(f"smartmoe_{name}") == "auto":
            flag = f"--smartmoe-{name.replace('_', '-')} auto"
            if chosen is None:
                yield f"the run did not write what {flag} was: taken to be {assumed}"
            else:
                yield f"{flag} was {getattr(chosen, name)} in the run, and is taken to be so in every setting"


def on_ranks(cluster: ClusterSpec, ranks: int, nodes: int | None = None) -> ClusterSpec:
    """The cluster with as many nodes as a job has, and as many ranks on each.

    Args:
        cluster: of the file.
        ranks: of the job.
        nodes: of the job; None for as few as hold them.
    """
    nodes = nodes or -(-ranks // cluster.gpus_per_node)
    return replace(cluster, nodes=nodes, gpus_per_node=-(-ranks // nodes))


def _values(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Megatron's arguments as values; a text that is no literal of Python is a text."""
    return {name: _value(text) for name, text in arguments.items()}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _cluster(values: Mapping[str, Any], given: Path | None) -> ClusterSpec:
    if given is not None:
        return load_cluster_spec(given)
    if (named := values.get("smartmoe_cluster")) is not None:
        return load_cluster_spec(Path(str(named)))
    on_cpu = fitting_cluster(None)
    if values.get("distributed_backend") == "gloo" and on_cpu is not None:
        return on_cpu
    way_out = "Pass --run-cluster FILE; smartmoe calibrate measures a machine, h100-sxm and others are shipped."
    raise ConfigError("--run-cluster", None, "is required: the run does not say on which machine it ran", way_out)
