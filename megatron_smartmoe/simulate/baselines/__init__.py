"""The peers' rules, written from their published descriptions: what `smartmoe simulate --policy all` compares with.

How to write one: a module per rule with a frozen dataclass (its parameters as fields, with their published defaults)
that follows `placement.layer_plan.Rule`: `name`, `sees`, and `plan(problem: LayerProblem) -> LayerPlan`, a pure
function of one layer's problem. The plan names how tokens are shared (`equal`, `exact`, `local`, `quota`); the
simulator evaluates it with `placement.layer_plan.evaluate` on counts that the rule did not see, or on those it did when
`sees` is `exact`.

`by_name()` gives the rules under the names of the simulator's table: none, smartmoe2023, lpt, eplb, eplb-hierarchical,
fastermoe, echo, ultraep, ultraep-min1, llep, laer, epic, moonep, lplb.
"""

from __future__ import annotations

from functools import partial

from megatron_smartmoe.placement.layer_cost import Relay
from megatron_smartmoe.placement.layer_plan import Rule
from megatron_smartmoe.simulate.baselines.contiguous import Contiguous
from megatron_smartmoe.simulate.baselines.echo import Echo
from megatron_smartmoe.simulate.baselines.epic import Epic
from megatron_smartmoe.simulate.baselines.eplb import Eplb, EplbHierarchical
from megatron_smartmoe.simulate.baselines.fastermoe import FasterMoE
from megatron_smartmoe.simulate.baselines.greedy import Lpt, SmartMoE2023
from megatron_smartmoe.simulate.baselines.laer import Laer, laer_traffic
from megatron_smartmoe.simulate.baselines.llep import Llep
from megatron_smartmoe.simulate.baselines.lplb import Lplb
from megatron_smartmoe.simulate.baselines.moonep import MoonEp
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp, ultraep_relay


def by_name() -> dict[str, Rule]:
    """Every rule with its published defaults, in the order of the table."""
    rules: tuple[Rule, ...] = (
        Contiguous(),
        SmartMoE2023(),
        Lpt(),
        Eplb(),
        EplbHierarchical(),
        FasterMoE(),
        Echo(),
        UltraEp(),
        UltraEp(name="ultraep-min1", min_tokens_per_replica=1),
        Llep(),
        Laer(),
        Epic(),
        MoonEp(),
        Lplb(),
    )
    return {rule.name: rule for rule in rules}


def relays_by_name(num_nodes: int) -> dict[str, Relay]:
    """How the systems that forward replicas do it; homes send all of them in the others."""
    ultraep = partial(ultraep_relay, num_nodes=num_nodes)
    return {"ultraep": ultraep, "ultraep-min1": ultraep, "laer": laer_traffic}


MOVING_HOMES = frozenset({"smartmoe2023", "lpt", "eplb", "eplb-hierarchical"})  # from history, in their systems seldom
WITHOUT_HOMES = frozenset({"laer"})  # rules of systems whose experts' state is sharded over all ranks: none moves
