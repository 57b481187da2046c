"""What homes and replicas do with TransformerEngine's experts, said of the real package without a GPU.

TransformerEngine's modules and optimizer are constructed on the CPU: real parameters, names, shapes, checkpoint keys.
Its kernels need a GPU. Where something has to be computed, the grouped GEMM is a stand-in of this file, and the line
says so; everything around it (the grouped linear's forward and backward passes) is TransformerEngine's own.

The process group is torch's fake one: this process is rank 0 of two expert-parallel ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

PATH = Path(__file__).parents[2] / "docs" / "transformer_engine.txt"
RANKS, EXPERTS, HIDDEN, FFN, SPARE_SLOTS = 2, 4, 32, 16, 1
BF16_TOLERANCE = 2**-7  # of the largest value: gradients of home and replica are rounded in two parts


def main() -> int:
    """Run the checks; compare what they say with the file, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name} instead of comparing with it")
    write = parser.parse_args().write
    text = "\n".join(_lines()) + "\n"
    print(text)
    if write:
        PATH.write_text(text)
        return 0
    if PATH.read_text() != text:
        print(f"differs from {PATH}: run with --write, and look at its diff", file=sys.stderr)
        return 1
    return 0


def _lines() -> Iterator[str]:
    """Everything that is found, a section after the other."""
    prepare()
    yield from _packages()
    yield from _modules()
    yield from _checkpoint_keys()
    yield from _values()
    yield from _quantizers()
    yield from _optimizer_state()
    yield from _packed_weight()


def prepare() -> None:
    """TransformerEngine, the CPU facade and Megatron in one process, and a process group."""
    import transformer_engine.pytorch

    real = {name: module for name, module in sys.modules.items() if name.startswith("transformer_engine")}
    from megatron_smartmoe.adapter import cpu

    cpu.install()  # it hides packages for GPUs
    sys.modules.update(real)
    transformer_engine.pytorch.torch.cuda.is_available = lambda: True  # its constructors ask
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store: Any = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=store)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


def _packages() -> Iterator[str]:
    from importlib.metadata import version

    yield "packages: " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformer-engine", "megatron-core")
    )


# --- modules, parameters, what moves


def _modules() -> Iterator[str]:
    from megatron_smartmoe.adapter.migration.expert_state import slot_pieces

    for slots in (0, SPARE_SLOTS):
        experts = build(slots).experts
        yield ""
        yield f"--smartmoe-spare-slots {slots}: {type(experts).__name__}"
        yield from (f"  module {name}: {_mro(module)}" for name, module in experts.named_children())
        yield from (f"  parameter {name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in _named(experts))
        yield from (f"  buffer {name} {list(tensor.shape)}" for name, tensor in experts.named_buffers())
        for slot, pieces in enumerate(slot_pieces(experts, experts.num_local_experts)):
            yield f"  moves with the expert in slot {slot}: " + ", ".join(
                f"{piece.name} ({piece.stop - piece.start} elements)" for piece in pieces
            )
    weights = build(SPARE_SLOTS).experts.slot_weights()
    yield f"  sent to a spare slot: {[[*weight.shape[1:]] for weight in weights]} in {weights[0].dtype}"


def _named(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.named_parameters())


def _mro(module: torch.nn.Module) -> str:
    return " <- ".join(cls.__name__ for cls in type(module).__mro__[:4])


def build(spare_slots: int, *, delayed: bool = False, chunks: int = 1, **options: Any) -> Any:
    """A MoE layer of this project's with TransformerEngine's experts, as the product builds it."""
    from argparse import Namespace

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.enums import AttnBackend

    from megatron_smartmoe.adapter.moe.modules import Modules

    args = Namespace(
        smartmoe=True,
        smartmoe_experts="transformer_engine",
        smartmoe_spare_slots=spare_slots,
        smartmoe_pool=None,
        smartmoe_gate="top-k",
        smartmoe_overlap_degree=str(chunks),
        transformer_impl="transformer_engine",
        attention_backend=AttnBackend.auto,
        sequence_parallel=False,
        context_parallel_size=1,
    )
    modules = Modules.of(args, lambda: chunks, everywhere=True)
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=True)
    config = _config(**options)
    config.delay_wgrad_compute = delayed  # the constructor takes it with the schedule of two micro-batches only
    packs = str(int(config.moe_single_grouped_weight))  # without these TransformerEngine and Megatron refuse them
    with mock.patch.dict(os.environ, NVTE_GROUPED_LINEAR_SINGLE_PARAM=packs, NVTE_CUTEDSL_FUSED_GROUPED_MLP="1"):
        return modules.moe_spec(spec.submodules.mlp)(config)


