"""The pool: settings of one launch that can be changed while it runs, each priced under every scenario of the load.

Method. The offline phase leaves the choices open that need no restart: how often expert placement is re-evaluated, how
many of the spare slots are used and how replicas are planned, and into how many chunks each all-to-all is split. Each
combination gets its seconds per scenario; the online phase calls `choose` with the predictions for the present load,
and switches when another setting is better by more than a margin (hysteresis), so that noise does not make it flip.
Training reads the pool that was saved with a plan; `choose` is a pure function, so every switch can be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.pricing import Launch, Pricing
from megatron_smartmoe.planner.space import SpaceOptions, overlap_degrees
from megatron_smartmoe.spec.parallel import FLAT, Replicas
from megatron_smartmoe.spec.readers import values
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object

VERSION = 1
MOST_ENTRIES = 10_000  # settings of a pool: a launch has a few dozen
# Estimates; noise of step times is a few percent (docs/pool.md).
MARGIN = 0.02  # share of the step time that a switch must save
NEARLY = 0.005  # share of the best predicted time that a setting with fewer changes may be slower
SETTLE_ITERATIONS = 20  # after a switch, before the settings are compared again


@dataclass(frozen=True, kw_only=True)
class PoolSetting:
    """What can be changed without a restart.

    Attributes:
        homes_interval: expert placement is re-evaluated every so many iterations; 0 leaves the homes where they are.
        spare_slots: spare slots per rank that are used, of those that the launch has.
        replicas: how replicas are planned.
        overlap_degree: chunks of each all-to-all.
    """

    homes_interval: int
    spare_slots: int
    replicas: Replicas
    overlap_degree: int

    @property
    def key(self) -> str:
        """The setting's name in logs and files."""
        return f"homes{self.homes_interval}-K{self.spare_slots}-{self.replicas}-ov{self.overlap_degree}"


@dataclass(frozen=True, kw_only=True)
class PoolEntry:
    """A setting and its price: seconds of a step under each scenario, and their weighted mean."""

    setting: PoolSetting
    scenario_s: Mapping[str, float]
    expected_s: float


