"""Start-up checks of the `--smartmoe-*` flags: what they need, and which of Megatron's options they do not support."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from megatron_smartmoe.adapter.cost_inputs import expert_shape, machine, state_bytes
from megatron_smartmoe.adapter.flags.gate_checks import check_gate
from megatron_smartmoe.adapter.flags.parser import attribute, has_transformer_engine
from megatron_smartmoe.adapter.flags.pool_settings import homes_interval, may_overlap, settings_of_pool
from megatron_smartmoe.adapter.flags.smartmoe_arguments import (
    ACCOUNT,
    AUTO,
    IDEAL_RUN,
    PLAN_ON,
    POOL,
    POOL_INTERVAL,
    RECORD_MICRO_BATCHES,
    RESUME,
    WATCHDOG_FLOOR,
    replicas_mode,
)
from megatron_smartmoe.adapter.local.muon import OPTIMIZERS as EMERGING_OPTIMIZERS
from megatron_smartmoe.adapter.moe.graphs import graph_kind, graphed_modules, holds_experts, holds_preprocessing
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.planner.flags import DISPATCH, OVERLAP_DEGREE, SPARE_SLOTS
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.report.account import read_steps
from megatron_smartmoe.spec.cluster import SCOPES, load_cluster_spec
from megatron_smartmoe.spec.parallel import FLAT, HIERARCHICAL
from megatron_smartmoe.spec.trace import load_trace

_VALUE_BYTES = 2  # bf16 and fp16; fp32 is aligned when they are
_GEMM_ALIGNMENT_BYTES = 16  # of a row, in torch's grouped GEMM on a GPU
_REMOVE_ONE = "Remove one of the two."
_MODULES = "--cuda-graph-modules"
_GRAPHED_PARTS = f"--cuda-graph-impl transformer_engine {_MODULES} attn moe_router moe_preprocess"

_DELAYING = ("--delay-wgrad-compute", "--overlap-dispatch-backward-with-experts-wgrad")
_FUSED = "--use-transformer-engine-op-fuser"

# flag -> why it is not supported with --smartmoe,
_NOT_WITH_SMARTMOE = {
    "--use-megatron-fsdp": "it shards parameters in a layout of its own",
    "--use-torch-fsdp2": "it shards parameters in a layout of its own",
    "--moe-use-upcycling": "it reads the dense checkpoint into Megatron's own experts",
}
# with --smartmoe-experts grouped_mm,
_NOT_WITH_GROUPED_MM = {
    "--moe-router-padding-for-quantization": "experts are not padded",
    "--moe-use-device-initiated-grouped-gemm": "it is an option of TransformerEngine's experts",
    "--moe-single-grouped-weight": "it is an option of TransformerEngine's experts",
    "--moe-paged-stash": "it is an option of TransformerEngine's experts",
    "--moe-expert-rank-capacity-factor": "it is an option of TransformerEngine's experts",
    "--use-te-activation-func": "the activation is Megatron's",
    "--use-transformer-engine-op-fuser": "it fuses TransformerEngine's experts",
    "--use-fused-weighted-squared-relu": "the activation is not fused",
}
# with --smartmoe-homes other than off,
_NOT_WITH_HOMES = {
    "--fp8-param-gather": "fp8 parameters have scales that would have to move along",
    "--fp4-param-gather": "fp4 parameters have scales that would have to move along",
}
# with --smartmoe-spare-slots and --smartmoe-experts transformer_engine,
_NOT_WITH_TE_REPLICAS = {
    "--fp8-param-gather": "replicas get bf16 weights, and the parameters are fp8",
    "--fp4-param-gather": "replicas get bf16 weights, and the parameters are fp4",
}
# with --smartmoe-spare-slots and --use-transformer-engine-op-fuser,
_NOT_WITH_FUSED_REPLICAS = dict.fromkeys(
    _DELAYING,
    "fused operations compute the weight gradients of all slots together, and those of replicas are sent home in the "
    "backward pass",
)
# with --smartmoe-overlap-degree,
_NOT_IN_CHUNKS = {
    "--moe-pad-expert-input-to-capacity": "only Megatron's own dispatcher pads",
    "--moe-router-padding-for-quantization": "only Megatron's own dispatcher pads",
    "--overlap-moe-expert-parallel-comm": "it overlaps the same all-to-alls with another micro-batch",
    "--overlap-dispatch-backward-with-experts-wgrad": "it overlaps the same all-to-alls with the weight gradients of "
    "all chunks",
}
# with --smartmoe-dispatch hierarchical or auto,
_NOT_IN_TWO_HOPS = {
    "--moe-pad-expert-input-to-capacity": "only Megatron's own dispatcher pads",
    "--moe-router-padding-for-quantization": "only Megatron's own dispatcher pads",
}
_UNSCALED_TYPES = ("fp32", "bf16")  # of the precision-aware optimizer's state
_SCALED_STATE = "a scale is kept for a whole shard, and experts that move would be rounded by one another's"
_FP8_WITHOUT_HISTORY = ("tensorwise", "blockwise", "mxfp8")  # recipes whose scales come from the values themselves
# with --smartmoe-spare-slots.
_NOT_WITH_REPLICAS = {
    "--moe-ncclep-static-shape": "it hands experts rows of unknown number",
}


def check_smartmoe(args: argparse.Namespace, *, cpu: bool) -> None:
    """Check the project's flags against each other and against Megatron's.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_watchdog(args)
    _check_traces(args)
    _check_ideal_run(args)
    _check_resume(args)
    _check_replicas(args)
    _check_overlap(args)
    _check_pool(args)
    _check_dispatch(args)
    _check_wide_norm(args)
    check_gate(args)
    if not args.smartmoe:
        if args.smartmoe_experts != "grouped_mm":
            raise ConfigError("--smartmoe-experts", args.smartmoe_experts, "needs --smartmoe", "Add --smartmoe.")
        return
    _needs_experts(args, "--smartmoe", True)
    for flag, reason in _NOT_WITH_SMARTMOE.items():
        if getattr(args, attribute(flag), False):
            raise ConfigError(flag, True, f"is not supported with --smartmoe: {reason}", _REMOVE_ONE)
    if args.transformer_impl == "inference_optimized":
        rule = "is not supported with --smartmoe: it is for inference only"
        raise ConfigError("--transformer-impl", args.transformer_impl, rule, "Pass local or transformer_engine.")
    _check_graphs(args)
    _check_experts(args, cpu=cpu)
    _check_homes(args)


