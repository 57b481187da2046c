"""Start-up checks of the `--smartmoe-*` flags: what they need, and which of Megatron's options do not go with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_smartmoe.adapter.expert_sizes import expert_shape, state_bytes
from megatron_smartmoe.adapter.flags.overlap_checks import check_overlap
from megatron_smartmoe.adapter.flags.parser import attribute, has_transformer_engine
from megatron_smartmoe.adapter.flags.pool_checks import check_pool
from megatron_smartmoe.adapter.flags.replica_checks import check_replicas
from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.cluster import load_cluster_spec
from megatron_smartmoe.spec.trace import load_trace

_VALUE_BYTES = 2  # bf16 and fp16; fp32 is aligned when they are
_GEMM_ALIGNMENT_BYTES = 16  # of a row, in torch's grouped GEMM on a GPU

# flag -> why --smartmoe does not go with it
_NOT_WITH_SMARTMOE = {
    "--use-megatron-fsdp": "its parameters are sharded in a layout of its own",
    "--use-torch-fsdp2": "its parameters are sharded in a layout of its own",
    "--optimizer-cpu-offload": "the experts' optimizer state is looked up on the device",
    "--moe-use-upcycling": "the dense checkpoint is read into Megatron's own experts",
}
_NOT_WITH_GROUPED_MM = {
    "--delay-wgrad-compute": "weight gradients cannot be delayed",
    "--overlap-dispatch-backward-with-experts-wgrad": "weight gradients cannot be delayed",
    "--moe-router-padding-for-quantization": "no expert is padded",
    "--moe-use-device-initiated-grouped-gemm": "it is TransformerEngine's",
    "--moe-single-grouped-weight": "it is TransformerEngine's",
}
_NOT_WITH_HOMES = {
    "--use-precision-aware-optimizer": "its state is packed by TransformerEngine",
    "--fp8-param-gather": "fp8 parameters have scales that would have to move along",
    "--mtp-num-layers": "layers of multi-token prediction share their numbers with others",
}


def check_smartmoe(args: argparse.Namespace, *, cpu: bool) -> None:
    """Check the project's flags against each other and against Megatron's.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for flag in ("--smartmoe-record-trace", "--smartmoe-replay-trace"):
        if getattr(args, attribute(flag)) is not None:
            _needs_experts(args, flag, getattr(args, attribute(flag)))
    _check_record(args)
    _check_replay(args)
    check_replicas(args)
    check_overlap(args)
    check_pool(args)
    if not args.smartmoe:
        if args.smartmoe_experts != "grouped_mm":
            raise ConfigError("--smartmoe-experts", args.smartmoe_experts, "needs --smartmoe", "Add --smartmoe.")
        return
    _needs_experts(args, "--smartmoe", True)
    for flag, reason in _NOT_WITH_SMARTMOE.items():
        if getattr(args, attribute(flag), False):
            raise ConfigError(flag, True, f"does not go with --smartmoe: {reason}", "Leave one of the two out.")
    if args.transformer_impl == "inference_optimized":
        rule = "does not go with --smartmoe, which trains"
        raise ConfigError("--transformer-impl", args.transformer_impl, rule, "Pass local or transformer_engine.")
    if (getattr(args, "cuda_graph_impl", None) or "none") != "none":
        rule = "does not go with --smartmoe: its dispatcher has not been captured yet"
        raise ConfigError("--cuda-graph-impl", args.cuda_graph_impl, rule, "Leave it out.")
    _check_experts(args, cpu=cpu)
    _check_homes(args)


def _needs_experts(args: argparse.Namespace, flag: str, value: object) -> None:
    if args.num_experts is None and not args.use_checkpoint_args:
        raise ConfigError(flag, value, "needs a model with experts", "Pass --num-experts, or leave it out.")


def _check_experts(args: argparse.Namespace, *, cpu: bool) -> None:
    """What the two kinds of experts can compute."""
    if args.smartmoe_experts == "transformer_engine":
        if args.transformer_impl != "transformer_engine" or not args.moe_grouped_gemm or not has_transformer_engine():
            rule = "needs TransformerEngine, --transformer-impl transformer_engine and --moe-grouped-gemm"
            way_out = "Add them, or leave --smartmoe-experts out."
            raise ConfigError("--smartmoe-experts", args.smartmoe_experts, rule, way_out)
        return
    for flag, reason in _NOT_WITH_GROUPED_MM.items():
        if getattr(args, attribute(flag), False):
            rule = f"does not go with --smartmoe-experts grouped_mm: {reason}"
            raise ConfigError(flag, True, rule, "Leave one of the two out.")
    if args.add_bias_linear:
        rule = "is needed: --smartmoe-experts grouped_mm has no biases"
        raise ConfigError("--disable-bias-linear", False, rule, "Add --disable-bias-linear.")
    for flag in ("--fp8-format", "--fp4-format"):
        value = getattr(args, {"--fp8-format": "fp8", "--fp4-format": "fp4"}[flag], None)
        if value:
            rule = "does not go with --smartmoe-experts grouped_mm, which computes in bf16, fp16 and fp32"
            raise ConfigError(flag, value, rule, "Leave it out, or pass --smartmoe-experts transformer_engine.")
    if not cpu and not args.use_checkpoint_args:
        _check_alignment(args)


