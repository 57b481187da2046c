"""The model of every pipeline stage that differs from the others: built, wrapped, and run on one micro-batch."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_smartmoe.adapter import hooks
from megatron_smartmoe.adapter.batch import Batch, forward_step
from megatron_smartmoe.adapter.moe.modules import Modules
from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
from megatron_smartmoe.adapter.rehearsal.groups import become_rank
from megatron_smartmoe.adapter.rehearsal.request import StageReport
from megatron_smartmoe.adapter.rehearsal.shapes import META, GroupedGemmShapes, Shapes

# Kernels of TransformerEngine, apex and NVIDIA's libraries, which cannot run here: the same sizes go through Megatron's
# own modules. Each is an argument and the value that stands for "without".
_WITHOUT_KERNELS: dict[str, Any] = {
    "transformer_impl": "local",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "cross_entropy_loss_fusion": False,
    "use_te_rng_tracker": False,
    "te_rng_tracker": False,
    "tp_comm_overlap": False,
    "fp8": None,
    "fp4": None,
    "smartmoe_experts": "grouped_mm",
    "use_transformer_engine_op_fuser": False,
}


class Stages:
    """The pipeline stages of a run.

    Args:
        args: Megatron's arguments, after validation.
        overlap_degree: chosen once for all stages.
    """

    def __init__(self, args: Namespace) -> None:
        self.notes: list[str] = []
        self._args = args
        self._model_args = self._rehearsed(args)
        self._overlap_degree = OverlapDegree(args)

    def _rehearsed(self, args: Namespace) -> Namespace:
        """The arguments of the model that stands for the run's own."""
        changed = copy.copy(args)
        if args.transformer_impl == "local":
            return changed
        self.notes.append(
            "TransformerEngine's modules run on a GPU only: torch modules of the same sizes stood for them."
        )
        if args.moe_grouped_gemm and not args.add_bias_linear:
            changed.smartmoe = True  # one grouped GEMM for all experts of a rank, as TransformerEngine has
        for name, value in _WITHOUT_KERNELS.items():
            if hasattr(changed, name):
                setattr(changed, name, value)
        if changed.moe_token_dispatcher_type == "flex":
            changed.moe_token_dispatcher_type = "alltoall"
        return changed

    def distinct(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(rank, stages): one rank of each kind of stage, and the stages that are of this kind."""
        ranks = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
        kinds: dict[object, list[int]] = {}
        config = gpt_config_from_args(self._model_args).transformer
        for stage in range(len(ranks)):
            kinds.setdefault(self._kind(config, stage), []).append(stage)
        for stages in kinds.values():
            yield ranks[stages[0]], tuple(stages)

    def _kind(self, config: Any, stage: int) -> object:
        """Everything by which one stage's model can differ from another's."""
        stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
        places = []
        for chunk in range(chunks or 1):
            virtual = chunk if chunks else None
            first = get_transformer_layer_offset(config, virtual, stage)
            count = get_num_layers_to_build(config, virtual, stage)
            places.append(tuple(_layer_kind(config, layer) for layer in range(first, first + count)))
        return (stage == 0, stage == stages - 1, tuple(places), self._is_last_special(config, stage))

    def _is_last_special(self, config: Any, stage: int) -> object:
        """A layout may put prediction layers on any stage: stages with a layout of their own are compared by it."""
        layout = config.pipeline_model_parallel_layout
        return None if layout is None else str(layout.layout[stage])

    def build_and_run(self, rank: int, stages: tuple[int, ...]) -> StageReport:
        """One kind of stage: model, data-parallel wrapper, optimizer, one micro-batch."""
        become_rank(self._args, rank)
        args = self._model_args
        hooks.use_modules(Modules.of(args, self._overlap_degree, everywhere=args.spec is None))
        config = gpt_config_from_args(args)
        config.pre_wrap_hooks.append(lambda chunks: [chunk.to(META) for chunk in chunks])
        wrapped = self._build(config)
        chunks = unwrap_model(wrapped)
        parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        layers = [layer for chunk in chunks for layer in chunk.modules() if hasattr(layer, "is_moe_layer")]
        moe = sum(bool(layer.is_moe_layer) for layer in layers)
        self._run(chunks)
        return StageReport(stages=stages, parameters=parameters, dense_layers=len(layers) - moe, moe_layers=moe)

    def _build(self, config: Any) -> list[torch.nn.Module]:
        """The model on the meta device, wrapped as in training, and its optimizer."""
        args = self._model_args
        settings = pretrain_cfg_container_from_args(args, config)
        own_wrapper = args.use_megatron_fsdp or args.use_torch_fsdp2  # they need the device
        with_optimizer = not args.skip_train and not own_wrapper
        current_device = torch.cuda.current_device
        torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
        try:
            wrapped: list[torch.nn.Module] = config.get_builder_cls()(config).build_distributed_models(
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
                ddp_config=settings.ddp,
                overlap_param_gather_with_optimizer_step=settings.optimizer.overlap_param_gather_with_optimizer_step,
                wrap_with_ddp=with_optimizer,
                data_parallel_random_init=False,
            )
            if with_optimizer:
                optimizer, overrides = hooks.loop_module().get_megatron_optimizer_config(args)
                get_megatron_optimizer(optimizer, wrapped, config_overrides=overrides)
        finally:
            torch.cuda.current_device = current_device
        return wrapped

    def _run(self, chunks: list[torch.nn.Module]) -> None:
        """One micro-batch through each chunk, forward and backward."""
        args, shapes = self._model_args, Shapes()
        sequence = args.seq_length // args.context_parallel_size
        if args.sequence_parallel:
            sequence //= args.tensor_model_parallel_size
        hidden = (sequence, args.micro_batch_size, args.hidden_size)
        with GroupedGemmShapes():  # type: ignore[no-untyped-call]
            for chunk in chunks:
                shapes.convert(chunk)
                _keep_distinct_layers(chunk)
                if not chunk.pre_process:
                    received = shapes.empty(hidden, args.params_dtype).requires_grad_()
                    chunk.set_input_tensor(received)  # type: ignore[operator]
                output, loss_of = forward_step(_micro_batches(args), chunk)
                if chunk.post_process:
                    torch.autograd.backward(loss_of(output)[0])
                else:
                    torch.autograd.backward(output, shapes.empty(output.shape, output.dtype))


def _layer_kind(config: Any, layer: int) -> tuple[object, ...]:
    """What a layer's number decides: patterns that are a list with an entry per layer, or a period."""
    values = []
    for name, value in sorted(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_layers:
            values.append(str(value[layer]))
        elif name.endswith("_freq") and isinstance(value, int) and value > 0:
            values.append(str(layer % value == 0))
    if getattr(config, "first_last_layers_bf16", False) or hasattr(config, "per_block_parameters"):
        values.append(str(layer))
    return tuple(values)


def _keep_distinct_layers(chunk: torch.nn.Module) -> None:
    """Of layers that are alike one stays: the others would take the same shapes through the same code."""
    for block in chunk.modules():
        if not isinstance(block, TransformerBlock) or not block.layers:
            continue
        kept: dict[object, torch.nn.Module] = {}
        for layer in block.layers:
            shapes = tuple((name, tuple(each.shape), each.dtype) for name, each in layer.named_parameters())
            kept.setdefault((shapes, _layer_kind(block.config, layer.layer_number - 1)), layer)
        block.layers = torch.nn.ModuleList(kept.values())
        block.num_layers_per_pipeline_rank = len(kept)
        if block.config.recompute_num_layers is not None:
            block.config.recompute_num_layers = min(block.config.recompute_num_layers, len(kept))


def _micro_batches(args: Namespace) -> Iterator[Batch]:
    """Micro-batches of tokens that every vocabulary has."""
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        yield {
            "tokens": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.zeros(shape, dtype=torch.int64),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(args.seq_length).expand(shape).contiguous(),
            "attention_mask": _attention_mask(args),
        }


def _attention_mask(args: Namespace) -> torch.Tensor | None:
    if not args.create_attention_mask_in_dataloader:
        return None
    return torch.zeros((args.micro_batch_size, 1, args.seq_length, args.seq_length), dtype=torch.bool)
