"""What the cost model and the planners are given in a run: its machine, its model, its launch, and their prices.

Start-up checks read it before any process group exists, so Megatron's groups are looked up in the functions that need
them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_smartmoe.adapter.flags.smartmoe_arguments import replicas_mode
from megatron_smartmoe.cost.compute import ExpertShape, replica_grad_bytes
from megatron_smartmoe.cost.dispatchers import Dispatcher
from megatron_smartmoe.cost.memory.buffers import MAIN_BYTES, MOMENT_BYTES, expert_state_bytes
from megatron_smartmoe.cost.moe_layer import constants_of, crossing_bytes_s, exchanges_of, transfer_price
from megatron_smartmoe.cost.replicas import TransferPrice, schedule_of
from megatron_smartmoe.placement.layer_cost import LayerPricing
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_homes import HomesOptions, node_swap_price
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.placement.policy import BETWEEN_NODES_TOLERANCE, PolicyOptions
from megatron_smartmoe.placement.replica_planner import planners_mode
from megatron_smartmoe.placement.routing_groups import explain, stay_whole
from megatron_smartmoe.planner.arguments import model_from_arguments, parallel_from_arguments
from megatron_smartmoe.spec.cluster import ClusterSpec, load_cluster_spec
from megatron_smartmoe.spec.devices import Device, cluster_for, fitting_cluster
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import HIERARCHICAL, Dispatch, ParallelSpec

# fp32 tensors that an optimizer keeps for each parameter
_STATES_OF = {"sgd": 1, "muon": 1, "dist_muon": 1, "adaptive_muon": 2, "lion": 1, "soap": 4}
_BYTES_OF_TYPE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}  # of the precision-aware optimizer's moments
_REMAINDER_BYTES = 2  # it keeps of an fp32 main weight what the bf16 weight lacks
_FLAGS_NAME = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.uint8": "fp8"}

# --- the machine


def machine(args: Namespace) -> ClusterSpec:
    """The cluster file that --smartmoe-cluster names; else the shipped one for this GPU, or for the CPU."""
    return _machine(args)[0]


def machine_line(args: Namespace) -> str | None:
    """What to say at the start about where the prices come from; None where the user or the CPU has decided it."""
    return _machine(args)[1] if args.smartmoe else None


_measured: ClusterSpec | None = None  # of this process's job


def use_measured(cluster: ClusterSpec) -> None:
    """Take these prices for the machine from now on, where no flag names others; the same on all ranks."""
    global _measured
    _measured = cluster


def lacks_prices(args: Namespace) -> bool:
    """Whether this rank's prices would be those of another GPU."""
    found = args.smartmoe and args.smartmoe_cluster is None and _measured is None and torch.cuda.is_available()
    return bool(found and fitting_cluster(torch.cuda.get_device_name()) is None)


def _machine(args: Namespace) -> tuple[ClusterSpec, str | None]:
    if args.smartmoe_cluster is not None:
        return load_cluster_spec(Path(args.smartmoe_cluster)), None
    if _measured is not None:
        return _measured, None
    if not torch.cuda.is_available():
        return load_cluster_spec(Path("cpu")), None
    found = torch.cuda.get_device_properties()
    capability = (found.major, found.minor)
    return cluster_for(Device(name=found.name, capability=capability, memory_bytes=float(found.total_memory)))


