"""The homes loop in Megatron: builds the controller when the model is there, and calls it after each training step."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.cost_inputs import online_options, online_setting
from megatron_smartmoe.adapter.flags.checkpoint_check import saved_placement
from megatron_smartmoe.adapter.flags.smartmoe_arguments import REPLICAS
from megatron_smartmoe.adapter.hooks import after, rebind
from megatron_smartmoe.adapter.loops.decision_log import DecisionLog
from megatron_smartmoe.adapter.migration.mover import ExpertMover, with_home_slots, with_spare_slots
from megatron_smartmoe.adapter.moe.routers import all_layer_numbers, count_tokens, moe_layers
from megatron_smartmoe.placement.homes_planner import HomesPlanner, ReplicaMode
from megatron_smartmoe.placement.layer_cost import layer_seconds
from megatron_smartmoe.placement.review import LayerSeconds
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.controller import Controller, ControllerOptions
from megatron_smartmoe.runtime.counts import CountsShape, ExpertCounts, IntervalCounts
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

WINDOWS = 4  # records that an interval is observed in: enough to see a drift, few enough to keep
MIB = 2**20


class Balancer:
    """Listens to one training run.

    Args:
        run_dir: where smartmoe.jsonl goes, or None for nowhere.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._controller: Controller | None = None
        self._layer_seconds: dict[str, LayerSeconds] = {}  # by mode of the copies

    def listen(self) -> None:
        """Hook into Megatron's loop."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)
        after(training, "post_training_step_callbacks", self.on_step_end)
        rebind(training, "save_checkpoint", self._in_logical_order, key=self)

    def on_model(self, result: tuple[list[Any], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: build the controller; go on with the placement of the checkpoint."""
        options = get_args()
        model_chunks, optimizer = result[0], result[1]
        chunks = unwrap_model(model_chunks)
        numbers = all_layer_numbers([number for number, _ in moe_layers(chunks)])
        counts = ExpertCounts(max(numbers) + 1, options.num_experts, torch.cuda.current_device())
        count_tokens(chunks, counts)
        num_ranks, windows = mpu.get_expert_model_parallel_world_size(), min(WINDOWS, options.smartmoe_homes_interval)
        mover = ExpertMover(
            {numbers.index(number): layer for number, layer in moe_layers(chunks)},
            model_chunks,
            optimizer,
            staging_bytes=options.smartmoe_migration_staging_mib * MIB,
            timeout_s=options.smartmoe_migration_timeout_s,
        )
        shape = CountsShape(
            rows=tuple(numbers),
            num_ranks=num_ranks,
            ep_rank=mpu.get_expert_model_parallel_rank(),
            windows=windows,
        )
        self._controller = Controller(
            _controller_options(options, windows),
            _planner(options, len(numbers), windows),
            IntervalCounts(counts, shape),
            mover,
            DecisionLog(self._run_dir, dry=options.smartmoe_homes == "dry"),
            Placement.contiguous(
                num_layers=len(numbers),
                num_experts=options.num_experts,
                num_ranks=num_ranks,
                spare_slots=options.smartmoe_spare_slots,
            ),
        )
        # all of them now: a cluster file that is edited while the run goes on must not matter
        self._layer_seconds = {mode: layer_seconds(online_setting(options, mode)) for mode in REPLICAS}
        self._restore(options, mover)

    def _restore(self, options: Namespace, mover: ExpertMover) -> None:
        """A checkpoint holds experts in logical order; its placement is a hint, taken if it fits this run."""
        controller = self._controller
        assert controller is not None
        hint = [saved_placement(options) if options.rank == 0 and options.iteration else None]
        dist.broadcast_object_list(hint, src=0)
        saved, present = hint[0], controller.placement
        if saved is None or options.smartmoe_homes == "dry":
            return
        if (saved.num_layers, saved.num_experts, saved.num_ranks) != (
            present.num_layers,
            present.num_experts,
            present.num_ranks,
        ):
            return
        wanted = with_home_slots(present, saved.home_slot_LE)
        if wanted != present:
            moved = mover.move(present, wanted)
            controller.placement = moved.placement
            if options.rank == 0:
                text = moved.failure or f"experts are back where they were: {moved.wire_bytes / MIB:.1f} MiB moved"
                print(f"smartmoe: checkpoint of iteration {options.iteration}: {text}", flush=True)

    def on_step_end(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After `post_training_step_callbacks`: the slow loop."""
        assert self._controller is not None
        self._controller.step(args[3])

    @property
    def homes_LRH(self) -> IntArray:
        """The logical expert in each home slot, of all MoE layers of the model."""
        assert self._controller is not None
        return self._controller.placement.homes_LRH

    def switch_to(self, setting: PoolSetting) -> None:
        """Look at the homes, or leave them alone, as a setting of the pool says; and plan them for its copies."""
        controller = self._controller
        assert controller is not None
        controller.paused = setting.homes_interval == 0
        controller.placement = with_spare_slots(controller.placement, setting.spare_slots)
        planner = controller.planner
        mode: ReplicaMode = "exact" if setting.replicas == "exact" else "history"
        planner.options = replace(planner.options, replicas=mode)
        planner.layer_seconds = self._layer_seconds[setting.replicas]

    def _in_logical_order(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Around `save_checkpoint`: what it writes is in logical order, and the placement goes along as a hint.

        torch_dist maps slots to logical experts in the index and moves nothing. Formats that write the optimizer's
        buffers as they lie need the experts at home; asynchronous saves have copied them before the call returns.
        """

        @functools.wraps(save_checkpoint)
        def save(*args: Any, **kwargs: Any) -> Any:
            options, controller = get_args(), self._controller
            if controller is None:
                return save_checkpoint(*args, **kwargs)
            options.smartmoe_placement = controller.placement.to_json()
            if not saves_slots(options):
                return save_checkpoint(*args, **kwargs)
            with controller.at_home() as at_home:
                result = save_checkpoint(*args, **kwargs)
            if at_home.wire_bytes and options.rank == 0:
                moved = f"{at_home.wire_bytes / MIB:.1f} MiB in {at_home.seconds:.2f} s"
                print(f" smartmoe: checkpoint | experts moved home and back: {moved} |", flush=True)
            return result

        return save


def saves_slots(options: Namespace) -> bool:
    """Whether a checkpoint would hold experts in the order of the slots, so that they must be at home for it."""
    raw_buffers = options.use_distributed_optimizer and not options.dist_ckpt_optim_fully_reshardable
    return (
        options.ckpt_format != "torch_dist"
        or (raw_buffers and not options.no_save_optim)
        or options.ckpt_assume_constant_structure
        or options.smartmoe_experts != "grouped_mm"
    )


def _controller_options(options: Namespace, windows: int) -> ControllerOptions:
    return ControllerOptions(
        mode=options.smartmoe_homes,
        interval=options.smartmoe_homes_interval,
        first=options.smartmoe_homes_start,
        last=options.smartmoe_homes_stop,
        windows=windows,
        seed=options.seed,
        micro_batches=get_num_microbatches(),
        groups=mpu.get_expert_data_parallel_world_size(),
    )


def _planner(options: Namespace, num_layers: int, windows: int) -> HomesPlanner:
    """The planner with this machine's prices."""
    online = online_options(options, review_records=windows)
    return HomesPlanner(num_layers, options.num_experts, online, layer_seconds(online_setting(options)))
