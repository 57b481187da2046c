"""Start-up checks of the replicas' flags: what they need, and what does not go with them yet."""

from __future__ import annotations

import argparse

from megatron_smartmoe.adapter.flags.parser import attribute
from megatron_smartmoe.adapter.flags.replica_arguments import replicas_mode
from megatron_smartmoe.errors import ConfigError

# flag -> why copies do not go with it
_NOT_WITH_REPLICAS = {
    "--moe-pad-expert-input-to-capacity": "every expert gets as many rows as the next, there is nothing to balance",
    "--overlap-moe-expert-parallel-comm": "it runs two micro-batches of a layer at a time",
    "--mtp-num-layers": "layers of multi-token prediction share their numbers with others",
    "--moe-permute-fusion": "TransformerEngine's kernels want the counts on the device",
}


def check_replicas(args: argparse.Namespace) -> None:
    """Check the replicas' flags against each other and against Megatron's.

    Raises:
        ConfigError: the first rule that is broken.
    """
    slots, mode = args.smartmoe_spare_slots, args.smartmoe_replicas
    if slots < 0:
        raise ConfigError("--smartmoe-spare-slots", slots, "must be at least 0", "Leave it out for no copies.")
    if mode not in (None, "off") and slots == 0:
        rule = "needs spare slots to put copies in"
        raise ConfigError("--smartmoe-replicas", mode, rule, "Add --smartmoe-spare-slots 1, or leave it out.")
    if replicas_mode(args) != "off":
        check_copies(args)


def check_copies(args: argparse.Namespace) -> None:
    """Check that copies are possible at all: for a run that makes them, or may come to.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_slots(args, args.smartmoe_spare_slots)
    for flag, reason in _NOT_WITH_REPLICAS.items():
        if value := getattr(args, attribute(flag), None):
            rule = f"does not go with --smartmoe-spare-slots: {reason}"
            raise ConfigError(flag, value, rule, "Leave one of the two out.")
    _check_choices(args)


def _check_slots(args: argparse.Namespace, slots: int) -> None:
    """Copies need other ranks, and no rank needs two copies of an expert."""
    ranks = args.expert_model_parallel_size
    if not args.smartmoe:
        raise ConfigError("--smartmoe-spare-slots", slots, "needs --smartmoe", "Add --smartmoe, or leave it out.")
    if ranks == 1:
        rule = "needs expert parallelism: on one rank there is nothing to balance"
        raise ConfigError("--smartmoe-spare-slots", slots, rule, "Pass --expert-model-parallel-size, or leave it out.")
    if args.num_experts is not None and slots > (most := args.num_experts - args.num_experts // ranks):
        rule = f"must be at most {most}, the experts of the other ranks"
        raise ConfigError("--smartmoe-spare-slots", slots, rule, "Pass a smaller number; 1 or 2 are mostly enough.")


def _check_choices(args: argparse.Namespace) -> None:
    """Options of which some values do not go with copies."""
    for flag, value, good in (
        ("--moe-token-dispatcher-type", args.moe_token_dispatcher_type, "alltoall"),
        ("--smartmoe-experts", args.smartmoe_experts, "grouped_mm"),
    ):
        if value != good:
            rule = "does not go with --smartmoe-spare-slots"
            raise ConfigError(flag, value, rule, f"Pass {good}, or leave the spare slots out.")
    if not args.smartmoe_replicas_margin >= 0:  # also not a number
        rule = "must be at least 0"
        raise ConfigError("--smartmoe-replicas-margin", args.smartmoe_replicas_margin, rule, "1 is the default.")
