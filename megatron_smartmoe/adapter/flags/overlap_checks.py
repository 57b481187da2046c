"""Start-up checks of `--smartmoe-overlap-degree`: what it needs, and what does not go with it."""

from __future__ import annotations

import argparse

from megatron_smartmoe.errors import ConfigError

FLAG = "--smartmoe-overlap-degree"
AUTO = "auto"
MOST_PIECES = 8  # that `auto` tries: a ninth would hide another 1/72 of the all-to-alls at best


def check_overlap(args: argparse.Namespace) -> None:
    """Check the flag against Megatron's; 1 is always well, and so is `auto` where there is nothing to choose.

    Raises:
        ConfigError: the first rule that is broken.
    """
    value, ranks = args.smartmoe_overlap_degree, args.expert_model_parallel_size
    if value == AUTO and ranks == 1:
        return
    if value != AUTO:
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= ranks):
            rule = f"must be {AUTO} or a number from 1 to {ranks}, the expert-parallel ranks"
            raise ConfigError(FLAG, value, rule, "Leave it out for 1, which overlaps nothing.")
        if int(value) == 1:
            return
    if not args.smartmoe:
        raise ConfigError(FLAG, value, "needs --smartmoe", "Add --smartmoe, or leave it out.")
    check_companions(args)


def check_companions(args: argparse.Namespace) -> None:
    """Options of which some values do not go with cut all-to-alls: for a run that cuts them, or may come to.

    Raises:
        ConfigError: the first rule that is broken.
    """
    kind, dispatcher = args.smartmoe_experts, args.moe_token_dispatcher_type
    two_batches = getattr(args, "overlap_moe_expert_parallel_comm", False)
    padded = args.moe_pad_expert_input_to_capacity
    for flag, given, wrong, reason, way_out in (
        (
            "--moe-token-dispatcher-type",
            dispatcher,
            dispatcher != "alltoall",
            "there is no all-to-all of ours to cut",
            "Pass alltoall.",
        ),
        (
            "--smartmoe-experts",
            kind,
            kind != "grouped_mm",
            "they have not been run on pieces of a micro-batch",
            "Pass grouped_mm.",
        ),
        (
            "--moe-pad-expert-input-to-capacity",
            padded,
            padded,
            "Megatron's own dispatcher pads",
            "Leave one of the two out.",
        ),
        (
            "--overlap-moe-expert-parallel-comm",
            two_batches,
            two_batches,
            "it overlaps the same all-to-alls with another micro-batch",
            "Leave one of the two out.",
        ),
    ):
        if wrong:
            raise ConfigError(flag, given, f"does not go with {FLAG}: {reason}", way_out)
