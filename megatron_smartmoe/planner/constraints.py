"""What a user's own flags leave open: a command line as limits of the space, and the flags that a plan decides.

`--parallel auto` searches the launches that agree with every flag of `DECIDED` on the command line, and takes the rest
of them from the plan. Flags of Megatron that split the model in a way that the space does not have are refused, with
the flag that expresses it another way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import (
    DISPATCH,
    GRANULARITY,
    LAYOUT,
    MICRO_BATCH,
    MODULES,
    OTHER_SPLITS,
    OVERLAP_DEGREE,
    PIPELINE_STAGES,
    RECOMPUTE_FLAGS,
    SEQUENCE_PARALLEL,
    SIZES,
    SPARE_SLOTS,
    SWITCHES,
    VIRTUAL_STAGES,
    int_value,
    layout_layers,
    parse_tokens,
    recompute_mode,
)
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.parallel import ParallelSpec

# flag -> (field of SpaceOptions with the values to try, field of ParallelSpec with the value of one launch)
_TRIED = {
    MICRO_BATCH: ("micro_batches", "micro_batch"),
    SPARE_SLOTS: ("spare_slots", "spare_slots"),
    OVERLAP_DEGREE: ("overlap_degrees", "overlap_degree"),
}
# Searched only when they are asked for: their values are kept, also those of a configuration.
KEPT_FROM_CONFIG = (SPARE_SLOTS, OVERLAP_DEGREE, DISPATCH)
# What a plan decides; a configuration's own values are replaced by the plan's.
DECIDED = (*SIZES, MICRO_BATCH, *SWITCHES, *RECOMPUTE_FLAGS, *OTHER_SPLITS, LAYOUT, SEQUENCE_PARALLEL)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the user's flags leave open.

    Attributes:
        options: the space that is left.
        given: values that every launch must have, by field of ParallelSpec.
        kept: the user's flags that restrict the space, each with its values, as given.
    """

    options: SpaceOptions
    given: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    def disagreement(self, spec: ParallelSpec) -> str | None:
        """The first thing in which a launch differs from what the user gave, or None."""
        for name, value in {**self.options.fixed, **self.given}.items():
            if getattr(spec, name) != value:
                return f"it has {name} {getattr(spec, name)}, not {value}"
        return None


def constraints_from_flags(tokens: Sequence[str], base: SpaceOptions) -> Constraints:
    """Restrict a space to what agrees with a command line; flags that the planner does not decide are left alone.

    Args:
        tokens: the user's own flags. `--no-X` of a switch turns X off.
        base: the space without them.

    Raises:
        ConfigError: a flag has no number where it needs one, or splits the model as the space cannot.
    """
    flags = parse_tokens(tokens)
    for flag in OTHER_SPLITS:
        if flag in flags:
            rule = "is a pipeline split that --parallel auto does not support"
            way_out = f"Use {LAYOUT} or {VIRTUAL_STAGES}, or remove --parallel auto."
            raise ConfigError(flag, " ".join(flags[flag]) or True, rule, way_out)
    given: dict[str, Any] = {name: _positive(flag, flags[flag]) for flag, name in SIZES.items() if flag in flags}
    kept = [flag for flag in SIZES if flag in flags]
    changes: dict[str, Any] = {}
    for flag, (tried, name) in _TRIED.items():
        if flag in flags and flags[flag] != ["auto"]:
            given[name] = _positive(flag, flags[flag]) if flag == MICRO_BATCH else int_value(flag, flags[flag])
            changes[tried] = (given[name],)
            kept.append(flag)
    if DISPATCH in flags and flags[DISPATCH] != ["auto"]:
        given["dispatch"] = " ".join(flags[DISPATCH])
        changes["dispatches"] = (given["dispatch"],)
        kept.append(DISPATCH)
    for flag, name in SWITCHES.items():
        for form in (flag, _negative(flag)):
            if form in flags:
                changes[name] = given[name] = form == flag
                kept.append(form)
    _complete_overlap(changes, base)
    if LAYOUT in flags:
        given |= _layout("".join(flags[LAYOUT]), given.get("pp"))
        changes["layers_of_chunk"] = given["layers_of_chunk"]
        kept.append(LAYOUT)
    if recompute := [flag for flag in RECOMPUTE_FLAGS if flag in flags]:
        granularity, modules = flags.get(GRANULARITY, []), flags.get(MODULES, [])
        given["recompute"] = recompute_mode(" ".join(granularity), modules)
        changes["recompute"] = (given["recompute"],)
        kept += recompute
    changes["fixed"] = {**base.fixed} | {name: given[name] for name in SIZES.values() if name in given}
    texts = tuple(" ".join([flag, *flags[flag]]) for flag in kept)
    return Constraints(options=replace(base, **changes), given=given, kept=texts)


def without_negated(tokens: Sequence[str], known: Collection[str]) -> list[str]:
    """The command line without each `--no-X` that Megatron does not know: the planner obeys it by leaving X out."""
    own = {_negative(flag) for flag in DECIDED} - set(known)
    return [token for token in tokens if token not in own]


def _negative(flag: str) -> str:
    """`--no-X` of `--X`."""
    return "--no-" + flag.removeprefix("--")


def _positive(flag: str, values: Sequence[str]) -> int:
    value = int_value(flag, values)
    if value < 1:
        raise ConfigError(flag, value, "must be at least 1", "Remove it to have it planned.")
    return value


def _complete_overlap(changes: dict[str, Any], base: SpaceOptions) -> None:
    """Keep the overlapped parameter gather consistent with what it needs.

    Asked for by name, it turns on what it needs; where what it needs is off, it is turned off.
    """
    needs = ("distributed_optimizer", "overlap_grad_reduce")
    if changes.get("overlap_param_gather"):
        for name in needs:
            changes.setdefault(name, True)
    elif not all(changes.get(name, getattr(base, name)) for name in needs):
        changes.setdefault("overlap_param_gather", False)


def _layout(text: str, pp: int | None) -> dict[str, Any]:
    sizes = layout_layers(text)
    if not pp or len(sizes) % pp:
        rule = f"has {len(sizes)} chunks, and needs {PIPELINE_STAGES} that divides them"
        raise ConfigError(LAYOUT, text, rule, f"Pass it too, for example {len(sizes)}.")
    if "m" in text.rpartition("|")[0]:
        rule = "is not supported with --parallel auto: the planner has prediction blocks (m) in the last chunk only"
        raise ConfigError(LAYOUT, text, rule, "Move them there, or remove --parallel auto.")
    return {"layers_of_chunk": sizes, "vpp": len(sizes) // pp}
