"""What a run directory holds, read once: losses, step times, balance, decisions, and where they were made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smartmoe.errors import ConfigError, PlanError
from megatron_smartmoe.placement.plan_homes import drop_misplaced
from megatron_smartmoe.report.chosen import Chosen, read_chosen
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.readers.files import Named, read_text
from megatron_smartmoe.spec.readers.json_text import CUT, read_json_lines, read_object
from megatron_smartmoe.spec.trace import RoutingTrace, load_trace

WAY_OUT = "Give the run directory that a training has written."
_BALANCE = re.compile(r"balance-stage(\d+)-group(\d+)\.jsonl")
_REPLICAS = re.compile(r"replicas-stage(\d+)-group0\.jsonl")
_OF_A_DECISION = {"iteration", "kind", "group", "inputs", "before", "after", "taken", "why", "changes"}
_ARGUMENT = re.compile(r"^  (\w+) \.\.\.+ (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Values by iteration."""

    iteration: FloatArray
    value: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """Max / mean tokens per rank of a layer, by logged iteration.

    Attributes:
        layer: number of the layer, from 0.
        iteration: `[N]`.
        homes: if homes alone computed the tokens, the worst micro-batch and group, `[N]`.
        split: with replicas, likewise.
        replicas: filled, mean over micro-batches and groups; None where they were not counted.
    """

    layer: int
    iteration: FloatArray
    homes: FloatArray
    split: FloatArray
    replicas: FloatArray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """A run.

    Attributes:
        name: of the directory.
        metrics: losses and step times: `lm loss`, `validation loss`, `seconds_per_step`, `tokens_per_second`.
        balance: by layer; empty where replicas were off.
        decisions: homes, reviews of them and switches of the pool, in their order.
        num_replica_plans: changes of the replicas.
        placement: where experts are after the last decision; None where the run had no expert parallelism.
        trace: the counts, where they were recorded.
        summary: of the end; empty while training.
        environment: host, versions, revision.
        arguments: Megatron's, as texts.
        config: the configuration, as text.
        plan: the chosen launch, with --parallel auto.
        notes: what could not be read.
        chosen: what `auto` in its arguments was, where the run wrote it.
        compared: what `homes` and `split` of the balance are, in words.
    """

    name: str
    metrics: dict[str, Series]
    balance: list[Balance]
    decisions: list[dict[str, Any]]
    num_replica_plans: int
    placement: Placement | None
    trace: RoutingTrace | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    arguments: dict[str, str]
    config: str
    plan: dict[str, Any]
    notes: list[str]
    chosen: Chosen | None = None
    compared: tuple[str, str] = ("homes alone", "with replicas")

    @property
    def is_finished(self) -> bool:
        """Whether the training has come to its end."""
        return bool(self.summary)


def read_run(directory: Path, trace: Path | None = None) -> RunRecord:
    """Read a run directory, of a run that has ended or one that still trains.

    Args:
        directory: the run directory.
        trace: a routing trace of the run; None looks for the one that it recorded.

    Raises:
        ConfigError: it is no run directory, or a file in it is damaged.
    """
    if not directory.is_dir():
        raise ConfigError("RUN", str(directory), "is not a directory", WAY_OUT)
    if not (directory / "metrics.jsonl").is_file():
        raise ConfigError("RUN", str(directory), "has no metrics.jsonl: it is no run directory", WAY_OUT)
    notes: list[str] = []
    arguments = _arguments(directory)
    decisions = list(read_decisions(directory / "smartmoe.jsonl"))
    replicas = [decision for path in replica_files(directory) for decision in read_decisions(path)]
    balance = _balance(directory)
    return RunRecord(
        name=directory.resolve().name,
        metrics=_metrics(directory),
        balance=balance,
        decisions=decisions,
        num_replica_plans=sum(decision["kind"] == "replicas" for decision in replicas),
        placement=_placement(decisions, replicas, balance, arguments),
        trace=_trace(trace, arguments, notes),
        summary=_object(directory / "summary.json"),
        environment=_object(directory / "environment.json"),
        arguments=arguments,
        config=_text(directory / "config.yaml"),
        plan=_object(directory / "plan.json"),
        notes=notes,
        chosen=read_chosen(directory),
    )


def _named(path: Path) -> Named:
    return Named(path=path, field="RUN", way_out="Take it away, or restore it.")


