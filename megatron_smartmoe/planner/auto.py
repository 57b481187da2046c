"""`--parallel auto`: the launch for a user's model on the machine at hand, with its reasons.

Every node of a job plans by itself, so the result depends on nothing but the request: where two launches differ by
rounding only, their names decide. A resumed run reuses its saved plan (`plan.json` in the run directory) where it
still applies; where it does not, the reason is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.alternatives import alternatives
from megatron_smartmoe.planner.constraints import Constraints
from megatron_smartmoe.planner.explain import GB, sentence, short_time, why
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.planner.load import LoadModel, Scenario, scenarios_from_model
from megatron_smartmoe.planner.plan_json import as_json
from megatron_smartmoe.planner.pool import make_pool
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import SearchResult, search
from megatron_smartmoe.planner.space import exclusion
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.readers import values

EQUAL = 1e-6  # of the step time: other processors may round differently
SAVED_LAUNCHES = 10  # in plan.json, fastest first
LARGEST_SIZE = 10**7  # of a parallel size or a batch in a saved plan
MOST_SPARE_SLOTS = 1000  # per rank, in a saved plan
ALTERNATIVES = 1  # printed beside the runner-up


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanRequest:
    """What to plan.

    Attributes:
        model: the model and its batch.
        cluster: the machine, with the job's nodes and ranks per node, and a rank's memory.
        constraints: what the user's flags leave open.
        scenarios: loads to plan for; None for those that the model's router suggests.
    """

    model: ModelSpec
    cluster: ClusterSpec
    constraints: Constraints
    scenarios: Sequence[Scenario] | None = None

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.cluster.nodes * self.cluster.gpus_per_node

    def pricing(self) -> Pricing:
        """The prices of launches under the load."""
        scenarios = scenarios_from_model(self.model) if self.scenarios is None else self.scenarios
        return Pricing(self.model, self.cluster, LoadModel(scenarios, self.cluster, self.model.moe.routing_groups))


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanResult:
    """What to launch.

    Attributes:
        launch: the launch and its price.
        pricing: what priced it.
        search: the search that found it; None for a launch of a saved plan.
    """

    launch: Launch
    pricing: Pricing
    search: SearchResult | None = None


def choose_launch(request: PlanRequest) -> PlanResult:
    """Search the launches that the constraints leave.

    Raises:
        ConfigError: none fits, or none agrees with the user's flags.
    """
    pricing, kept = request.pricing(), request.constraints.kept
    try:
        found = search(pricing, request.ranks, request.constraints.options, limit=SAVED_LAUNCHES)
    except ConfigError as error:
        if error.field != "--gpus":
            raise
        way_out = "Use more ranks or a smaller model or sequence"
        way_out += f", or remove one of: {', '.join(kept)}." if kept else "."
        rule = f"on {request.ranks} ranks {error.rule}"
        raise ConfigError("--parallel", "auto", rule, way_out) from None
    _break_ties(found)
    return PlanResult(launch=found.best[0], pricing=pricing, search=found)


def _break_ties(found: SearchResult) -> None:
    """Of the launches that are as fast as the fastest, put the one first whose name sorts first."""
    limit_s = found.best[0].expected_s * (1 + EQUAL)
    found.best.sort(key=lambda one: (0.0, one.spec.label()) if one.expected_s <= limit_s else (one.expected_s, ""))


def reuse_saved_plan(content: object, request: PlanRequest) -> PlanResult | str:
    """The launch of a saved plan, or the reason why it does not apply any more.

    Args:
        content: what `to_json` wrote, read back.
        request: what to plan now.

    Raises:
        ConfigError: the content is not a plan.
    """
    spec = replace(_spec_from(content), global_batch=request.model.global_batch)
    options, ranks = request.constraints.options, request.ranks
    if spec.gpus != ranks:
        return f"it is for {spec.gpus} ranks, this job has {ranks}"
    homes_interval = options.homes_interval if spec.ep > 1 else 0
    spec = replace(
        spec, precision=options.precision, implementation=options.implementation, homes_interval=homes_interval
    )
    reason = request.constraints.disagreement(spec) or exclusion(request.model, request.cluster, spec, options)
    if reason:
        return reason
    pricing = request.pricing()
    launch, has = pricing.price(spec), request.cluster.gpu.memory_bytes
    if launch.memory.total > has:
        return f"it needs {launch.memory.total / GB:.1f} GB, and a rank has {has / GB:.1f} GB"
    return PlanResult(launch=launch, pricing=pricing)


def _spec_from(content: object) -> ParallelSpec:
    way_out = "Remove it from the run directory to plan again."
    best = content.get("best") if isinstance(content, dict) else None
    first = best[0] if isinstance(best, list) and best else None
    if not isinstance(first, dict) or not isinstance(first.get("spec"), dict):
        raise ConfigError("plan.json", None, "is not a plan that --parallel auto wrote", way_out)
    where = "plan.json: best[0].spec"
    spec = values.build(ParallelSpec, first["spec"], where, way_out, known_only=False)
    for name in ("gpus", "tp", "pp", "vpp", "ep", "etp", "cp", "micro_batch", "global_batch", "overlap_degree"):
        values.whole(getattr(spec, name), f"{where}.{name}", least=1, most=LARGEST_SIZE)
    values.whole(spec.spare_slots, f"{where}.spare_slots", most=MOST_SPARE_SLOTS)
    for name, size in (("TP x PP x CP", spec.tp * spec.pp * spec.cp), ("ETP x EP x PP", spec.etp * spec.ep * spec.pp)):
        if spec.gpus % size:
            raise ConfigError(f"{where}.gpus", spec.gpus, f"must be a multiple of {name} = {size}", way_out)
    return spec


def to_json(result: PlanResult, request: PlanRequest) -> dict[str, Any]:
    """The content of plan.json in the run directory: the format of `smartmoe plan --json`."""
    assert result.search is not None
    flags = [megatron_flags(request.model, launch.spec) for launch in result.search.best]
    pool = make_pool(result.launch, result.pricing, request.constraints.options)
    asked = {
        "model": request.model.name,
        "cluster": request.cluster.name,
        "gpus": request.ranks,
        "nodes": request.cluster.nodes,
        "memory_bytes": request.cluster.gpu.memory_bytes,
        "kept": list(request.constraints.kept),
    }
    return as_json(result.search, result.pricing, flags, pool, asked)


def describe(result: PlanResult, request: PlanRequest, memory_from: str, replaced: Sequence[str]) -> list[str]:
    """The chosen launch and its reasons, a few lines.

    Args:
        result: what was planned.
        request: what was asked for.
        memory_from: where the memory of a rank comes from.
        replaced: flags of the configuration that the plan replaces.
    """
    cluster, launch, found = request.cluster, result.launch, result.search
    memory = cluster.gpu.memory_bytes / GB
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    rows = [
        ("machine", f"{request.ranks} x {cluster.gpu.name} on {nodes}, {memory:.1f} GB each ({memory_from})"),
        ("load", "; ".join(scenario.name for scenario in result.pricing.loads.scenarios)),
    ]
    rows += [("note", note) for note in result.pricing.loads.scenarios[0].notes]
    rows += [("kept", ", ".join(request.constraints.kept))] if request.constraints.kept else []
    rows += [("replaced", f"the configuration's {', '.join(replaced)}")] if replaced else []
    if found is not None:
        effort = f"{found.shapes} launches, {found.priced} priced in full, {found.seconds:.1f} s"
        rows.append(("search", f"{effort}; step times are predicted"))
    price = f"{short_time(launch.expected_s)} per step ({short_time(launch.worst_s)} under the worst load)"
    rows.append(("choice", f"{launch.spec.label()}: {price}, {launch.memory.total / GB:.1f} of {memory:.1f} GB"))
    rows += [("because" if at == 0 else "", line) for at, line in enumerate(_reasons(result, request))]
    return [f"  {name:<9} {text}" for name, text in rows]


def _reasons(result: PlanResult, request: PlanRequest) -> list[str]:
    """What the launch is good at, the runner-up, and the launches that people ask about."""
    launch, found = result.launch, result.search
    lines = why(launch, [], result.pricing) or ["EP 1 needs no all-to-all: every rank has all experts."]
    if found is None:
        return lines
    others = [("next: ", found.best[1])] if len(found.best) > 1 else []
    slower = [one for one in alternatives(launch, result.pricing) if _is_slower(one, request, found)]
    others += [("", one) for one in sorted(slower, key=lambda one: one.expected_s)[:ALTERNATIVES]]
    return [*lines, *(head + sentence(launch, one) for head, one in others)]


def _is_slower(other: Launch, request: PlanRequest, found: SearchResult) -> bool:
    """Whether an alternative was allowed, fits, is slower and is not the runner-up."""
    constraints, cluster = request.constraints, request.cluster
    fits = other.memory.total <= cluster.gpu.memory_bytes
    shown = any(other.spec == launch.spec for launch in found.best[:2])
    excluded = constraints.disagreement(other.spec) or exclusion(
        request.model, cluster, other.spec, constraints.options
    )
    return fits and not excluded and not shown and other.expected_s > found.best[0].expected_s