def _config(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    usual = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "expert_model_parallel_size": RANKS,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "gradient_accumulation_fusion": True,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(usual | options))


# --- checkpoints


def _checkpoint_keys() -> Iterator[str]:
    keys = {slots: _keys(build(slots).experts) for slots in (0, SPARE_SLOTS)}
    yield ""
    yield f"checkpoint keys are the same with and without spare slots: {keys[0] == keys[SPARE_SLOTS]}"
    yield from (f"  {key}" for key in keys[SPARE_SLOTS])
    own = _keys(_own_experts())
    yield f"and those of weights are --smartmoe-experts grouped_mm's: {_weights(keys[0]) == _weights(own)}"


def _weights(keys: list[str]) -> list[str]:
    return [key for key in keys if "_extra_state" not in key]


def _keys(experts: Any) -> list[str]:
    """Key, global shape and offset of each tensor that a checkpoint holds of these experts."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found = set()
    for entry in nested_values(experts.sharded_state_dict(prefix="experts.")):
        parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            shape = getattr(part, "global_shape", "")
            found.add(f"{part.key} {tuple(shape)} from {tuple(part.global_offset)}" if shape else f"{part.key}")
    return sorted(found)


def _own_experts() -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_smartmoe.adapter.moe.experts import SlottedExperts

    return SlottedExperts(EXPERTS // RANKS, _config(), get_default_pg_collection())


# --- values: forward and backward with a replica


class _Replicas:
    """A stand-in for `SpareSlots`: replicas' weights that are there already."""

    num_slots = SPARE_SLOTS

    def __init__(self, *weights: torch.Tensor) -> None:
        self._weights = weights

    def weights(self) -> tuple[torch.Tensor, ...]:
        """As `SpareSlots.weights`."""
        return self._weights


@torch.no_grad()
def grouped_gemm(
    weights: list[torch.Tensor],
    rows: list[torch.Tensor],
    out: list[torch.Tensor],
    *args: object,
    layout: str = "TN",
    accumulate: bool = False,
    single_output: bool = False,
    m_splits: Any = None,
    bias: Any = None,
    use_bias: bool | None = False,
    **kwargs: object,
) -> tuple[list[None], list[torch.Tensor | None], None]:
    """A stand-in for TransformerEngine's `general_grouped_gemm`, with its arguments: in float32, a GEMM at a time."""
    parts = out[0].split([len(part) for part in rows]) if single_output else out
    bias_gradients: list[torch.Tensor | None] = [None] * len(rows)
    for slot, (weight, part, target) in enumerate(zip(weights, rows, parts, strict=True)):
        left, right = part.float(), weight.float()
        value = {"TN": lambda a, b: a @ b.T, "NN": lambda a, b: a @ b, "NT": lambda a, b: a.T @ b}[layout](left, right)
        if use_bias and layout == "TN":
            value = value + bias[slot].float()
        if use_bias and layout == "NT":
            bias_gradients[slot] = part.float().sum(0).to(part.dtype)
        target.copy_(target + value if accumulate else value)
    return [None] * len(rows), bias_gradients, None


def scaled_swiglu(rows: torch.Tensor, scales: torch.Tensor, *args: object) -> torch.Tensor:
    """A stand-in for the kernel of TransformerEngine's fused operations."""
    gate, linear = rows.float().chunk(2, dim=-1)
    value = torch.nn.functional.silu(gate) * linear * scales.float().unsqueeze(-1)
    return value.to(rows.dtype)


