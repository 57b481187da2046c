"""What a user's own flags leave open: a command line as limits of the space, and the flags that a plan decides.

`--parallel auto` searches the launches that agree with every flag of `DECIDED` on the command line, and takes the rest
of them from the plan. Flags of Megatron that split the model in a way that the space does not have are refused with
the flag that says it another way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.planner.words import layers_of_layout, number, recompute_of, said
from megatron_smartmoe.spec.parallel import ParallelSpec

_LAYOUT = "--pipeline-model-parallel-layout"
_SIZES = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--num-virtual-stages-per-pipeline-rank": "vpp",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
    "--context-parallel-size": "cp",
}
# flag -> (what the space calls the values that it tries, what a launch calls the one that it has)
_TRIED = {
    "--micro-batch-size": ("micro_batches", "micro_batch"),
    "--smartmoe-spare-slots": ("spare_slots", "spare_slots"),
    "--smartmoe-overlap-degree": ("overlap_degrees", "overlap_degree"),
}
_SWITCHES = {
    "--use-distributed-optimizer": "distributed_optimizer",
    "--overlap-grad-reduce": "overlap_grad_reduce",
    "--overlap-param-gather": "overlap_param_gather",
}
_RECOMPUTE = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules")
_OTHER_SPLITS = (
    "--num-layers-per-virtual-pipeline-stage",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
# Not searched without being asked for: whoever names them, also in a configuration, is followed.
FOLLOWED = ("--smartmoe-spare-slots", "--smartmoe-overlap-degree")
# What a plan says; a configuration's own are replaced by the plan's.
DECIDED = (
    *_SIZES,
    "--micro-batch-size",
    *_SWITCHES,
    *_RECOMPUTE,
    *_OTHER_SPLITS,
    _LAYOUT,
    "--sequence-parallel",
)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the user's flags leave open.

    Attributes:
        options: the space.
        given: what every launch of it has, by field of ParallelSpec.
        kept: flags of the user that restrict it, each with its values, as given.
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


def constraints_from_flags(words: Sequence[str], base: SpaceOptions) -> Constraints:
    """Restrict a space to what agrees with a command line; flags that the planner does not decide are left alone.

    Args:
        words: the user's own flags. `--no-X` of a switch turns X off.
        base: the space without them.

    Raises:
        ConfigError: a flag has no number where it needs one, or splits the model as the space cannot.
    """
    flags = said(words)
    _refuse_other_splits(flags)
    given: dict[str, Any] = {name: _positive(flag, flags[flag]) for flag, name in _SIZES.items() if flag in flags}
    kept = [flag for flag in _SIZES if flag in flags]
    changes: dict[str, Any] = {}
    for flag, (tried, name) in _TRIED.items():
        if flag in flags and flags[flag] != ["auto"]:
            given[name] = _positive(flag, flags[flag]) if flag == "--micro-batch-size" else number(flag, flags[flag])
            changes[tried] = (given[name],)
            kept.append(flag)
    for flag, name in _SWITCHES.items():
        for form in (flag, _negative(flag)):
            if form in flags:
                changes[name] = given[name] = form == flag
                kept.append(form)
    _settle_overlap(changes, base)
    if _LAYOUT in flags:
        given |= _layout(flags[_LAYOUT], given)
        changes["layers_of_chunk"] = given["layers_of_chunk"]
        kept.append(_LAYOUT)
    if said_here := [flag for flag in _RECOMPUTE if flag in flags]:
        given["recompute"] = recompute_of(flags)
        changes["recompute"] = (given["recompute"],)
        kept += said_here
    changes["fixed"] = {**base.fixed} | {name: given[name] for name in _SIZES.values() if name in given}
    texts = tuple(" ".join([flag, *flags[flag]]) for flag in kept)
    return Constraints(options=replace(base, **changes), given=given, kept=texts)


def without_refusals(words: Sequence[str], known: Collection[str]) -> list[str]:
    """The command line without those `--no-X` that only the planner understands: it heeds them by leaving X out."""
    own = {_negative(flag) for flag in DECIDED} - set(known)
    return [word for word in words if word not in own]


def _negative(flag: str) -> str:
    """`--no-X` of `--X`."""
    return "--no-" + flag.removeprefix("--")


def _refuse_other_splits(flags: Mapping[str, list[str]]) -> None:
    for flag in _OTHER_SPLITS:
        if flag in flags:
            rule = "is not a split that --parallel auto can search with"
            way_out = f"Say it as {_LAYOUT} or --num-virtual-stages-per-pipeline-rank, or leave --parallel auto out."
            raise ConfigError(flag, " ".join(flags[flag]) or True, rule, way_out)


def _positive(flag: str, values: list[str]) -> int:
    value = number(flag, values)
    if value < 1:
        raise ConfigError(flag, value, "must be at least 1", "Leave it out, and it is planned.")
    return value


def _settle_overlap(changes: dict[str, Any], base: SpaceOptions) -> None:
    """Without what it rests on, the parameter gather cannot overlap; asked for by name, it brings what it rests on."""
    rests_on = ("distributed_optimizer", "overlap_grad_reduce")
    if changes.get("overlap_param_gather"):
        for name in rests_on:
            changes.setdefault(name, True)
    elif not all(changes.get(name, getattr(base, name)) for name in rests_on):
        changes.setdefault("overlap_param_gather", False)


def _layout(values: list[str], given: Mapping[str, int]) -> dict[str, Any]:
    text = "".join(values)
    sizes = layers_of_layout(text)
    pp = given.get("pp", 0)
    if not pp or len(sizes) % pp:
        rule = f"has {len(sizes)} chunks, and needs --pipeline-model-parallel-size that divides them"
        raise ConfigError(_LAYOUT, text, rule, f"Pass it too, for example {len(sizes)}.")
    return {"layers_of_chunk": sizes, "vpp": len(sizes) // pp}
