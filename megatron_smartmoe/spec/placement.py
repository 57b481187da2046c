"""Placement: which expert lies in which slot of which expert-parallel rank, for every layer.

One array holds it all: `slots_LRS[layer, rank, slot]` is a logical expert or -1 for an empty slot. The first E / R
slots of a rank are home slots: over all ranks they are a permutation of the experts, and they own the optimizer state.
The slots after them are spare: they hold replicas or nothing. The alternative, a map from expert to slot plus a list of
replicas, needs two structures that can disagree; here the column alone says whether a slot is a home or a replica.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smartmoe.errors import ConfigError, PlanError, shown
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.readers import values

EMPTY = -1  # a spare slot without a replica

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SlotChange:
    """One slot whose expert differs between two placements; `before` and `after` may be EMPTY."""

    layer: int
    rank: int
    slot: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Homes and replicas of every layer.

    Args:
        slots_LRS: expert in each slot, EMPTY (-1) for none; the first E / R slots of each rank are homes.
        num_experts: E, logical experts of a layer.

    Raises:
        PlanError: naming the first entry that breaks a rule.
    """

    slots_LRS: IntArray
    num_experts: int

    def __post_init__(self) -> None:
        slots_LRS = np.array(self.slots_LRS, dtype=np.int64)  # a copy: the caller's array may change later
        slots_LRS.setflags(write=False)
        object.__setattr__(self, "slots_LRS", slots_LRS)
        _check_shape(slots_LRS, self.num_experts)
        _check_range(slots_LRS, self.num_experts)
        _check_homes(self.homes_LRH, self.num_experts)
        _check_once_per_rank(slots_LRS)

    @classmethod
    def contiguous(cls, *, num_layers: int, num_experts: int, num_ranks: int, spare_slots: int = 0) -> Placement:
        """Megatron's own order: expert e at home on rank e // (E / R), no replicas."""
        if num_ranks < 1 or num_experts % num_ranks:
            raise PlanError(f"{num_experts} experts cannot be shared evenly by {num_ranks} ranks")
        home_RH = np.arange(num_experts).reshape(num_ranks, -1)
        slots_RS = with_empty_slots(home_RH, spare_slots)
        return cls(slots_LRS=np.broadcast_to(slots_RS, (num_layers, *slots_RS.shape)), num_experts=num_experts)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slots_LRS.shape[0])

    @property
    def num_ranks(self) -> int:
        """R, ranks of one expert-parallel group."""
        return int(self.slots_LRS.shape[1])

    @property
    def home_slots(self) -> int:
        """Home slots per rank, E / R."""
        return self.num_experts // self.num_ranks

    @property
    def spare_slots(self) -> int:
        """Spare slots per rank."""
        return int(self.slots_LRS.shape[2]) - self.home_slots

    @property
    def homes_LRH(self) -> IntArray:
        """Expert in each home slot."""
        return self.slots_LRS[:, :, : self.home_slots]

    @cached_property
    def home_slot_LE(self) -> IntArray:
        """Home slot of each expert, counted over all ranks: h % H of rank h // H."""
        slot_LE = np.argsort(self.homes_LRH.reshape(self.num_layers, -1), axis=1)
        slot_LE.setflags(write=False)
        return slot_LE

    @cached_property
    def home_rank_LE(self) -> IntArray:
        """Rank that owns each expert's optimizer state."""
        return self.home_slot_LE // self.home_slots

    @cached_property
    def hosts_LER(self) -> BoolArray:
        """Whether a rank hosts an expert, as its home or with a replica."""
        return np.stack([hosts_of(slots_RS, self.num_experts) for slots_RS in self.slots_LRS])

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, equal in every process for equal placements."""
        header = f"placement-v1:{self.num_experts}:{self.slots_LRS.shape}".encode()
        return hashlib.sha256(header + self.slots_LRS.astype("<i4").tobytes()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_experts == other.num_experts and np.array_equal(self.slots_LRS, other.slots_LRS)

    def __hash__(self) -> int:
        return hash(self.digest)

    def diff(self, after: Placement) -> tuple[SlotChange, ...]:
        """Slots that differ in `after`, in the order of layer, rank, slot."""
        if self.slots_LRS.shape != after.slots_LRS.shape or self.num_experts != after.num_experts:
            raise PlanError(
                f"placements of different shape cannot be compared: {self.num_experts} experts in "
                f"{self.slots_LRS.shape} slots, {after.num_experts} experts in {after.slots_LRS.shape} slots"
            )
        where = np.nonzero(self.slots_LRS != after.slots_LRS)
        columns = (*where, self.slots_LRS[where], after.slots_LRS[where])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return tuple(
            SlotChange(layer=layer, rank=rank, slot=slot, before=old, after=new) for layer, rank, slot, old, new in rows
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back; its digest travels with it."""
        return {
            "version": 1,
            "experts": self.num_experts,
            "slots": self.slots_LRS.tolist(),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Placement:
        """Read what `to_json` wrote.

        Raises:
            PlanError: another version, a wrong type, a wrong digest, or a table that breaks a rule.
        """
        if not isinstance(content, Mapping):
            raise PlanError(f"placement = {shown(content)}: must be a mapping")
        if type(content.get("version")) is not int or content["version"] != 1:
            raise PlanError(f"placement version = {shown(content.get('version'))}: only version 1 is known")
        try:
            slots = values.whole_table(content.get("slots"), "placement.slots", 3)
            num_experts = values.whole(content.get("experts"), "placement.experts", least=1)
        except ConfigError as error:
            raise PlanError(str(error)) from None
        placement = cls(slots_LRS=slots, num_experts=num_experts)
        if content.get("digest") != placement.digest:
            raise PlanError(f"placement digest = {shown(content.get('digest'))}: its slots give {placement.digest!r}")
        return placement


def with_empty_slots(slots: IntArray, number: int) -> IntArray:
    """A slot table `[..., S]` with `number` more spare slots behind the others, all of them empty."""
    return np.pad(slots, [(0, 0)] * (slots.ndim - 1) + [(0, number)], constant_values=EMPTY)


def hosts_of(slots_RS: IntArray, num_experts: int) -> BoolArray:
    """`[E, R]`: whether rank r hosts expert e, as its home or with a replica."""
    hosts_ER = np.zeros((num_experts, slots_RS.shape[0]), dtype=np.bool_)
    rank, slot = np.nonzero(slots_RS != EMPTY)
    hosts_ER[slots_RS[rank, slot], rank] = True
    return hosts_ER


def _check_shape(slots_LRS: IntArray, num_experts: int) -> None:
    if slots_LRS.ndim != 3 or 0 in slots_LRS.shape:
        raise PlanError(f"slots must be [layers, ranks, slots] with none of them zero, got {slots_LRS.shape}")
    _, num_ranks, num_slots = slots_LRS.shape
    if num_experts < 1 or num_experts % num_ranks:
        raise PlanError(f"{num_experts} experts cannot be shared evenly by {num_ranks} ranks")
    if num_slots < num_experts // num_ranks:
        raise PlanError(
            f"slots per rank = {num_slots}: must be at least the homes per rank, {num_experts // num_ranks}"
        )


def _check_range(slots_LRS: IntArray, num_experts: int) -> None:
    wrong = np.argwhere((slots_LRS < EMPTY) | (slots_LRS >= num_experts))
    if len(wrong):
        layer, rank, slot = wrong[0]
        value = slots_LRS[layer, rank, slot]
        raise PlanError(
            f"layer {layer}, rank {rank}, slot {slot} = {value}: must be -1 or an expert below {num_experts}"
        )


def _check_homes(home_LRH: IntArray, num_experts: int) -> None:
    """Over the ranks of a layer, the home slots are a permutation of the experts."""
    for layer, home_RH in enumerate(home_LRH):
        if (home_RH == EMPTY).any():
            rank, slot = np.argwhere(home_RH == EMPTY)[0]
            raise PlanError(f"layer {layer}, rank {rank}, slot {slot} is a home slot and must not be empty")
        uses_E = np.bincount(home_RH.ravel(), minlength=num_experts)
        if (uses_E > 1).any():
            expert = int(np.argmax(uses_E > 1))
            places = ", ".join(f"rank {r} slot {s}" for r, s in np.argwhere(home_RH == expert))
            raise PlanError(f"layer {layer}, expert {expert} has {uses_E[expert]} homes ({places}), it must have one")


def _check_once_per_rank(slots_LRS: IntArray) -> None:
    ordered = np.sort(slots_LRS, axis=2)
    twice = np.argwhere((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != EMPTY))
    if len(twice):
        layer, rank, column = twice[0]
        expert = ordered[layer, rank, column]
        raise PlanError(f"layer {layer}, rank {rank} holds expert {expert} twice: a rank needs it once")
