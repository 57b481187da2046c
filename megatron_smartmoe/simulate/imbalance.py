"""The benchmark of token imbalance: made workloads, replayed through every rule, priced on a cluster.

A case is a workload of one MoE layer as a routing trace; every rule plans it as the simulator replays any trace, so
that a rule which plans from history has never seen the step that it is judged on. A result is one row, whose names are
those of NVIDIA/Megatron-LM pull request 7488 where it has them; what it measures on GPUs, this predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.simulate.run import PolicyResult, SimulationSetup
from megatron_smartmoe.simulate.workloads import compatible, corrected
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace

Series = Literal["compatible", "corrected"]
SERIES: dict[Series, tuple[str, ...]] = {
    "compatible": tuple(compatible.POOLS),
    "corrected": tuple(corrected.WORKLOADS),
}


@dataclass(frozen=True, kw_only=True)
class BenchSizes:
    """Sizes of all workloads of a run.

    Attributes:
        num_experts: E.
        top_k: K, experts of a token.
        tokens: of a source rank in a micro-batch.
        num_ranks: R, of an expert-parallel group.
        steps: iterations.
        micro_batches: of an iteration, in the corrected series; a step of the compatible one is one.
        seed: of all draws.
    """

    num_experts: int
    top_k: int
    tokens: int
    num_ranks: int
    steps: int
    micro_batches: int
    seed: int

    def __post_init__(self) -> None:
        most = self.num_experts // 2
        if self.top_k > most:
            rule = f"must be at most {most}, half of the experts: W5_zero_expert_rank and C6_idle_experts use no more"
            raise ConfigError("--top-k", self.top_k, rule, f"For example: --top-k {most}.")
        if self.num_experts % self.num_ranks:
            rule = f"must divide --experts {self.num_experts}"
            raise ConfigError("--ep", self.num_ranks, rule, f"For example: --experts {8 * self.num_ranks}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One workload.

    Attributes:
        series: that it belongs to.
        name: the workload's.
        trace: its tokens; every record is a step.
        checksum: of its tokens: by the pull request's recipe, or of the counts.
    """

    series: Series
    name: str
    trace: RoutingTrace
    checksum: str


def make_case(series: Series, name: str, sizes: BenchSizes) -> Case:
    """Draw a workload and check what every routing keeps: K different experts a token, no token lost."""
    if series == "compatible":
        of_rank = compatible.Sizes(num_experts=sizes.num_experts, top_k=sizes.top_k, tokens=sizes.tokens)
        counts_NE = np.array([compatible.counts(name, of_rank, step, sizes.seed) for step in range(sizes.steps)])
        counts_NRME = np.repeat(counts_NE[:, None, None], sizes.num_ranks, axis=1)
        checksum = compatible.fingerprint(name, of_rank, steps=sizes.steps, ep=sizes.num_ranks, seed=sizes.seed)
    else:
        shape = corrected.Shape(
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            tokens=sizes.tokens,
            num_ranks=sizes.num_ranks,
            micro_batches=sizes.micro_batches,
        )
        counts_NRME = corrected.counts(name, shape, sizes.steps, sizes.seed)
        checksum = corrected.fingerprint(counts_NRME)
    tokens_NRM = counts_NRME.sum(axis=3)
    assert (tokens_NRM % sizes.top_k == 0).all(), "a token without K experts"
    assert (counts_NRME.max(axis=3) <= tokens_NRM // sizes.top_k).all(), "a token with the same expert twice"
    trace = RoutingTrace(
        counts=counts_NRME[:, None],
        iteration=np.arange(sizes.steps),
        layer=np.array([0]),
        meta={"source": f"smartmoe bench-imbalance: {series}/{name}", "top_k": sizes.top_k, "seed": sizes.seed},
    )
    return Case(series=series, name=name, trace=trace, checksum=checksum)


def row(case: Case, sizes: BenchSizes, setup: SimulationSetup, cluster: str, result: PolicyResult) -> dict[str, Any]:
    """One rule on one workload, by the names of the pull request where it has them.

    `expert_imbalance`, `expert_cv` and `rank_imbalance` are of the counted steps together, the last one by the rank
    that computes the tokens without balancing; `overload_before` and `overload_after` are means over micro-batches.
    """
    counted = case.trace.counts[setup.warmup :, 0].astype(np.float64)  # [N, R, M, E]
    load_E = counted.sum(axis=(0, 1, 2))
    rank_R = load_E.reshape(setup.num_ranks, -1).sum(axis=1)
    stats, records = result.stats, case.trace.num_records - setup.warmup
    return {
        "workload_id": case.name,
        "workload_checksum": case.checksum,
        "series": case.series,
        "mode": "modelled",
        "backend": result.name,
        "cluster": cluster,
        "ep": setup.num_ranks,
        "etp": 1,
        "tp": 1,
        "world_size": setup.num_ranks,
        "num_nodes": setup.num_nodes,
        "num_experts": sizes.num_experts,
        "topk": sizes.top_k,
        "logical_tokens": int(load_E.sum()) // sizes.top_k,
        "assignments": int(load_E.sum()),
        "steps": records,
        "warmup_iters": setup.warmup,
        "seed": sizes.seed,
        "spare_slots": setup.spare_slots,
        "expert_imbalance": float(load_E.max() / load_E.mean()),
        "expert_cv": float(load_E.std() / load_E.mean()),
        "rank_imbalance": float(rank_R.max() / rank_R.mean()),
        "expert_counts": load_E.astype(np.int64).tolist(),
        "overload_before": float(_overload(counted, setup.num_ranks).mean()),
        "overload_after": float(result.imbalance.mean()),
        "overload_after_worst": float(result.imbalance.max()),
        "replicas_per_step": stats.replicas_made / records,
        "experts_moved": stats.experts_moved,
        "moved_bytes": stats.experts_moved * setup.state_bytes,
        "plan_ms": stats.plan_s * 1e3 / max(stats.plans, 1),
        "modelled_ms": result.total_s * 1e3,
        "status": "OK",
    }


def _overload(counted_NRME: FloatArray, num_ranks: int) -> FloatArray:
    """Max / mean tokens by rank, `[N, M]`, of experts where their numbers put them."""
    steps, _, micro_batches, _ = counted_NRME.shape
    load_NMR = counted_NRME.sum(axis=1).reshape(steps, micro_batches, num_ranks, -1).sum(axis=3)
    return np.asarray(load_NMR.max(axis=2) / load_NMR.mean(axis=2))


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the least predicted time; the first of equal ones."""
    return min(rows, key=lambda one: float(one["modelled_ms"]))
