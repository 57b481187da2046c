"""What `smartmoe plan` prints and writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_smartmoe.planner.explain import GB, memory_lines, time_lines
from megatron_smartmoe.planner.flags import PlanFlags
from megatron_smartmoe.planner.pool import Pool
from megatron_smartmoe.planner.pricing import Plan, Pricing
from megatron_smartmoe.planner.search import SearchResult
from megatron_smartmoe.spec.parallel import ParallelSpec

REASONS = 8  # kinds of rejection that are printed


def as_table(result: SearchResult, pricing: Pricing) -> str:
    """The best few, a line each; the times are parts of the step and add up with `rest`."""
    head = f"{'':3} {'launch':<40} {'step s':>8} {'worst s':>8} {'tok/s/GPU':>9} {'MFU':>6} {'GB':>6} "
    head += f"{'dense':>7} {'experts':>7} {'a2a':>7} {'TP/CP':>7} {'bubble':>7} {'rest':>7}"
    lines = [head]
    for number, plan in enumerate(result.best, 1):
        lines.append(_row(number, plan, pricing))
    return "\n".join(lines)


def _row(number: int, plan: Plan, pricing: Pricing) -> str:
    time, total_s = plan.time, plan.expected_s
    dense = time.attention_s + time.dense_mlp_s + time.shared_expert_s + time.loss_s
    experts = time.moe_gemm_s + time.moe_experts_s + time.moe_source_s + time.moe_fixed_s
    exchange = time.all_to_all_intra_s + time.all_to_all_inter_s + time.hidden_s
    tensor = time.tensor_comm_s + time.context_comm_s + time.expert_tensor_s
    rest = total_s - dense - experts - exchange - tensor - time.bubble_s
    tokens = pricing.model.tokens_per_step / total_s / plan.spec.gpus
    text = f"{number:3} {plan.spec.label():<40} {total_s:8.3f} {plan.worst_s:8.3f} {tokens:9.0f} "
    text += f"{mfu(plan, pricing):6.1%} {plan.memory.total / GB:6.1f} "
    return text + " ".join(f"{value:7.3f}" for value in (dense, experts, exchange, tensor, time.bubble_s, rest))


def mfu(plan: Plan, pricing: Pricing) -> float:
    """Share of the peak that the model's own arithmetic takes: 6 per active weight and token, and attention."""
    model = pricing.model
    matrices = 3 if model.gated else 2
    attention = model.hidden * (model.query_size + model.value_size + 2 * model.query_groups * model.head_dim)
    if model.latent:
        latent = model.latent
        attention = model.hidden * (latent.q_rank + latent.kv_rank + latent.qk_rope_dim + model.value_size)
        attention += (latent.q_rank or model.hidden) * model.query_size
        attention += latent.kv_rank * model.heads * (latent.qk_head_dim + latent.v_head_dim)
    blocks = model.layers + model.mtp_layers
    active = blocks * attention + model.num_moe_layers * matrices * model.hidden * (
        model.moe.top_k * model.moe.ffn + model.moe.shared_ffn
    )
    active += (blocks - model.num_moe_layers) * matrices * model.hidden * model.ffn
    active += (1 + model.mtp_layers) * model.vocab * model.hidden
    scores = blocks * model.seq_length * (model.query_size + model.value_size) / 2  # causal
    flops = 6.0 * (active + scores) * model.tokens_per_step
    return float(flops / (plan.expected_s * plan.spec.gpus * pricing.cluster.gpu.peak_flops))


def breakdown(plan: Plan, pricing: Pricing) -> str:
    """Time and memory of one plan, in terms that add up."""
    return "\n".join([*time_lines(plan), *memory_lines(plan, pricing)])


def rejections(result: SearchResult) -> str:
    """Why points are out, by kind, with an example each."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for rejected in result.rejected:
        kind = _kind(rejected.reason)
        kinds[kind] += 1
        example.setdefault(kind, f"{rejected.spec.label()}: {rejected.reason}")
    lines = [f"{result.shapes} points, {result.priced} launches priced, {len(result.rejected)} out:"]
    for kind, count in kinds.most_common(REASONS):
        lines.append(f"  {count:6} {kind:<34} e.g. {example[kind]}")
    hidden = len(kinds) - REASONS
    return "\n".join(lines + ([f"         and {hidden} more kinds (--json has all)"] if hidden > 0 else []))


def _kind(reason: str) -> str:
    if "slower than the first" in reason:
        return "slower"
    if reason.startswith("at least"):
        return "bounded: cannot be among the best"
    if reason.startswith("needs"):
        return "too big"
    return "breaks a rule: " + reason.split(" = ")[0].split(" does not")[0].rstrip("0123456789 ")


def as_json(
    result: SearchResult, pricing: Pricing, flags: list[PlanFlags], pool: Pool | None, question: dict[str, Any]
) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "version": 1,
        "question": question,
        "best": [plan_json(plan, pricing, one) for plan, one in zip(result.best, flags, strict=True)],
        "pareto": [
            {"launch": p.spec.label(), "expected_s": p.expected_s, "memory_bytes": p.memory.total}
            for p in result.pareto
        ],
        "rejected": [{"launch": r.spec.label(), **_sizes(r.spec), "reason": r.reason} for r in result.rejected],
        "pool": pool.to_json() if pool else None,
        "shapes": result.shapes,
        "priced": result.priced,
        "seconds": result.seconds,
    }


def _sizes(spec: ParallelSpec) -> dict[str, int]:
    return {name: getattr(spec, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "micro_batch")}


def plan_json(plan: Plan, pricing: Pricing, flags: PlanFlags) -> dict[str, Any]:
    """One plan."""
    names = [scenario.name for scenario in pricing.loads.scenarios]
    return {
        "launch": plan.spec.label(),
        "spec": plan.spec.to_json(),
        "expected_s": plan.expected_s,
        "worst_s": plan.worst_s,
        "scenario_s": dict(zip(names, plan.scenario_s, strict=True)),
        "time_s": dict(plan.time.terms()),
        "memory_bytes": {"sum": plan.memory.total, **dict(plan.memory.parts())},
        "stage": plan.stage,
        "hot": plan.hot,
        "tokens_per_s_per_gpu": pricing.model.tokens_per_step / plan.expected_s / plan.spec.gpus,
        "mfu": mfu(plan, pricing),
        "flags": {"megatron": flags.megatron, "smartmoe": flags.smartmoe},
    }