def scaled_dswiglu(
    gradient: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, *args: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for its backward pass: gradients of rows and of scales."""
    with torch.enable_grad():
        leaves = rows.detach().requires_grad_(), scales.detach().requires_grad_()
        found = torch.autograd.grad(scaled_swiglu(*leaves), leaves, gradient)
    return found[0], found[1]


def grouped_dbias(gradient: torch.Tensor, offsets: torch.Tensor, num_groups: int) -> torch.Tensor:
    """A stand-in for the kernel that sums the gradients of biases."""
    parts = gradient.float().split(offsets.diff().tolist())
    return torch.stack([part.sum(0) for part in parts])


def grouped_dbias_dscales(
    gradient: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, *, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for the kernel that does so where biases are scaled by row."""
    of_rows = biases.float().repeat_interleave(offsets.diff(), dim=0)
    scaled = gradient.float() * scales.unsqueeze(-1)
    return grouped_dbias(scaled, offsets, len(biases)), (gradient.float() * of_rows).sum(-1)


_DELAY, _BESIDE = "--delay-wgrad-compute", "--overlap-dispatch-backward-with-experts-wgrad"
_FUSER, _PACKED = "--use-transformer-engine-op-fuser", "--moe-single-grouped-weight"
_BIASES, _CHUNKS = "with biases", "in 2 chunks"
_FUSION = "--gradient-accumulation-fusion"
_MIXES = (
    {_FUSION},
    {f"--no-{_FUSION[2:]}"},
    {_FUSION, _DELAY},
    {_FUSION, _BIASES},
    {_FUSION, _DELAY, _BIASES},
    {_FUSION, _BESIDE},
    {f"--no-{_FUSION[2:]}", _BESIDE, _BIASES},
    {_FUSION, _CHUNKS},
    {f"--no-{_FUSION[2:]}", _CHUNKS},
    {_FUSION, _BIASES, _CHUNKS},
    {_FUSION, _FUSER},
    {f"--no-{_FUSION[2:]}", _FUSER, _BIASES},
    {_FUSION, _FUSER, _BIASES, _CHUNKS},
    {_FUSION, _FUSER, _PACKED},
    {f"--no-{_FUSION[2:]}", _FUSER, _PACKED},
    {_FUSION, _FUSER, _PACKED, _BIASES, _CHUNKS},
)


def _values() -> Iterator[str]:
    from transformer_engine.pytorch.module import grouped_linear
    from transformer_engine.pytorch.ops.basic import grouped_linear as operation
    from transformer_engine.pytorch.ops.basic import swiglu

    yield ""
    stand_ins = contextlib.ExitStack()
    with stand_ins:
        # its forward pass asks
        stand_ins.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)))
        for module, names in (
            (grouped_linear, {"general_grouped_gemm": grouped_gemm}),
            (
                operation,
                {
                    "general_grouped_gemm": grouped_gemm,
                    "is_op_fuser_grouped_tensor_path_supported": lambda *_: False,
                    "compute_grouped_dbias": grouped_dbias,
                    "compute_grouped_dbias_dscales": grouped_dbias_dscales,
                },
            ),
            (swiglu.tex, {"scaled_swiglu": scaled_swiglu, "scaled_dswiglu": scaled_dswiglu}),
        ):
            stand_ins.enter_context(mock.patch.multiple(module, **names))
        for mix in _MIXES:
            # The reference has no replica, no chunks, a parameter for each expert, and delays nothing.
            runs = _run(mix, spare=True), _run(mix - {_CHUNKS, _PACKED, _DELAY, _BESIDE}, spare=False)
            worst = max(_relative(one, other) for one, other in zip(*runs, strict=True))
            flags = sorted(mix, key=lambda flag: (not flag.startswith("--"), not flag.endswith(_FUSION[2:]), flag))
            yield (
                f"{' '.join(flags)}: output, and gradients of rows and of the expert, with its rows split over home "
                f"and replica, equal to without (stand-in GEMM, bf16): {worst < BF16_TOLERANCE}"
            )


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def _run(mix: set[str], *, spare: bool) -> list[torch.Tensor]:
    """Rows of the expert in slot 1, all at home or some in a spare slot: output, its gradients and the rows'."""
    from megatron_smartmoe.runtime.replicas.per_slot import tensors_of

    torch.manual_seed(1)
    fused, biases = _FUSION in mix, _BIASES in mix
    options: dict[str, Any] = {
        "gradient_accumulation_fusion": fused,
        "add_bias_linear": biases,
        "overlap_dispatch_backward_with_experts_wgrad": _BESIDE in mix,
        "use_transformer_engine_op_fuser": _FUSER in mix,
        "moe_single_grouped_weight": _PACKED in mix,
        "moe_single_grouped_bias": _PACKED in mix and biases,
    }
    layer = build(SPARE_SLOTS, delayed=_DELAY in mix, chunks=2 if _CHUNKS in mix else 1, **options)
    experts = layer.experts
    homes = experts.slot_weights()
    for home in homes:
        for slot in home.slots:
            slot.data.copy_(torch.randn_like(slot) * 0.2)
    for weight in tensors_of(homes):
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    replica = [home[1].detach()[None].clone().requires_grad_() for home in homes]
    rows = torch.randn(6, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    experts.spare_slots = _Replicas(*replica)
    forward = partial(_in_chunks, layer) if _CHUNKS in mix else partial(_at_once, layer, spare)
    if _FUSER in mix:  # operations made without gradients, as of a layer that is recomputed, must not stay
        with torch.no_grad():
            forward(rows)
    output = forward(rows)
    output.float().square().sum().backward()
    experts.backward_dw()
    gradients = []
    for home, copy in zip(homes, replica, strict=True):
        own = home.main_grad[1] if fused and home[1].dim() > 1 else _gradient(home)
        gradients.append(own.float() + (copy.grad[0].float() if copy.grad is not None else 0))
    assert rows.grad is not None
    return [output.detach(), rows.grad, *gradients]


def _gradient(home: Any) -> torch.Tensor:
    """What autograd has for the expert in slot 1."""
    gradient: torch.Tensor = home[1].grad if home.packed is None else home.packed.grad[1]
    return gradient


def _at_once(layer: Any, spare: bool, rows: torch.Tensor) -> torch.Tensor:
    """The layer's experts on two rows of slot 0, two of slot 1, and two of the spare slot, or of slot 1."""
    output: torch.Tensor = layer.experts(rows, torch.tensor([2, 2, 2] if spare else [2, 4]), torch.ones(6))[0]
    return output


def _in_chunks(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """The same rows, that come in two chunks; both have rows of slot 1."""
    from megatron_smartmoe.adapter.moe.overlap import _PeerChunk

    chunks = [
        _PeerChunk(counts_PQS=torch.tensor([[count]]), dispatch=None, combine=None, rows=(part, torch.ones(3)))
        for part, count in zip(rows.split(3), ([2, 1, 0], [0, 1, 2]), strict=True)
    ]
    returning, _ = layer.routed_experts_compute(chunks, None)
    return torch.cat([chunk.rows[0] for chunk in returning])


# --- fp8


def _quantizers() -> Iterator[str]:
    """How many quantizers a recipe gets, of weights and of all tensors of the forward pass."""
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    yield ""
    for recipe in (Float8CurrentScaling(), Float8BlockScaling(), MXFP8BlockScaling()):
        experts = build(SPARE_SLOTS).experts
        experts.spare_slots = _Replicas()
        answers = {"is_fp8_enabled": True, "get_fp8_recipe": recipe, "get_fp8_group": None}
        with mock.patch.multiple(FP8GlobalStateManager, **{n: mock.Mock(return_value=v) for n, v in answers.items()}):
            experts.linear_fc1.init_fp8_metadata(num_gemms=experts.num_local_experts)
        found = experts.linear_fc1.quantizers["scaling_fwd"]
        if isinstance(recipe, Float8BlockScaling):
            yield (
                f"Float8BlockScaling quantizes a weight in blocks of {found[1].block_len} in "
                f"{recipe.w_block_scaling_dim} dimensions, scales are powers of two: "
                f"{recipe.fp8_quant_fwd_weight.power_2_scale and found[1].force_pow_2_scales}"
            )
        yield f"{type(recipe).__name__}: {len(found)} quantizers for {len(found) // 3} GEMMs, {type(found[1]).__name__}"


# --- the precision-aware optimizer


def _optimizer_state() -> Iterator[str]:
    """What TransformerEngine's Adam keeps of a bf16 shard, and what of it moves with an expert."""
    from types import SimpleNamespace

    from transformer_engine.pytorch.optimizers import FusedAdam

    from megatron_smartmoe.adapter.migration import optimizer_state
    from megatron_smartmoe.errors import CompatError, ConfigError

    yield ""
    for moments in (torch.float32, torch.bfloat16, torch.float16):  # fp8 cannot be made without a driver
        shard = torch.nn.Parameter(torch.randn(64, dtype=torch.bfloat16))
        inner = FusedAdam(
            [shard],
            master_weights=True,
            use_decoupled_grad=True,
            store_param_remainders=True,
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
        )
        inner.initialize_state(shard, store_param_remainders=True)
        config = SimpleNamespace(
            optimizer="adam",
            use_precision_aware_optimizer=True,
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=True,
            optimizer_cpu_offload=False,
            main_params_dtype=torch.float32,
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
        )
        one = SimpleNamespace(optimizer=inner, config=config)
        yield f"moments in {str(moments).removeprefix('torch.')}: " + ", ".join(
            f"{name} {value.dtype}" for name, value in inner.state[shard].items() if isinstance(value, torch.Tensor)
        )
        try:
            optimizer_state.check_state_type(config)
            moved = optimizer_state.state_tensors(one, shard, shard)
            yield "  moves: " + ", ".join(f"{name} ({value.itemsize} bytes)" for name, value in moved.items())
        except (CompatError, ConfigError) as error:
            yield f"  refused: {error}"


# --- --moe-single-grouped-weight


def _packed_weight() -> Iterator[str]:
    """One parameter for all experts of a rank: what moves, checkpoints' keys, and what the optimizer has of it."""
    from megatron_smartmoe.adapter.migration.expert_state import slot_pieces

    options = {
        "use_transformer_engine_op_fuser": True,
        "moe_single_grouped_weight": True,
        "moe_single_grouped_bias": True,
        "add_bias_linear": True,
    }
    experts = build(SPARE_SLOTS, **options).experts
    yield ""
    yield "--moe-single-grouped-weight --moe-single-grouped-bias"
    yield from (f"  parameter {name} {list(tensor.shape)} {type(tensor).__name__}" for name, tensor in _named(experts))
    slots = slot_pieces(experts, experts.num_local_experts)
    for slot, pieces in enumerate(slots):
        yield f"  moves with the expert in slot {slot}: " + ", ".join(
            f"{piece.name} {piece.start} to {piece.stop}" for piece in pieces
        )
    for piece in slots[1]:
        piece.parameter.detach().view(-1)[piece.start : piece.stop].fill_(3.0)
    written = all(bool((home[1] == 3).all()) and not (home[0] == 3).any() for home in experts.slot_weights())
    yield f"  what is written there is read in slot 1 alone: {written}"
    alike = _keys(build(SPARE_SLOTS, add_bias_linear=True).experts) == _keys(experts)
    yield f"  checkpoint keys are those of a parameter for each expert: {alike}"
    yield from _packed_state(experts)


def _packed_state(experts: Any) -> Iterator[str]:
    """What Megatron's distributed optimizer keeps of the one parameter, as this project finds it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_smartmoe.adapter.migration.optimizer_state import parameter_states

    wrapped = DistributedDataParallel(
        experts.config, DistributedDataParallelConfig(use_distributed_optimizer=True), experts
    )
    config = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16)
    config.use_distributed_optimizer = True
    optimizer = get_megatron_optimizer(config, [wrapped], use_gloo_process_groups=False)
    named = dict(experts.named_parameters())
    for name, state in zip(named, parameter_states(optimizer, named.values()).values(), strict=True):
        yield f"  {name}: main weight {state.has_main}, shards {state.shards}, here {sorted(state.tensors)}"
    homes = experts.slot_weights()
    inside = all(home[0].data_ptr() == home.packed.detach().view(-1).data_ptr() for home in homes)
    yield f"  slots are in the memory that Megatron's buffers have given the parameter: {inside}"
    yield f"  gradients that replicas add to: {[list(home.main_grad.shape) for home in homes]}"


if __name__ == "__main__":
    sys.exit(main())