def _text(path: Path) -> str:
    return read_text(_named(path)) if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    return read_object(_named(path)) if path.is_file() else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line, without a last one that is being written; none if there is no file.

    Raises:
        ConfigError: it is damaged; names the line.
    """
    if path.is_file():
        for number, value, _ in read_json_lines(_named(path)):
            if value is CUT:
                continue
            if not isinstance(value, dict):
                raise ConfigError(_named(path).at(number), value, "must be a JSON object", "Take the line away.")
            yield value


def read_decisions(path: Path) -> Iterator[dict[str, Any]]:
    """The decisions in a file.

    Raises:
        ConfigError: see `read_lines`; or a line lacks what every decision has.
    """
    for number, line in enumerate(read_lines(path), 1):
        if missing := _OF_A_DECISION - line.keys():
            rule = f"is not a decision: it lacks {min(missing)}"
            raise ConfigError(f"{path}: line {number}", str(line)[:100], rule, "Take the line away.")
        yield line


def replica_files(directory: Path) -> list[Path]:
    """The logs of replicas: of one group of each pipeline stage, which stands for all; every group plans its own."""
    return sorted(path for path in directory.iterdir() if _REPLICAS.fullmatch(path.name))


def _metrics(directory: Path) -> dict[str, Series]:
    found: dict[str, dict[int, float]] = {}
    for line in read_lines(directory / "metrics.jsonl"):
        values = {name: value for name, value in line.items() if isinstance(value, int | float)}
        for name, value in line.get("validation", {}).items():
            values[f"validation {name.removeprefix('lm ')}"] = value
        iteration = int(values.pop("iteration", 0))
        for name, value in values.items():  # a resumed run logs an iteration again: the later value is the run's
            found.setdefault(name, {})[iteration] = float(value)
    return {name: _series(by_iteration) for name, by_iteration in found.items()}


def _series(by_iteration: dict[int, float]) -> Series:
    iterations = sorted(by_iteration)
    return Series(
        iteration=np.array(iterations, dtype=np.float64),
        value=np.array([by_iteration[iteration] for iteration in iterations]),
    )


def _balance(directory: Path) -> list[Balance]:
    """All groups' files together: the worst of them counts, since all ranks wait for it."""
    found: dict[int, dict[int, list[tuple[float, float, float]]]] = {}
    for path in sorted(directory.iterdir()):
        if not _BALANCE.fullmatch(path.name):
            continue
        for line in read_lines(path):
            for at, layer in enumerate(line["layers"]):
                homes, split, copies = (line[name][at] for name in ("homes", "split", "copies"))
                if homes:
                    row = (max(homes), max(split), float(np.mean(copies)))
                    found.setdefault(int(layer), {}).setdefault(int(line["iteration"]), []).append(row)
    balance = []
    for layer in sorted(found):
        iterations = sorted(found[layer])
        rows_NG = [np.array(found[layer][iteration]) for iteration in iterations]
        balance.append(
            Balance(
                layer=layer,
                iteration=np.array(iterations, dtype=np.float64),
                homes=np.array([rows[:, 0].max() for rows in rows_NG]),
                split=np.array([rows[:, 1].max() for rows in rows_NG]),
                replicas=np.array([rows[:, 2].mean() for rows in rows_NG]),
            )
        )
    return balance


def _arguments(directory: Path) -> dict[str, str]:
    return {name: value.strip() for name, value in _ARGUMENT.findall(_text(directory / "arguments.txt"))}


def whole(arguments: dict[str, str], name: str) -> int | None:
    """An argument that is a whole number; None if it is not, or not there."""
    text = arguments.get(name, "")
    return int(text) if text.isdecimal() else None


def with_homes(placement: Placement, changes: Sequence[Sequence[int]]) -> Placement:
    """The placement with the homes among these changes; those of spare slots are the replicas' planner's to make."""
    slots_LRS = placement.slots_LRS.copy()
    for layer, rank, slot, _, after in changes:
        if slot < placement.home_slots:
            slots_LRS[layer, rank, slot] = after
    return Placement(slots_LRS=slots_LRS, num_experts=placement.num_experts)


def is_move(decision: dict[str, Any]) -> bool:
    """Whether a decision has moved homes, or moved them back."""
    return bool(decision["taken"]) and decision["kind"] in ("homes", "review")


def _placement(
    decisions: Sequence[dict[str, Any]],
    replicas: Sequence[dict[str, Any]],
    balance: Sequence[Balance],
    arguments: dict[str, str],
) -> Placement | None:
    """The first placement with every change that was taken; replicas as they were planned last."""
    experts, ranks = (whole(arguments, name) for name in ("num_experts", "expert_model_parallel_size"))
    layers = 1 + max(
        [change[0] for decision in decisions for change in decision.get("changes", ())]
        + [one.layer for one in balance],
        default=-1,
    )
    if experts is None or ranks is None or ranks < 2 or layers < 1:
        return None
    spare = whole(arguments, "smartmoe_spare_slots") or 0
    placement = Placement.contiguous(num_layers=layers, num_experts=experts, num_ranks=ranks, spare_slots=spare)
    # Replicas of an iteration are planned before its step, homes move after it; a move drops the replicas that it puts
    # on the rank of their home, without a line of its own.
    made = [*((one["iteration"], 0, one) for one in replicas), *((one["iteration"], 1, one) for one in decisions)]
    try:
        slots_LRS = placement.slots_LRS.copy()
        for _, _, decision in sorted(made, key=lambda one: one[:2]):
            moves = is_move(decision)
            for layer, rank, slot, _, after in decision["changes"] if decision["taken"] else ():
                if (slot < placement.home_slots) == moves:
                    slots_LRS[layer, rank, slot] = after
            for slots_RS in slots_LRS if moves else ():
                drop_misplaced(slots_RS, placement.home_slots, np.zeros(ranks, dtype=np.int64))
        return Placement(slots_LRS=slots_LRS, num_experts=experts)
    except PlanError:
        return None  # the run began from a placement that its checkpoint had


def _trace(given: Path | None, arguments: dict[str, str], notes: list[str]) -> RoutingTrace | None:
    if given is not None:
        return load_trace(given)
    recorded = arguments.get("smartmoe_record_trace", "None")
    if recorded == "None":
        return None
    if not Path(recorded).is_file():
        notes.append(f"the recorded trace is not at {recorded}; --trace names it")
        return None
    return load_trace(Path(recorded))
