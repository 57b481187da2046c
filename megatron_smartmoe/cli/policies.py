"""What the simulator's tools replay: a simulation, and its policies: ours in one of its ways, or a peer's rule."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_smartmoe.cli.simulate_prices import Prices
from megatron_smartmoe.cost.memory.buffers import expert_state_bytes
from megatron_smartmoe.placement.homes_planner import OnlineOptions, ReplicaMode
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import layer_seconds
from megatron_smartmoe.placement.layer_plan import Sees
from megatron_smartmoe.placement.plan_homes import HomesOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import PolicyOptions
from megatron_smartmoe.simulate.baselines import WITHOUT_HOMES, by_name, relays_by_name
from megatron_smartmoe.simulate.policies import OnlinePolicy, RulePolicy
from megatron_smartmoe.simulate.run import SimulationSetup
from megatron_smartmoe.simulate.whatif import Move, RecordedPolicy
from megatron_smartmoe.spec.placement import Placement


def setup_of(prices: Prices, *, spare_slots: int, warmup: int, kernels: Kernels = NUMPY) -> SimulationSetup:
    """The simulation that a price list is for.

    Args:
        prices: cluster, expert and ranks.
        spare_slots: K per rank.
        warmup: records at the start that are replayed but not counted.
        kernels: what plans and splits.
    """
    return SimulationSetup(
        num_ranks=prices.num_ranks,
        spare_slots=spare_slots,
        num_nodes=prices.num_nodes,
        warmup=warmup,
        constants=prices.layer("exact").constants,
        state_bytes=expert_state_bytes(prices.expert),
        migration_bytes_s=prices.migration_bytes_s,
        prices={"history": prices.layer("history"), "exact": prices.layer("exact")},
        kernels=kernels,
    )


def own_policy(
    mode: ReplicaMode,
    placement: Placement,
    num_groups: int,
    setup: SimulationSetup,
    prices: Prices,
    *,
    homes_interval: int,
    homes_policy: PolicyOptions | None = None,
    first_evaluation: int = 0,
    moves: Sequence[Move] | None = None,
) -> OnlinePolicy:
    """Homes, replicas and split as training runs them.

    Args:
        mode: what replicas are planned from.
        placement: at the start.
        num_groups: expert-parallel groups.
        setup: ranks, slots and prices of the simulation.
        prices: what the replicas are priced with.
        homes_interval: iterations between two evaluations of the homes; 0 for none.
        homes_policy: when a move of homes is worth its cost; None for the defaults.
        first_evaluation: iteration before which homes are left alone.
        moves: those of a real run, which homes then follow instead of deciding; None to decide.
    """
    sees: Sees = "exact" if mode == "exact" else "history"
    options = OnlineOptions(
        homes_interval=homes_interval if moves is None else 0,
        first_evaluation=first_evaluation,
        replicas=mode,
        micro_batches=prices.micro_batches,
        state_bytes=setup.state_bytes,
        migration_bytes_s=setup.migration_bytes_s,
        homes=HomesOptions(num_nodes=setup.num_nodes, replica_scope_is_node=prices.within_node),
        replica=ReplicaOptions(
            num_nodes=setup.num_nodes if prices.within_node else 1, replica_price_tokens=prices.replica_tokens(sees)
        ),
        auto_limit=1.0 if prices.first_version and sees == "exact" else OnlineOptions.auto_limit,
        exact_price_tokens=prices.replica_tokens("exact"),
        policy=homes_policy or PolicyOptions(),
    )
    seconds = layer_seconds(setup.pricing_of(sees, has_trees=not prices.first_version))
    if moves is not None:
        return RecordedPolicy(placement, num_groups, options, seconds, moves, setup.kernels)
    return OnlinePolicy(placement, num_groups, options, seconds, setup.kernels)


def peer_policy(
    name: str, placement: Placement, num_groups: int, setup: SimulationSetup, *, interval: int
) -> RulePolicy:
    """A peer's rule, with its own way of moving weights.

    Args:
        name: in the catalogue of rules.
        placement: at the start.
        num_groups: expert-parallel groups.
        setup: ranks and nodes of the simulation.
        interval: iterations between two plans of a rule that plans from history.
    """
    return RulePolicy(
        by_name()[name],
        placement,
        num_groups,
        setup.num_nodes,
        interval,
        relays_by_name(setup.num_nodes).get(name),
        has_homes=name not in WITHOUT_HOMES,
    )
