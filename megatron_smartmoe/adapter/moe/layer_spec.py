"""The layer spec: Megatron's own, with a few modules replaced.

`--smartmoe` puts `SmartMoELayer` in the place of Megatron's MoE layer, with `SlottedExperts` unless TransformerEngine's
are asked for; where its all-to-alls are split into chunks it is an `OverlappedMoELayer`. Two modules are replaced where
TransformerEngine is not used.

`--transformer-impl transformer_engine` gets Megatron's TransformerEngine spec as it is. `--transformer-impl local`
gets Megatron's local spec with `TorchNorm` (so that MoE runs under tensor parallelism) and `SDPAttention` (so that
context parallelism runs, without a score matrix). No parameter is renamed, so checkpoints are Megatron's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_smartmoe.adapter.flags.pool_settings import may_overlap as pool_may_overlap
from megatron_smartmoe.adapter.local.attention import SDPAttention
from megatron_smartmoe.adapter.local.norm import TorchNorm, WideNorm
from megatron_smartmoe.adapter.moe.experts import SlottedExperts
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.overlap import OverlappedMoELayer
from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
from megatron_smartmoe.errors import CompatError

type Spec = ModuleSpec | TransformerBlockSubmodules


def spec_for(args: Namespace, overlap_degree: OverlapDegree | None = None) -> Callable[..., Spec]:
    """The spec that the flags ask for.

    Args:
        args: Megatron's arguments, after validation.
        overlap_degree: shared with the pool, so that the degree is chosen once; None to choose it here.
    """
    if not args.smartmoe:
        return partial(layer_spec, wide_qk_norm=args.smartmoe_wide_qk_norm)
    slotted = args.smartmoe_experts == "grouped_mm"
    degree = overlap_degree or OverlapDegree(args)
    return partial(
        smartmoe_layer_spec,
        slotted=slotted,
        overlap_degree=degree,
        may_cut=pool_may_overlap(args),
        wide_qk_norm=args.smartmoe_wide_qk_norm,
    )


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, wide_qk_norm: bool = False) -> Spec:
    """The spec of one pipeline stage; passed to Megatron as `GPTModelConfig.transformer_layer_spec`.

    Args:
        config: the model's configuration.
        vp_stage: stage of the virtual pipeline; None without one.
        wide_qk_norm: whether queries and keys are normalised over all heads together (`--smartmoe-wide-qk-norm`).
    """
    if not _is_plain_local(config):
        return default_layer_spec(config, vp_stage)
    transformer = config.transformer
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layer_specs = [_with_torch_modules(spec, _uses_sdpa(config)) for spec in block.layer_specs]
    if wide_qk_norm:
        layer_specs = [_with_wide_norms(spec, transformer) for spec in layer_specs]
    return replace(block, layer_specs=layer_specs, layer_norm=TorchNorm)


def wrap_mtp_block_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give layers of multi-token prediction the modules of `layer_spec`; Megatron builds their spec separately.

    Args:
        original: `megatron.training.models.gpt.mtp_block_spec`.
    """

    def mtp_block_spec(config: GPTModelConfig, *args: Any, **kwargs: Any) -> Any:
        block = original(config, *args, **kwargs)
        if block is None or not _is_plain_local(config):
            return block
        use_sdpa = _uses_sdpa(config)
        return replace(block, layer_specs=[_with_torch_prediction(spec, use_sdpa) for spec in block.layer_specs])

    return mtp_block_spec


def smartmoe_layer_spec(
    config: GPTModelConfig,
    vp_stage: int | None = None,
    *,
    slotted: bool = True,
    overlap_degree: Callable[[], int] = lambda: 1,
    may_cut: bool = False,
    wide_qk_norm: bool = False,
) -> Spec:
    """`layer_spec` with this project's MoE layer.

    Args:
        config: the model's configuration.
        vp_stage: stage of the virtual pipeline; None without one.
        slotted: False for TransformerEngine's experts.
        overlap_degree: returns the number of chunks of each all-to-all; called when the process groups exist.
        may_cut: whether the degree may change later; then the layer supports every degree.
        wide_qk_norm: see `layer_spec`.

    Raises:
        CompatError: the spec's MoE layers are not built as in a supported Megatron.
    """
    spec, degree = layer_spec(config, vp_stage, wide_qk_norm=wide_qk_norm), overlap_degree()
    layer = partial(OverlappedMoELayer, overlap_degree=degree) if may_cut or degree > 1 else SmartMoELayer
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[_with_smart_moe(one, slotted, layer) for one in spec.layer_specs])
    return _with_smart_moe(spec, slotted, layer)


