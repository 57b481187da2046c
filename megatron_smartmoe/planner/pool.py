"""The pool: settings of one launch that can be changed while it runs, each priced under every scenario of the load.

Method. The offline phase leaves the choices that need no restart open: how often homes move, how many of the spare
slots are used and how replicas are planned, into how many pieces the all-to-all is cut. Each combination gets its
seconds per scenario; the online phase asks `choose` with the predictions for the load as it is, and switches when
another setting is better by more than a margin (hysteresis), so that noise does not make it flip. Pools saved beside a
plan are read back by the trainer; `choose` is a pure function, so every switch can be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.pricing import Plan, Pricing
from megatron_smartmoe.planner.space import SpaceOptions, overlap_degrees
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import Replicas

VERSION = 1
MARGIN = 0.02  # of the step, that another setting must win
NEARLY = 0.005  # of the best prediction, which another setting may miss if less has to change for it
SETTLE_ITERATIONS = 20  # after a switch, before the next look


@dataclass(frozen=True, kw_only=True)
class PoolSetting:
    """What can be changed without a restart.

    Attributes:
        homes_interval: iterations between two looks at the homes; 0 leaves them alone.
        spare_slots: of the launch's slots, how many are used.
        replicas: how copies are planned.
        overlap_degree: pieces of each all-to-all.
    """

    homes_interval: int
    spare_slots: int
    replicas: Replicas
    overlap_degree: int

    @property
    def key(self) -> str:
        """Name in logs and files."""
        return f"homes{self.homes_interval}-K{self.spare_slots}-{self.replicas}-ov{self.overlap_degree}"


@dataclass(frozen=True, kw_only=True)
class PoolEntry:
    """A setting and its price: seconds of a step under each scenario, and the mean by their weights."""

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
            ConfigError: another version, or entries are missing.
        """
        if content.get("version") != VERSION:
            rule = f"only version {VERSION} is known"
            raise ConfigError("pool.version", content.get("version"), rule, "Plan again with smartmoe plan --pool.")
        entries = tuple(
            PoolEntry(
                setting=PoolSetting(**entry["setting"]),
                scenario_s=dict(entry["scenario_s"]),
                expected_s=float(entry["expected_s"]),
            )
            for entry in cast(list[dict[str, Any]], content["entries"])
        )
        return cls(launch=str(content["launch"]), entries=entries)

    @property
    def settings(self) -> tuple[PoolSetting, ...]:
        """All settings, fastest first."""
        return tuple(entry.setting for entry in self.entries)

    @classmethod
    def load(cls, path: Path, field: str) -> Pool:
        """Read a pool from its own file or from a plan's that has one in it.

        Args:
            path: of what `save`, `smartmoe plan --json` or `--parallel auto` wrote.
            field: that named the file, for the error.

        Raises:
            ConfigError: it cannot be read, or it is no pool.
        """
        way_out = "Make one with smartmoe plan --pool FILE, or pass auto."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(field, str(path), f"cannot be read as JSON: {error}", way_out) from None
        try:
            pool = cls.from_json(content.get("pool", content))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(field, str(path), "holds no pool", way_out) from None
        if not pool.entries:
            raise ConfigError(field, str(path), "holds a pool without settings", way_out)
        return pool

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def make_pool(plan: Plan, pricing: Pricing, options: SpaceOptions) -> Pool:
    """Every setting that the launch of `plan` can switch to."""
    spec, entries = plan.spec, []
    weights = [scenario.weight for scenario in pricing.loads.scenarios]
    names = [scenario.name for scenario in pricing.loads.scenarios]
    for setting in _settings(pricing.model, plan, options):
        priced = pricing.plan(replace(spec, **asdict(setting)))
        mean = sum(w * s for w, s in zip(weights, priced.scenario_s, strict=True)) / sum(weights)
        scenario_s = dict(zip(names, priced.scenario_s, strict=True))
        entries.append(PoolEntry(setting=setting, scenario_s=scenario_s, expected_s=mean))
    entries.sort(key=lambda entry: (entry.expected_s, entry.setting.key))
    return Pool(launch=spec.label(), entries=tuple(entries))


def _settings(model: ModelSpec, plan: Plan, options: SpaceOptions) -> list[PoolSetting]:
    spec = plan.spec
    if spec.ep == 1:
        return [PoolSetting(homes_interval=0, spare_slots=0, replicas="off", overlap_degree=1)]
    modes: list[tuple[int, Replicas]] = [(0, "off")]
    for used in range(1, spec.spare_slots + 1):
        modes += [(used, "history"), (used, "exact")]
    intervals = sorted({0, spec.homes_interval})
    return [
        PoolSetting(homes_interval=interval, spare_slots=used, replicas=mode, overlap_degree=degree)
        for interval in intervals
        for used, mode in modes
        for degree in overlap_degrees(model, spec, options)
    ]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What to run next, and why.

    Attributes:
        setting: to run.
        switched: whether it is another one than before.
        reason: of what kind the reason is: the last switch is too recent, nothing wins enough, or another setting does.
        why: in words, with the numbers.
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
    """Whether to switch: a pure function of what is known.

    Args:
        now: the setting in force.
        predicted_s: seconds of a step under the present load by setting, from the cost model; must hold `now`.
        measured_s: seconds of a step as measured under `now`; predictions are scaled by its ratio to the prediction,
            so an error that all settings share does not matter.
        since_switch: iterations since the last switch.
        margin: share of the step that a switch must win.
    """
    if since_switch < SETTLE_ITERATIONS:
        why = f"{since_switch} iterations since the last switch, too few"
        return Switch(setting=now, switched=False, reason="settling", why=why)
    scale = measured_s / predicted_s[now]
    best = _nearest_of_the_best(now, predicted_s)
    gain = 1 - predicted_s[best] / predicted_s[now]
    if best == now:
        return Switch(setting=now, switched=False, reason="margin", why="no other setting is predicted to be faster")
    if gain <= margin:
        why = f"best alternative {best.key} wins {gain:.1%}, below {margin:.0%}"
        return Switch(setting=now, switched=False, reason="margin", why=why)
    why = f"{now.key} takes {measured_s:.3f} s, {best.key} should take {predicted_s[best] * scale:.3f} s ({gain:.1%})"
    return Switch(setting=best, switched=True, reason="gain", why=why)


def _nearest_of_the_best(now: PoolSetting, predicted_s: Mapping[PoolSetting, float]) -> PoolSetting:
    """Of the settings that are nearly the fastest, the one for which the fewest things change; then the fastest.

    So that homes, say, are not left alone because a prediction rounds in favour of it.
    """
    limit_s = min(predicted_s.values()) * (1 + NEARLY)
    present = asdict(now)

    def order(setting: PoolSetting) -> tuple[int, float, str]:
        changes = sum(value != present[name] for name, value in asdict(setting).items())
        return changes, predicted_s[setting], setting.key

    return min((setting for setting, each in predicted_s.items() if each <= limit_s), key=order)