def _check_graphs(args: argparse.Namespace) -> None:
    """CUDA graphs hold parts of a layer, and the host works between them; or they hold the experts too."""
    kind, modules = graph_kind(args), graphed_modules(args)
    if kind == "none":
        return
    if kind == "local" and modules and not modules & {"attn", "mlp"}:
        rule = f"captures nothing of a GPT model with {_MODULES} {' '.join(sorted(modules))}: Megatron's own graphs of "
        rule += "parts of a MoE layer are those of hybrid models"
        raise ConfigError("--cuda-graph-impl", kind, rule, f"Pass {_GRAPHED_PARTS}.")
    if args.smartmoe_replay_trace is not None and (holds_experts(args) or "moe_router" in modules):
        rule = "is not supported with CUDA graphs that hold the router: a graph would replay one micro-batch"
        way_out = f"Pass --cuda-graph-impl transformer_engine {_MODULES} attn."
        raise ConfigError("--smartmoe-replay-trace", args.smartmoe_replay_trace, rule, way_out)
    if holds_experts(args):
        _check_graphed_experts(args)
    elif "moe_router" in modules:
        _check_graphed_router(args)


def _check_graphed_experts(args: argparse.Namespace) -> None:
    """Nothing in such a graph is the host's: no messages of replicas, no plan, and no number of rows."""
    wider = f"is not supported with CUDA graphs that hold the experts (--cuda-graph-impl {args.cuda_graph_impl})"
    way_out = f"Remove it, or pass {_GRAPHED_PARTS}."
    if replicas_mode(args) != "off":
        rule = f"{wider}: the host plans replicas, and sends and receives their weights, in every layer"
        raise ConfigError(SPARE_SLOTS, args.smartmoe_spare_slots, rule, way_out)
    if args.smartmoe_pool:
        rule = f"{wider}: settings are switched while training, and a graph keeps those of its capture"
        raise ConfigError(POOL, args.smartmoe_pool, rule, way_out)
    if args.smartmoe_record_micro_batches:
        rule = f"{wider}: the host tells micro-batches apart, and takes no part in a replay"
        raise ConfigError(RECORD_MICRO_BATCHES, True, rule, way_out)
    is_padded = args.moe_pad_expert_input_to_capacity and args.moe_token_dispatcher_type != "allgather"
    if not is_padded and getattr(args, "moe_expert_rank_capacity_factor", None) is None:
        rule = "holds the experts, whose numbers of rows follow from the routing: a CUDA graph has fixed ones"
        way_out = "Add --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity, with the alltoall "
        way_out += f"dispatcher, or pass {_GRAPHED_PARTS}."
        raise ConfigError("--cuda-graph-impl", args.cuda_graph_impl, rule, way_out)


