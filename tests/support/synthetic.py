"""Synthetic routing traces with a seed: loads whose shape is known, for tests and for regimes no recorded trace shows.

Each kind makes the popularity of every expert in every record and layer; tokens are then drawn from it, so that the
counts carry the sampling noise of real routing. A recorded trace (`spec/trace.py`) is better evidence where there is
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.arrays import FloatArray
from megatron_smartmoe.spec.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class SyntheticSpec:
    """What to make.

    Attributes:
        kind: `uniform`, `zipf`, `lognormal`, `drifting`, `one_hot` or `burst`.
        num_records: N.
        num_layers: L.
        num_sources: source ranks.
        num_experts: E.
        micro_batches: M; 1 leaves the axis out.
        tokens_per_source: tokens of one source rank in one micro-batch, each of which chooses `top_k` experts.
        top_k: experts per token; no expert can get more than 1 / top_k of the assignments.
        skew: zipf, one_hot: the busiest rank's (zipf) or expert's (one_hot) load over the mean; lognormal, drifting,
            burst: sigma of the log popularity.
        num_ranks: zipf: `skew` is measured over this many ranks of consecutive experts; 0 means over single experts.
        drift: drifting: sigma of the step that log popularity takes from one record to the next.
        burst_factor: burst: how many times more popular a bursting expert becomes.
        burst_every: burst: records between the starts of two bursts; one lasts a third of that.
        seed: same seed, same trace.
    """

    kind: str
    num_records: int = 64
    num_layers: int = 4
    num_sources: int = 16
    num_experts: int = 32
    micro_batches: int = 1
    tokens_per_source: int = 8192
    top_k: int = 2
    skew: float = 1.0
    num_ranks: int = 0
    drift: float = 0.05
    burst_factor: float = 8.0
    burst_every: int = 12
    seed: int = 0


def synthetic_trace(spec: SyntheticSpec) -> RoutingTrace:
    """Draw a trace from a spec.

    Raises:
        ConfigError: unknown kind, a count that is not positive, or a skew or drift that cannot be reached.
    """
    if spec.kind not in _KINDS:
        raise ConfigError("kind", spec.kind, "is not a synthetic trace", f"Known: {', '.join(_KINDS)}.")
    _check(spec)
    rng = np.random.default_rng(spec.seed)
    popularity_NLE = np.broadcast_to(
        _KINDS[spec.kind](spec, rng), (spec.num_records, spec.num_layers, spec.num_experts)
    )
    popularity_NLE = _at_most(popularity_NLE / popularity_NLE.sum(axis=-1, keepdims=True), 1 / spec.top_k)
    draws = (spec.num_sources, spec.micro_batches)
    assignments = spec.tokens_per_source * spec.top_k
    counts = rng.multinomial(assignments, popularity_NLE[:, :, None, None], size=(*popularity_NLE.shape[:2], *draws))
    return RoutingTrace(
        counts=(counts if spec.micro_batches > 1 else counts[:, :, :, 0]).astype(np.uint32),
        iteration=np.arange(spec.num_records, dtype=np.int64),
        layer=np.arange(spec.num_layers, dtype=np.int64),
        meta={"experts": spec.num_experts, "top_k": spec.top_k, "source": "synthetic", "spec": asdict(spec)},
    )


def _check(spec: SyntheticSpec) -> None:
    """Whole numbers that must be positive, and a drift that its skew allows."""
    names = ("num_records", "num_layers", "num_sources", "num_experts", "micro_batches", "tokens_per_source", "top_k")
    for name in (*names, "burst_every"):
        if getattr(spec, name) < 1:
            raise ConfigError(name, getattr(spec, name), "must be at least 1", "Choose another number.")
    if spec.top_k > spec.num_experts:
        rule = f"must not be above num_experts = {spec.num_experts}"
        raise ConfigError("top_k", spec.top_k, rule, "Choose fewer experts per token.")
    if spec.kind == "drifting" and 0 < spec.skew < spec.drift:
        rule = f"must not be above skew = {spec.skew:g}, or popularity spreads further than that"
        raise ConfigError("drift", spec.drift, rule, "Choose a slower drift or a larger skew.")


def _at_most(share_NLE: FloatArray, cap: float) -> FloatArray:
    """Cut shares at `cap` and give what was cut to the others in proportion, until none is above it."""
    for _ in range(8):
        over = share_NLE >= cap
        rest = np.where(over, 0.0, share_NLE)
        free = 1.0 - cap * over.sum(axis=-1, keepdims=True)
        share_NLE = np.where(over, cap, rest * free / np.maximum(rest.sum(axis=-1, keepdims=True), 1e-12))
    share_NLE = np.minimum(share_NLE, cap)
    return share_NLE / share_NLE.sum(axis=-1, keepdims=True)


def _uniform(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    return np.ones(spec.num_experts)


def _zipf(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    """Popularity 1 / place ** s, places shuffled per layer; s by bisection so that max / mean meets `skew`."""
    num_bins = spec.num_ranks or spec.num_experts
    place_LE = np.stack([rng.permutation(spec.num_experts) + 1.0 for _ in range(spec.num_layers)])

    def popularity(exponent: float) -> FloatArray:
        share_LE = place_LE**-exponent
        return _at_most(share_LE / share_LE.sum(axis=-1, keepdims=True), 1 / spec.top_k)

    def skew(exponent: float) -> float:
        load = popularity(exponent).reshape(spec.num_layers, num_bins, -1).sum(axis=-1)
        return float(np.mean(load.max(axis=-1) / load.mean(axis=-1)))

    low, high = 0.0, 8.0
    if not skew(low) <= spec.skew <= skew(high):
        rule = f"must be between {skew(low):.2f} and {skew(high):.2f} here"
        raise ConfigError("skew", spec.skew, rule, "Choose another skew, top_k or number of experts.")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if skew(middle) < spec.skew else (low, middle)
    return popularity(high)


def _lognormal(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    return np.exp(spec.skew * rng.standard_normal((spec.num_layers, spec.num_experts)))


def _drifting(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    """Log popularity walks at random and is pulled back so that its spread stays `skew`."""
    log_NLE = np.empty((spec.num_records, spec.num_layers, spec.num_experts))
    log_NLE[0] = spec.skew * rng.standard_normal(log_NLE.shape[1:])
    keep = np.sqrt(max(0.0, 1.0 - (spec.drift / spec.skew) ** 2)) if spec.skew > 0 else 1.0
    for record in range(1, spec.num_records):
        log_NLE[record] = keep * log_NLE[record - 1] + spec.drift * rng.standard_normal(log_NLE.shape[1:])
    return np.exp(log_NLE)


def _one_hot(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    """One expert gets `skew` times the mean, the others share the rest evenly."""
    share = spec.skew / spec.num_experts
    if not 1 / spec.num_experts <= share <= 1 / spec.top_k:
        rule = f"must be between 1 and {spec.num_experts / spec.top_k:g} here"
        raise ConfigError("skew", spec.skew, rule, "One expert cannot get more than 1 / top_k of the assignments.")
    popularity_LE = np.full((spec.num_layers, spec.num_experts), (1 - share) / (spec.num_experts - 1))
    popularity_LE[np.arange(spec.num_layers), rng.integers(spec.num_experts, size=spec.num_layers)] = share
    return popularity_LE


def _burst(spec: SyntheticSpec, rng: np.random.Generator) -> FloatArray:
    """A steady lognormal load in which, every `burst_every` records, another expert is hot for a while."""
    popularity_NLE = np.repeat(_lognormal(spec, rng)[None], spec.num_records, axis=0)
    for begin in range(spec.burst_every // 2, spec.num_records, spec.burst_every):
        expert_L = rng.integers(spec.num_experts, size=spec.num_layers)
        end = begin + max(1, spec.burst_every // 3)
        popularity_NLE[begin:end, np.arange(spec.num_layers), expert_L] *= spec.burst_factor
    return popularity_NLE


_KINDS: dict[str, Callable[[SyntheticSpec, np.random.Generator], FloatArray]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "lognormal": _lognormal,
    "drifting": _drifting,
    "one_hot": _one_hot,
    "burst": _burst,
}
