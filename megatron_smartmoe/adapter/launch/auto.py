"""`--parallel auto`: plan the launch for the machine that the launcher runs on.

Parallel flags of the command line are kept, those of the configuration are replaced by the plan's; model, batch,
precision and everything else are the user's. The plan's flags are then treated like a configuration's, so they pass the
same checks, and the run directory's config.yaml has them.

Every node plans by itself and must come to the same launch. So what goes into a plan is the same on all of them: the
flags, the number of nodes and of ranks per node, the cluster file. A device's own memory is used on one node only.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter.flags.smartmoe_arguments import AUTO, POOL
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.checkpoint_limits import limits_of_checkpoint
from megatron_smartmoe.adapter.launch.machine import find_machine, vocabulary
from megatron_smartmoe.adapter.launch.merged import Merged, merge
from megatron_smartmoe.adapter.launch.search_space import space_options
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.arguments import check_plannable, model_from_arguments
from megatron_smartmoe.planner.auto import PlanRequest, PlanResult, choose_launch, describe, reuse_saved_plan, to_json
from megatron_smartmoe.planner.constraints import DECIDED, KEPT_FROM_CONFIG, Constraints, constraints_from_flags
from megatron_smartmoe.planner.flags import launch_flags, parse_tokens
from megatron_smartmoe.planner.load import scenarios_of
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_json
from megatron_smartmoe.spec.run import FlagValue, RunSpec

PLAN_FILE = "plan.json"
PREFIX = "--parallel-"  # what --parallel-trace and --parallel-skew begin with


@dataclass(frozen=True, kw_only=True)
class AutoPlan:
    """A configuration and a command line with the flags of a plan.

    Attributes:
        spec: the configuration with the plan's flags.
        command_line: the user's own flags, which still win.
        lines: lines to print.
        content: the content of plan.json; None when a saved plan was reused.
    """

    spec: RunSpec
    command_line: list[str]
    lines: list[str]
    content: dict[str, Any] | None

    def save(self, directory: Path) -> None:
        """Write plan.json at once: no other node can read a part of it."""
        if self.content is not None:
            write_text(directory / PLAN_FILE, json.dumps(self.content, indent=1) + "\n")


@dataclass(frozen=True)
class Load:
    """The load to plan for: a routing trace, a skew, or neither."""

    trace: Path | None = None
    skew: str | None = None


def plan_parallel(
    spec: RunSpec, command_line: Sequence[str], topology: Topology, directory: Path, load: Load
) -> AutoPlan:
    """Plan, or reuse the saved plan of an existing run directory.

    Raises:
        ConfigError: the machine is unknown, nothing fits, or a flag is not supported by the planner.
    """
    # Step 1: read the run without the parallel flags of its configuration.
    merged = merge(spec, command_line, topology, directory, to_plan=True)
    with merged.naming_origins():
        return _planned(merged, spec, command_line, topology, directory, load)


def _planned(
    merged: Merged, spec: RunSpec, command_line: Sequence[str], topology: Topology, directory: Path, load: Load
) -> AutoPlan:
    """What `plan_parallel` says, of a run that is merged."""
    args, cpu = merged.args, merged.cpu
    # Step 2: say what is to be planned.
    check_plannable(vars(args))
    model = replace(model_from_arguments(vars(args), spec.name), vocab=vocabulary(spec, args))
    cluster, memory_from = find_machine(args, topology, cpu=cpu)
    kept = {name: value for name, value in spec.flags.items() if f"--{name}" in KEPT_FROM_CONFIG}
    limits = limits_of_checkpoint(args, space_options(args, cpu=cpu))
    asked = constraints_from_flags(flag_lists.merge(kept, command_line, merged.known), limits.options)
    constraints = Constraints(
        options=asked.options, given={**limits.given, **asked.given}, kept=(*asked.kept, *limits.kept)
    )
    scenarios = scenarios_of(model, load.trace, load.skew, PREFIX)
    request = PlanRequest(model=model, cluster=cluster, constraints=constraints, scenarios=scenarios)
    # Step 3: plan, and put the plan's flags where the configuration's were.
    result, heading = _reused_or_new(request, directory / PLAN_FILE)
    flags = flag_lists.as_mapping(launch_flags(model, result.launch.spec))
    others = {name: value for name, value in spec.flags.items() if f"--{name}" not in DECIDED}
    return AutoPlan(
        spec=replace(
            spec,
            flags={**_with_pool(others, args, result.launch.spec), **flags},
            origins={**spec.origins, **dict.fromkeys(flags, "plan of --parallel auto")},
        ),
        command_line=merged.command_line,
        lines=[heading, *describe(result, request, memory_from, _replaced(spec, command_line, flags))],
        content=None if result.search is None else to_json(result, request),
    )


def _reused_or_new(request: PlanRequest, path: Path) -> tuple[PlanResult, str]:
    """The plan and the line that says where it comes from."""
    if not path.is_file():
        return choose_launch(request), "--parallel auto"
    way_out = f"Remove {path} to plan again."
    try:
        reused = reuse_saved_plan(read_json(Named(path=path, field="--run-dir", way_out=way_out)), request)
    except ConfigError as error:  # nobody corrects a file that a program wrote
        raise ConfigError(error.field, error.value, error.rule, way_out) from None
    if isinstance(reused, PlanResult):
        return reused, f"--parallel auto: reuses the plan in {path} (remove it to plan again)"
    return choose_launch(request), f"--parallel auto: planned again, the plan in {path} no longer applies: {reused}"


def _with_pool(config: dict[str, FlagValue], args: Namespace, plan: ParallelSpec) -> dict[str, FlagValue]:
    """The configuration's flags, with `--smartmoe-pool auto` where the plan has more to switch than the homes.

    Where there is nothing to switch the flag is removed. A pool file of the user stays.
    """
    flag, asked = POOL.removeprefix("--"), args.smartmoe_pool
    if not args.smartmoe or asked not in (None, AUTO):
        return config
    replicas = plan.spare_slots > 0 and args.smartmoe_replicas != "off"
    if plan.ep > 1 and (asked or replicas or plan.overlap_degree > 1):
        return {**config, flag: AUTO}
    return {name: value for name, value in config.items() if name != flag}


def _replaced(spec: RunSpec, command_line: Sequence[str], flags: Mapping[str, FlagValue]) -> list[str]:
    """Flags of the configuration for which the plan has another value, with both values."""
    given = parse_tokens(command_line)
    found = []
    for name, before in spec.flags.items():
        flag, now = f"--{name}", flags.get(name)
        if flag in DECIDED and flag not in given and before != now:
            found.append(f"{flag} {_text(before)} with {_text(now)}")
    return found


def _text(value: FlagValue | None) -> str:
    """A flag's value in a sentence."""
    if isinstance(value, list):
        return " ".join(value)
    return value if isinstance(value, str) else "on" if value else "none"
