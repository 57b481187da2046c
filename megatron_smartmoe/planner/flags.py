"""A launch as Megatron flags, and flags as a launch: the only file of the planner that spells Megatron's flags.

`megatron_flags` gives everything that decides the model's shape, how it is distributed and how it is scheduled;
learning rate, data and checkpoints are the user's. `parallel_from_flags` reads back what it writes, and the same from
any command line: flags that do not concern the planner are left alone. Parsed arguments are read by
`planner.arguments`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.model import ModelSpec
from megatron_smartmoe.spec.parallel import FLAT, HIERARCHICAL, ParallelSpec, Recompute, Replicas

HOMES_INTERVAL = 100  # default of --smartmoe-homes-interval

# flag -> field of ParallelSpec: the sizes of a layout, ...
PIPELINE_STAGES = "--pipeline-model-parallel-size"
VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
SIZES = {
    "--tensor-model-parallel-size": "tp",
    PIPELINE_STAGES: "pp",
    VIRTUAL_STAGES: "vpp",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
    "--context-parallel-size": "cp",
}
# ... other whole numbers, ...
MICRO_BATCH = "--micro-batch-size"
SPARE_SLOTS = "--smartmoe-spare-slots"
OVERLAP_DEGREE = "--smartmoe-overlap-degree"
DISPATCH = "--smartmoe-dispatch"
COUNTS = {
    MICRO_BATCH: "micro_batch",
    "--global-batch-size": "global_batch",
    SPARE_SLOTS: "spare_slots",
    "--smartmoe-homes-interval": "homes_interval",
}
# ... and switches.
SWITCHES = {
    "--use-distributed-optimizer": "distributed_optimizer",
    "--overlap-grad-reduce": "overlap_grad_reduce",
    "--overlap-param-gather": "overlap_param_gather",
}
LAYOUT = "--pipeline-model-parallel-layout"
SEQUENCE_PARALLEL = "--sequence-parallel"
VIRTUAL_STAGE_LAYERS = "--num-layers-per-virtual-pipeline-stage"
# Ways to split layers over stages that a ParallelSpec does not have.
OTHER_SPLITS = (
    VIRTUAL_STAGE_LAYERS,
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
GRANULARITY, MODULES = "--recompute-granularity", "--recompute-modules"
RECOMPUTE_FLAGS = (GRANULARITY, "--recompute-method", "--recompute-num-layers", MODULES)
_MODE_FLAGS: dict[Recompute, list[str]] = {
    "none": [],
    "act": [GRANULARITY, "selective", MODULES, "layernorm", "moe_act"],
    "moe": [GRANULARITY, "selective", MODULES, "moe"],
    "full": [GRANULARITY, "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
}


@dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """The flags of one launch, in groups.

    Attributes:
        model: the model's shape.
        parallel: how it is distributed over the ranks.
        training: batch, precision, recomputation.
        smartmoe: this project's own flags.
    """

    model: list[str]
    parallel: list[str]
    training: list[str]
    smartmoe: list[str]

    @property
    def megatron(self) -> list[str]:
        """All flags of Megatron."""
        return [*self.model, *self.parallel, *self.training]

    @property
    def all(self) -> list[str]:
        """Everything, in one list."""
        return [*self.megatron, *self.smartmoe]

    def lines(self) -> list[str]:
        """One line per group, quoted for a shell."""
        groups = (self.model, self.parallel, self.training, self.smartmoe)
        return [shlex.join(group) for group in groups if group]


def megatron_flags(model: ModelSpec, spec: ParallelSpec, *, cpu: bool = False) -> LaunchFlags:
    """The flags of a launch.

    Args:
        model: the model to train.
        spec: how it is distributed.
        cpu: for the CPU ranks of a machine without GPUs, where TransformerEngine's options do not exist.
    """
    return LaunchFlags(
        model=[*_shape(model), *_latent(model), *_moe(model)],
        parallel=_parallel(model, spec),
        training=_training(spec, cpu=cpu),
        smartmoe=_smartmoe(model, spec),
    )


def launch_flags(model: ModelSpec, spec: ParallelSpec) -> list[str]:
    """What `--parallel auto` adds to a user's flags: layout, micro-batch, recomputation, replicas and overlap."""
    return [
        *_parallel(model, spec),
        *_pairs(micro_batch_size=spec.micro_batch),
        *_MODE_FLAGS[spec.recompute],
        *_pairs(
            smartmoe_spare_slots=spec.spare_slots or None,
            smartmoe_overlap_degree=spec.overlap_degree if spec.overlap_degree > 1 else None,
            smartmoe_dispatch=spec.dispatch if spec.dispatch != FLAT else None,
        ),
    ]


def _pairs(**values: Any) -> list[str]:
    """`num_layers=4` as `--num-layers 4`; True is the flag alone; None, False and "" are left out."""
    found: list[str] = []
    for name, value in values.items():
        if value is None or value is False or value == "":
            continue
        number = f"{value:g}" if isinstance(value, float) else str(value)
        found += [as_flag(name)] if value is True else [as_flag(name), number]
    return found


