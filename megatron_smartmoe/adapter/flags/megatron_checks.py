"""Start-up checks of Megatron's flags, before any process group forms.

Megatron checks most of this too, by assertions that come late, from one rank at a time. The rules here are Megatron
0.19's own, each with the flag, its value, the rule and the way out; what they do not cover, Megatron's own validation
still refuses (see `megatron_verdict`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import traceback
from math import gcd

from megatron_smartmoe.adapter.flags.checkpoint_options import check_checkpoint_options
from megatron_smartmoe.adapter.flags.data_checks import check_data
from megatron_smartmoe.adapter.flags.ignored_options import check_ignored
from megatron_smartmoe.adapter.flags.parser import attribute, has_transformer_engine
from megatron_smartmoe.adapter.flags.smartmoe_checks import check_smartmoe
from megatron_smartmoe.adapter.flags.start_checks import check_start
from megatron_smartmoe.adapter.gpu_environment import set_gpu_environment
from megatron_smartmoe.adapter.local.muon import MEGATRONS_REGISTRY
from megatron_smartmoe.adapter.moe.own_experts import declare_grouped
from megatron_smartmoe.adapter.repairs.bucket_padding import check_bucket_padding
from megatron_smartmoe.errors import ConfigError


def check(args: argparse.Namespace, *, world_size: int, cpu: bool, data_exists: bool = True) -> None:
    """Check parsed flags against each other, the number of ranks, and the files that they name.

    Args:
        args: from `parser.parse`; None for flags that are not given and have no default.
        world_size: number of ranks of the job.
        cpu: whether the CPU facade will be used.
        data_exists: False when the dataset is still to be prepared, so that its files are not checked.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_sizes(args)
    _check_supported(args, cpu=cpu)
    if not args.use_checkpoint_args:  # otherwise the model's shape is still unknown
        _check_model(args)
    _check_parallelism(args, world_size)
    _check_batch(args, world_size)
    check_ignored(args, cpu=cpu)
    check_checkpoint_options(args)
    check_smartmoe(args, cpu=cpu)
    check_start(args)
    check_bucket_padding(args)
    if data_exists:
        check_data(args)


def check_args(args: argparse.Namespace, *, cpu: bool, data_exists: bool = True) -> None:
    """Check parsed flags of this job, and set the environment variables that follow from them.

    Raises:
        ConfigError: see `check`.
    """
    check(args, world_size=args.world_size, cpu=cpu, data_exists=data_exists)
    set_gpu_environment(args, cpu=cpu)


def _divides(field: str, value: int, divisor: int, divisor_name: str, way_out: str | None = None) -> None:
    if divisor < 1 or value % divisor:
        way_out = (
            way_out
            or f"Change one of the two, for example to {field} {-(-value // max(1, divisor)) * max(1, divisor)}."
        )
        raise ConfigError(field, value, f"must be divisible by {divisor_name} = {divisor}", way_out)


def _check_sizes(args: argparse.Namespace) -> None:
    """Sizes by which the other checks divide."""
    for flag in (
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--context-parallel-size",
        "--expert-model-parallel-size",
        "--expert-tensor-parallel-size",
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--num-query-groups",
        "--seq-length",
        "--max-position-embeddings",
        "--num-experts",
        "--micro-batch-size",
        "--global-batch-size",
        "--moe-router-topk",
    ):
        value = getattr(args, attribute(flag))
        if value is not None and value < 1:
            raise ConfigError(flag, value, "must be at least 1", f"Remove it, or pass {flag} 1, for example.")