def _check_graphed_router(args: argparse.Namespace) -> None:
    """The host counts tokens behind each replay, and continues where the graph ends."""
    if args.overlap_moe_expert_parallel_comm:
        rule = f"is not supported with {_MODULES} moe_router: its schedule calls no layer whose tokens could be counted"
        raise ConfigError("--overlap-moe-expert-parallel-comm", True, rule, f"Pass {_MODULES} attn.")
    if not holds_preprocessing(args):
        return
    only = f"Pass {_MODULES} attn moe_router, or remove it."
    if args.smartmoe_dispatch != FLAT:
        rule = f"is not supported with {_MODULES} moe_preprocess: how many rows cross a node once follows from the "
        rule += "routing, and a CUDA graph has a fixed number"
        raise ConfigError(DISPATCH, args.smartmoe_dispatch, rule, only)
    if args.moe_token_dispatcher_type != "alltoall":
        return
    drops = args.moe_expert_capacity_factor is not None and not args.moe_pad_expert_input_to_capacity
    for flag, is_set in (
        ("--moe-router-padding-for-quantization", args.moe_router_padding_for_quantization),
        ("--moe-expert-capacity-factor", drops),
    ):
        if is_set:
            rule = f"is not supported with {_MODULES} moe_preprocess and the alltoall dispatcher: how many rows a rank "
            rule += "sends follows from the routing, and a CUDA graph has a fixed number"
            raise ConfigError(flag, getattr(args, attribute(flag)), rule, only)
    if args.moe_shared_expert_overlap:
        rule = f"is not supported with {_MODULES} moe_preprocess: Megatron's shared experts begin in the preprocessing "
        rule += "then, and refuse to continue behind a replay"
        raise ConfigError("--moe-shared-expert-overlap", True, rule, only)


def _check_wide_norm(args: argparse.Namespace) -> None:
    """Norms over all heads of a token need all heads on one rank."""
    flag = "--smartmoe-wide-qk-norm"
    if not args.smartmoe_wide_qk_norm:
        return
    if not (args.qk_layernorm and args.normalization == "RMSNorm") or args.multi_latent_attention:
        rule = "needs --qk-layernorm and --normalization RMSNorm, without --multi-latent-attention"
        raise ConfigError(flag, True, rule, "Add them, or remove it.")
    if args.transformer_impl != "local" or args.spec is not None:
        rule = "needs --transformer-impl local: TransformerEngine's norms are per head"
        raise ConfigError(flag, True, rule, "Add --transformer-impl local, or remove it.")
    if args.tensor_model_parallel_size > 1:
        rule = "is not supported with tensor parallelism, which spreads the heads of a token over ranks"
        raise ConfigError(flag, True, rule, "Pass --tensor-model-parallel-size 1; experts can use more expert ranks.")


def _needs_experts(args: argparse.Namespace, flag: str, value: object) -> None:
    if args.num_experts is None and not args.use_checkpoint_args:
        raise ConfigError(flag, value, "needs a model with experts", "Pass --num-experts 8, for example, or remove it.")


def _needs_smartmoe(args: argparse.Namespace, flag: str, value: object) -> None:
    if not args.smartmoe:
        raise ConfigError(flag, value, "needs --smartmoe", "Add --smartmoe, or remove it.")


def _needs_expert_parallelism(args: argparse.Namespace, flag: str, value: object) -> None:
    if args.expert_model_parallel_size == 1:
        rule = "needs expert parallelism: on one rank there is nothing to balance or to overlap"
        raise ConfigError(flag, value, rule, "Pass --expert-model-parallel-size 2, for example, or remove it.")


def _check_watchdog(args: argparse.Namespace) -> None:
    floor_s = args.smartmoe_watchdog_floor_s
    if not 1 <= floor_s < math.inf:  # also refuses NaN
        rule = "must be a number of seconds, at least 1: every longer hiccup of a short step would be reported"
        raise ConfigError(WATCHDOG_FLOOR, floor_s, rule, "Remove it for its default, or pass --smartmoe-watchdog off.")


def _check_resume(args: argparse.Namespace) -> None:
    """Going back to a whole checkpoint needs one to look for, and a look."""
    if args.smartmoe_resume == "newest":
        return
    if args.load is None:
        raise ConfigError(RESUME, args.smartmoe_resume, "needs --load", "Add --load DIR, or remove it.")
    if "://" in args.load:
        rule = f"looks for checkpoints in a directory, and --load is {args.load}"
        raise ConfigError(RESUME, args.smartmoe_resume, rule, "Remove it, or pass --load DIR.")
    if args.smartmoe_checkpoint_check == "off":
        rule = "needs a check that finds damage, and --smartmoe-checkpoint-check is off"
        raise ConfigError(RESUME, args.smartmoe_resume, rule, "Pass --smartmoe-checkpoint-check full or sizes.")


