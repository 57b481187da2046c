"""Defaults that depend on the run's own flags, beside those that depend on the machine (`parser.machine_defaults`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_smartmoe.adapter.flags.parser import Default, build_parser, gate_defaults
from megatron_smartmoe.adapter.repairs import bucket_padding

RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"


def run_defaults(argv: Sequence[str]) -> list[Default]:
    """The defaults for these flags of the user, in front of which they go.

    Raises:
        ConfigError: a value that the parser refuses.
    """
    of_gate = gate_defaults(argv)
    if "--smartmoe" not in argv:
        return of_gate  # the parser need not be built
    args = build_parser().parse_known_args(list(argv))[0]
    if not _saves_moved_optimizer_state(args) or not bucket_padding.is_sound():
        return of_gate
    reason = "optimizer state is saved by parameter: experts need not move home for each save"
    return [
        *of_gate,
        Default(flags=(RESHARDABLE,), reason=f"{reason}; --no-{RESHARDABLE.removeprefix('--')} for raw buffers"),
    ]


def _saves_moved_optimizer_state(args: argparse.Namespace) -> bool:
    """Whether checkpoints hold the distributed optimizer's state of experts that training may move.

    Raw buffers are in the order of the slots, so for each save every expert that is not at home goes there and comes
    back: minutes where nodes are joined by a network.
    """
    moves = args.smartmoe_homes in ("on", "shuffle") and args.expert_model_parallel_size > 1
    saves = args.save is not None and args.ckpt_format == "torch_dist" and not args.no_save_optim
    is_reshardable = not args.use_megatron_fsdp and args.non_persistent_ckpt_type != "local"
    return bool(
        moves and saves and is_reshardable and args.use_distributed_optimizer and args.smartmoe_experts == "grouped_mm"
    )