def _check_supported(args: argparse.Namespace, *, cpu: bool) -> None:
    """Options that need what is not installed, or that this entry point does not support."""
    for flag in ("--sft", "--dataloader-inter-document-masking", "--hybrid-context-parallel", "--perform-rl-step"):
        if getattr(args, attribute(flag), False):
            raise ConfigError(flag, True, "is not supported by this entry point, which pretrains GPT-MoE", "Remove it.")
    if args.yaml_cfg is not None:
        rule = "is not supported: configurations in Megatron's own YAML are not read"
        raise ConfigError("--yaml-cfg", args.yaml_cfg, rule, "Use --config FILE, or flags.")
    if (teacher := getattr(args, "logits_load_dir", None)) is not None:  # releases up to 0.18 have no such flag
        rule = "is not supported by this entry point, which pretrains GPT-MoE: it is for distillation"
        raise ConfigError("--logits-load-dir", teacher, rule, "Remove it.")
    if args.transformer_impl == "transformer_engine" and not has_transformer_engine():
        rule = f"needs TransformerEngine, which {'CPU ranks do not use' if cpu else 'is not installed'}"
        way_out = f"{'Remove it' if cpu else 'Install it'}, or pass --transformer-impl local."
        raise ConfigError("--transformer-impl", args.transformer_impl, rule, way_out)
    if args.use_precision_aware_optimizer and not args.optimizer_cpu_offload and not has_transformer_engine():
        rule = f"needs TransformerEngine's Adam, which {'CPU ranks do not use' if cpu else 'is not installed'}"
        way_out = f"Remove it, {'or' if cpu else 'install TransformerEngine, or'} add --optimizer-cpu-offload."
        raise ConfigError("--use-precision-aware-optimizer", True, rule, way_out)
    if args.transformer_impl == "local":
        _check_local_implementation(args)
    if args.optimizer not in ("adam", "sgd"):
        _check_emerging_optimizer(args)
    if cpu and args.distributed_backend != "gloo":
        rule = "must be gloo on CPU ranks"
        raise ConfigError("--distributed-backend", args.distributed_backend, rule, "Remove it, or pass gloo.")
    if cpu and _is_interleaved(args) and not args.overlap_p2p_comm:
        rule = "is not supported on CPU ranks: the interleaved schedule with batched sends gives wrong results on gloo"
        raise ConfigError("--no-overlap-p2p-communication", True, rule, "Remove it.")


def _check_local_implementation(args: argparse.Namespace) -> None:
    if args.moe_grouped_gemm:
        rule = "needs TransformerEngine and --transformer-impl transformer_engine"
        raise ConfigError("--moe-grouped-gemm", True, rule, "Remove it, or install TransformerEngine.")
    if args.fp8:
        raise ConfigError("--fp8-format", args.fp8, "needs TransformerEngine", "Pass --bf16 instead, or install it.")


def _check_emerging_optimizer(args: argparse.Namespace) -> None:
    """Muon and its like come from a package of their own, and share their state among ranks in their own way."""
    if importlib.util.find_spec("emerging_optimizers") is None:
        way_out = "Install it (pip install emerging-optimizers), or pass adam."
        raise ConfigError("--optimizer", args.optimizer, "needs the package emerging-optimizers", way_out)
    if args.smartmoe and importlib.util.find_spec(MEGATRONS_REGISTRY) is None:
        rule = "needs megatron-core 0.18 with --smartmoe, or experts in slots would be left to Adam"
        raise ConfigError("--optimizer", args.optimizer, rule, "Install it, or pass adam.")
    layer_wise = args.use_distributed_optimizer or args.optimizer.startswith("dist_")
    if layer_wise and not args.bf16:
        rule = "needs --bf16 with --use-distributed-optimizer: Megatron's layer-wise optimizer has no other precision"
        raise ConfigError("--optimizer", args.optimizer, rule, "Add --bf16, or remove --use-distributed-optimizer.")


def _is_interleaved(args: argparse.Namespace) -> bool:
    return bool(args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank)


def _check_model(args: argparse.Namespace) -> None:
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings", "--seq-length"):
        name = attribute(flag)
        if getattr(args, name) is None and not (name == "num_layers" and args.hybrid_layer_pattern):
            raise ConfigError(flag, None, "is required", f"Pass {flag} N, or a --config that has it.")
    tp = args.tensor_model_parallel_size
    _divides("--num-attention-heads", args.num_attention_heads, tp, "--tensor-model-parallel-size")
    if args.group_query_attention:
        groups, heads = args.num_query_groups, args.num_attention_heads
        _divides("--num-query-groups", groups, tp, "--tensor-model-parallel-size")
        _divides("--num-attention-heads", heads, groups, "--num-query-groups")
    if args.sequence_parallel:
        _divides("--seq-length", args.seq_length, tp, "--tensor-model-parallel-size (sequence parallel)")
    cp = args.context_parallel_size
    if cp > 1:
        _divides("--seq-length", args.seq_length, 2 * cp, "2 x --context-parallel-size")
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        rule = f"cannot choose more than --num-experts = {args.num_experts} experts"
        raise ConfigError("--moe-router-topk", args.moe_router_topk, rule, "Pass a smaller number, for example 2.")
    _check_layers(args)


