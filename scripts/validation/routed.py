"""How the measured runs routed: who computed which tokens and who sent them, from a gate's law of popularity.

- A gate's popularity is a Zipf law, one exponent per gate, no expert above 1 / top_k (a token chooses it once).
- A capacity drops what an expert gets above `capacity` times the mean; GShard's gate also drops second choices.
- FasterMoE replicates the hottest experts on every rank when its own rule says so (He et al., PPoPP 2022).
- DeepSpeed and Tutel pad every expert to the capacity, or to the fullest expert where there is none.
- SmartMoE's online placement gives each expert, the most popular first, to the least loaded rank with a free slot. Its
  code remaps a dropped assignment to the last expert, which therefore computes what the capacity dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerCounts, LayerFlow
from megatron_smartmoe.spec.arrays import FloatArray, IntArray
from scripts.validation.measured import MeasuredRun, Part

PADDED = ("deepspeed", "tutel")  # systems that pad every expert
SPREAD = (0.25, 1.75)  # exponents of layers over their mean, evenly between: some are nearly even, some collapse


@dataclass(frozen=True)
class GateLaw:
    """How a gate spreads tokens.

    Attributes:
        exponent: exponent of the Zipf law, mean over layers and time; single layers are spread around it by `SPREAD`.
        kept: share of second choices that the gate keeps.
    """

    exponent: float
    kept: float = 1.0


def popularity(gate: GateLaw, experts: int, top_k: int) -> FloatArray:
    """Share of the assignments that each expert gets, most popular first; sums to 1, none above 1 / top_k."""
    share_E = np.arange(1, experts + 1, dtype=np.float64) ** -gate.exponent
    share_E /= share_E.sum()
    for _ in range(20):
        over_E = share_E > 1 / top_k
        if not over_E.any():
            break
        free = 1 - over_E.sum() / top_k
        share_E = np.where(over_E, 1 / top_k, share_E * free / max(share_E[~over_E].sum(), 1e-12))
    return share_E


@lru_cache(maxsize=4096)
def counts_of(run: MeasuredRun, part: Part, gate: GateLaw, nodes: int) -> list[LayerCounts]:
    """What of each layer's flow decides its time; a fit asks for the same ones again and again."""
    return [LayerCounts.of(flow) for flow in flows_of(run, part, gate, nodes)]


def flows_of(run: MeasuredRun, part: Part, gate: GateLaw, nodes: int) -> list[LayerFlow]:
    """The flow of each layer with experts: its own exponent, its own order of the experts."""
    model, spec = part.model, part.spec
    experts, ranks = model.moe.experts, spec.ep
    tokens = spec.micro_batch * model.seq_length * model.moe.top_k
    rng = np.random.default_rng(0)
    flows = []
    for spread in rng.permutation(np.linspace(*SPREAD, max(1, model.num_moe_layers))):
        law = replace(gate, exponent=gate.exponent * spread)
        share_E = _computed(popularity(law, experts, model.moe.top_k), run, part, gate)[rng.permutation(experts)]
        slots_RS = np.arange(experts).reshape(ranks, -1)
        if run.dynamic:
            slots_RS = _greedy(share_E, ranks)
            share_E = share_E + (np.arange(experts) == experts - 1) * max(0.0, 1 - share_E.sum())
        counts_RE = np.broadcast_to(share_E * tokens, (ranks, experts))
        flow = LayerFlow.equal_split(counts_RE, slots_RS, num_nodes=nodes)
        flows.append(_shadowed(flow, part, counts_RE) if run.shadow else flow)
    return flows


def _greedy(share_E: FloatArray, ranks: int) -> IntArray:
    """Experts by rank: the most popular first, each to the least loaded rank with a free slot."""
    slots_R: list[list[int]] = [[] for _ in range(ranks)]
    load_R = np.zeros(ranks)
    for expert in np.argsort(-share_E, kind="stable"):
        free_R = [rank for rank in range(ranks) if len(slots_R[rank]) < len(share_E) // ranks]
        rank = min(free_R, key=lambda at: float(load_R[at]))
        slots_R[rank].append(int(expert))
        load_R[rank] += share_E[expert]
    return np.array(slots_R)


def _computed(share_E: FloatArray, run: MeasuredRun, part: Part, gate: GateLaw) -> FloatArray:
    """Each expert's rows over all assignments, after drops and padding."""
    experts = len(share_E)
    if run.system in PADDED:  # every expert computes the same
        full = run.capacity if np.isfinite(run.capacity) else float(share_E.max()) * experts
        return np.full(experts, full / experts)
    kept = (1 + gate.kept) / 2 if part.model.moe.top_k == 2 else 1.0
    return np.minimum(share_E * kept, run.capacity / experts)


def _shadowed(flow: LayerFlow, part: Part, counts_RE: FloatArray) -> LayerFlow:
    """FasterMoE's policy: the k hottest experts get replicas on every rank, while its cost model says that this pays.

    Source: He et al., PPoPP 2022, section 4, with the 8 GB/s and 112 TFLOP/s of its scripts.
    """
    hidden, (ranks, experts) = part.model.hidden, counts_RE.shape
    alpha = part.model.moe.ffn / hidden
    move_s, compute_s, replica_s = hidden * 2 / 8e9, 4 * alpha * hidden**2 / 112e12, 32 * alpha * hidden**2 / 8e9
    order_E = np.argsort(-counts_RE.sum(axis=0), kind="stable")
    total_E = counts_RE.sum(axis=0)[order_E]

    def cost_s(k: int) -> float:
        local = float(counts_RE[0, order_E[:k]].sum())
        remote = total_E[k] * (ranks - 1) / ranks
        return float(3 * compute_s * (total_E[k] + local) + 4 * move_s * remote + k * replica_s)

    # Step 1: the k of the smallest predicted time, scanned from 1 for as long as it beats no shadowing.
    best = 0
    for k in range(1, experts):
        if cost_s(k) >= cost_s(0):
            break
        best = k if cost_s(k) < cost_s(best) else best
    # Step 2: a shadowed expert's tokens stay on their source rank.
    load_ER, traffic_RR = flow.load_ER.copy(), flow.traffic_RR.copy()
    for expert in order_E[:best]:
        home = int(np.argmax(flow.load_ER[expert]))
        load_ER[expert] = counts_RE[:, expert]
        traffic_RR[:, home] -= counts_RE[:, expert]
        traffic_RR[np.diag_indices(ranks)] += counts_RE[:, expert]
    ring_RR = np.roll(np.eye(ranks), 1, axis=1) * best  # broadcast and reduce go round once
    return replace(flow, load_ER=load_ER, traffic_RR=traffic_RR, replicas_RR=ring_RR)
