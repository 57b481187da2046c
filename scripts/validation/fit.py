"""Fit the step model's constants to measured runs: a few physical numbers, each with a prior.

Method. Each constant is positive and is fitted as its logarithm; the residuals are logarithms of predicted over
measured time, with a soft threshold so that one run that the model does not fit does not bend the others (Huber 1964),
and every constant adds one residual that pulls it to its prior. Machines differ: when the runs come from
several clusters each gets small deviations of its own from the common constants, and a cluster without a run gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from megatron_smartmoe.cost.step.constants import StepConstants
from megatron_smartmoe.cost.step.step import StepTime
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.cluster import ClusterSpec
from scripts.validation.measured import MeasuredRun
from scripts.validation.routed import GateLaw
from scripts.validation.systems import predict

NOISE = 0.05  # relative; a run's own spread between steps is 10 to 20%, its median's a few
MAX_ROUNDS = 30


@dataclass(frozen=True)
class Prior:
    """What is expected of a constant: its middle, and one standard deviation of its logarithm."""

    middle: float
    spread: float
    why: str
    per_cluster: bool = False


PRIORS = {
    "gemm": Prior(0.45, 0.3, "of the fp16 peak, with kernels of 2022", per_cluster=True),
    "card": Prior(
        0.35, 0.8, "of a card per GPU: 8 GPUs share 1, 2, 4 or 8 of them; the geometric mean", per_cluster=True
    ),
    "stated_card": Prior(1.0, 0.3, "of the cards that a cluster file gives a node, where it knows them"),
    "ring": Prior(0.8, 0.2, "of a node's cards, in collectives"),
    "all_to_all_intra": Prior(0.5, 0.7, "grouped sends inside a node", per_cluster=True),
    "all_to_all": Prior(0.6, 0.3, "of a node's cards, in grouped sends of unequal sizes"),
    "even_exchange": Prior(1.4, 0.3, "times that, in one all-to-all of equal blocks"),
    "broadcast": Prior(0.25, 0.5, "of what a collective reaches: FasterMoE's scripts state 2 GB/s beside 8"),
    "gshard": Prior(0.6, 0.4, "Zipf exponent with a balancing loss"),
    "naive": Prior(1.2, 0.4, "Zipf exponent without one; recorded traces give about this"),
    "deepspeed-top1": Prior(0.45, 0.4, "Zipf exponent with a balancing loss, top-1"),
    "kept": Prior(0.7, 0.3, "second choices that GShard's gate keeps"),
    "expert_round": Prior(0.76e-3, 0.5, "seconds per local expert: this code runs experts one after another"),
    "padded_layer": Prior(3e-3, 1.0, "seconds per layer that the padding systems spend on masks"),
    "read_image": Prior(0.5e-3, 1.0, "seconds of an image on its way from the storage that all nodes share"),
}
SHARED_SPREAD = 0.3  # of a cluster's deviation from the common constant, in logarithms


@dataclass(frozen=True)
class Machines:
    """A cluster's machines.

    Attributes:
        spec: its file.
        knows_cards: the network between nodes is the cluster's own; False where the file gives each GPU a card because
            nobody has said how many a node has.
    """

    spec: ClusterSpec
    knows_cards: bool = True


@dataclass(frozen=True)
class Fitted:
    """Constants and how to predict with them.

    Attributes:
        values: constant -> value common to all clusters.
        deviations: (cluster, constant) -> factor on it.
        clusters: name -> machines; the empty name stands for any other.
    """

    values: Mapping[str, float]
    deviations: Mapping[tuple[str, str], float]
    clusters: Mapping[str, Machines]

    def predict(self, run: MeasuredRun) -> StepTime:
        """The run's step."""
        value = {name: v * self.deviations.get((run.cluster, name), 1.0) for name, v in self.values.items()}
        machines = self.machines_of(run)
        card = value["stated_card" if machines.knows_cards else "card"]
        constants = StepConstants(
            fused_attention=False,
            gemm=value["gemm"],
            ring_inter=card * value["ring"],
            all_to_all_intra=value["all_to_all_intra"],
            all_to_all_inter=card * value["all_to_all"],
        )
        kept = min(1.0, value["kept"])
        gates = {
            "gshard": GateLaw(value["gshard"], kept),
            "naive": GateLaw(value["naive"]),
            "deepspeed-top1": GateLaw(value["deepspeed-top1"]),
        }
        gates.setdefault(run.gate, GateLaw(value["gshard"]))
        cluster = replace(machines.spec, nodes=max(1, run.gpus // machines.spec.gpus_per_node))
        return predict(run, cluster, constants, gates, value)

    def machines_of(self, run: MeasuredRun) -> Machines:
        """The machines that a run was measured on."""
        return self.clusters.get(run.cluster, self.clusters[""])


def fit(runs: Sequence[MeasuredRun], clusters: Mapping[str, Machines]) -> Fitted:
    """Constants that explain `runs`; without runs, the priors' middles."""
    seen = sorted({run.cluster for run in runs})
    own = [(cluster, name) for cluster in seen for name, p in PRIORS.items() if p.per_cluster] if len(seen) > 1 else []

    def fitted(at: FloatArray) -> Fitted:
        values = {
            name: prior.middle * float(np.exp(prior.spread * x))
            for (name, prior), x in zip(PRIORS.items(), at, strict=False)
        }
        factors = {key: float(np.exp(SHARED_SPREAD * x)) for key, x in zip(own, at[len(PRIORS) :], strict=True)}
        return Fitted(values, factors, clusters)

    def residuals(at: FloatArray) -> FloatArray:
        model = fitted(at)
        errors = [np.log(model.predict(run).total_s / run.time_s) / NOISE for run in runs]
        return np.concatenate([errors, at])

    start = np.zeros(len(PRIORS) + len(own))
    if not runs:
        return fitted(start)
    solve: Callable[..., object] = least_squares
    found = solve(residuals, start, diff_step=1e-3, loss="soft_l1", max_nfev=MAX_ROUNDS)
    return fitted(found.x)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class FitSetting:
    """Runs that compete: one model, cluster, number of GPUs and capacity.

    Attributes:
        regret: how much slower the run ranked first is than the fastest measured one; 0.03 is 3%.
    """

    key: str
    best_measured: str
    first_predicted: str
    regret: float
    runs: int


def fit_settings(runs: Sequence[MeasuredRun], predicted_s: Sequence[float]) -> list[FitSetting]:
    """For each setting, the fastest measured run and the one that the prediction ranks first."""
    by_key: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        by_key.setdefault(run.key, []).append(at)
    found = []
    for key, members in by_key.items():
        fastest = min(members, key=lambda at: runs[at].time_s)
        first = min(members, key=lambda at: predicted_s[at])
        regret = runs[first].time_s / runs[fastest].time_s - 1
        found.append(FitSetting(key, runs[fastest].label, runs[first].label, regret, len(members)))
    return found
