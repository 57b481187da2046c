"""`--parallel auto`: the launch for a user's model on the machine at hand, why this one, and the same one again.

Every node of a job plans for itself, so the choice depends on nothing but the question: where two launches are equal
but for rounding, their names decide. A run keeps its plan (`plan.json` beside it): gone on with, it is launched the
same way as long as that is possible, and the reason is said when it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.alternatives import alternatives
from megatron_smartmoe.planner.constraints import Constraints
from megatron_smartmoe.planner.explain import GB, sentence, short_time, why
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.planner.load import LoadModel, Scenario, scenarios_from_model
from megatron_smartmoe.planner.plan_json import as_json
from megatron_smartmoe.planner.pool import make_pool
from megatron_smartmoe.planner.pricing import Plan, Pricing
from megatron_smartmoe.planner.search import SearchResult, search
from megatron_smartmoe.planner.space import against
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import ParallelSpec

EQUAL = 1e-6  # of the step: nodes with other processors may round differently
KEPT_BEST = 10
ALTERNATIVES = 1  # beside the runner-up


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is planned.

    Attributes:
        model: with its batch.
        cluster: nodes and ranks per node are the job's, memory is a rank's.
        constraints: what the user's flags leave open.
        scenarios: of the load; None for those that the model's config suggests.
    """

    model: ModelSpec
    cluster: ClusterSpec
    constraints: Constraints
    scenarios: Sequence[Scenario] | None = None

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.cluster.nodes * self.cluster.gpus_per_node

    def pricing(self) -> Pricing:
        """Prices under the load."""
        within_node = self.cluster.replica_scope == "node"
        scenarios = scenarios_from_model(self.model) if self.scenarios is None else self.scenarios
        loads = LoadModel(scenarios, replica_scope_is_node=within_node)
        return Pricing(self.model, self.cluster, loads)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What will be launched.

    Attributes:
        plan: the launch and its price.
        pricing: that priced it.
        result: of the search; None for a launch that an earlier plan chose.
    """

    plan: Plan
    pricing: Pricing
    result: SearchResult | None = None


def choose_launch(question: Question) -> Choice:
    """Search the launches that the constraints leave.

    Raises:
        ConfigError: none fits, or none agrees with the user's flags.
    """
    pricing, kept = question.pricing(), question.constraints.kept
    try:
        result = search(pricing, question.ranks, question.constraints.options, limit=KEPT_BEST)
    except ConfigError as error:
        if error.field != "--gpus":
            raise
        way_out = "Use more ranks or a smaller model or sequence"
        way_out += f", or leave out one of: {', '.join(kept)}." if kept else "."
        rule = f"on {question.ranks} ranks {error.rule}"
        raise ConfigError("--parallel", "auto", rule, way_out) from None
    _settle_ties(result)
    return Choice(plan=result.best[0], pricing=pricing, result=result)


def _settle_ties(result: SearchResult) -> None:
    """Put the launch first whose name sorts first among those that are as fast as the fastest."""
    limit_s = result.best[0].expected_s * (1 + EQUAL)
    result.best.sort(key=lambda plan: (0.0, plan.spec.label()) if plan.expected_s <= limit_s else (plan.expected_s, ""))


def choose_again(content: object, question: Question) -> Choice | str:
    """The launch of an earlier plan, or why it cannot be had again.

    Args:
        content: what `to_json` wrote, read back.
        question: as it is now.

    Raises:
        ConfigError: the content is no plan.
    """
    spec = replace(_spec_from(content), global_batch=question.model.global_batch)
    options, ranks = question.constraints.options, question.ranks
    if spec.gpus != ranks:
        return f"it is for {spec.gpus} ranks, there are {ranks}"
    moves = options.homes_interval if spec.ep > 1 and not question.model.mtp_layers else 0
    spec = replace(spec, precision=options.precision, implementation=options.implementation, homes_interval=moves)
    differs = question.constraints.disagreement(spec) or against(question.model, question.cluster, spec, options)
    if differs:
        return differs
    pricing = question.pricing()
    plan, has = pricing.plan(spec), question.cluster.gpu.memory_bytes
    if plan.memory.total > has:
        return f"it needs {plan.memory.total / GB:.1f} GB, there are {has / GB:.1f} GB"
    return Choice(plan=plan, pricing=pricing)


def _spec_from(content: object) -> ParallelSpec:
    names = {field.name for field in fields(ParallelSpec)}
    try:
        saved: Mapping[str, Any] = content["best"][0]["spec"]  # type: ignore[index]
        values = {name: value for name, value in saved.items() if name in names}
        if values["layers_of_chunk"] is not None:
            values["layers_of_chunk"] = tuple(values["layers_of_chunk"])
        return ParallelSpec(**values)
    except (TypeError, KeyError, IndexError, AttributeError):
        rule = "is not a plan that --parallel auto wrote"
        raise ConfigError(
            "plan.json", None, rule, "Remove it from the run directory, and it is planned anew."
        ) from None


def to_json(choice: Choice, question: Question) -> dict[str, Any]:
    """What is saved beside the run: the format of `smartmoe plan --json`."""
    assert choice.result is not None
    flags = [megatron_flags(question.model, plan.spec) for plan in choice.result.best]
    pool = make_pool(choice.plan, choice.pricing, question.constraints.options)
    asked = {
        "model": question.model.name,
        "cluster": question.cluster.name,
        "gpus": question.ranks,
        "nodes": question.cluster.nodes,
        "memory_bytes": question.cluster.gpu.memory_bytes,
        "kept": list(question.constraints.kept),
    }
    return as_json(choice.result, choice.pricing, flags, pool, asked)


def describe(choice: Choice, question: Question, memory_from: str, replaced: Sequence[str]) -> list[str]:
    """The choice and its reason, a few lines.

    Args:
        choice: what was found.
        question: what was asked.
        memory_from: who says how much memory a rank has.
        replaced: flags of the configuration that the plan replaces.
    """
    cluster, plan, result = question.cluster, choice.plan, choice.result
    memory = cluster.gpu.memory_bytes / GB
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    rows = [
        ("machine", f"{question.ranks} x {cluster.gpu.name} on {nodes}, {memory:.1f} GB each ({memory_from})"),
        ("load", "; ".join(scenario.name for scenario in choice.pricing.loads.scenarios)),
    ]
    rows += [("kept", ", ".join(question.constraints.kept))] if question.constraints.kept else []
    rows += [("replaced", f"the configuration's {', '.join(replaced)}")] if replaced else []
    if result is not None:
        looked = f"{result.shapes} launches, {result.priced} priced in full, {result.seconds:.1f} s"
        rows.append(("search", f"{looked}; times are estimates"))
    price = f"{short_time(plan.expected_s)} a step ({short_time(plan.worst_s)} under the worst load)"
    rows.append(("choice", f"{plan.spec.label()}: {price}, {plan.memory.total / GB:.1f} of {memory:.1f} GB"))
    rows += [("because" if at == 0 else "", line) for at, line in enumerate(_reasons(choice, question))]
    return [f"  {name:<9} {text}" for name, text in rows]


def _reasons(choice: Choice, question: Question) -> list[str]:
    """What the launch is good at, the runner-up, and the launches that people ask about."""
    plan, result = choice.plan, choice.result
    lines = why(plan, [], choice.pricing) or ["EP 1 needs no all-to-all: every rank has all experts."]
    if result is None:
        return lines
    others = [("next: ", result.best[1])] if len(result.best) > 1 else []
    asked = [one for one in alternatives(plan, choice.pricing) if _loses(one, question, result)]
    others += [("", one) for one in sorted(asked, key=lambda one: one.expected_s)[:ALTERNATIVES]]
    return [*lines, *(head + sentence(plan, one) for head, one in others)]


def _loses(other: Plan, question: Question, result: SearchResult) -> bool:
    """Whether an alternative was open, fits, is slower and is not the runner-up."""
    options, cluster = question.constraints.options, question.cluster
    fits = other.memory.total <= cluster.gpu.memory_bytes
    shown = any(other.spec == plan.spec for plan in result.best[:2])
    closed = question.constraints.disagreement(other.spec) or against(question.model, cluster, other.spec, options)
    return fits and not closed and not shown and other.expected_s > result.best[0].expected_s
