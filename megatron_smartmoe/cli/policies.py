"""What the simulator's tools replay: a simulation, and its policies: ours in one of its ways, or a peer's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_smartmoe.cli.simulate_prices import Prices
from megatron_smartmoe.cost.memory.buffers import expert_state_bytes
from megatron_smartmoe.placement.kernels import NUMPY, Kernels
from megatron_smartmoe.placement.layer_cost import PricedLayer
from megatron_smartmoe.placement.layer_plan import Sees
from megatron_smartmoe.placement.online_options import OnlineOptions, ReplicaMode
from megatron_smartmoe.placement.plan_homes import HomesOptions, node_swap_price
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import BETWEEN_NODES_TOLERANCE, PolicyOptions
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
        dispatcher=prices.dispatcher,
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
    may_suspend: bool = True,
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
        may_suspend: see `ReplicaOptions`; not so in decision files of earlier versions.
    """
    sees: Sees = "exact" if mode == "exact" else "history"
    pace = _pace(setup.num_nodes, homes_interval if moves is None else 0)
    judge = homes_policy or pace.policy
    options = replace(
        pace,
        first_evaluation=first_evaluation,
        replicas=mode,
        micro_batches=prices.micro_batches,
        state_bytes=setup.state_bytes,
        migration_bytes_s=setup.migration_bytes_s,
        homes=HomesOptions(
            num_nodes=prices.balanced_nodes,
            replica_scope_is_node=prices.domains > 1,
            node_swap_price=node_swap_price(
                setup.constants,
                prices.micro_batches * prices.rank_tokens,
                num_nodes=prices.balanced_nodes,
                swap_s=setup.state_bytes / setup.migration_bytes_s,
                worth_s=judge.horizon_iterations / judge.margin,
                dispatcher=prices.dispatcher,
            ),
            num_groups=prices.num_groups,
        ),
        replica=ReplicaOptions(
            num_nodes=prices.domains,
            or_group=prices.or_group,
            price=prices.replica_price(sees),
            may_suspend=may_suspend,
        ),
        auto_limit=1.0 if prices.first_version and sees == "exact" else OnlineOptions.auto_limit,
        exact_price=prices.replica_price("exact"),
        policy=judge,
    )
    priced = partial(setup.pricing_of, has_trees=not prices.first_version)
    seconds = PricedLayer(pricing=priced(sees), alone=priced("exact") if mode == "auto" else None)
    if moves is not None:
        return RecordedPolicy(placement, num_groups, options, seconds, moves, setup.kernels)
    return OnlinePolicy(placement, num_groups, options, seconds, setup.kernels)


def _pace(num_nodes: int, homes_interval: int) -> OnlineOptions:
    """How soon homes may move again after a move: as in training, after an interval, in which the move is reviewed.

    On one node the planners' defaults hold, whatever the interval, so that earlier decision files are reproduced.
    """
    if num_nodes == 1 or not homes_interval:
        return OnlineOptions(homes_interval=homes_interval)
    return OnlineOptions(
        homes_interval=homes_interval,
        review_records=min(OnlineOptions.review_records, homes_interval),
        policy=PolicyOptions(cooldown_iterations=homes_interval, tolerance=BETWEEN_NODES_TOLERANCE),
    )


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
