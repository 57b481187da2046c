"""Slotted experts: the home experts of a rank in two parameters, slot-major, computed by grouped GEMMs.

One expert is one contiguous range of each parameter, so that it can be sent, received and copied without packing. A
rank's home slots are `weight1` `[S, F1, H]` and `weight2` `[S, H, F2]`, where F2 = ffn / ETP and F1 = F2, or 2 x F2 for
a gated activation (gate rows first, or blocks of gate and linear rows in turns, as --moe-mlp-glu-interleave-size says).
With biases there are two more parameters, `biases1.bias` `[S, 1, F1]` and `biases2.bias` `[S, 1, H]`. Megatron's
TEGroupedMLP has the same GEMMs with a parameter per expert; SequentialMLP has a GEMM per expert. On disk all three look
alike (see `slot_sharding`), so their checkpoints load into each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu, weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_smartmoe.adapter.local.muon import mark_matrices
from megatron_smartmoe.adapter.moe import main_gradients
from megatron_smartmoe.adapter.moe.chunk_order import Blocks
from megatron_smartmoe.adapter.moe.delayed_gradients import DelayedGradients, are_delayed
from megatron_smartmoe.adapter.moe.slot_sharding import SlotSharding
from megatron_smartmoe.ops import swiglu
from megatron_smartmoe.ops.grouped_bias import bias_of_rows
from megatron_smartmoe.ops.grouped_linear import (
    Groups,
    Taker,
    grouped_linear,
    recomputed_linear,
    wants_counts_on_device,
)
from megatron_smartmoe.runtime.replicas.slots import SpareSlots

_EXTRA_STATE = "extra_state_of_experts"  # in a sharded state dict; in no checkpoint


class SlotBiases(torch.nn.Module):
    """The biases of one matrix of every slot.

    Megatron's rules see biases in it by the parameter's name, which ends in `.bias`, and by its three axes, where it
    holds no matrices: no weight decay, and Adam beside Muon.

    Args:
        shape: `[S, 1, rows of the matrix]`.
        dtype: of the weights.
        device: of the weights.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing: `SlottedExperts` saves them, by expert."""


class SlottedExperts(MegatronModule):
    """The experts whose home is this rank; a drop-in for Megatron's SequentialMLP and TEGroupedMLP.

    Args:
        num_local_experts: S, the number of this rank's home slots.
        config: the transformer's configuration.
        pg_collection: process groups; `ep`, `expt_tp` and `expt_dp` are used.
        name: unused; Megatron passes the module's name to every builder.

    Attributes:
        weight1: `[S, F1, H]`.
        weight2: `[S, H, F2]`.
        biases1: with `bias` `[S, 1, F1]`; None with --disable-bias-linear.
        biases2: with `bias` `[S, 1, H]`; None with --disable-bias-linear.
        experts_in_slots: logical expert in each home slot; at the start those of a contiguous placement.
        accumulates: whether gradients are added to float32 sums where the weights have some; see `main_gradients`.
        spare_slots: slots for replicas of other ranks' experts, or None. They are not parameters and are never saved.
    """

    spare_slots: SpareSlots | None = None

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "Megatron's MoELayer passes the process groups"
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        first = self.ep_group.rank() * num_local_experts
        self.experts_in_slots = list(range(first, first + num_local_experts))
        self._gated = bool(config.gated_linear_unit)
        selective = config.recompute_granularity == "selective"
        self._recomputes_activation = selective and "moe_act" in (config.recompute_modules or [])
        self.accumulates = bool(config.gradient_accumulation_fusion)
        self._delayed = DelayedGradients(accumulates=self.accumulates) if are_delayed(config) else None
        hidden, ffn = config.moe_latent_size or config.hidden_size, config.moe_ffn_hidden_size
        local_ffn = ffn // self.tp_group.size()
        self.weight1 = self._parameter(local_ffn * (2 if self._gated else 1), hidden, partition_dim=1)
        self.weight2 = self._parameter(hidden, local_ffn, partition_dim=2)
        self.biases1 = self._biases_of(self.weight1) if config.add_bias_linear else None
        self.biases2 = self._biases_of(self.weight2) if config.add_bias_linear else None
        if config.perform_initialization:
            self._initialize(hidden, ffn)

    def _parameter(self, rows: int, columns: int, *, partition_dim: int) -> torch.nn.Parameter:
        """An empty parameter `[S, rows, columns]`, marked as Megatron's own expert weights are."""
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(self.num_local_experts, rows, columns, dtype=config.params_dtype, device=device)
        parameter = torch.nn.Parameter(weight)
        self._mark(parameter, partition_dim)
        parameter.skip_backward_post_hook = self._delayed is not None  # type: ignore[attr-defined]
        mark_matrices(parameter)
        return parameter

    def _biases_of(self, weight: torch.nn.Parameter) -> SlotBiases:
        """Zero biases for the rows of a weight's matrices; Megatron allows them without expert tensor parallelism."""
        biases = SlotBiases((self.num_local_experts, 1, weight.shape[1]), weight.dtype, weight.device)
        self._mark(biases.bias, partition_dim=2)
        return biases

    def _mark(self, parameter: torch.nn.Parameter, partition_dim: int) -> None:
        """Mark a parameter as Megatron marks those of experts."""
        config = self.config
        stride = 2 if partition_dim == 1 and self._gated else 1
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=partition_dim, stride=stride)
        tp_differs = config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        own_group = config.expert_model_parallel_size > 1 or tp_differs
        # Megatron reduces gradients of parameters without `allreduce` over the expert-data-parallel group
        parameter.allreduce = not own_group  # type: ignore[attr-defined]

    def _initialize(self, hidden: int, ffn: int) -> None:
        """Draw the weights in the order in which Megatron's experts do: the same seed gives the same model."""
        config = self.config
        for slot in range(self.num_local_experts):
            sizes = (
                (self.weight1.data[slot], ffn * (2 if self._gated else 1), hidden, 0, config.init_method),
                (self.weight2.data[slot], hidden, ffn, 1, config.output_layer_init_method),
            )
            for weight, out_size, in_size, partition_dim, init_method in sizes:
                stride = 2 if partition_dim == 0 and self._gated else 1
                if not config.use_cpu_initialization:
                    _initialize_affine_weight_gpu(weight, init_method, partition_dim, stride=stride, is_expert=True)
                    continue
                _initialize_affine_weight_cpu(
                    weight,
                    out_size,
                    in_size,
                    weight.shape[partition_dim],
                    partition_dim,
                    init_method,
                    stride=stride,
                    params_dtype=config.params_dtype,
                    rank=self.tp_group.rank(),
                    world_size=self.tp_group.size(),
                )

    def slot_weights(self) -> tuple[torch.nn.Parameter, ...]:
        """What a home slot holds: `[S, F1, H]` and `[S, H, F2]`, and with biases `[S, 1, F1]` and `[S, 1, H]`."""
        if self.biases1 is None or self.biases2 is None:
            return self.weight1, self.weight2
        return self.weight1, self.weight2, self.biases1.bias, self.biases2.bias

    def forward(
        self, tokens_NH: torch.Tensor | Blocks, tokens_per_expert: torch.Tensor, probs_N: torch.Tensor | Blocks
    ) -> tuple[torch.Tensor | Blocks, None]:
        """Compute the experts.

        Args:
            tokens_NH: rows sorted by slot; those of home slots and of spare slots may be two blocks.
            tokens_per_expert: rows of each slot, int64 `[S]`, where `ops.grouped_linear.wants_counts_on_device` says,
                so that the host does not wait for them. With replicas in use: `[S + K]`, home slots first, on the host.
            probs_N: weight of each row, multiplied into the activation as Megatron does; blocks as the rows are.

        Returns:
            `[N, H]` in the order of the rows (under expert tensor parallelism: a partial sum), in blocks as the rows
            were, and no bias.
        """
        if not isinstance(tokens_NH, torch.Tensor):
            assert not isinstance(probs_N, torch.Tensor), "rows in two blocks, and their weights in one piece"
            return self._compute_blocks(tokens_NH, tokens_per_expert, probs_N), None
        assert isinstance(probs_N, torch.Tensor), "rows in one piece, and their weights in two blocks"
        if len(tokens_per_expert) == self.num_local_experts:
            tokens_S = self._without_copies(tokens_NH, tokens_per_expert)
            return self._compute(tokens_NH, tokens_S, probs_N, *self.slot_weights()), None
        home_rows = int(tokens_per_expert[: self.num_local_experts].sum())
        tokens, probs = (cast(Blocks, each.tensor_split([home_rows])) for each in (tokens_NH, probs_N))
        return torch.cat(self._compute_blocks(tokens, tokens_per_expert, probs)), None

    def _without_copies(self, tokens_NH: torch.Tensor, tokens_S: torch.Tensor) -> torch.Tensor:
        """Rows of each slot; padded to capacity all alike, and written by the device: graphs refuse the host's."""
        is_padded = self.config.moe_pad_expert_input_to_capacity
        if not (is_padded and tokens_S.is_cpu and wants_counts_on_device(tokens_NH)):
            return tokens_S
        return tokens_S.new_full(tokens_S.shape, int(tokens_S[0]), device=tokens_NH.device)

    def _compute_blocks(self, tokens: Blocks, tokens_per_expert: torch.Tensor, probs: Blocks) -> Blocks:
        """The rows of home slots, and behind them those of spare slots, whose weights are on their way meanwhile."""
        assert self.spare_slots is not None, "rows for replicas, and no spare slots"
        home_S, spare_K = torch.split(tokens_per_expert, [self.num_local_experts, self.spare_slots.num_slots])
        home_NH = self._compute(tokens[0], home_S, probs[0], *self.slot_weights())
        spares = self.spare_slots.weights()  # [K, F1, H], [K, H, F2], ...
        return home_NH, self._compute(tokens[1], spare_K, probs[1], *spares)

    def _compute(
        self,
        tokens_NH: torch.Tensor,
        tokens_S: torch.Tensor,
        probs_N: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        bias1: torch.Tensor | None = None,
        bias2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One set of slots and its rows, `[N, H]`."""
        if self.config.moe_apply_probs_on_input:
            tokens_NH = (probs_N.unsqueeze(-1) * tokens_NH).to(tokens_NH.dtype)
            probs_N = torch.ones_like(probs_N)
        slots = Groups.of(tokens_NH, tokens_S)
        inner_NF = grouped_linear(tokens_NH, weight1, slots, self._taker(weight1))
        if bias1 is not None:
            inner_NF = inner_NF + bias_of_rows(bias1, slots, len(inner_NF))
        if self._recomputes_activation:  # start-up checks refuse it beside delayed gradients
            output_NH = recomputed_linear(self._activate, (inner_NF, probs_N), weight2, slots, self._taker(weight2))
        else:
            output_NH = grouped_linear(self._activate(inner_NF, probs_N), weight2, slots, self._taker(weight2))
        if bias2 is None:
            return output_NH
        bias_NH = bias_of_rows(bias2, slots, len(output_NH), probs_N)  # the rest has the probability already
        return (output_NH + bias_NH).to(output_NH.dtype)

    def _taker(self, weight: torch.Tensor) -> Taker | None:
        """Who computes the weight's gradient, where it is not autograd."""
        if self._delayed is not None and (weight is self.weight1 or weight is self.weight2):
            return self._delayed.keep
        return main_gradients.add if self.accumulates and main_gradients.is_wider(weight) else None

    def _activate(self, inner_NF: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
        """The activation times the router's probability, by a fused function where Megatron would use one.

        Megatron's are compiled when they first run, and again for other numbers of rows: on each rank at another step,
        while the others wait. SwiGLU, which nearly all models use, has a kernel of this project instead.
        """
        config, probs_N1 = self.config, probs_N.unsqueeze(-1)
        activated: torch.Tensor
        if self._gated and config.moe_mlp_glu_interleave_size is not None:
            inner_NF = _gate_first(inner_NF, config.moe_mlp_glu_interleave_size)
        if config.bias_activation_fusion and self._gated and config.activation_func is F.silu:
            if not config.activation_func_fp8_input_store:
                return swiglu(inner_NF, probs_N)
            activated = weighted_bias_swiglu_impl(inner_NF, None, probs_N1, fp8_input_store=True)
            return activated
        if config.bias_activation_fusion and self._gated and config.activation_func is quick_gelu:
            activated = weighted_bias_quick_geglu_impl(
                inner_NF,
                None,
                probs_N1,
                config.activation_func_fp8_input_store,
                config.glu_linear_offset,
                config.activation_func_clamp_value,
            )
            return activated
        if self._gated:
            gate, linear = inner_NF.chunk(2, dim=-1)
            if (limit := config.activation_func_clamp_value) is not None:
                gate, linear = gate.clamp(max=limit), linear.clamp(min=-limit, max=limit)
            activated = config.activation_func(gate) * (linear + config.glu_linear_offset)
        else:
            activated = config.activation_func(inner_NF)
        return (activated * probs_N1).to(activated.dtype)

    def backward_dw(self) -> None:
        """Compute the weight gradients that the backward pass has left; Megatron calls it without any, too."""
        if self._delayed is not None:
            self._delayed.compute()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], object]) -> None:
        """Have `hook` called after `backward_dw`; Megatron's wrapper calls this for delayed weight gradients."""
        assert self._delayed is not None
        self._delayed.call_after(hook)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The parameters as Megatron's checkpoints hold them: a tensor per expert, under SequentialMLP's keys."""
        singleton = bool(ensure_metadata_has_dp_cp_group(metadata).get("singleton_local_shards"))
        replica_id = (0, 0, self.dp_group.rank())
        state: dict[str, Any] = {}
        for name, linear, kind, parameter in self._saved():
            sharding = SlotSharding(
                linear=linear,
                kind=kind,
                experts=self.experts_in_slots,
                num_experts=self.num_local_experts * self.ep_group.size(),
                tp_axis=int(name == "weight2"),
                tp_rank=self.tp_group.rank(),
                tp_size=self.tp_group.size(),
                gated=self._gated and linear == "linear_fc1",
                offsets=tuple(sharded_offsets),
                singleton=singleton,
            )
            state[f"{prefix}{name}"] = sharding.factory(parameter, f"{prefix}experts", replica_id)
            if kind == "bias":
                continue
            for slot, extra in sharding.extra_states(f"{prefix}experts", self.dp_group.rank()).items():
                state[f"{prefix}{_EXTRA_STATE}.{slot}"] = extra
        return state

    def _saved(self) -> list[tuple[str, str, str, torch.nn.Parameter]]:
        """Each parameter: its name here, and the linear layer and the kind of which it is in SequentialMLP's keys."""
        names = ("weight1", "weight2", "biases1.bias", "biases2.bias")
        linears, kinds = ("linear_fc1", "linear_fc2") * 2, ("weight", "weight", "bias", "bias")
        return list(zip(names, linears, kinds, self.slot_weights(), strict=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A tensor per expert under SequentialMLP's keys: what Megatron's torch format holds, which stock reads.

        Experts are in logical order there: they are brought home for a save in this format.
        """
        for _, linear, kind, parameter in self._saved():
            for slot, weight in enumerate(parameter if keep_vars else parameter.detach()):
                key = f"{prefix}local_experts.{slot}.{linear}"
                value = weight if kind == "weight" else weight.squeeze(0)
                destination[f"{key}.{kind}"] = value.clone()  # a file would hold the memory of all slots for each
                destination[f"{key}._extra_state"] = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as torch does, from a tensor for all slots or one per expert, and without empty extra states."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}{_EXTRA_STATE}.")]:
            del state_dict[key]
        for name, linear, kind, parameter in self._saved():
            keys = [f"{prefix}local_experts.{slot}.{linear}" for slot in range(self.num_local_experts)]
            if all(f"{key}.{kind}" in state_dict for key in keys):
                slots = torch.stack([state_dict.pop(f"{key}.{kind}") for key in keys])
                state_dict[prefix + name] = slots.view(parameter.shape)
                for key in keys:
                    state_dict.pop(f"{key}._extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _gate_first(inner_NF: torch.Tensor, block: int) -> torch.Tensor:
    """Rows whose gate and linear parts come in turns, in blocks of this many columns, with the whole gate first."""
    return inner_NF.view(-1, inner_NF.shape[-1] // (2 * block), 2, block).transpose(1, 2).reshape(inner_NF.shape)
