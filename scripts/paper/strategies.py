"""The parallel strategies of Figures 8 and 10: what the planner's model chooses for each setting of measured runs.

The model is fitted to the same runs and prices SmartMoE's code base, so a chosen strategy is compared with the measured
one on the same terms; what is compared is the choice. Beside it stands the same strategy under an even load, which is
what replicas and the exact split make of it and that code base does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_smartmoe.cost.memory.budget import memory_budget
from megatron_smartmoe.spec.cluster import ClusterSpec
from megatron_smartmoe.spec.parallel import violation
from scripts.validation.fit import Fitted, fit_settings
from scripts.validation.measured import MeasuredRun, Part
from scripts.validation.routed import PADDED

BASELINE = "fastmoe"
# Speedups over FastMoE that the paper's Figure 8 has for 16 A100, by capacity: of the sum of 200 iterations.
PUBLISHED = {1.2: 1.483, 2.4: 1.558, 4.8: 1.618, math.inf: 2.190}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting: FastMoE, the fastest measured strategy, and the one that the planner's model chooses.

    Attributes:
        key: model, cluster, GPUs, capacity.
        capacity: factor above which tokens are dropped.
        baseline_s: FastMoE's measured median step.
        measured: the fastest measured strategy of the code base.
        measured_s: its median step.
        chosen: the strategy that is predicted fastest of all that fit into memory.
        predicted_s: its predicted step.
        even_s: the same, if the load of every layer were even.
        candidates: strategies that were priced.
    """

    key: str
    capacity: float
    baseline_s: float
    measured: str
    measured_s: float
    chosen: str
    predicted_s: float
    even_s: float
    candidates: int


def choices(runs: Sequence[MeasuredRun], model: Fitted) -> Iterator[Choice]:
    """A choice for each setting that FastMoE was measured in."""
    own = [run for run in runs if run.system not in PADDED and not run.shadow and not run.vision]
    for setting in fit_settings(own, [run.time_s for run in own]):
        members = [run for run in own if run.key == setting.key]
        baseline = next((run for run in members if run.system == BASELINE), None)
        if baseline is None:
            continue
        fastest = min(members, key=lambda run: run.time_s)
        candidates = list(strategies(baseline, model.machines_of(baseline).spec))
        chosen = min(candidates, key=lambda run: model.predict(run).total_s)
        even = replace(model, values={**model.values, chosen.gate: 0.0})
        yield Choice(
            key=setting.key,
            capacity=baseline.capacity,
            baseline_s=baseline.time_s,
            measured=fastest.parts[0].spec.label(),
            measured_s=fastest.time_s,
            chosen=chosen.parts[0].spec.label(),
            predicted_s=model.predict(chosen).total_s,
            even_s=even.predict(chosen).total_s,
            candidates=len(candidates),
        )


def strategies(run: MeasuredRun, cluster: ClusterSpec) -> Iterator[MeasuredRun]:
    """The run with every PP and EP that divide its ranks and fit into memory; the rest of the launch as it is."""
    (part,) = run.parts
    sizes = [1 << power for power in range(run.gpus.bit_length()) if run.gpus % (1 << power) == 0]
    for pp in sizes:
        for ep in sizes:
            spec = replace(part.spec, pp=pp, ep=ep)
            # The busiest rank's tokens are bounded by those of all ranks, or by what the capacity lets through.
            imbalance = min(float(ep), run.capacity)
            if violation(part.model, spec):
                continue
            budget, _ = memory_budget(part.model, spec, cluster.gpu, imbalance)
            if budget.total <= cluster.gpu.memory_bytes:
                yield replace(run, system="smartmoe", parts=(Part(part.model, spec),))