def _shape(model: ModelSpec) -> list[str]:
    grouped = model.query_groups != model.heads and not model.latent
    return _pairs(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=grouped,
        num_query_groups=model.query_groups if grouped else None,
        kv_channels=None if model.latent else model.head_dim,
        seq_length=model.seq_length,
        max_position_embeddings=model.seq_length,
        vocab_size=model.vocab,
        position_embedding_type=model.position,
        rotary_base=model.rope_base if model.position == "rope" else None,
        normalization=model.norm,
        swiglu=model.gated,
        disable_bias_linear=not model.bias,
        add_qkv_bias=model.qkv_bias and not model.bias,
        qk_layernorm=model.qk_norm,
        untie_embeddings_and_output_weights=not model.tied,
        attention_dropout=float(model.dropout),
        hidden_dropout=float(model.dropout),
        mtp_num_layers=model.mtp_layers or None,
    )


def _latent(model: ModelSpec) -> list[str]:
    latent = model.latent
    if latent is None:
        return []
    return _pairs(
        multi_latent_attention=True,
        q_lora_rank=latent.q_rank or None,
        kv_lora_rank=latent.kv_rank,
        qk_head_dim=latent.qk_head_dim,
        qk_pos_emb_head_dim=latent.qk_rope_dim,
        v_head_dim=latent.v_head_dim,
    )


def _moe(model: ModelSpec) -> list[str]:
    moe = model.moe
    pattern = "".join("1" if model.has_experts(layer) else "0" for layer in range(model.layers))
    layer_freq = None if "0" not in pattern else f"([{','.join(pattern)}])"
    return _pairs(
        num_experts=moe.experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn,
        moe_shared_expert_intermediate_size=moe.shared_ffn or None,
        moe_layer_freq=layer_freq,
        moe_router_score_function=moe.score_function if moe.score_function != "softmax" else None,
        moe_router_pre_softmax=moe.pre_softmax or (moe.top_k == 1 and moe.score_function == "softmax"),
        moe_router_enable_expert_bias=moe.expert_bias,
        moe_router_num_groups=moe.groups or None,
        moe_router_group_topk=moe.group_top_k or None,
        moe_router_topk_scaling_factor=moe.scaling_factor or None,
        moe_router_load_balancing_type=moe.balancing,
        moe_aux_loss_coeff=moe.aux_loss_coeff or None,
        moe_expert_capacity_factor=moe.capacity_factor or None,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
    )


def _parallel(model: ModelSpec, spec: ParallelSpec) -> list[str]:
    even = spec.layers_of_chunk is None
    return _pairs(
        tensor_model_parallel_size=spec.tp,
        sequence_parallel=spec.tp > 1,
        pipeline_model_parallel_size=spec.pp,
        pipeline_model_parallel_layout=None if even else layout_text(model, spec),
        num_virtual_stages_per_pipeline_rank=spec.vpp if even and spec.vpp > 1 else None,
        context_parallel_size=spec.cp if spec.cp > 1 else None,
        expert_model_parallel_size=spec.ep,
        expert_tensor_parallel_size=spec.etp,
        use_distributed_optimizer=spec.distributed_optimizer,
        overlap_grad_reduce=spec.overlap_grad_reduce,
        overlap_param_gather=spec.overlap_param_gather,
    )


def _training(spec: ParallelSpec, *, cpu: bool) -> list[str]:
    grouped = spec.implementation == "transformer_engine" and not cpu
    return [
        *_pairs(
            micro_batch_size=spec.micro_batch,
            global_batch_size=spec.global_batch,
            bf16=spec.precision == "bf16",
            grad_reduce_in_bf16=spec.precision == "bf16" and not spec.grad_reduce_in_fp32,
            moe_grouped_gemm=grouped,
            moe_permute_fusion=grouped and not spec.spare_slots,
        ),
        *_MODE_FLAGS[spec.recompute],
    ]


def _smartmoe(model: ModelSpec, spec: ParallelSpec) -> list[str]:
    if not spec.smartmoe:
        return []
    return _pairs(
        smartmoe=True,
        smartmoe_spare_slots=spec.spare_slots,
        smartmoe_replicas=spec.replicas,
        smartmoe_homes=None if spec.homes_interval else "off",
        smartmoe_homes_interval=spec.homes_interval or None,
        smartmoe_overlap_degree=spec.overlap_degree,
        smartmoe_dispatch=spec.dispatch if spec.dispatch != FLAT else None,
    )


def layout_text(model: ModelSpec, spec: ParallelSpec) -> str:
    """Megatron's text of an uneven split, `Ett|ttt|...|tmL`: embedding, layers, prediction blocks, loss."""
    sizes = spec.layers_of_chunk or ()
    parts = ["t" * size for size in sizes]
    parts[0] = "E" + parts[0]
    parts[-1] += "m" * model.mtp_layers + "L"
    return "|".join(parts)


