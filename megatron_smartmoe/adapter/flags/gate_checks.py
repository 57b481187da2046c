"""Start-up checks of `--smartmoe-gate`: the flags that a gate is made of, and the options that no gate defines."""

from __future__ import annotations

import argparse

from megatron_smartmoe.adapter.flags.parser import attribute
from megatron_smartmoe.adapter.gates.table import (
    AUX,
    CAPACITY,
    COEFF,
    GATE,
    GATES,
    OUTGOING,
    OUTGOING_DEFAULT,
    RESIDUALS,
    TAU_DEFAULT,
    TOP_K,
    ZERO_EXPERTS,
    ZERO_EXPERTS_DEFAULT,
    ZERO_EXPERTS_TAU,
    Gate,
    ZeroExperts,
)
from megatron_smartmoe.errors import ConfigError

# Options that change which experts are chosen, in ways that no paper of a gate defines: flag -> what it does.
_UNDEFINED = {
    "--moe-router-enable-expert-bias": "it adds a bias to the scores that are compared",
    "--moe-router-num-groups": "it limits the experts of a token to groups",
    "--moe-router-group-topk": "it limits the experts of a token to groups",
    "--moe-router-topk-scaling-factor": "it scales the weights",
    "--moe-router-force-load-balancing": "it replaces the scores by random numbers",
    "--moe-router-force-biased": "it replaces the scores by random numbers",
    "--moe-use-upcycling": "it makes Megatron's router",
    "--smartmoe-replay-trace": "it replaces what a gate chooses",
}
# Options that Megatron's router honours, and the routers of this project do not: flag -> why.
_MEGATRONS_ALONE = {
    "--moe-router-fusion": "its kernels compute Megatron's top-k",
    "--moe-pad-expert-input-to-capacity": "a gate that drops choices pads nothing",
    "--use-megatron-fsdp": "it is not tested with the gate's own parameters",
    "--use-torch-fsdp2": "it is not tested with the gate's own parameters",
}


def check_gate(args: argparse.Namespace) -> None:
    """Check the gate against Megatron's flags.

    Raises:
        ConfigError: the first rule that is broken.
    """
    name = args.smartmoe_gate
    _check_own_flags(args, name)
    if name == TOP_K:
        return
    if args.num_experts is None and not args.use_checkpoint_args:
        raise ConfigError(GATE, name, "needs a model with experts", "Pass --num-experts 8, for example, or remove it.")
    gate = GATES[name]
    # Step 1: the flags that it is made of
    for flag, wanted in gate.sets.items():
        _check_set(args, name, flag, wanted)
    # Step 2: what is not defined for it
    for flag, does in _UNDEFINED.items():
        value = getattr(args, attribute(flag), None)
        if value is not None and value is not False:
            rule = f"is not defined for {GATE} {name}: {does}"
            raise ConfigError(flag, value, rule, f"Remove it, or {GATE}.")
    if args.transformer_impl == "inference_optimized":
        rule = f"is not supported with {GATE}: it is for inference only"
        raise ConfigError("--transformer-impl", args.transformer_impl, rule, "Pass local or transformer_engine.")
    # Step 3: what its own router needs
    if gate.needs_layer:
        _check_layer(args, name)
    if gate.router is not None:
        _check_router(args, name, gate)


def _check_own_flags(args: argparse.Namespace, name: str) -> None:
    """Flags of single gates."""
    outgoing, tau = args.smartmoe_gate_outgoing, args.smartmoe_zero_experts_tau
    for flag, owner, default in (
        (OUTGOING, "topology", OUTGOING_DEFAULT),
        (ZERO_EXPERTS, "moe++", ZERO_EXPERTS_DEFAULT),
        (ZERO_EXPERTS_TAU, "moe++", TAU_DEFAULT),
        (RESIDUALS, "moe++", "on"),
    ):
        value = getattr(args, attribute(flag))
        if name != owner and value != default:
            raise ConfigError(flag, value, f"needs {GATE} {owner}", f"Add {GATE} {owner}, or remove it.")
    if not 0 <= outgoing <= 1:  # also refuses NaN
        raise ConfigError(OUTGOING, outgoing, "must be a share from 0 to 1", f"Pass {OUTGOING_DEFAULT}, for example.")
    if not 0 < tau < float("inf"):
        raise ConfigError(ZERO_EXPERTS_TAU, tau, "must be a number above 0", f"Pass {TAU_DEFAULT}, for example.")
    try:
        ZeroExperts.parse(args.smartmoe_zero_experts)
    except ValueError:
        rule = "must name how many experts there are of each kind: zero, copy, constant; and at least one"
        way_out = f"Pass {ZERO_EXPERTS_DEFAULT}, for example."
        raise ConfigError(ZERO_EXPERTS, args.smartmoe_zero_experts, rule, way_out) from None


