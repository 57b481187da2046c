"""What `--parallel auto` may choose: the planner's space, limited to what the layers of this run support.

Where a start-up check refuses a combination that depends on the layout, the space must exclude it too.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_smartmoe.planner.flags import grads_in_fp32
from megatron_smartmoe.planner.space import RECOMPUTE, SpaceOptions
from megatron_smartmoe.spec.parallel import FLAT, Precision, is_recomputable

# Tried with --smartmoe where no flag gives them.
SPARE_SLOTS = (0,)
OVERLAP_DEGREES = (1,)
DISPATCHES = (FLAT,)

_GROUPED_MM_MULTIPLE = 8  # two-byte values in the 16 bytes at which rows of torch's grouped GEMM start on a GPU
_SHARDED = ("adam", "sgd")  # optimizers that Megatron's distributed optimizer takes


def space_options(args: Namespace, *, cpu: bool) -> SpaceOptions:
    """The space of a run.

    Args:
        args: parsed arguments.
        cpu: whether ranks are CPU ranks. Nothing overlaps there: messages and GEMMs share the cores.
    """
    precision: Precision = "bf16" if args.bf16 or args.fp16 else "fp32"
    sharded = args.optimizer in _SHARDED
    own_experts = args.smartmoe and args.smartmoe_experts == "grouped_mm"
    grouped_by_te = args.moe_grouped_gemm and not own_experts
    return SpaceOptions(
        spare_slots=SPARE_SLOTS if args.smartmoe else (0,),
        overlap_degrees=OVERLAP_DEGREES if args.smartmoe else (1,),
        dispatches=DISPATCHES,
        recompute=tuple(mode for mode in RECOMPUTE if is_recomputable(mode, grouped_by_te=grouped_by_te)),
        homes_interval=args.smartmoe_homes_interval if args.smartmoe and args.smartmoe_homes == "on" else 0,
        precision=precision,
        implementation="local" if args.transformer_impl == "local" else "transformer_engine",
        distributed_optimizer=sharded,
        overlap_grad_reduce=not cpu,
        overlap_param_gather=sharded and not cpu,
        grad_reduce_in_fp32=grads_in_fp32(
            bf16=args.bf16,
            fp16=args.fp16,
            reduce_in_bf16=args.grad_reduce_in_bf16,
            accumulate_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        ),
        ffn_multiple=_GROUPED_MM_MULTIPLE if own_experts and not cpu else 1,
    )
