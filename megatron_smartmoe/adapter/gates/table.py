"""The gates of `--smartmoe-gate`: what each one is, the flags of Megatron that it stands for, and who computes it.

Some gates are settings of Megatron's own router, which the table gives names to (`naive`, `switch`); the others are
routers of this package. Nothing here imports torch or Megatron: the parser, the checks and the page of docs read it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field

GATE = "--smartmoe-gate"
OUTGOING = "--smartmoe-gate-outgoing"
OUTGOING_DEFAULT = 0.14  # of the code of FasterMoE's authors
ZERO_EXPERTS, ZERO_EXPERTS_TAU = "--smartmoe-zero-experts", "--smartmoe-zero-experts-tau"
ZERO_EXPERTS_DEFAULT, TAU_DEFAULT = "zero=1,copy=1,constant=2", 0.75  # of MoE++ with 8 and 16 experts
RESIDUALS, RESIDUAL_WEIGHT = "--smartmoe-gate-residuals", "residual_weight"
TOP_K = "top-k"  # Megatron's own router, as its flags say

AUX = "--moe-router-load-balancing-type"
COEFF = "--moe-aux-loss-coeff"
CAPACITY = "--moe-expert-capacity-factor"
_TOP_K, _PRE_SOFTMAX, _SCORES = "--moe-router-topk", "--moe-router-pre-softmax", "--moe-router-score-function"
_DROP = "--moe-token-drop-policy"

Value = str | bool  # False for a switch that must not be given


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate.

    Attributes:
        paper: where it is defined.
        what: one line for people, with the equations.
        sets: flags of Megatron that the gate is made of: other values are refused.
        suggests: flags whose values are the paper's, where nothing else is said.
        router: `module:class` of the router that computes it; None for Megatron's own.
        depends: what the routing depends on besides the model and the tokens; empty where every parallelism routes
            alike.
        least_choices: experts per token that it needs.
        draws: whether it draws random numbers.
        drops: whether it can leave choices out, so that it needs a capacity.
        equal_shares: whether the tokens of a rank must be a multiple of the experts.
        fits_in_rank: whether a rank needs at least as many experts as a token has choices.
        parameters: of its router, besides Megatron's.
        needs_layer: whether this project's layer (`--smartmoe`) has a part in it.
    """

    paper: str
    what: str
    sets: Mapping[str, Value] = field(default_factory=dict)
    suggests: Mapping[str, str] = field(default_factory=dict)
    router: str | None = None
    depends: str = ""
    least_choices: int = 1
    draws: bool = False
    drops: bool = False
    equal_shares: bool = False
    fits_in_rank: bool = False
    parameters: tuple[str, ...] = ()
    needs_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class ZeroExperts:
    """How many experts of MoE++ cost nothing, by what they return: zero, their input, or a constant."""

    zero: int = 1
    copy: int = 1
    constant: int = 2

    @property
    def total(self) -> int:
        """Z."""
        return self.zero + self.copy + self.constant

    @classmethod
    def parse(cls, text: str) -> ZeroExperts:
        """Read `zero=1,copy=1,constant=2`; a kind that is not named has none.

        Raises:
            ValueError: it is something else, or there would be none at all.
        """
        counts = {"zero": 0, "copy": 0, "constant": 0}
        for part in text.split(","):
            name, _, count = part.strip().partition("=")
            if name not in counts or not count.isdecimal() or counts[name]:
                raise ValueError(text)
            counts[name] = int(count)
        if not any(counts.values()):
            raise ValueError(text)
        return cls(**counts)


_NO_LOSS: dict[str, Value] = {AUX: "none", COEFF: "0"}
_SOFTMAX_OF_CHOSEN: dict[str, Value] = {_PRE_SOFTMAX: False, _SCORES: "softmax"}

