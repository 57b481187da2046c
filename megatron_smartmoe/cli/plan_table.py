"""What `smartmoe plan` prints."""

from __future__ import annotations

import re
from collections import Counter

from megatron_smartmoe.planner.explain import GB, memory_lines, time_lines
from megatron_smartmoe.planner.plan_json import mfu
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.search import Ranking, SearchResult, seconds_of

REASONS = 8  # kinds of rejection to print


def as_table(result: SearchResult, pricing: Pricing, plain: Launch | None) -> str:
    """One line per launch, and one for plain Megatron; the times are parts of the step and add up with `rest`."""
    head = f"{'':3} {'launch':<40} {'step s':>8} {'worst s':>8} {'tok/s/GPU':>9} {'MFU':>6} {'GB':>6} "
    head += f"{'dense':>7} {'experts':>7} {'a2a':>7} {'TP/CP':>7} {'bubble':>7} {'rest':>7}"
    lines = [head]
    for number, launch in enumerate(result.best, 1):
        lines.append(_row(f"{number:3}", launch, pricing))
    if plain is not None and plain not in result.best:
        lines.append(_row("  -", plain, pricing))
    return "\n".join(lines)


def beside_plain(best: Launch, plain: Launch | None, rank: Ranking) -> str:
    """What balancing is worth, in a sentence."""
    what = "plain Megatron (no balancing, flat all-to-all)"
    if plain is None:
        return f"{what} does not fit on these GPUs"
    if plain is best:
        return f"1 is {what}: no launch with --smartmoe is predicted to be faster"
    slower = seconds_of(plain, rank) / seconds_of(best, rank) - 1
    return f"{what} at its best, {plain.spec.label()}, is {slower:.1%} slower than 1"


def _row(number: str, launch: Launch, pricing: Pricing) -> str:
    time, total_s = launch.time, launch.expected_s
    dense = time.attention_s + time.dense_mlp_s + time.shared_expert_s + time.loss_s
    experts = time.moe_gemm_s + time.moe_experts_s + time.moe_source_s + time.moe_fixed_s
    exchange = time.all_to_all_intra_s + time.all_to_all_inter_s + time.hidden_s
    tensor = time.tensor_comm_s + time.context_comm_s + time.expert_tensor_s
    rest = total_s - dense - experts - exchange - tensor - time.bubble_s
    tokens = pricing.model.tokens_per_step / total_s / launch.spec.gpus
    label = launch.spec.label() if launch.spec.smartmoe else f"{launch.spec.label()} plain"
    text = f"{number} {label:<40} {total_s:8.3f} {launch.worst_s:8.3f} {tokens:9.0f} "
    text += f"{mfu(launch, pricing):6.1%} {launch.memory.total / GB:6.1f} "
    return text + " ".join(f"{value:7.3f}" for value in (dense, experts, exchange, tensor, time.bubble_s, rest))


def breakdown(launch: Launch, pricing: Pricing) -> str:
    """Time and memory of one launch, in terms that add up."""
    return "\n".join([*time_lines(launch), *memory_lines(launch, pricing)])


def rejections(result: SearchResult) -> str:
    """Why points were rejected, by kind, with an example each."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for rejected in result.rejected:
        kind = _kind(rejected.reason)
        kinds[kind] += 1
        example.setdefault(kind, f"{rejected.spec.label()}: {rejected.reason}")
    lines = [f"{result.shapes} points, {result.priced} launches priced, {len(result.rejected)} rejected:"]
    for kind, count in kinds.most_common(REASONS):
        lines.append(f"  {count:6} {kind:<34} e.g. {example[kind]}")
    hidden = len(kinds) - REASONS
    return "\n".join(lines + ([f"         and {hidden} more kinds (--json has all)"] if hidden > 0 else []))


def _kind(reason: str) -> str:
    if "slower than the first" in reason:
        return "slower"
    if reason.startswith("at least"):
        return "cannot be among the best"
    if reason.startswith("needs"):
        return "too large"
    rule = reason.split(" = ")[0].split(" does not")[0].split(", there are")[0]
    return "breaks a rule: " + re.sub(r" \d+", "", rule)  # one kind, whatever its numbers