def _with_smart_moe(spec: ModuleSpec, slotted: bool, layer: Callable[..., SmartMoELayer]) -> ModuleSpec:
    """A copy of one layer's spec with its MoE layer, if it has one, replaced."""
    mlp = spec.submodules.mlp
    if isinstance(mlp, ModuleSpec) or _is_dense(mlp):
        return spec
    if not isinstance(mlp, partial) or mlp.func is not MoELayer:
        raise CompatError(
            f"--smartmoe: this Megatron builds its MoE layers from {str(mlp)[:200]}. Use megatron-core 0.19.2."
        )
    submodules = mlp.keywords["submodules"]
    if slotted:
        submodules = replace(submodules, experts=SlottedExperts)
    return replace(spec, submodules=replace(spec.submodules, mlp=partial(layer, submodules=submodules)))


def _is_dense(mlp: object) -> bool:
    """Whether a layer's MLP is built by one of Megatron's dense classes, through their `as_mlp_submodule`."""
    maker = getattr(mlp.func, "__self__", None) if isinstance(mlp, partial) else None
    return isinstance(maker, type) and issubclass(maker, MLP)


def _with_torch_modules(spec: ModuleSpec, use_sdpa: bool) -> ModuleSpec:
    """A copy of one layer's spec with its norms, and its core attention, replaced."""
    layer = spec.submodules
    attention: ModuleSpec = layer.self_attention
    changes: dict[str, Any] = {
        name: TorchNorm for name in _norm_fields(attention.submodules) if _is_norm(getattr(attention.submodules, name))
    }
    if use_sdpa:
        changes["core_attention"] = SDPAttention
    attention = replace(attention, submodules=replace(attention.submodules, **changes))
    norms = {name: TorchNorm for name in _norm_fields(layer) if _is_norm(getattr(layer, name))}
    return replace(spec, submodules=replace(layer, self_attention=attention, **norms))


def _with_wide_norms(spec: ModuleSpec, transformer: Any) -> ModuleSpec:
    """A copy of one layer's spec whose norms of queries and keys are over all heads together."""
    heads, groups = transformer.num_attention_heads, transformer.num_query_groups
    attention: ModuleSpec = spec.submodules.self_attention
    query, key = partial(WideNorm, num_heads=heads), partial(WideNorm, num_heads=groups)
    attention = replace(attention, submodules=replace(attention.submodules, q_layernorm=query, k_layernorm=key))
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def _with_torch_prediction(spec: ModuleSpec, use_sdpa: bool) -> ModuleSpec:
    """A copy of a prediction layer's spec with its norms, and those and the attention of its layer, replaced."""
    norms = {name: TorchNorm for name in vars(spec.submodules) if name.endswith("norm")}
    layer = _with_torch_modules(spec.submodules.mtp_model_layer, use_sdpa)
    return replace(spec, submodules=replace(spec.submodules, mtp_model_layer=layer, **norms))


def _is_plain_local(config: GPTModelConfig) -> bool:
    """Whether the layers are Megatron's local ones, of one kind: those whose modules are replaced."""
    transformer = config.transformer
    special = transformer.experimental_attention_variant or isinstance(transformer, HeterogeneousTransformerConfig)
    return transformer.transformer_impl == "local" and not special


def _uses_sdpa(config: GPTModelConfig) -> bool:
    """Whether attention runs on torch's kernels: always, unless the user asks for Megatron's own attention."""
    return config.transformer.attention_backend not in (AttnBackend.unfused, AttnBackend.local)


def _norm_fields(submodules: object) -> list[str]:
    return [name for name in vars(submodules) if name.endswith("layernorm")]


def _is_norm(module: object) -> bool:
    """Whether a submodule is a norm with weights: neither absent nor the L2 norm."""
    return module not in (None, IdentityOp, L2Norm)
