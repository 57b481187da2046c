"""The homes loop in Megatron: builds the controller when the model exists, and calls it between training steps."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from numpy.typing import NDArray

from megatron_smartmoe.adapter.cost_inputs import online_options, online_setting, routing_groups_line, state_bytes
from megatron_smartmoe.adapter.flags.checkpoint_check import saved_placement
from megatron_smartmoe.adapter.flags.smartmoe_arguments import REPLICAS, replicas_mode
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.loops import saved_state
from megatron_smartmoe.adapter.loops.decision_log import DecisionLog
from megatron_smartmoe.adapter.loops.saved_state import State
from megatron_smartmoe.adapter.migration.mover import ExpertMover, with_home_slots
from megatron_smartmoe.adapter.moe.routers import count_tokens
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.checkpoint.manifest import read_manifest
from megatron_smartmoe.cost.memory.buffers import staging_bytes
from megatron_smartmoe.errors import ConfigError, MigrationError, PlanError
from megatron_smartmoe.placement.homes_planner import HomesPlanner
from megatron_smartmoe.placement.layer_cost import layer_seconds
from megatron_smartmoe.planner.pool import PoolSetting
from megatron_smartmoe.runtime.controller import Controller, ControllerOptions
from megatron_smartmoe.runtime.counts import CountsShape, ExpertCounts, IntervalCounts
from megatron_smartmoe.runtime.decisions.record import HomesStart
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement

WINDOWS = 4  # records that an interval is observed in: enough to see a drift, few enough to keep
MIB = 2**20
STATE_FILE = "smartmoe_homes.npz"  # in a checkpoint's folder


class HomesLoop(Callback):
    """Counts tokens in every step, and lets the controller move experts between steps."""

    order = Order.HOMES

    def on_start(self, run: Run) -> None:
        """Build the controller, and restore the placement that the checkpoint was saved with."""
        args, numbers, ranks = run.args, run.layer_numbers, run.ranks
        self._run = run
        counts = ExpertCounts(max(numbers) + 1, args.num_experts, torch.cuda.current_device())
        count_tokens(run.layers, counts)
        self._mover = ExpertMover(
            {numbers.index(number): layer for number, layer in run.layers},
            run.model_chunks,
            run.optimizer,
            staging_bytes=args.smartmoe_migration_staging_mib * MIB,
            timeout_s=args.smartmoe_migration_timeout_s,
        )
        self._take_staging_memory()
        windows = min(WINDOWS, args.smartmoe_homes_interval)
        shape = CountsShape(rows=numbers, num_ranks=ranks.ep_size, ep_rank=ranks.ep_rank, windows=windows)
        # All of them now: a cluster file that is edited during the run must not change what the run does.
        self._pricing = {mode: online_setting(args, mode) for mode in REPLICAS}
        self._controller = Controller(
            ControllerOptions(
                mode=args.smartmoe_homes,
                interval=args.smartmoe_homes_interval,
                first=args.smartmoe_homes_start,
                last=args.smartmoe_homes_stop,
                windows=windows,
                seed=args.seed,
                micro_batches=get_num_microbatches(),
                groups=ranks.edp_size,
            ),
            HomesPlanner(
                len(numbers),
                args.num_experts,
                online_options(args, review_records=windows),
                layer_seconds(self._pricing, replicas_mode(args)),
            ),
            IntervalCounts(counts, shape),
            self._mover,
            DecisionLog(run, dry=args.smartmoe_homes == "dry"),
            Placement.contiguous(
                num_layers=len(numbers),
                num_experts=args.num_experts,
                num_ranks=ranks.ep_size,
                spare_slots=args.smartmoe_spare_slots,
            ),
        )
        if run.is_reporter and (line := routing_groups_line(args)) is not None:
            print(f" smartmoe: {line}", flush=True)
        self._restore()

    def _take_staging_memory(self) -> None:
        """Allocate what a migration may need, while a lack of it is still a matter of flags.

        Raises:
            ConfigError: on every rank of a pipeline stage in which one has no memory for it.
        """
        args = self._run.args
        limit_mib = args.smartmoe_migration_staging_mib
        try:
            self._mover.reserve(
                staging_bytes(state_bytes(args), args.num_experts // self._run.ranks.ep_size, limit_mib * MIB)
            )
        except MigrationError as error:
            way_out = "Pass a smaller number, or --smartmoe-homes off."
            raise ConfigError("--smartmoe-migration-staging-mib", limit_mib, str(error), way_out) from error

    def _restore(self) -> None:
        """A checkpoint holds experts in logical order; its placement is a hint, used if it fits this run."""
        args, controller = self._run.args, self._controller
        hint = [self._saved_placement() if self._run.is_reporter and args.iteration else None]
        dist.broadcast_object_list(hint, src=0)
        saved, present = hint[0], controller.placement
        if saved is None or args.smartmoe_homes == "dry" or not _same_shape(saved, present):
            return
        wanted = with_home_slots(present, saved.home_slot_LE)
        if wanted != present:
            moved = self._mover.move(present, wanted)
            controller.placement = moved.placement
            if self._run.is_reporter:
                size = f"{moved.wire_bytes / MIB:.1f} MiB moved"
                text = moved.failure or f"restored expert placement from checkpoint ({size})"
                print(f" smartmoe: iteration {args.iteration:8d} | homes: {text} |", flush=True)
        if np.array_equal(saved.home_slot_LE, controller.placement.home_slot_LE):
            self._restore_state()

    def _restore_state(self) -> None:
        """Continue with the counts and the decisions that the checkpoint was saved with, so that homes move when they
        would have moved without a restart."""
        run, problem = self._run, ""
        content: list[dict[str, NDArray[Any]] | str | None] = [None]
        if run.is_reporter and run.loaded_folder is not None:
            content = [_load_state(run.loaded_folder / STATE_FILE)]
        dist.broadcast_object_list(content, src=0)
        state = content[0]
        if state is None:
            return
        if isinstance(state, str):
            problem = state
        else:
            try:
                self._controller.restore(state, adds_sums=run.is_reporter)
            except PlanError as error:
                problem = str(error)
        if problem and run.is_reporter:
            text = f"the checkpoint's load history is not used: {problem}"
            print(f" smartmoe: iteration {run.args.iteration:8d} | homes: {text} |", flush=True)

    def after_save(self, iteration: int, folder: Path) -> None:
        """Keep what the next decisions depend on in the checkpoint."""
        state = self._controller.state()
        problem = saved_state.save(folder / STATE_FILE, state) if self._run.is_reporter else ""
        if problem:
            text = f"WARNING: homes: {problem}; a run that resumes from here starts without load history"
            print(f" smartmoe: iteration {iteration:8d} | {text} |", flush=True)

    def _saved_placement(self) -> Placement | None:
        """The placement in the manifest or beside the checkpoint's arguments. One that cannot be read is no error."""
        folder = self._run.loaded_folder
        try:
            manifest = read_manifest(folder) if folder is not None else None
            if manifest is not None and manifest.placement is not None:
                return Placement.from_json(dict(manifest.placement))
            return saved_placement(self._run.args)
        except Exception as error:  # of a damaged hint anything may be wrong, and the other ranks wait
            text = f"the placement in the checkpoint cannot be read, experts start at home: {error}"
            print(f" smartmoe: iteration {self._run.args.iteration:8d} | WARNING: homes: {text} |", flush=True)
            return None

    @STEP_CLOCK.within(Part.PLANNING)
    def between_steps(self, iteration: int) -> None:
        """Re-evaluate the homes, when the interval is over."""
        self._controller.step(iteration)

    @property
    def homes_LRH(self) -> IntArray:
        """The logical expert in each home slot, of all MoE layers of the model."""
        return self._controller.placement.homes_LRH

    def switch_to(self, setting: PoolSetting) -> None:
        """Move homes or not, as a setting of the pool says, and plan them for its replicas from now on."""
        self._controller.switch_to(setting, layer_seconds(self._pricing, setting.replicas))

    def recorded(self) -> tuple[HomesStart, State]:
        """What a replay of the next decisions begins with. A collective call."""
        controller = self._controller
        start = HomesStart(
            options=controller.options,
            online=controller.planner.options,
            mode=replicas_mode(self._run.args),
            pricing=self._pricing,
        )
        return start, {**controller.state(), "slots_LRS": controller.placement.slots_LRS}

    @contextlib.contextmanager
    def around_save(self, iteration: int) -> Iterator[None]:
        """What is saved is in logical order, and the placement is saved beside it as a hint.

        torch_dist maps slots to logical experts in the index and moves nothing. Formats that write the optimizer's
        buffers as they lie need the experts at home; asynchronous saves have copied them before the call returns.
        """
        args, controller = self._run.args, self._controller
        args.smartmoe_placement = controller.placement.to_json()
        if not saves_slots(args):
            yield
            return
        with controller.at_home() as at_home:
            yield
        if at_home.wire_bytes and self._run.is_reporter:
            moved = f"{at_home.wire_bytes / MIB:.1f} MiB in {at_home.seconds:.2f} s"
            print(
                f" smartmoe: iteration {iteration:8d} | checkpoint: experts moved home for it and back, {moved} |",
                flush=True,
            )


def _load_state(path: Path) -> dict[str, NDArray[Any]] | str | None:
    """What a checkpoint has of the homes loop; a text if it cannot be read, None if it has nothing."""
    if not path.is_file():
        return None
    try:
        return saved_state.load(path)
    except PlanError as error:
        return str(error)


def _same_shape(one: Placement, other: Placement) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("num_layers", "num_experts", "num_ranks"))


def saves_slots(args: Namespace) -> bool:
    """Whether a checkpoint would hold experts in the order of the slots, so that they must be at home for it."""
    raw_buffers = args.use_distributed_optimizer and not args.dist_ckpt_optim_fully_reshardable
    return (
        args.ckpt_format != "torch_dist"
        or (raw_buffers and not args.no_save_optim)
        or args.ckpt_assume_constant_structure
        or args.smartmoe_experts != "grouped_mm"
    )