def parse_tokens(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values, in the order of the flags; the last of a repeated flag wins, as in argparse."""
    found: dict[str, list[str]] = {}
    flag = ""
    for token in tokens:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            found.pop(flag, None)
            found[flag] = [value] if equals else []
        elif flag:
            found[flag].append(token)
    return found


def int_value(flag: str, values: Sequence[str]) -> int:
    """The value of a flag that takes one whole number.

    Raises:
        ConfigError: it is not one.
    """
    text = " ".join(values)
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(flag, text, "must be a whole number", f"For example {flag} 4.")
    return int(text)


def recompute_mode(granularity: str | None, modules: Sequence[str]) -> Recompute:
    """The planner's mode that is nearest to what these values of the recomputation flags mean."""
    if granularity == "full":
        return "full"
    if granularity == "selective" and ("moe" in modules or "mlp" in modules):
        return "moe"
    if granularity == "selective" and ("moe_act" in modules or "layernorm" in modules):
        return "act"
    return "none"  # `core_attn`: fused attention keeps nothing that it would recompute


def layout_layers(text: str) -> tuple[int, ...]:
    """Layers of each model chunk in the text of a layout, multiplications unrolled: `E(tt|)*2tL` has 2, 2 and 1.

    Raises:
        ConfigError: the text has other letters.
    """
    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        plain = re.sub(pattern, lambda match: match[1] * int(match[2]), plain)
    if set(plain) - set("Etm|L"):
        raise ConfigError(LAYOUT, text, "may hold E, t, m, L and | only", "For example: Ett|ttt|ttL.")
    return tuple(part.count("t") for part in plain.split("|"))


def grads_in_fp32(*, bf16: bool, fp16: bool, reduce_in_bf16: bool, accumulate_in_fp32: bool) -> bool:
    """Whether Megatron accumulates and reduces gradients in fp32: by default unless it trains in fp16."""
    return not (bf16 and reduce_in_bf16) and (bf16 or not fp16 or accumulate_in_fp32)


def parallel_from_flags(tokens: Sequence[str], model: ModelSpec, gpus: int) -> ParallelSpec:
    """The launch that a command line describes; Megatron's defaults for flags that it does not have.

    Raises:
        ConfigError: a size that is not a number, or a layout that Megatron would not read.
    """
    flags = parse_tokens(tokens)
    values: dict[str, Any] = {"gpus": gpus, "global_batch": model.global_batch}
    for flag, name in {**SIZES, **COUNTS}.items():
        if flag in flags:
            values[name] = int_value(flag, flags[flag])
    values.setdefault("etp", values.get("tp", 1))  # Megatron's default
    for flag, name in SWITCHES.items():
        values[name] = flag in flags
    values["precision"] = "bf16" if "--bf16" in flags or "--fp16" in flags else "fp32"
    values["grad_reduce_in_fp32"] = grads_in_fp32(
        bf16="--bf16" in flags,
        fp16="--fp16" in flags,
        reduce_in_bf16="--grad-reduce-in-bf16" in flags,
        accumulate_in_fp32="--accumulate-allreduce-grads-in-fp32" in flags,
    )
    values["recompute"] = recompute_mode(" ".join(flags.get(GRANULARITY, [])), flags.get(MODULES, []))
    replicas = " ".join(flags.get("--smartmoe-replicas", []))
    values["replicas"] = cast(Replicas, replicas or ("auto" if values.get("spare_slots") else "off"))
    degree = flags.get(OVERLAP_DEGREE, ["1"])
    values["overlap_degree"] = 1 if degree == ["auto"] else int_value(OVERLAP_DEGREE, degree)
    values["dispatch"] = HIERARCHICAL if flags.get(DISPATCH) == [HIERARCHICAL] else FLAT
    if flags.get("--transformer-impl") == ["local"]:
        values["implementation"] = "local"
    if LAYOUT in flags:
        values["layers_of_chunk"] = layout_layers("".join(flags[LAYOUT]))
        values["vpp"] = len(values["layers_of_chunk"]) // values.get("pp", 1)
    if VIRTUAL_STAGE_LAYERS in flags:
        each = int_value(VIRTUAL_STAGE_LAYERS, flags[VIRTUAL_STAGE_LAYERS])
        values["vpp"] = max(1, model.layers // values.get("pp", 1) // max(1, each))
    if flags.get("--smartmoe-homes") == ["off"] or "--smartmoe" not in flags:
        values["homes_interval"] = 0
    else:
        values.setdefault("homes_interval", HOMES_INTERVAL)
    return ParallelSpec(**values)


def as_flag(name: str) -> str:
    """The flag of an argument: `num_layers` -> `--num-layers`."""
    return "--" + name.replace("_", "-")