GATES: dict[str, Gate] = {
    "naive": Gate(
        paper="FastMoE (arXiv 2103.13262)",
        what="top-k of a linear layer, softmax over the chosen, no loss",
        sets={**_NO_LOSS, **_SOFTMAX_OF_CHOSEN},
    ),
    "switch": Gate(
        paper="Switch Transformer (arXiv 2101.03961)",
        what="the best expert with its softmax probability; capacity eq. 3, loss eq. 4-6, jitter on the input",
        sets={_TOP_K: "1", _PRE_SOFTMAX: True, _SCORES: "softmax", AUX: "aux_loss"},
        suggests={COEFF: "0.01", CAPACITY: "1.25", _DROP: "position", "--moe-input-jitter-eps": "0.01"},
        depends="capacity per rank",
    ),
    "noisy-top-k": Gate(
        paper="Sparsely-Gated MoE (arXiv 1701.06538)",
        what="top-k of logits with trained noise, eq. 3-5; losses on importance, eq. 6-7, and load, eq. 8-11",
        sets={AUX: "aux_loss", **_SOFTMAX_OF_CHOSEN},
        suggests={COEFF: "0.1"},
        router="noisy_top_k:NoisyTopKRouter",
        parameters=("noise_weight",),
        least_choices=2,
        draws=True,
    ),
    "gshard": Gate(
        paper="GShard (arXiv 2006.16668)",
        what="two experts, the second by chance, first choices before second ones at the capacity; algorithm 1 and its "
        "loss",
        sets={_TOP_K: "2", AUX: "aux_loss", _DROP: "position", **_SOFTMAX_OF_CHOSEN},
        suggests={COEFF: "0.01", CAPACITY: "1"},
        router="gshard:GShardRouter",
        depends="capacity per rank",
        draws=True,
        drops=True,
    ),
    "base": Gate(
        paper="BASE layers (arXiv 2103.16716)",
        what="one expert with the sigmoid of its score; in training the best assignment that gives every expert the "
        "same number of tokens, section 3",
        sets={_TOP_K: "1", _SCORES: "sigmoid", _PRE_SOFTMAX: False, **_NO_LOSS},
        router="base:BaseRouter",
        depends="tokens of a rank are assigned together",
        equal_shares=True,
    ),
    "swipe": Gate(
        paper="BaGuaLu (PPoPP 2022)",
        what="top-k; in training choices that are too many for a rank go to ranks with room, so that all ranks have "
        "the same number",
        sets={**_NO_LOSS, **_SOFTMAX_OF_CHOSEN},
        router="swipe:SwipeRouter",
        depends="logical expert-parallel ranks",
        least_choices=2,
        fits_in_rank=True,
    ),
    "dynamic-capacity": Gate(
        paper="Tutel (arXiv 2206.03382)",
        what="top-k with the capacity that a micro-batch needs, up to a bound; first choices before later ones, "
        "GShard's loss",
        sets={AUX: "aux_loss", _DROP: "position", **_SOFTMAX_OF_CHOSEN},
        suggests={COEFF: "0.01", CAPACITY: "2"},
        router="dynamic_capacity:DynamicCapacityRouter",
        depends="capacity per rank",
        least_choices=2,
        drops=True,
    ),
    "distributed-capacity": Gate(
        paper="FastMoE (DCGate of its code)",
        what="top-k with a capacity that the ranks of an expert-parallel group share, first choices before later ones; "
        "GShard's loss",
        sets={AUX: "aux_loss", _DROP: "position", **_SOFTMAX_OF_CHOSEN},
        suggests={COEFF: "0.01", CAPACITY: "1.2"},
        router="distributed_capacity:DistributedCapacityRouter",
        depends="capacity per expert-parallel group",
        least_choices=2,
        drops=True,
    ),
    "topology": Gate(
        paper="FasterMoE (PPoPP 2022)",
        what=f"two experts; where the best one of too many tokens ({OUTGOING}) is on another node, the others stay on "
        "theirs; GShard's loss",
        sets={_TOP_K: "2", AUX: "aux_loss", **_SOFTMAX_OF_CHOSEN},
        suggests={COEFF: "0.01"},
        router="topology:TopologyRouter",
        depends="nodes of the logical expert-parallel ranks",
    ),
    "moe++": Gate(
        paper="MoE++ (arXiv 2410.07348)",
        what=f"top-k of the experts and of some that cost nothing ({ZERO_EXPERTS}), eq. 3-5; residuals between "
        "routers, eq. 6; its loss, eq. 7, and capacity, eq. 8",
        sets={AUX: "aux_loss", _DROP: "position", _PRE_SOFTMAX: True, _SCORES: "softmax"},
        suggests={COEFF: "0.01", CAPACITY: "1.1"},
        router="zero_computation:ZeroComputationRouter",
        depends="capacity per rank; residuals per pipeline stage",
        drops=True,
        parameters=("zero_weight", "constant_weight", "constant_vector", RESIDUAL_WEIGHT),
        needs_layer=True,
    ),
}


def all_flags(gate: Gate) -> tuple[str, ...]:
    """The flags of Megatron that a gate stands for or has a value for."""
    return (*gate.sets, *gate.suggests)


def flag_values(gate: Gate) -> dict[str, str | bool]:
    """The flags that a gate puts in front of the user's, a switch as True."""
    return {flag: value for flag, value in {**gate.suggests, **gate.sets}.items() if value is not False}


def has_router(name: str) -> bool:
    """Whether a gate is computed by a router of this package."""
    return name in GATES and GATES[name].router is not None


def extra_parameters(args: Namespace) -> tuple[str, ...]:
    """The parameters of the gate's router besides Megatron's, by the arguments of a run or of a checkpoint."""
    names = GATES[gate].parameters if (gate := getattr(args, "smartmoe_gate", TOP_K)) in GATES else ()
    absent = RESIDUAL_WEIGHT if getattr(args, "smartmoe_gate_residuals", "off") == "off" else None
    return tuple(name for name in names if name != absent)


def parameter_names() -> frozenset[str]:
    """The parameters that routers of this package have besides Megatron's."""
    return frozenset(name for gate in GATES.values() for name in gate.parameters)