def _check_layer(args: argparse.Namespace, name: str) -> None:
    """What this project's layer adds to its output."""
    if not args.smartmoe:
        raise ConfigError(GATE, name, "needs --smartmoe: its layer computes them", "Add --smartmoe.")
    if args.overlap_moe_expert_parallel_comm:
        rule = f"is not supported with {GATE} {name}: two micro-batches would share a router"
        raise ConfigError("--overlap-moe-expert-parallel-comm", True, rule, f"Remove it, or {GATE}.")


def _check_set(args: argparse.Namespace, name: str, flag: str, wanted: str | bool) -> None:
    value = getattr(args, attribute(flag), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(wanted, bool):
        is_right, way_out = bool(value) == wanted, f"{'Add' if wanted else 'Remove'} {flag}, or use another gate."
        must = f"must {'' if wanted else 'not '}be given"
    else:
        is_right = value == wanted if isinstance(value, str) else _is_number(value, wanted)
        must, way_out = f"must be {wanted}", f"Remove it: {GATE} {name} sets {flag} {wanted}."
    if not is_right:
        raise ConfigError(flag, value, f"{must} with {GATE} {name}, which is made of it", way_out)


def _is_number(value: object, wanted: str) -> bool:
    return isinstance(value, int | float) and value == float(wanted)


def _check_router(args: argparse.Namespace, name: str, gate: Gate) -> None:
    for flag, why in _MEGATRONS_ALONE.items():
        if value := getattr(args, attribute(flag), None):
            raise ConfigError(flag, value, f"is not supported with {GATE} {name}: {why}", f"Remove it, or {GATE}.")
    if (getattr(args, "cuda_graph_impl", None) or "none") != "none":
        rule = f"is not supported with {GATE} {name}: its router runs in no CUDA graph yet"
        raise ConfigError("--cuda-graph-impl", args.cuda_graph_impl, rule, f"Remove it, or {GATE}.")
    if not gate.least_choices <= args.moe_router_topk:
        rule = f"must be at least {gate.least_choices} with {GATE} {name}"
        raise ConfigError("--moe-router-topk", args.moe_router_topk, rule, f"Pass {gate.least_choices}.")
    if args.num_experts is not None and args.moe_router_topk >= args.num_experts:
        rule = f"must be less than --num-experts = {args.num_experts} with {GATE} {name}: there is nothing to choose"
        raise ConfigError("--moe-router-topk", args.moe_router_topk, rule, "Pass a smaller number, for example 2.")
    if gate.sets.get(AUX) == "aux_loss" and not _coeff(args) >= 0:  # also refuses NaN
        raise ConfigError(COEFF, args.moe_aux_loss_coeff, "must be at least 0", f"Remove it: {GATE} has a default.")
    capacity = args.moe_expert_capacity_factor
    if gate.drops and not (capacity or 0) > 0:
        rule = f"must be a number above 0 with {GATE} {name}, which leaves choices out"
        way_out = f"Remove it for the paper's, or pass {CAPACITY} {args.num_experts}, which drops nothing for capacity."
        raise ConfigError(CAPACITY, capacity, rule, way_out)
    if not gate.drops and capacity is not None and capacity >= 0:
        rule = f"is not defined for {GATE} {name}, which drops nothing"
        raise ConfigError(CAPACITY, capacity, rule, f"Remove it, or {GATE}.")
    if gate.draws and getattr(args, "mtp_use_repeated_layer", False) and (args.mtp_num_layers or 0) > 1:
        rule = f"is not supported with {GATE} {name}: random numbers are told apart by layer and micro-batch, and the "
        rule += "depths share one layer"
        raise ConfigError("--mtp-use-repeated-layer", True, rule, f"Remove it, or {GATE}.")
    if args.use_checkpoint_args:
        return  # the sizes are in a checkpoint
    if gate.equal_shares:
        _check_shares(args, name)
    experts_per_rank = args.num_experts // args.expert_model_parallel_size
    if gate.fits_in_rank and args.moe_router_topk > experts_per_rank:
        rule = f"must be at most {experts_per_rank}, the experts of a rank, with {GATE} {name}: a token that is given "
        rule += "to a rank needs different experts there"
        raise ConfigError("--moe-router-topk", args.moe_router_topk, rule, "Use fewer expert-parallel ranks.")


def _check_shares(args: argparse.Namespace, name: str) -> None:
    """Every expert gets the same number of a rank's tokens."""
    split = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    tokens = args.micro_batch_size * args.seq_length // split
    if tokens % args.num_experts:
        rule = f"gives a rank {tokens} tokens, which --num-experts = {args.num_experts} must divide with {GATE} {name}"
        raise ConfigError("--micro-batch-size", args.micro_batch_size, rule, f"Pass {args.num_experts}, for example.")


def _coeff(args: argparse.Namespace) -> float:
    value = args.moe_aux_loss_coeff
    return float(value[0] if isinstance(value, list) else value or 0)
