"""What a run records when it starts, so that its decisions can be made again: settings, prices, and the loops' state.

One file for each start of a run, `decisions/start-000020.json` in its directory for one that resumes after iteration
20, and beside it `.npz` files with what the loops had from the checkpoint. Together with the routing trace and the
measured step times in `pool.jsonl` that is all that decisions depend on. Prices are those of the time: a cluster file
may be edited, or measured anew, after the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_smartmoe.cost.replicas import TransferPrice
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.placement.layer_cost import LayerPricing
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.controller import ControllerOptions
from megatron_smartmoe.runtime.pool.prediction import PoolPrices
from megatron_smartmoe.runtime.pool.switchboard import SwitchboardOptions
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object
from megatron_smartmoe.spec.readers.numpy_files import read_npz
from megatron_smartmoe.spec.readers.values import build

VERSION = 1
FOLDER = "decisions"  # in the run directory
HOMES_LOG, POOL_LOG = "smartmoe.jsonl", "pool.jsonl"
REPLICAS_LOG = "replicas-stage{stage}-group{group}.jsonl"
WAY_OUT = "Decisions can be replayed of a run with --smartmoe-run-dir and --smartmoe-record-trace FILE."


@dataclass(frozen=True, kw_only=True)
class HomesStart:
    """The homes loop.

    Attributes:
        options: when it decides.
        online: options of its planner.
        mode: how replicas are planned, which decides what a layer costs.
        pricing: price of a layer by mode.
    """

    options: ControllerOptions
    online: OnlineOptions
    mode: str
    pricing: Mapping[str, LayerPricing]


@dataclass(frozen=True, kw_only=True)
class ReplicasStart:
    """The replicas loop.

    Attributes:
        mode: how replicas are planned at first.
        used_slots: spare slots of a rank that are used at first.
        online: options of the planners.
        exact_price: of replicas that serve one micro-batch, in tokens of the busiest rank.
        scope_nodes: nodes that a replica must not leave its home's of; 1 lets it go anywhere.
        num_nodes: nodes that the group lies on.
    """

    mode: str
    used_slots: int
    online: OnlineOptions
    exact_price: TransferPrice
    scope_nodes: int
    num_nodes: int


@dataclass(frozen=True, kw_only=True)
class PoolStart:
    """The pool.

    Attributes:
        now: setting in force at first.
        settings: all settings, in the order in which they are predicted.
        options: when it switches.
        prices: what a setting's seconds are predicted from.
        sample: rows of the layers whose load it samples.
        iterations: iterations whose load it keeps.
        micro_batches: micro-batches of the latest one that it keeps.
    """

    now: PoolSetting
    settings: tuple[PoolSetting, ...]
    options: SwitchboardOptions
    prices: PoolPrices
    sample: tuple[int, ...]
    iterations: int
    micro_batches: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The MoE layers of a pipeline stage: their numbers, and how often a micro-batch passes each."""

    layers: tuple[int, ...]
    passes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run.

    Attributes:
        version: of this format.
        iteration: the last iteration before it; 0 for a run that starts anew.
        trace: the routing trace that is recorded.
        logs: bytes that each log of decisions has at this moment; what follows is of this start.
        num_experts: E.
        num_ranks: R, of an expert-parallel group.
        groups: expert-parallel groups of a stage.
        expert_shares: ranks that share an expert (expert tensor parallelism).
        spare_slots: of a rank.
        micro_batches: of one rank in an iteration.
        stages: layers of each pipeline stage.
        homes: None where homes stay.
        replicas: None where there are none.
        pool: None without one.
    """

    version: int
    iteration: int
    trace: str
    logs: Mapping[str, int]
    num_experts: int
    num_ranks: int
    groups: int
    expert_shares: int
    spare_slots: int
    micro_batches: int
    stages: tuple[Stage, ...]
    homes: HomesStart | None
    replicas: ReplicasStart | None
    pool: PoolStart | None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all MoE layers, ascending."""
        return tuple(sorted(number for stage in self.stages for number in stage.layers))

    @property
    def passes(self) -> int:
        """The most passes of a layer in an iteration: its micro-batches, several times for some layers."""
        return self.micro_batches * max(passes for stage in self.stages for passes in stage.passes)

    @property
    def plans_from_history(self) -> bool:
        """Whether replicas may be planned from history, now or after a switch of the pool."""
        return bool(self.modes & {"history", "auto"})

    @property
    def modes(self) -> frozenset[str]:
        """All ways in which replicas may be planned."""
        settings = self.pool.settings if self.pool is not None else ()
        first = "off" if self.replicas is None else self.replicas.mode
        return frozenset({first, *(setting.replicas for setting in settings)})

    def to_text(self) -> str:
        """JSON that `read_start` reads back."""
        content = asdict(self)
        for pricing in content["homes"]["pricing"].values() if self.homes is not None else ():
            del pricing["kernels"]  # functions: numpy's and the compiled ones find the same
        return json.dumps(content, indent=1) + "\n"


def start_file(iteration: int) -> str:
    """Name of the file of a start, in `FOLDER`."""
    return f"start-{iteration:06d}.json"


def homes_state_file(iteration: int) -> str:
    """Name of the file with what the homes loop had at a start."""
    return f"start-{iteration:06d}-homes.npz"


def replicas_state_file(iteration: int, stage: int, group: int) -> str:
    """Name of the file with what the replicas loop of a stage and group had at a start."""
    return f"start-{iteration:06d}-replicas-stage{stage}-group{group}.npz"


def read_starts(directory: Path) -> list[Start]:
    """The starts of a run in the order in which they happened.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    folder = directory / FOLDER
    paths = sorted(folder.glob("start-*.json")) if folder.is_dir() else []
    if not paths:
        raise ConfigError("--replay", str(directory), f"has no {FOLDER}/start-*.json", WAY_OUT)
    starts = [_read_start(path) for path in paths]
    return sorted(starts, key=lambda start: (sum(start.logs.values()), start.iteration))


def _read_start(path: Path) -> Start:
    content = read_object(Named(path=path, field="--replay", way_out=WAY_OUT))
    version = content.get("version")
    if version != VERSION:
        rule = f"has version {version!r:.60}: only version {VERSION} is known"
        raise ConfigError("--replay", str(path), rule, "Replay it with the version of the project that wrote it.")
    _bring_up_to_date(content)
    return build(Start, content, str(path), WAY_OUT)


def _bring_up_to_date(content: Any) -> None:
    """Give the content of earlier files what they lack: they had one number as the price of every transfer, saw all
    ranks on one node, and never suspended replicas from history."""
    if not isinstance(content, dict):
        return
    for old, new in (("replica_price_tokens", "price"), ("exact_price_tokens", "exact_price")):
        if isinstance(tokens := content.get(old), int | float) and new not in content:
            del content[old]
            content[new] = asdict(TransferPrice.of_each(float(tokens)))
    if "objective" in content and "good_enough" in content:  # of `ReplicaOptions`
        content.setdefault("may_suspend", False)
    for each in content.values():
        _bring_up_to_date(each)


def read_state(directory: Path, name: str) -> dict[str, NDArray[Any]]:
    """Arrays that a loop had at a start, its slots among them.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    named = Named(path=directory / FOLDER / name, field="--replay", way_out=WAY_OUT)
    state = read_npz(named)
    if "slots_LRS" not in state:
        raise named.refused("has no array slots_LRS")
    return state