def _check_traces(args: argparse.Namespace) -> None:
    """The trace to record has a good name; the one to replay fits the model and the expert-parallel groups."""
    name = args.smartmoe_record_trace
    if name is not None:
        flag = "--smartmoe-record-trace"
        _needs_experts(args, flag, name)
        if Path(name).suffix != ".npz":
            raise ConfigError(flag, name, "must end in .npz", f"Pass {name}.npz.")
        if os.path.isdir(name):
            raise ConfigError(flag, name, "is a directory", f"Pass a file in it, for example {name}/trace.npz.")
    if args.smartmoe_record_micro_batches and name is None:
        rule = "says how --smartmoe-record-trace records, which is not given"
        raise ConfigError(RECORD_MICRO_BATCHES, True, rule, "Add --smartmoe-record-trace FILE, or remove it.")
    name = args.smartmoe_replay_trace
    if name is None:
        return
    flag = "--smartmoe-replay-trace"
    _needs_experts(args, flag, name)
    try:
        trace = load_trace(Path(name), field=flag)
        trace.groups(args.expert_model_parallel_size, record=0)  # the source ranks can be divided among the ranks
    except ConfigError as error:
        field = "--expert-model-parallel-size" if error.field == "--ep" else error.field
        raise ConfigError(field, error.value, error.rule, error.way_out) from None
    if args.num_experts is not None and trace.num_experts != args.num_experts:
        rule = f"has {trace.num_experts} experts, and --num-experts is {args.num_experts}"
        raise ConfigError(flag, name, rule, f"Pass a trace with {args.num_experts} experts.")
    if trace.has_micro_batches and args.recompute_granularity == "full":
        rule = "has counts per micro-batch, and full recomputation routes each micro-batch twice"
        raise ConfigError(flag, name, rule, "Remove --recompute-granularity full.")
    if args.moe_expert_capacity_factor is not None or args.moe_pad_expert_input_to_capacity:
        rule = "is not supported with --smartmoe-replay-trace, which replays assignments before any are dropped"
        raise ConfigError("--moe-expert-capacity-factor", args.moe_expert_capacity_factor, rule, _REMOVE_ONE)


