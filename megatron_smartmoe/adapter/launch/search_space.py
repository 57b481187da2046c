"""What `--parallel auto` may choose: the planner's space, cut to what the layers of this run can do.

Where the trainer's start-up checks refuse a combination that depends on the layout, the space has to know it here.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_smartmoe.planner.space import SpaceOptions
from megatron_smartmoe.spec.parallel import Precision, Recompute

# Tried with --smartmoe where the user says nothing of them.
SPARE_SLOTS = (0,)
OVERLAP_DEGREES = (1,)

_GROUPED_MM_MULTIPLE = 8  # two-byte values in the 16 bytes at which rows of torch's grouped GEMM start on a GPU
_SHARDED = ("adam", "sgd")  # optimizers that Megatron's distributed optimizer takes


def space_options(args: Namespace, *, cpu: bool) -> SpaceOptions:
    """The space of a run.

    Args:
        args: as parsed, this machine's defaults in front.
        cpu: whether ranks are CPU ranks. Nothing overlaps there: messages and GEMMs share the cores.
    """
    precision: Precision = "bf16" if args.bf16 or args.fp16 else "fp32"
    sharded = args.optimizer in _SHARDED
    own_experts = args.smartmoe and args.smartmoe_experts == "grouped_mm"
    return SpaceOptions(
        spare_slots=SPARE_SLOTS if args.smartmoe else (0,),
        overlap_degrees=OVERLAP_DEGREES if args.smartmoe else (1,),
        recompute=_recompute(args, own_experts=own_experts),
        homes_interval=args.smartmoe_homes_interval if args.smartmoe and args.smartmoe_homes == "on" else 0,
        precision=precision,
        implementation="local" if args.transformer_impl == "local" else "transformer_engine",
        distributed_optimizer=sharded,
        overlap_grad_reduce=not cpu,
        overlap_param_gather=sharded and not cpu,
        grad_reduce_in_fp32=not args.grad_reduce_in_bf16 and (args.bf16 or not args.fp16),
        ffn_multiple=_GROUPED_MM_MULTIPLE if own_experts and not cpu else 1,
    )


def _recompute(args: Namespace, *, own_experts: bool) -> tuple[Recompute, ...]:
    """Megatron recomputes the experts' activation in TransformerEngine's grouped experts only."""
    if args.moe_grouped_gemm and not own_experts:
        return ("none", "act", "moe", "full")
    return ("none", "moe", "full")