def _check_alignment(args: argparse.Namespace) -> None:
    """Rows of the grouped GEMM start at multiples of 16 bytes on a GPU."""
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
            raise ConfigError(flag, value, rule, "Choose another size.")


def _check_staging(args: argparse.Namespace) -> None:
    """One expert must fit beside the two chunks that take a quarter, or nothing could ever move."""
    if not (args.moe_ffn_hidden_size or args.ffn_hidden_size) or not args.hidden_size:
        return  # from a checkpoint
    # Of the distributed optimizer's state each rank holds a part, which may be none.
    least_bytes = expert_shape(args).weight_bytes if args.use_distributed_optimizer else state_bytes(args)
    least_mib = -(-least_bytes * 4 // 3 // 2**20)
    if args.smartmoe_migration_staging_mib < least_mib:
        raise ConfigError(
            "--smartmoe-migration-staging-mib",
            args.smartmoe_migration_staging_mib,
            f"must be at least {least_mib}, or no expert of this model could ever move",
            "Leave it out for its default, or pass --smartmoe-homes off.",
        )


def _check_homes(args: argparse.Namespace) -> None:
    """Numbers of the homes loop, and optimizers whose state cannot be moved."""
    for flag, least in (
        ("--smartmoe-homes-interval", 1),
        ("--smartmoe-homes-start", 0),
        ("--smartmoe-homes-horizon", 1),
        ("--smartmoe-migration-staging-mib", 1),
        ("--smartmoe-migration-timeout-s", 1),
    ):
        value = getattr(args, attribute(flag))
        if value < least:
            raise ConfigError(flag, value, f"must be at least {least}", "Leave it out for its default.")
    if args.smartmoe_homes_margin < 1:
        rule = "must be at least 1, or experts would move at a loss"
        raise ConfigError("--smartmoe-homes-margin", args.smartmoe_homes_margin, rule, "Leave it out for its default.")
    if args.smartmoe_cluster is not None:
        load_cluster_spec(Path(args.smartmoe_cluster))
    if args.smartmoe_homes == "off" or args.expert_model_parallel_size == 1:
        return
    _check_staging(args)
    for flag, reason in _NOT_WITH_HOMES.items():
        if getattr(args, attribute(flag), False):
            rule = f"does not go with --smartmoe-homes {args.smartmoe_homes}: {reason}"
            raise ConfigError(flag, getattr(args, attribute(flag)), rule, "Leave it out, or pass --smartmoe-homes off.")
    if args.optimizer not in ("adam", "sgd"):
        rule = f"does not go with --smartmoe-homes {args.smartmoe_homes}: its state cannot be moved"
        raise ConfigError("--optimizer", args.optimizer, rule, "Pass adam or sgd, or --smartmoe-homes off.")


def _check_record(args: argparse.Namespace) -> None:
    name = args.smartmoe_record_trace
    if name is None:
        return
    path = Path(name)
    if path.suffix != ".npz":
        raise ConfigError("--smartmoe-record-trace", name, "must end in .npz", f"Pass {name}.npz.")
    if path.is_dir():
        raise ConfigError("--smartmoe-record-trace", name, "is a directory", "Pass the name of a file in it.")


def _check_replay(args: argparse.Namespace) -> None:
    """The trace has to fit the model and the expert-parallel groups."""
    name = args.smartmoe_replay_trace
    if name is None:
        return
    try:
        trace = load_trace(Path(name))
        trace.groups(args.expert_model_parallel_size, record=0)  # the source ranks can be shared out
    except ConfigError as error:
        field = "--smartmoe-replay-trace" if error.field == "--trace" else "--expert-model-parallel-size"
        raise ConfigError(field, error.value, error.rule, error.way_out) from None
    if args.num_experts is not None and trace.num_experts != args.num_experts:
        rule = f"has {trace.num_experts} experts, and --num-experts is {args.num_experts}"
        raise ConfigError("--smartmoe-replay-trace", name, rule, "Replay a trace of the same number of experts.")
    if trace.has_micro_batches and args.recompute_granularity == "full":
        rule = "keeps micro-batches apart, and full recomputation routes each of them twice"
        raise ConfigError("--smartmoe-replay-trace", name, rule, "Leave --recompute-granularity full out.")
    if args.moe_expert_capacity_factor is not None or args.moe_pad_expert_input_to_capacity:
        rule = "replays assignments before dropping, and a capacity would not be applied"
        raise ConfigError("--moe-expert-capacity-factor", args.moe_expert_capacity_factor, rule, "Leave it out.")
