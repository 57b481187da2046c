"""A model of experts and nothing else, in Megatron's own data parallelism and optimizers, whose experts can be moved.

What an expert is fed depends on its logical number, the iteration and the data-parallel rank, not on where it lives.
So the state of every expert after any number of steps must be the same, bit for bit, wherever it was in between.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

HIDDEN, FFN, TOKENS, MICRO_BATCHES = 24, 32, 3, 2


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the job is laid out; the world is ep x edp x etp x pp ranks."""

    ep: int = 2
    edp: int = 1
    etp: int = 1
    pp: int = 1
    bf16: bool = False
    fp16: bool = False
    distributed: bool = False
    overlap: bool = False
    sequential: bool = False
    optimizer: str = "adam"
    layers: int = 3
    slots: int = 3

    @property
    def world_size(self) -> int:
        return self.ep * self.edp * self.etp * self.pp

    @property
    def experts(self) -> int:
        return self.ep * self.slots

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


class Job:
    """This rank of a training run: model, optimizer, homes."""

    def __init__(self, mix: Mix, timeout_s: float = 30.0, device: str = "cpu") -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.migration.expert_state import ExpertStates

        hooks.use_torch_adam()
        self.mix, self.timeout_s, self.device = mix, timeout_s, device
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=mix.etp,
            pipeline_model_parallel_size=mix.pp,
            expert_model_parallel_size=mix.ep,
            expert_tensor_parallel_size=mix.etp,
        )
        self.ep_rank = parallel_state.get_expert_model_parallel_rank()
        self.edp_rank = parallel_state.get_expert_data_parallel_rank()
        self.etp_rank = parallel_state.get_expert_tensor_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        module = build_model(mix).to(device)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=mix.distributed,
            overlap_grad_reduce=mix.overlap,
            overlap_param_gather=mix.overlap and mix.distributed,
            bucket_size=2000 if mix.overlap else None,
            grad_reduce_in_fp32=True,
        )
        self.ddp = DistributedDataParallel(module.config, ddp_config, module)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=mix.optimizer,
                lr=1e-2,
                weight_decay=0.01,
                clip_grad=0.0,
                bf16=mix.bf16,
                fp16=mix.fp16,
                initial_loss_scale=2.0**8 if mix.fp16 else 2.0**32,
                params_dtype=mix.dtype,
                use_distributed_optimizer=mix.distributed,
                overlap_param_gather=mix.overlap and mix.distributed,
            ),
            [self.ddp],
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        self.layer_ids = [stage * mix.layers + index for index in range(mix.layers)]
        self.homes_LE = np.tile(np.arange(mix.experts), (mix.layers, 1))
        layers = list(zip(self.layer_ids, module.layers, strict=True))
        self.states = ExpertStates(layers, [self.ddp], self.optimizer, timeout_s=timeout_s)
        self._module = module
        self.iteration = 0

    def micro_batch(self, number: int) -> None:
        """Forward and backward of one micro-batch."""
        inputs = []
        for layer, homes_E in zip(self.layer_ids, self.homes_LE, strict=True):
            experts = np.argsort(homes_E).reshape(self.mix.ep, -1)[self.ep_rank]
            rows = [self._draw(layer, int(expert), number) for expert in experts]
            inputs.append((torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])))
        loss = self.ddp(inputs)
        self.optimizer.scale_loss(loss).backward()

    def _draw(self, layer: int, expert: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed = hash((self.iteration, number, layer, expert, self.edp_rank)) % (1 << 31)
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(TOKENS, HIDDEN, generator=generator).to(self.device, self.mix.dtype) for _ in range(2)]
        return drawn[0], drawn[1]

    def step(self) -> None:
        """One training step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for number in range(MICRO_BATCHES):
            with ExitStack() as stack:
                if number < MICRO_BATCHES - 1:
                    stack.enter_context(self.ddp.no_sync())
                self.micro_batch(number)
        self.ddp.finish_grad_sync()
        success, _, _ = self.optimizer.step()
        assert success
        self.iteration += 1

    def exchange(self, staging_bytes: int = 1 << 20, probe: Any = None) -> Any:
        """An exchange over the ranks of this pipeline stage."""
        from megatron_smartmoe.runtime.migration.exchange import ExpertExchange

        return ExpertExchange(
            group=self.states.group,
            workers=self.states.workers,
            device=self.device,
            staging_bytes=staging_bytes,
            timeout_s=self.timeout_s,
            probe=probe,
        )

    def migrate(self, after_LE: np.ndarray, exchange: Any, **plan_options: Any) -> tuple[Any, Any]:
        """Prepare, plan, execute; returns plan and report."""
        from megatron_smartmoe.placement.migration import plan_migration

        self.states.prepare(gradients_spent=True)
        states = self.states.states()
        plan = plan_migration(
            self.homes_LE,
            after_LE,
            [states[layer].layout for layer in self.layer_ids],
            num_ranks=self.mix.ep,
            staging_bytes=exchange.staging_bytes,
            **plan_options,
        )
        report = exchange.execute(plan, states, self.set_homes)
        return plan, report

    def set_homes(self, step: Any) -> None:
        """Record the new homes; the exchange calls it after each commit."""
        self.homes_LE[self.layer_ids.index(step.layer), list(step.experts)] = step.to_slot

    def random_homes(self, seed: int) -> np.ndarray:
        """A random permutation of every layer; equal on all ranks."""
        rng = np.random.default_rng(seed)
        return np.stack([rng.permutation(self.mix.experts) for _ in self.layer_ids])

    def fingerprints(self) -> dict[int, list[list[int]]]:
        """Fingerprints of every tensor of every expert of this stage: `[E][tensors]` by layer."""
        from tests.support.fingerprints import fingerprints

        self.states.prepare(gradients_spent=True)
        return {
            layer: fingerprints(
                state, self.homes_LE[self.layer_ids.index(layer)], self.ep_rank, self.states.group
            ).tolist()
            for layer, state in self.states.states().items()
        }

    def main_weights_agree(self) -> bool:
        """Whether every weight is its main weight, rounded."""
        for state in self.states.states().values():
            names = [tensor.name for tensor in state.layout.tensors]
            for slot, pieces in enumerate(state.pieces):
                for index, name in enumerate(names):
                    if name.endswith("/main"):
                        weight = names.index(name.removesuffix("/main"))
                        low, high = state.layout.tensors[index].held_SC2[slot, state.shards[index]]
                        if not torch.equal(pieces[weight][low:high], pieces[index].to(self.mix.dtype)):
                            return False
        return True


def build_model(mix: Mix) -> Any:
    """The experts of `mix.layers` layers of this rank, and one dense parameter."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_smartmoe.adapter.moe.experts import SlottedExperts

    config = TransformerConfig(
        num_layers=mix.layers * mix.pp,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=mix.experts,
        moe_ffn_hidden_size=FFN,
        ffn_hidden_size=FFN,
        tensor_model_parallel_size=mix.etp,
        sequence_parallel=mix.etp > 1,
        pipeline_model_parallel_size=mix.pp,
        pipeline_dtype=mix.dtype,
        expert_model_parallel_size=mix.ep,
        expert_tensor_parallel_size=mix.etp,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=mix.dtype,
        bf16=mix.bf16,
        fp16=mix.fp16,
    )

    class ExpertsOnly(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            torch.manual_seed(5)
            self.dense = torch.nn.Parameter(torch.randn(7, dtype=mix.dtype))
            make: Callable[[], Any] = lambda: SlottedExperts(mix.slots, config, groups)  # noqa: E731
            if mix.sequential:
                parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
                make = lambda: SequentialMLP(mix.slots, config, parts, groups)  # noqa: E731
            self.layers = torch.nn.ModuleList(make() for _ in range(mix.layers))
            for parameter in self.layers.parameters():
                parameter.data.copy_(torch.randn(parameter.shape) * 0.2)

        def forward(self, inputs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
            loss = (self.dense.float() ** 2).sum()
            for experts, (rows, targets) in zip(self.layers, inputs, strict=True):
                sizes = torch.full((mix.slots,), TOKENS)
                output, _ = experts(rows, sizes, torch.ones(len(rows), dtype=rows.dtype, device=rows.device))
                loss = loss + (output.float() * targets.float()).sum()
            return loss

    return ExpertsOnly()
