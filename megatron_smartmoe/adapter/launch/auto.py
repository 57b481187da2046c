"""`--parallel auto`: plan the launch for the machine that this launcher finds itself on.

What the command line says about parallelism is kept; what the configuration says about it is replaced by the plan;
model, batch, precision and everything else is the user's. The plan's flags then go the way of a configuration's, so
they meet the same checks, and the run directory's config.yaml has them.

Every node plans for itself and must come to the same launch. So what goes into a plan is the same on all of them: the
flags, the number of nodes and of ranks per node, the cluster file. A device's own memory is used on one node only.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter.flags.pool_arguments import AUTO, FLAG
from megatron_smartmoe.adapter.launch import corpus
from megatron_smartmoe.adapter.launch import flags as flag_lists
from megatron_smartmoe.adapter.launch.checkpoint_limits import limits_of_checkpoint
from megatron_smartmoe.adapter.launch.machine import find_machine, vocabulary
from megatron_smartmoe.adapter.launch.plan import asked_device
from megatron_smartmoe.adapter.launch.search_space import space_options
from megatron_smartmoe.adapter.launch.topology import Topology
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.auto import Choice, Question, choose_again, choose_launch, describe, to_json
from megatron_smartmoe.planner.constraints import (
    DECIDED,
    FOLLOWED,
    Constraints,
    constraints_from_flags,
    without_refusals,
)
from megatron_smartmoe.planner.flags import launch_flags
from megatron_smartmoe.planner.load import scenarios_of
from megatron_smartmoe.planner.model_flags import model_from_arguments
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.run import FlagValue, RunSpec

PLAN_FILE = "plan.json"
PREFIX = "--parallel-"  # of the launcher's flags that say more of it


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the planner made of a configuration and a command line.

    Attributes:
        spec: the configuration with the plan's flags.
        command_line: the user's own, which still comes last.
        lines: what to print.
        content: of plan.json; None when an earlier plan was taken again.
    """

    spec: RunSpec
    command_line: list[str]
    lines: list[str]
    content: dict[str, Any] | None

    def save(self, directory: Path) -> None:
        """Write plan.json; other nodes see all of it or nothing."""
        if self.content is not None:
            part = directory / f".{PLAN_FILE}.part"
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(directory / PLAN_FILE)


@dataclass(frozen=True)
class Load:
    """The load that the user wants to be planned for: a trace, a skew, or neither."""

    trace: Path | None = None
    skew: str | None = None


def plan_parallel(
    spec: RunSpec, command_line: Sequence[str], topology: Topology, directory: Path, load: Load
) -> Planned:
    """Plan, or take the plan of an existing run directory again.

    Raises:
        ConfigError: the machine is unknown, nothing fits, or a flag cannot be planned with.
    """
    from megatron_smartmoe.adapter.flags.parser import build_parser, parse
    from megatron_smartmoe.adapter.pretrain import choose_device, with_defaults

    cpu = choose_device(asked_device(spec, command_line))
    corpus.check(spec)
    known = build_parser()._option_string_actions
    own = without_refusals(command_line, known)
    config = {name: value for name, value in spec.flags.items() if f"--{name}" not in DECIDED}
    tokens = flag_lists.merge({**corpus.dataset_flags(spec), **config}, own, known)
    args = parse(with_defaults([token.replace("{run_dir}", str(directory)) for token in tokens], cpu=cpu, say=False))
    followed = {name: value for name, value in config.items() if f"--{name}" in FOLLOWED}
    constraints = _constraints(args, flag_lists.merge(followed, command_line, known), cpu=cpu)
    model = replace(model_from_arguments(vars(args), spec.name), vocab=vocabulary(spec, args))
    cluster, memory_from = find_machine(args, topology, cpu=cpu)
    scenarios = scenarios_of(model, load.trace, load.skew, PREFIX)
    question = Question(model=model, cluster=cluster, constraints=constraints, scenarios=scenarios)
    choice, heading = _choice(question, directory / PLAN_FILE)
    flags = flag_lists.as_mapping(launch_flags(model, choice.plan.spec))
    return Planned(
        spec=replace(spec, flags={**_with_pool(config, args, choice.plan.spec), **flags}),
        command_line=own,
        lines=[heading, *describe(choice, question, memory_from, _replaced(spec, command_line, flags))],
        content=None if choice.result is None else to_json(choice, question),
    )


def _choice(question: Question, path: Path) -> tuple[Choice, str]:
    """The choice and the line that says where it comes from."""
    if not path.is_file():
        return choose_launch(question), "--parallel auto"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        way_out = "Remove it, and it is planned anew."
        raise ConfigError("--run-dir", str(path), "cannot be read as JSON", way_out) from None
    again = choose_again(content, question)
    if isinstance(again, Choice):
        return again, f"--parallel auto: as before, from {path} (remove it to plan anew)"
    return choose_launch(question), f"--parallel auto: planned anew, the plan in {path} cannot be kept: {again}"


def _constraints(args: Namespace, words: Sequence[str], *, cpu: bool) -> Constraints:
    """What the layers, a checkpoint and the user's own flags leave open."""
    limits = limits_of_checkpoint(args, space_options(args, cpu=cpu))
    asked = constraints_from_flags(words, limits.options)
    given = {**limits.given, **asked.given}
    return Constraints(options=asked.options, given=given, kept=(*asked.kept, *limits.kept))


def _with_pool(config: dict[str, FlagValue], args: Namespace, plan: ParallelSpec) -> dict[str, FlagValue]:
    """The configuration's flags with `--smartmoe-pool auto` where the plan leaves more than the homes to switch, and
    without it where there is nothing. A pool that the user names stays; `--no-smartmoe-pool` takes ours away."""
    flag, asked = FLAG.removeprefix("--"), args.smartmoe_pool
    if not args.smartmoe or asked not in (None, AUTO):
        return config
    copies = plan.spare_slots > 0 and args.smartmoe_replicas != "off"
    if plan.ep > 1 and not args.mtp_num_layers and (asked or copies or plan.overlap_degree > 1):
        return {**config, flag: AUTO}
    return {name: value for name, value in config.items() if name != flag}


def _replaced(spec: RunSpec, command_line: Sequence[str], flags: dict[str, FlagValue]) -> list[str]:
    """Flags of the configuration that the plan says differently, with both values."""
    given = {token.split("=")[0] for token in command_line}
    found = []
    for name, before in spec.flags.items():
        flag, now = f"--{name}", flags.get(name)
        if flag in DECIDED and flag not in given and before != now:
            found.append(f"{flag} {_text(before)} by {_text(now)}")
    return found


def _text(value: FlagValue | None) -> str:
    """A flag's value in a sentence."""
    if isinstance(value, list):
        return " ".join(value)
    return value if isinstance(value, str) else "on" if value else "none"
