"""Measured runs of other MoE systems as launches of this planner: what each row trained, and under which load.

The systems are those of the SmartMoE paper (Zhai et al., USENIX ATC 2023): FastMoE, FasterMoE, SmartMoE's static part
and an Alpa-like choice on one code base, DeepSpeed beside them. All train the same GPT-MoE in fp16 with unfused
attention, without sharded optimizer and without overlap, so a row differs from a planner's launch by its load alone:

- a gate's popularity is a Zipf law, one exponent per gate, no expert above 1 / top_k (a token chooses it once);
- a capacity drops what an expert gets above `capacity` times the mean; GShard's gate also drops second choices;
- FasterMoE replicates the hottest experts on every rank when its own rule says so (He et al., PPoPP 2022);
- DeepSpeed pads every expert to the capacity, or to the fullest expert where there is none, and dispatches by einsum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_smartmoe.cost.moe_layer import LayerFlow
from megatron_smartmoe.cost.step.constants import StepConstants, layer_constants, spec_nodes
from megatron_smartmoe.cost.step.moe import moe_times
from megatron_smartmoe.cost.step.step import StepTime, step_time
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.model import ModelSpec, MoESpec
from megatron_smartmoe.spec.parallel import ParallelSpec, violation
from megatron_smartmoe.spec.readers.csv_rows import Row

VOCAB = 50304  # GPT-2's, padded, as the runs' FLOP count says
PADDED = ("deepspeed", "tutel")  # systems that pad every expert
SHARED_CARD = True  # the GPUs of a node share its network card
SPREAD = (0.25, 1.75)  # exponents of layers over their mean, evenly between: some are nearly even, some collapse
COLUMNS = (
    "cluster gpus system layers hidden heads seq topk experts gate capacity tp pp dp ep edp gbs mbs shadow "
    "median_ms_skip10"
).split()


_WHOLE = "gpus hidden heads seq topk experts tp pp ep gbs mbs".split()


class NotGpt(ConfigError):
    """A row of another kind of model."""


@dataclass(frozen=True)
class GateLaw:
    """How a gate spreads tokens.

    Attributes:
        exponent: exponent of the Zipf law, mean over layers and time; single layers are spread around it by `SPREAD`.
        kept: share of second choices that the gate keeps.
    """

    exponent: float
    kept: float = 1.0


@dataclass(frozen=True)
class MeasuredRun:
    """One row.

    Attributes:
        key: the setting whose runs compete: model, cluster, GPUs, capacity.
        label: system and parallel sizes.
        system: the code base.
        gate: name of the gate.
        capacity: factor above which tokens are dropped; infinity for none.
        cluster: name of the machines.
        shadow: FasterMoE's shadowing was on.
        time_s: median step after warm-up.
    """

    key: str
    label: str
    system: str
    gate: str
    capacity: float
    cluster: str
    shadow: bool
    model: ModelSpec
    spec: ParallelSpec
    time_s: float


def run_of(row: Row) -> MeasuredRun:
    """Read one row of the CSV.

    Raises:
        NotGpt: the row is not a GPT run (a vision model's sizes are not in the columns).
        ConfigError: a cell is not what its column needs.
    """
    if not row.is_whole("hidden") or not row.is_whole("seq"):
        rule = "is not one transformer shape; only GPT rows can be predicted"
        raise NotGpt(f"{row.where}: hidden", row.text("hidden"), rule, "Leave the row out.")
    number = {name: row.whole(name, least=1) for name in _WHOLE}
    hidden, top_k, gpus = number["hidden"], number["topk"], number["gpus"]
    for name, least in (("heads", hidden), ("topk", 4 * hidden), ("topk", number["experts"])):
        if number[name] > least:
            raise ConfigError(f"{row.where}: {name}", number[name], f"must be at most {least}", "Correct the cell.")
    model = ModelSpec(
        name="gpt-moe",
        layers=row.whole("layers", least=1, most=10_000),
        hidden=hidden,
        heads=number["heads"],
        query_groups=number["heads"],
        head_dim=hidden // number["heads"],
        ffn=4 * hidden,
        vocab=VOCAB,
        seq_length=number["seq"],
        global_batch=number["gbs"],
        norm="LayerNorm",
        gated=False,
        bias=True,
        tied=True,
        position="learned_absolute",
        moe=MoESpec(experts=row.whole("experts", least=1, most=65_536), top_k=top_k, ffn=4 * hidden // top_k),
    )
    spec = ParallelSpec(
        gpus=gpus,
        tp=number["tp"],
        pp=number["pp"],
        ep=number["ep"],
        micro_batch=number["mbs"],
        global_batch=number["gbs"],
        distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        grad_reduce_in_fp32=False,
        implementation="local",
    )
    reason = violation(model, spec)
    if reason:
        raise ConfigError(f"{row.where}: gpus", gpus, f"is a launch that cannot be: {reason}", "Correct the row.")
    return MeasuredRun(
        key=f"{row.text('cluster')} {gpus} L{model.layers} H{hidden} E{model.moe.experts} "
        f"capacity {row.text('capacity')}",
        label=f"{row.text('system')} {spec.label()}",
        system=row.text("system"),
        gate=row.text("gate"),
        capacity=row.number("capacity", finite=False),
        cluster=row.text("cluster"),
        shadow=row.text("shadow") == "ON",
        model=model,
        spec=spec,
        time_s=row.number("median_ms_skip10") * 1e-3,
    )


def predict(
    run: MeasuredRun,
    cluster: ClusterSpec,
    constants: StepConstants,
    gates: Mapping[str, GateLaw],
    system_s: Mapping[str, float],
) -> StepTime:
    """The run's step on `cluster` with these constants."""
    flows_L = flows_of(run, gates[run.gate], spec_nodes(cluster, run.spec.ep))
    layer = layer_constants(cluster, run.model, run.spec, constants, shared_card=SHARED_CARD)
    if run.system not in PADDED:
        layer = replace(layer, expert_s=layer.expert_s + system_s["expert_round"])
    moe = [moe_times([flow], layer, run.model, run.spec, cluster, constants) for flow in flows_L]
    if run.system in PADDED:
        busiest = sum(float(flow.load_ER.sum(axis=0).max()) for flow in flows_L) / len(flows_L)
        extra_s = _einsum_s(run, busiest, cluster, constants) + system_s["padded_layer"]
        moe = [replace(one, layer=replace(one.layer, source_s=one.layer.source_s + extra_s)) for one in moe]
    # FasterMoE fills its replicas in every micro-batch.
    spec = replace(run.spec, replicas="exact", spare_slots=1) if run.shadow else run.spec
    return step_time(run.model, spec, cluster, constants, moe)


def _einsum_s(run: MeasuredRun, busiest_tokens: float, cluster: ClusterSpec, constants: StepConstants) -> float:
    """Dispatch and combine as products with a one-hot [tokens, experts, capacity], forward and backward.

    Each is 2 x tokens x (experts x capacity) x H operations; a rank's padded rows are as many as it computes.
    """
    tokens = run.spec.micro_batch * run.model.seq_length
    flops = 5 * 2.0 * tokens * busiest_tokens * run.model.hidden
    return flops / (cluster.gpu.peak_flops * constants.gemm)


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


@lru_cache(maxsize=1024)
def flows_of(run: MeasuredRun, gate: GateLaw, nodes: int) -> list[LayerFlow]:
    """The flow of each layer: its own exponent, its own order of the experts."""
    model, spec = run.model, run.spec
    experts, ranks = model.moe.experts, spec.ep
    tokens = spec.micro_batch * model.seq_length * model.moe.top_k
    rng = np.random.default_rng(0)
    flows = []
    for spread in rng.permutation(np.linspace(*SPREAD, model.layers)):
        law = replace(gate, exponent=gate.exponent * spread)
        share_E = _computed(popularity(law, experts, model.moe.top_k), run, gate)
        counts_RE = np.broadcast_to(share_E[rng.permutation(experts)] * tokens, (ranks, experts))
        slots_RS = np.arange(experts).reshape(ranks, -1)
        flow = LayerFlow.equal_split(counts_RE, slots_RS, num_nodes=nodes)
        flows.append(_shadowed(flow, run, counts_RE) if run.shadow else flow)
    return flows


def _computed(share_E: FloatArray, run: MeasuredRun, gate: GateLaw) -> FloatArray:
    """Each expert's rows over all assignments, after drops and padding."""
    experts = len(share_E)
    if run.system in PADDED:  # every expert computes the same
        full = run.capacity if np.isfinite(run.capacity) else float(share_E.max()) * experts
        return np.full(experts, full / experts)
    kept = (1 + gate.kept) / 2 if run.model.moe.top_k == 2 else 1.0
    return np.minimum(share_E * kept, run.capacity / experts)


def _shadowed(flow: LayerFlow, run: MeasuredRun, counts_RE: FloatArray) -> LayerFlow:
    """FasterMoE's policy: the k hottest experts get replicas on every rank, while its cost model says that this pays.

    Source: He et al., PPoPP 2022, section 4, with the 8 GB/s and 112 TFLOP/s of its scripts.
    """
    hidden, (ranks, experts) = run.model.hidden, counts_RE.shape
    alpha = run.model.moe.ffn / hidden
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