def machine_of_job(args: Namespace) -> ClusterSpec:
    """The machine with this job's nodes and ranks per node, as `--parallel auto` plans for it."""
    per_node = ranks_per_node()
    return replace(machine(args), nodes=-(-args.world_size // per_node), gpus_per_node=per_node)


def nodes_of_group(num_ranks: int) -> int:
    """Nodes that the expert-parallel group lies on; each rank counts as one where ranks are spread unevenly."""
    from megatron.core import parallel_state as mpu

    per_node = ranks_per_node()
    nodes = [rank // per_node for rank in dist.get_process_group_ranks(mpu.get_expert_model_parallel_group())]
    found = sorted(set(nodes))
    even = num_ranks % len(found) == 0 and nodes == [node for node in found for _ in range(num_ranks // len(found))]
    return len(found) if even else num_ranks


def ranks_per_node() -> int:
    """Ranks of this job on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


_dispatch: Dispatch | None = None  # of this process's job


def use_dispatch(dispatch: Dispatch) -> None:
    """Price tokens that travel so from now on: what `--smartmoe-dispatch auto` has chosen; the same on all ranks."""
    global _dispatch
    _dispatch = dispatch


# --- the model and the launch


def model_of_run(args: Namespace) -> ModelSpec:
    """The model, as the planner describes it.

    With --moe-latent-size the experts and the all-to-all work on projected tokens, which the planner has no model of:
    for the MoE layers, which is all that is priced in training, the projected size is the hidden size.
    """
    model = model_from_arguments(vars(args))
    return replace(model, hidden=args.moe_latent_size) if args.moe_latent_size else model


def launch_of_run(args: Namespace) -> ParallelSpec:
    """The launch, as the planner describes it."""
    spec = parallel_from_arguments(vars(args), model_from_arguments(vars(args)), args.world_size)
    return spec if _dispatch is None else replace(spec, dispatch=_dispatch)


def expert_shape(args: Namespace, mode: str | None = None) -> ExpertShape:
    """Sizes of one expert as a rank computes it, from arguments as parsed or as validated.

    Args:
        args: Megatron's arguments.
        mode: how replicas are planned; None for the mode of the flags.
    """
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    element_bytes = 2 if args.bf16 or args.fp16 else 4
    return ExpertShape(
        hidden=args.moe_latent_size or args.hidden_size,
        ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) // etp,
        gated=args.swiglu or args.quick_geglu,
        element_bytes=element_bytes,
        grad_bytes=replica_grad_bytes(mode or replicas_mode(args), element_bytes),
        biases=bool(args.add_bias_linear),
        fp8_weights=sends_fp8(args),
    )


def sends_fp8(args: Namespace) -> bool:
    """Whether replicas get their weights as fp8 with a scale per block: all experts are quantized so, by powers of two.

    Variables of TransformerEngine's ask for other scales, or for a backward pass that reads the weights themselves;
    further options leave layers in bf16 or choose quantizers.
    """
    if args.smartmoe_experts != "transformer_engine" or not args.fp8 or not args.bf16:
        return False
    other_scales = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES") == "1"
    other_backward = bool(os.environ.get("NVTE_BACKWARD_OVERRIDE"))
    other_layers = args.first_last_layers_bf16 or args.fp8_quantizer_factory or args.te_precision_config_file
    return args.fp8_recipe == "blockwise" and not (other_scales or other_backward or other_layers)


def state_bytes(args: Namespace) -> int:
    """Bytes that move with an expert: weights, main weights where they are separate, and the optimizer's state."""
    return expert_state_bytes(expert_shape(args), optimizer_bytes(args))


def optimizer_bytes(args: Namespace) -> int:
    """Bytes that the optimizer of the flags keeps for each parameter of an expert, main weight included."""
    main = MAIN_BYTES if args.bf16 or args.fp16 or args.optimizer_cpu_offload else 0
    if args.optimizer != "adam":
        return main + _STATES_OF[args.optimizer] * MAIN_BYTES
    if args.optimizer_cpu_offload or not args.use_precision_aware_optimizer:
        return main + MOMENT_BYTES
    if _in_words(args.main_params_dtype) == "fp32" and args.bf16:
        main = _REMAINDER_BYTES
    return main + sum(_BYTES_OF_TYPE[_in_words(dtype)] for dtype in (args.exp_avg_dtype, args.exp_avg_sq_dtype))


def _in_words(dtype: object) -> str:
    """A type as the flags name it; Megatron's validation has turned it into torch's."""
    return _FLAGS_NAME.get(str(dtype), str(dtype))


# --- prices of the homes and replicas loops


def online_setting(args: Namespace, mode: str | None = None) -> LayerPricing:
    """The price of a MoE layer in one expert-parallel group.

    Args:
        args: Megatron's arguments.
        mode: how replicas are planned; None for the mode of the flags.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    num_ranks = mpu.get_expert_model_parallel_world_size()
    expert, mode = expert_shape(args, mode), mode or replicas_mode(args)
    early, dispatcher = not args.overlap_param_gather, dispatcher_of(args)
    degree = args.smartmoe_overlap_degree
    exchanges = exchanges_of(
        dispatcher.name,
        ranks=num_ranks,
        slots=args.num_experts // num_ranks + args.smartmoe_spare_slots,
        chunks=int(degree) if degree.isdecimal() else 1,  # "auto" is chosen later
        expert_tensor_ranks=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        padded=dispatcher.padded_factor > 0,
        overlaps_micro_batches=args.overlap_moe_expert_parallel_comm,
    )
    return LayerPricing(
        num_ranks=num_ranks,
        num_nodes=nodes_of_group(num_ranks),
        constants=constants_of(machine(args), expert, two_hops=dispatcher.name == HIERARCHICAL, exchanges=exchanges),
        replicas=schedule_of(mode, expert, micro_batches=get_num_microbatches(), fetched_early=early),
        has_trees=True,
        dispatcher=dispatcher,
    )


def dispatcher_of(args: Namespace) -> Dispatcher:
    """What sends the tokens of a MoE layer."""
    padded = args.moe_pad_expert_input_to_capacity
    two_hops = (_dispatch or args.smartmoe_dispatch) == HIERARCHICAL
    return Dispatcher(
        name=HIERARCHICAL if two_hops else args.moe_token_dispatcher_type,
        experts=args.num_experts,
        top_k=args.moe_router_topk,
        padded_factor=args.moe_expert_capacity_factor if padded else 0.0,
        spare_slots=args.smartmoe_spare_slots,
    )


def online_options(args: Namespace, review_records: int) -> OnlineOptions:
    """Options of the planners of homes and replicas.

    Args:
        args: Megatron's arguments.
        review_records: records after a move of homes from which its gain is measured.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    num_nodes = nodes_of_group(mpu.get_expert_model_parallel_world_size())
    return OnlineOptions(
        homes_interval=1,  # the controller calls the planner once per interval
        replicas=planners_mode(replicas_mode(args)),
        micro_batches=get_num_microbatches(),
        state_bytes=state_bytes(args),
        migration_bytes_s=crossing_bytes_s(machine(args), num_nodes),
        homes=homes_options(args),
        replica=replica_options(args),
        exact_price=replica_price(args, "exact"),
        policy=PolicyOptions(
            horizon_iterations=args.smartmoe_homes_horizon,
            margin=args.smartmoe_homes_margin,
            cooldown_iterations=args.smartmoe_homes_interval,
            tolerance=BETWEEN_NODES_TOLERANCE if num_nodes > 1 else 0.0,
        ),
        review_records=review_records,
    )


def homes_options(args: Namespace) -> HomesOptions:
    """The nodes that homes are balanced over, and what a swap of homes between two of them must gain."""
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    ranks, domains = mpu.get_expert_model_parallel_world_size(), scope_nodes(args)
    num_nodes, pricing = domains if domains > 1 else nodes_of_group(ranks), online_setting(args)
    return HomesOptions(
        num_nodes=num_nodes,
        replica_scope_is_node=domains > 1,
        node_swap_price=node_swap_price(
            pricing.constants,
            get_num_microbatches() * rank_tokens(args),
            dispatcher=pricing.dispatcher,
            num_nodes=num_nodes,
            swap_s=state_bytes(args) / crossing_bytes_s(machine(args), nodes_of_group(ranks)),
            worth_s=args.smartmoe_homes_horizon / args.smartmoe_homes_margin,
        ),
        num_groups=args.moe_router_num_groups if args.moe_router_group_topk else 1,
    )


def routing_groups_line(args: Namespace) -> str | None:
    """What group-limited routing means for the homes; None where it is off or the experts are on one node."""
    options, ranks = homes_options(args), args.expert_model_parallel_size
    groups, nodes = options.num_groups, options.num_nodes
    if groups == 1 or nodes == 1:
        return None
    routing = f"group-limited routing ({args.moe_router_group_topk} of {groups} groups a token, {nodes} nodes)"
    moves = explain(ranks, nodes, groups)
    if not stay_whole(ranks, nodes, groups):
        return f"{routing}: {moves}"
    if args.smartmoe_homes == "shuffle":
        moves = "--smartmoe-homes shuffle takes groups apart, and tokens go to more nodes than without"
    scope = args.smartmoe_replicas_scope
    if args.smartmoe_spare_slots and scope in ("auto", "group"):
        puts = "puts replicas" if scope == "group" else "may put replicas"
        moves += f"; --smartmoe-replicas-scope {scope} {puts} on other nodes than their group's"
    return f"{routing}: {moves}"


def replica_options(args: Namespace) -> ReplicaOptions:
    """Where replicas may be placed, and what one costs."""
    return ReplicaOptions(num_nodes=scope_nodes(args), or_group=may_leave_nodes(args), price=replica_price(args))


def may_leave_nodes(args: Namespace) -> bool:
    """Whether a layer's replicas are planned over the group as well where nodes are uneven."""
    return bool(args.smartmoe_replicas_scope == "auto")


def scope_nodes(args: Namespace) -> int:
    """Nodes of the group, or wider domains, that replicas are planned in; 1 lets them be anywhere in it."""
    from megatron.core import parallel_state as mpu

    num_nodes = nodes_of_group(mpu.get_expert_model_parallel_world_size())
    return machine(args).domains(num_nodes, args.smartmoe_replicas_scope)


def replica_price(args: Namespace, mode: str | None = None) -> TransferPrice:
    """What replicas cost, in tokens of the busiest rank of an iteration, or of a micro-batch if `exact`;
    --smartmoe-replicas-margin included.

    Args:
        args: Megatron's arguments.
        mode: how the replicas are planned; None for the mode of the flags.
    """
    pricing = online_setting(args, mode)
    return transfer_price(
        pricing.constants,
        pricing.replicas,
        rank_tokens(args),
        num_nodes=pricing.num_nodes,
        domains=scope_nodes(args),
        margin=args.smartmoe_replicas_margin,
        dispatcher=pricing.dispatcher,
    )


def rank_tokens(args: Namespace) -> float:
    """Tokens that a rank computes in a micro-batch and layer if the load is even."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    own = args.micro_batch_size * args.seq_length / args.context_parallel_size / args.tensor_model_parallel_size
    return float(own * args.moe_router_topk * etp)