def _check_ideal_run(args: argparse.Namespace) -> None:
    """The force-balanced run has measured steps, of as many ranks, stages and micro-batches."""
    name = args.smartmoe_ideal_run
    if name is None:
        return
    _needs_experts(args, IDEAL_RUN, name)
    if args.smartmoe_account == "off":
        raise ConfigError(IDEAL_RUN, name, f"needs {ACCOUNT} on, which measures this run", f"Pass {ACCOUNT} on.")
    steps = read_steps(Path(name))
    if steps is None:
        way_out = "Name the directory of a run with --moe-router-force-load-balancing, or remove the flag."
        raise ConfigError(IDEAL_RUN, name, "has no account.jsonl with measured steps", way_out)
    ideal, stages = steps.record, args.pipeline_model_parallel_size
    in_batch = args.micro_batch_size * max(
        1, args.world_size // (args.tensor_model_parallel_size * stages * args.context_parallel_size)
    )
    sizes = {
        "ranks": (len(ideal.stage_R), args.world_size),
        "pipeline stages": (int(ideal.stage_R.max()) + 1, stages),
        "micro-batches": (ideal.micro_batches, (args.global_batch_size or in_batch) // in_batch),
    }
    for what, (there, here) in sizes.items():
        if there != here:
            rule = f"has {there} {what}, and this run {here}"
            raise ConfigError(IDEAL_RUN, name, rule, "Name the force-balanced run of this launch, or remove the flag.")


def _check_experts(args: argparse.Namespace, *, cpu: bool) -> None:
    """What the two implementations of experts can compute."""
    if args.smartmoe_experts == "transformer_engine":
        if args.transformer_impl != "transformer_engine" or not args.moe_grouped_gemm or not has_transformer_engine():
            rule = "needs TransformerEngine, --transformer-impl transformer_engine and --moe-grouped-gemm"
            way_out = "Add them, or remove --smartmoe-experts."
            raise ConfigError("--smartmoe-experts", args.smartmoe_experts, rule, way_out)
        flag = "--moe-single-grouped-bias"
        if getattr(args, attribute(flag), False) and not getattr(args, attribute(_FUSED), False):
            rule = f"needs {_FUSED}: without it TransformerEngine's grouped linear takes a tensor of biases per expert"
            raise ConfigError(flag, True, rule, "Add it, or remove the flag.")
        return
    for flag, reason in _NOT_WITH_GROUPED_MM.items():
        if value := getattr(args, attribute(flag), False):
            rule = f"is not supported with --smartmoe-experts grouped_mm: {reason}"
            raise ConfigError(flag, value, rule, _REMOVE_ONE)
    _check_experts_memory(args)
    if args.optimizer not in ("adam", "sgd", *EMERGING_OPTIMIZERS):
        rule = "is not supported with --smartmoe-experts grouped_mm: it would leave the experts to Adam, because a "
        rule += "parameter holds several of them"
        raise ConfigError("--optimizer", args.optimizer, rule, "Pass adam, sgd, muon or lion.")
    _check_interleaving(args)
    for flag in ("--fp8-format", "--fp4-format"):
        value = getattr(args, {"--fp8-format": "fp8", "--fp4-format": "fp4"}[flag], None)
        if value:
            rule = "is not supported with --smartmoe-experts grouped_mm, which computes in bf16, fp16 and fp32"
            raise ConfigError(flag, value, rule, "Remove it, or pass --smartmoe-experts transformer_engine.")
    if not cpu and not args.use_checkpoint_args:
        _check_alignment(args)


def _check_interleaving(args: argparse.Namespace) -> None:
    """Blocks of gate and linear rows in turns must be whole on every rank."""
    flag = "--moe-mlp-glu-interleave-size"
    block = getattr(args, attribute(flag), None)
    if block is None:
        return
    if not (args.swiglu or args.quick_geglu):
        raise ConfigError(flag, block, "needs a gated activation", "Add --swiglu or --quick-geglu, or remove it.")
    if not (args.moe_ffn_hidden_size or args.ffn_hidden_size):
        return  # the sizes are in a checkpoint
    ffn = expert_shape(args).ffn
    if block < 1 or ffn % block:
        rule = f"must divide {ffn}, the inner size of an expert on a rank"
        raise ConfigError(flag, block, rule, "Pass 16 or 32, for example, or remove it.")


def _check_experts_memory(args: argparse.Namespace) -> None:
    """Parts of Megatron's experts that could be offloaded, and that these do not have."""
    flag = "--offload-modules"
    chosen = getattr(args, attribute(flag)) or []
    for part in ("expert_fc1", "moe_act", "fused_group_mlp"):
        if part in chosen:
            rule = f"has {part}, which is a part of Megatron's experts that --smartmoe-experts grouped_mm replaces"
            way_out = f"Remove {part}, or pass --smartmoe-experts transformer_engine."
            raise ConfigError(flag, " ".join(chosen), rule, way_out)
    for delays in _DELAYING:
        if getattr(args, attribute(delays), False) and "moe_act" in (args.recompute_modules or []):
            rule = f"has moe_act, which would drop what the delayed weight gradients of {delays} are made of"
            raise ConfigError("--recompute-modules", " ".join(args.recompute_modules), rule, _REMOVE_ONE)


def _check_alignment(args: argparse.Namespace) -> None:
    """On a GPU, rows of the grouped GEMM start at multiples of 16 bytes."""
    multiple = _GEMM_ALIGNMENT_BYTES // _VALUE_BYTES
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    ffn_flag = "--moe-ffn-hidden-size" if args.moe_ffn_hidden_size else "--ffn-hidden-size"
    ffn = args.moe_ffn_hidden_size or args.ffn_hidden_size or 4 * args.hidden_size
    for flag, value, size in (
        ("--hidden-size", args.hidden_size, args.hidden_size),
        (ffn_flag, ffn, ffn / etp),
    ):
        if size % multiple:
            rule = f"must be a multiple of {multiple} on every rank (expert tensor parallelism: {etp})"
            whole = multiple * (1 if flag == "--hidden-size" else etp)
            raise ConfigError(flag, value, rule, f"For example {flag} {-(-value // whole) * whole}.")


def _check_staging(args: argparse.Namespace) -> None:
    """One expert must fit beside the two chunks that take a quarter of the memory, or nothing could ever move."""
    if not (args.moe_ffn_hidden_size or args.ffn_hidden_size) or not args.hidden_size:
        return  # the sizes are in a checkpoint
    # Of the distributed optimizer's state each rank holds a part, which may be none.
    least_bytes = expert_shape(args).weight_bytes if args.use_distributed_optimizer else state_bytes(args)
    least_mib = -(-least_bytes * 4 // 3 // 2**20)
    if args.smartmoe_migration_staging_mib < least_mib:
        raise ConfigError(
            "--smartmoe-migration-staging-mib",
            args.smartmoe_migration_staging_mib,
            f"must be at least {least_mib}: no expert of this model would fit",
            f"Pass {least_mib} or more, or --smartmoe-homes off.",
        )


def _check_homes(args: argparse.Namespace) -> None:
    """Numbers of the homes loop, and options with which experts cannot move."""
    for flag, least in (
        ("--smartmoe-homes-interval", 1),
        ("--smartmoe-homes-start", 0),
        ("--smartmoe-homes-horizon", 1),
        ("--smartmoe-migration-staging-mib", 1),
        ("--smartmoe-migration-timeout-s", 1),
    ):
        value = getattr(args, attribute(flag))
        if value < least:
            raise ConfigError(flag, value, f"must be at least {least}", "Remove it for its default.")
    if args.smartmoe_homes_margin < 1:
        rule = "must be at least 1, or experts would move at a loss"
        raise ConfigError("--smartmoe-homes-margin", args.smartmoe_homes_margin, rule, "Remove it for its default, 2.")
    if args.smartmoe_cluster is not None:
        load_cluster_spec(Path(args.smartmoe_cluster))
    if args.smartmoe_homes == "off" or args.expert_model_parallel_size == 1:
        return
    _check_staging(args)
    for flag, reason in _NOT_WITH_HOMES.items():
        if getattr(args, attribute(flag), False):
            rule = f"is not supported with --smartmoe-homes {args.smartmoe_homes}: {reason}"
            raise ConfigError(flag, getattr(args, attribute(flag)), rule, "Remove it, or pass --smartmoe-homes off.")
    if args.fp8 and args.fp8_recipe not in _FP8_WITHOUT_HISTORY:
        come = "come" if args.fp8_recipe == "delayed" else "may come"
        rule = (
            f"is not supported with --smartmoe-homes {args.smartmoe_homes}: its scales {come} from the history of a "
            "slot, which is another expert's after a move"
        )
        way_out = "Pass --fp8-recipe tensorwise, blockwise or mxfp8, or --smartmoe-homes off."
        raise ConfigError("--fp8-recipe", args.fp8_recipe, rule, way_out)
    _check_scaled_state(args)


def _check_scaled_state(args: argparse.Namespace) -> None:
    """Types of the precision-aware optimizer's state that have scales; offloaded state is fp32 whatever they say."""
    if not args.use_precision_aware_optimizer or args.optimizer_cpu_offload:
        return
    for flag in ("--main-params-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype"):
        value = getattr(args, attribute(flag))
        if value not in _UNSCALED_TYPES:
            rule = f"is not supported with --smartmoe-homes {args.smartmoe_homes}: {_SCALED_STATE}"
            raise ConfigError(flag, value, rule, "Pass fp32, or --smartmoe-homes off.")


def _check_replicas(args: argparse.Namespace) -> None:
    slots, mode = args.smartmoe_spare_slots, args.smartmoe_replicas
    if slots < 0:
        raise ConfigError(SPARE_SLOTS, slots, "must be at least 0", "Remove it, or pass 0, for no replicas.")
    if mode not in (None, "off") and slots == 0:
        rule = "needs spare slots for the replicas"
        raise ConfigError("--smartmoe-replicas", mode, rule, f"Add {SPARE_SLOTS} 1, or remove it.")
    _check_scope(args)
    if args.smartmoe_plan_on == "device" and (found := not_on_device(args)) is not None:
        raise ConfigError(PLAN_ON, "device", found[0], f"{found[1]}, or {PLAN_ON} host.")
    if replicas_mode(args) != "off":
        _check_replicas_possible(args)


def _check_scope(args: argparse.Namespace) -> None:
    """The domains that replicas stay in are nodes, or those of a level that the cluster file names."""
    scope = args.smartmoe_replicas_scope
    if scope in SCOPES:
        return
    names = [level.name for level in machine(args).levels]
    if scope not in names:
        known = ", ".join([*SCOPES, *names])
        rule = "is not auto, node, group or the name of a level in the file of --smartmoe-cluster"
        raise ConfigError("--smartmoe-replicas-scope", scope, rule, f"Known: {known}.")


def _check_replicas_possible(args: argparse.Namespace) -> None:
    """For a run that makes replicas, or has a pool with a setting that does."""
    slots, ranks = args.smartmoe_spare_slots, args.expert_model_parallel_size
    _needs_smartmoe(args, SPARE_SLOTS, slots)
    _needs_expert_parallelism(args, SPARE_SLOTS, slots)
    if args.num_experts is not None and slots > (most := args.num_experts - args.num_experts // ranks):
        rule = f"must be at most {most}, the experts of the other ranks"
        raise ConfigError(SPARE_SLOTS, slots, rule, "Pass a smaller number; 1 or 2 is usually enough.")
    for flag, reason in _NOT_WITH_REPLICAS.items():
        if value := getattr(args, attribute(flag), None):
            raise ConfigError(flag, value, f"is not supported with {SPARE_SLOTS}: {reason}", _REMOVE_ONE)
    _check_flex_slots(args)
    if args.smartmoe_experts == "transformer_engine":
        _check_te_replicas(args)
    if not args.smartmoe_replicas_margin >= 0:  # also refuses NaN
        rule = "must be at least 0"
        raise ConfigError("--smartmoe-replicas-margin", args.smartmoe_replicas_margin, rule, "The default is 1.")


def not_on_device(args: argparse.Namespace) -> tuple[str, str] | None:
    """What keeps replicas from being planned on the device, and the way out; None if the flags allow it."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if args.smartmoe_replicas != "exact" or args.smartmoe_pool:
        return "needs --smartmoe-replicas exact, without a pool", "Pass that"
    if etp > 1:
        return f"needs experts on one rank each, and they are on {etp}", "Pass --expert-tensor-parallel-size 1"
    if args.smartmoe_replicas_margin:
        return "leaves out no replica that does not pay", "Pass --smartmoe-replicas-margin 0"
    return None


def _check_te_replicas(args: argparse.Namespace) -> None:
    """What TransformerEngine's experts cannot do in spare slots."""
    for flag, reason in _NOT_WITH_TE_REPLICAS.items():
        if getattr(args, attribute(flag), False):
            rule = f"is not supported with {SPARE_SLOTS} and --smartmoe-experts transformer_engine: {reason}"
            raise ConfigError(flag, True, rule, f"Remove it, or {SPARE_SLOTS}.")
    for flag, reason in _NOT_WITH_FUSED_REPLICAS.items() if getattr(args, attribute(_FUSED), False) else ():
        if getattr(args, attribute(flag), False):
            rule = f"is not supported with {SPARE_SLOTS} and {_FUSED}: {reason}"
            raise ConfigError(flag, True, rule, "Remove one of the three.")
    if args.fp8 and args.fp8_recipe not in _FP8_WITHOUT_HISTORY:
        come = "come" if args.fp8_recipe == "delayed" else "may come"
        rule = f"is not supported with {SPARE_SLOTS}: its scales {come} from the history of a slot, in which experts "
        rule += "follow one another"
        way_out = f"Pass --fp8-recipe tensorwise, blockwise or mxfp8, or remove {SPARE_SLOTS}."
        raise ConfigError("--fp8-recipe", args.fp8_recipe, rule, way_out)


def _check_flex_slots(args: argparse.Namespace) -> None:
    """HybridEP's kernels read the probabilities of a node's slots as vectors of 4 floats."""
    backend = getattr(args, "moe_flex_dispatcher_backend", None)
    if args.moe_token_dispatcher_type != "flex" or backend != "hybridep" or args.num_experts is None:
        return
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    ep, spare_slots = args.expert_model_parallel_size, args.smartmoe_spare_slots
    slots = (args.num_experts // ep + spare_slots) * ep * etp
    if slots % 4:
        rule = f"makes {slots} slots with the experts of {ep * etp} ranks, and HybridEP needs a multiple of 4"
        raise ConfigError(SPARE_SLOTS, spare_slots, rule, f"Pass {spare_slots + 1}, or another dispatcher.")


def _check_overlap(args: argparse.Namespace) -> None:
    value, ranks = args.smartmoe_overlap_degree, args.expert_model_parallel_size
    if value == AUTO and ranks == 1:
        return  # there is nothing to choose
    if value != AUTO:
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= ranks):
            rule = f"must be {AUTO} or a number from 1 to {ranks}, the expert-parallel ranks"
            raise ConfigError(OVERLAP_DEGREE, value, rule, "Remove it for 1, which overlaps nothing.")
        if int(value) == 1:
            return
    _needs_smartmoe(args, OVERLAP_DEGREE, value)
    _check_overlap_possible(args)


def _check_overlap_possible(args: argparse.Namespace) -> None:
    """For a run that splits all-to-alls into chunks, or has a pool with a setting that does."""
    if args.moe_token_dispatcher_type != "alltoall":
        rule = f"is not supported with {OVERLAP_DEGREE}: only the alltoall dispatcher can be split into chunks"
        raise ConfigError("--moe-token-dispatcher-type", args.moe_token_dispatcher_type, rule, "Pass alltoall.")
    for flag, reason in _NOT_IN_CHUNKS.items():
        if getattr(args, attribute(flag), False):
            raise ConfigError(flag, True, f"is not supported with {OVERLAP_DEGREE}: {reason}", _REMOVE_ONE)
    chosen = getattr(args, "offload_modules", None) or []
    for part in ("expert_fc1", "fused_group_mlp"):
        if part in chosen and args.smartmoe_experts == "transformer_engine":  # the others have no such parts
            rule = f"has {part}, which is not supported with {OVERLAP_DEGREE}: it frees the memory of a chunk's rows, "
            rule += "which other chunks may share"
            raise ConfigError("--offload-modules", " ".join(chosen), rule, _REMOVE_ONE)


def _check_pool(args: argparse.Namespace) -> None:
    """Every setting of the pool is possible in this launch; after the replicas' and the overlap's own checks."""
    value = args.smartmoe_pool
    if args.smartmoe_pool_interval < 1:
        raise ConfigError(POOL_INTERVAL, args.smartmoe_pool_interval, "must be at least 1", "The default is 100.")
    if value is None:
        return
    _needs_smartmoe(args, POOL, value)
    _needs_expert_parallelism(args, POOL, value)
    settings = settings_of_pool(args)
    if value == AUTO and len(settings) == 1:
        rule = "leaves nothing to choose: experts do not move, there are no spare slots, and nothing overlaps"
        way_out = f"Add {SPARE_SLOTS} 1 or {OVERLAP_DEGREE} auto, or remove it."
        raise ConfigError(POOL, value, rule, way_out)
    for setting in settings:
        _check_setting(setting, args)
    if any(setting.replicas != "off" for setting in settings):
        _check_replicas_possible(args)
    if may_overlap(args):
        _check_overlap_possible(args)


def _check_dispatch(args: argparse.Namespace) -> None:
    """Two hops: the all-to-all is this project's and whole, and there are nodes to cross."""
    value = args.smartmoe_dispatch
    if value == FLAT:
        return
    _needs_smartmoe(args, DISPATCH, value)
    _needs_expert_parallelism(args, DISPATCH, value)
    if args.moe_token_dispatcher_type != "alltoall":
        rule = f"is not supported with {DISPATCH} {value}: it has another exchange"
        way_out = f"Pass alltoall, or {DISPATCH} {FLAT}."
        raise ConfigError("--moe-token-dispatcher-type", args.moe_token_dispatcher_type, rule, way_out)
    for flag, reason in _NOT_IN_TWO_HOPS.items():
        if getattr(args, attribute(flag), False):
            raise ConfigError(flag, True, f"is not supported with {DISPATCH} {value}: {reason}", _REMOVE_ONE)
    if args.smartmoe_overlap_degree != "1" or may_overlap(args):
        rule = f"is not supported with {DISPATCH} {value}: the second hop waits for all of the first"
        raise ConfigError(OVERLAP_DEGREE, args.smartmoe_overlap_degree, rule, f"Pass 1, or {DISPATCH} {FLAT}.")
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    ranks, per_node = args.expert_model_parallel_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if value == HIERARCHICAL and per_node % (ranks * etp) == 0:
        raise ConfigError(DISPATCH, value, on_one_node(ranks), f"Pass {FLAT}, or remove it.")


def on_one_node(ranks: int) -> str:
    """Why a group of expert-parallel ranks has no use for a hierarchical dispatch."""
    return f"the {ranks} expert-parallel ranks are on one node, and tokens cross no slow link"


def _check_setting(setting: PoolSetting, args: argparse.Namespace) -> None:
    """One entry of the pool's file, by its name."""
    ranks, slots, interval = args.expert_model_parallel_size, args.smartmoe_spare_slots, homes_interval(args)
    again = "Write the file again with smartmoe plan --pool FILE."
    change = "Change the flag, or remove the entry from the file."
    homes = f"--smartmoe-homes-interval is {interval}" if interval else "--smartmoe-homes is off"
    for is_wrong, rule, way_out in (
        (
            (setting.spare_slots == 0) != (setting.replicas == "off"),
            "spare_slots = 0 requires replicas = off, and > 0 requires auto, history or exact",
            again,
        ),
        (
            not 0 <= setting.spare_slots <= slots,
            f"uses {setting.spare_slots} spare slot{'s' * (setting.spare_slots != 1)}, and {SPARE_SLOTS} is {slots}",
            change,
        ),
        (
            not 1 <= setting.overlap_degree <= ranks,
            f"its overlap degree {setting.overlap_degree} must be from 1 to {ranks}, the expert-parallel ranks",
            "Plan the pool for this launch, or remove the entry from the file.",
        ),
        (
            setting.homes_interval not in (0, interval),
            f"re-evaluates expert placement every {setting.homes_interval} iterations, and {homes}",
            change,
        ),
    ):
        if is_wrong:
            raise ConfigError(f"{POOL}, entry", setting.key, rule, way_out)
