"""Which faults: drawn from a seed, every kind and every point in turn, the rest at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.reliability.fault_points import ON_RANK_0, POINTS


@dataclass(frozen=True, kw_only=True)
class Length:
    """Of the trainings that are struck: their iterations, and how many lie between two saves."""

    iterations: int
    save_every: int


LONG = Length(iterations=9, save_every=3)
SHORT = Length(iterations=6, save_every=2)  # for CI
# Of a block of faults, how many are of each kind.
KINDS = {
    "kill": 5,
    "pause": 2,
    "long pause": 1,
    "slow": 2,
    "disk full": 2,
    "read-only": 1,
    "refuse memory": 1,
    "flipped file": 3,
    "truncated file": 2,
    "missing file": 1,
    "cut the link": 1,
}
ON_FILES = ("flipped file", "truncated file", "missing file")
ON_MOUNTS = ("disk full", "read-only")
IN_STEPS = ("replica fetch", "gradient return", "split", "optimizer step")
LONG_PAUSE_S = 15.0  # the watchdog names a rank after 3 times the median step and 8 s
TIMED_STEPS = 5  # after which there is a median
NOT_LAUNCHED = (*ON_FILES, "cut the link")
FILES = ("largest shard", "another shard", "index", "format", "tracker", "manifest")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the draw.
        kind: a name of `KINDS`.
        place: a point of `fault_points`, or which file of the newest checkpoint.
        victim: the rank.
        iteration: the first iteration in which the point counts.
        seconds: how long a pause lasts.
        replicas: how replicas are planned: `exact` or `history`.
        at: where in a file, as a share of its length.
        launched: whether the job is started through the launcher.
    """

    number: int
    kind: str
    place: str
    victim: int
    iteration: int
    seconds: float
    replicas: str
    at: float
    launched: bool


def draw(
    count: int, seed: int, *, length: Length, kinds: Sequence[str], launched_every: int, replicas: Sequence[str]
) -> list[Fault]:
    """`count` faults, the same for the same arguments; a longer draw begins with a shorter one.

    Args:
        count: of faults.
        seed: of the draw.
        length: of the trainings.
        kinds: those that this machine can bring about.
        launched_every: of so many faults on processes one goes through the launcher; 0: none does.
        replicas: how replicas may be planned.
    """
    rng = random.Random(seed)
    block = [kind for kind, share in KINDS.items() for _ in range(share) if kind in kinds]
    turn: dict[str, list[str]] = {}

    def next_of(name: str, choices: Sequence[str]) -> str:
        if not turn.get(name):
            turn[name] = rng.sample(list(choices), len(choices))
        return turn[name].pop()

    latest = length.iterations - length.save_every + 1  # every point comes once more
    faults: list[Fault] = []
    while len(faults) < count:
        for kind in rng.sample(block, len(block)):
            place = next_of(kind, places_of(kind))
            number, long = len(faults), kind == "long pause"
            due = launched_every > 0 and number % launched_every == 0
            faults.append(
                Fault(
                    number=number,
                    kind=kind,
                    place=place,
                    victim=0 if place in ON_RANK_0 else rng.randrange(2),
                    iteration=max(rng.randint(1, latest), TIMED_STEPS if long else 0),
                    seconds=LONG_PAUSE_S if long else round(rng.uniform(0.5, 2.0), 2),
                    replicas=rng.choice(list(replicas)),
                    at=round(rng.uniform(0.02, 0.98), 3),
                    launched=long or (due and kind not in NOT_LAUNCHED),
                )
            )
    return faults[:count]


def places_of(kind: str) -> Sequence[str]:
    """Where a kind of fault can strike."""
    if kind in ON_FILES:
        return FILES
    if kind == "long pause":
        return IN_STEPS
    if kind == "refuse memory":
        return ("migration: staged",)
    if kind in ON_MOUNTS:
        return ("save: begin", "save: shards", *ON_RANK_0, "counting", "optimizer step", "evaluation")
    if kind == "cut the link":
        return ("optimizer step", "replica fetch", "migration: received", "save: begin")
    return POINTS