def _check_layers(args: argparse.Namespace) -> None:
    pp = args.pipeline_model_parallel_size
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
        args.hybrid_layer_pattern,
    )
    if any(option is not None for option in uneven):
        return  # Megatron checks these layouts
    extra = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    layers = args.num_layers + extra
    if layers % pp:
        counted = f" (with {extra} counted for embedding and loss)" if extra else ""
        rule = f"must be divisible by --pipeline-model-parallel-size = {pp}{counted}"
        even = -(-layers // pp) * pp - extra
        way_out = f"Pass --num-layers {even}, for example, another --pipeline-model-parallel-size, or an uneven split "
        way_out += "with --decoder-first-pipeline-num-layers."
        raise ConfigError("--num-layers", args.num_layers, rule, way_out)
    if _is_interleaved(args) and pp < 2:
        rule = "the interleaved schedule needs at least two pipeline stages"
        raise ConfigError("--pipeline-model-parallel-size", pp, rule, "Pass 2 or more, or remove the virtual stages.")
    for flag in ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"):
        divisor, in_stage = getattr(args, attribute(flag)), layers // pp
        if divisor:
            way_out = (
                f"Pass a divisor of the layers of one pipeline stage, for example {flag} {gcd(divisor, in_stage)}."
            )
            _divides("--num-layers / PP", in_stage, divisor, flag, way_out)


def _check_parallelism(args: argparse.Namespace, world_size: int) -> None:
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if world_size % (tp * pp * cp):
        rule = f"must be a multiple of TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp} ranks"
        raise ConfigError("world size", world_size, rule, _more_ranks(world_size, tp * pp * cp))
    if ep > 1 and args.num_experts is None and not args.use_checkpoint_args:
        rule = "needs a model with experts"
        raise ConfigError("--expert-model-parallel-size", ep, rule, f"Pass --num-experts {ep}, for example.")
    if args.num_experts is None:
        return
    _divides("--num-experts", args.num_experts, ep, "--expert-model-parallel-size")
    if world_size % (etp * ep * pp):
        rule = f"must be a multiple of ETP {etp} x EP {ep} x PP {pp} = {etp * ep * pp} ranks"
        raise ConfigError("world size", world_size, rule, _more_ranks(world_size, etp * ep * pp))
    if tp > 1 and not args.sequence_parallel:
        rule = "needs sequence parallelism in a model with experts"
        raise ConfigError("--tensor-model-parallel-size", tp, rule, "Add --sequence-parallel.")


def _more_ranks(world_size: int, multiple: int) -> str:
    return f"Start {-(-world_size // multiple) * multiple} ranks, for example (--nproc), or lower one of these sizes."


def _check_batch(args: argparse.Namespace, world_size: int) -> None:
    if args.micro_batch_size is None:
        raise ConfigError("--micro-batch-size", None, "is required", "Pass --micro-batch-size 1, for example.")
    if args.global_batch_size is None:
        return  # Megatron's default is micro-batch size x data-parallel size
    model_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    dp = world_size // model_size
    name = f"--micro-batch-size x data-parallel size ({args.micro_batch_size} x {dp})"
    _divides("--global-batch-size", args.global_batch_size, args.micro_batch_size * dp, name)


def megatron_verdict(args: argparse.Namespace) -> None:
    """Let Megatron validate `args` (which it changes), without its output.

    Raises:
        ConfigError: Megatron refuses the flags; its message is the value.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import validate_args

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            validate_args(args, {})
            declare_grouped(args)
            core_transformer_config_from_args(args)  # has rules of its own
    except (Exception, SystemExit) as error:  # any error here is caused by the flags
        raise _refusal(error, printed.getvalue()) from error


def _refusal(error: BaseException, printed: str) -> ConfigError:
    """Megatron's message: that of the assertion, else the last line that it printed, else the assertion itself."""
    lines = [line for line in printed.splitlines() if line.strip()]
    if str(error).strip() and not isinstance(error, SystemExit):
        message = str(error).strip()
    elif isinstance(error, SystemExit) and lines:
        message = lines[-1]
    else:
        message = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    way_out = "Change the flags that it names; --help-megatron lists all."
    return ConfigError("Megatron's own check", message, "does not hold for these flags", way_out)
