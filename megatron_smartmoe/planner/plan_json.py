"""A search as JSON, for programs: what `smartmoe plan --json` writes, and `--parallel auto` in a run directory."""

from __future__ import annotations

from typing import Any

from megatron_smartmoe.planner.flags import LaunchFlags, megatron_flags
from megatron_smartmoe.planner.pool import Pool
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import SearchResult
from megatron_smartmoe.spec.parallel import ParallelSpec


def as_json(
    result: SearchResult,
    pricing: Pricing,
    flags: list[LaunchFlags],
    pool: Pool | None,
    question: dict[str, Any],
    plain: Launch | None = None,
) -> dict[str, Any]:
    """A whole search.

    Args:
        result: the search.
        pricing: what priced its launches.
        flags: the flags of each of the best launches.
        pool: the pool of the first launch.
        question: what was asked for.
        plain: the best launch of plain Megatron, where it was searched for.
    """
    beside = {} if plain is None else {"plain": launch_json(plain, pricing, megatron_flags(pricing.model, plain.spec))}
    return {
        "version": 1,
        "question": question,
        "best": [launch_json(launch, pricing, one) for launch, one in zip(result.best, flags, strict=True)],
        **beside,
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


def launch_json(launch: Launch, pricing: Pricing, flags: LaunchFlags) -> dict[str, Any]:
    """One launch with its price and its flags."""
    names = [scenario.name for scenario in pricing.loads.scenarios]
    return {
        "launch": launch.spec.label(),
        "spec": launch.spec.to_json(),
        "expected_s": launch.expected_s,
        "worst_s": launch.worst_s,
        "scenario_s": dict(zip(names, launch.scenario_s, strict=True)),
        "time_s": dict(launch.time.terms()),
        "memory_bytes": {"sum": launch.memory.total, **dict(launch.memory.parts())},
        "stage": launch.stage,
        "hot": launch.hot,
        "tokens_per_s_per_gpu": pricing.model.tokens_per_step / launch.expected_s / launch.spec.gpus,
        "mfu": mfu(launch, pricing),
        "flags": {"megatron": flags.megatron, "smartmoe": flags.smartmoe},
    }


def mfu(launch: Launch, pricing: Pricing) -> float:
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
    return float(flops / (launch.expected_s * launch.spec.gpus * pricing.cluster.gpu.peak_flops))