@dataclass(frozen=True, kw_only=True)
class Pool:
    """All settings of one launch, fastest first.

    Attributes:
        launch: label of the launch.
        entries: settings with prices.
    """

    launch: str
    entries: tuple[PoolEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {"version": VERSION, "launch": self.launch, "entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Pool:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: another version, or an entry is missing or has another type.
        """
        again = "Write the pool again with smartmoe plan --pool FILE."
        version = content.get("version")
        if type(version) is not int or version != VERSION:
            raise ConfigError("pool.version", version, f"must be {VERSION}", again)
        entries = content.get("entries")
        if not isinstance(entries, list) or len(entries) > MOST_ENTRIES:
            raise ConfigError("pool.entries", entries, f"must be a list of at most {MOST_ENTRIES:,} settings", again)
        return cls(
            launch=values.text(content.get("launch"), "pool.launch", example="TP1 PP1 EP8 DP8 mbs1"),
            entries=tuple(
                values.build(PoolEntry, entry, f"pool.entries[{at}]", again, known_only=False)
                for at, entry in enumerate(entries)
            ),
        )

    @property
    def settings(self) -> tuple[PoolSetting, ...]:
        """All settings, fastest first."""
        return tuple(entry.setting for entry in self.entries)

    @classmethod
    def load(cls, path: Path, field: str) -> Pool:
        """Read a pool from a file of its own, or from the file of a plan.

        Args:
            path: a file that `save`, `smartmoe plan --json` or `--parallel auto` wrote.
            field: the flag that named the file, for errors.

        Raises:
            ConfigError: the file cannot be read, or has no pool.
        """
        named = Named(path=path, field=field, way_out="Make one with smartmoe plan --pool FILE, or pass auto.")
        content = read_object(named)
        content = content.get("pool", content)
        if not isinstance(content, dict) or "entries" not in content:
            raise named.refused("does not contain a pool")
        try:
            pool = cls.from_json(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.field}", error.value, error.rule, error.way_out) from None
        if not pool.entries:
            raise named.refused("contains a pool without settings")
        return pool

    def save(self, path: Path) -> None:
        """Write the pool to a file that `load` reads."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def make_pool(launch: Launch, pricing: Pricing, options: SpaceOptions) -> Pool:
    """Every setting that a launch can switch to, with its price."""
    spec, entries = launch.spec, []
    weights = [scenario.weight for scenario in pricing.loads.scenarios]
    names = [scenario.name for scenario in pricing.loads.scenarios]
    degrees = overlap_degrees(pricing.model, spec, options) if spec.ep > 1 and spec.dispatch == FLAT else (1,)
    spare_slots, interval = (spec.spare_slots, spec.homes_interval) if spec.ep > 1 else (0, 0)
    for setting in pool_settings(homes_interval=interval, spare_slots=spare_slots, overlap_degrees=degrees):
        priced = pricing.price(replace(spec, **asdict(setting)))
        mean = sum(w * s for w, s in zip(weights, priced.scenario_s, strict=True)) / sum(weights)
        scenario_s = dict(zip(names, priced.scenario_s, strict=True))
        entries.append(PoolEntry(setting=setting, scenario_s=scenario_s, expected_s=mean))
    entries.sort(key=lambda entry: (entry.expected_s, entry.setting.key))
    return Pool(launch=spec.label(), entries=tuple(entries))


def pool_settings(*, homes_interval: int, spare_slots: int, overlap_degrees: Sequence[int]) -> tuple[PoolSetting, ...]:
    """All combinations of what a launch can switch between.

    Args:
        homes_interval: of the launch, beside which homes can also stay (0); 0 for a launch that never moves them.
        spare_slots: of the launch; any number of them can be used, planned in any way.
        overlap_degrees: numbers of chunks of an all-to-all.
    """
    modes: list[tuple[int, Replicas]] = [(0, "off")]
    for used in range(1, spare_slots + 1):
        modes += [(used, "history"), (used, "exact"), (used, "auto")]
    return tuple(
        PoolSetting(homes_interval=interval, spare_slots=used, replicas=mode, overlap_degree=degree)
        for interval, (used, mode), degree in product(sorted({0, homes_interval}), modes, overlap_degrees)
    )


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The setting to run next, with the reason.

    Attributes:
        setting: the setting to run.
        switched: whether it differs from the one in force.
        reason: `settling`: the last switch is too recent; `margin`: no setting saves enough; `gain`: another one does.
        why: the reason in words, with the numbers.
    """

    setting: PoolSetting
    switched: bool
    reason: Literal["settling", "margin", "gain"]
    why: str


def choose(
    now: PoolSetting,
    predicted_s: Mapping[PoolSetting, float],
    *,
    measured_s: float,
    since_switch: int,
    margin: float = MARGIN,
) -> Switch:
    """Whether to switch to another setting: a pure function of its arguments.

    Args:
        now: the setting in force.
        predicted_s: seconds of a step under the present load by setting, from the cost model; must contain `now`.
        measured_s: seconds of a step as measured under `now`; predictions are scaled by its ratio to the prediction,
            so an error that all settings share does not matter.
        since_switch: iterations since the last switch.
        margin: share of the step time that a switch must save.
    """
    if since_switch < SETTLE_ITERATIONS:
        why = f"{since_switch} iterations since the last switch, {SETTLE_ITERATIONS} are needed"
        return Switch(setting=now, switched=False, reason="settling", why=why)
    scale = measured_s / predicted_s[now]
    best = _nearest_of_the_best(now, predicted_s)
    gain = 1 - predicted_s[best] / predicted_s[now]
    if best == now:
        return Switch(setting=now, switched=False, reason="margin", why="no other setting is predicted to be faster")
    if gain <= margin:
        why = f"best alternative {best.key} is predicted to save {gain:.1%}, below {margin:.0%}"
        return Switch(setting=now, switched=False, reason="margin", why=why)
    predicted = f"{predicted_s[best] * scale:.3f} s ({gain:.1%} less)"
    why = f"{now.key}: measured {measured_s:.3f} s per step; {best.key}: predicted {predicted}"
    return Switch(setting=best, switched=True, reason="gain", why=why)


def _nearest_of_the_best(now: PoolSetting, predicted_s: Mapping[PoolSetting, float]) -> PoolSetting:
    """Of the settings that are nearly the fastest, the one that changes the least; then the fastest.

    Otherwise the rounding of a prediction could, say, stop experts from moving.
    """
    limit_s = min(predicted_s.values()) * (1 + NEARLY)
    present = asdict(now)

    def order(setting: PoolSetting) -> tuple[int, float, str]:
        changes = sum(value != present[name] for name, value in asdict(setting).items())
        return changes, predicted_s[setting], setting.key

    return min((setting for setting, each in predicted_s.items() if each <= limit_s), key=order)
