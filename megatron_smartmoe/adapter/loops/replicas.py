"""The replicas loop in Megatron: puts spare slots into the layers, and plans the replicas before each training step.

There is one planner per expert-parallel group and pipeline stage. It sees what its own group routes through its own
layers, which every rank of the group has from the dispatch, so all ranks of the group plan the same replicas without
sending anything. Groups that share homes (expert data parallelism) may have different replicas.

Replicas from history are planned for the next iteration on a thread, from the moment when the last micro-batch of this
one has been dispatched (`runtime.replicas.ahead`).

The planner counts by logical expert, the dispatchers by home slot; `by_home` translates. So a history stays true when
homes move.

A pool of settings may change between iterations how replicas are planned and how many of the spare slots are used
(`switch_to`); the memory of the slots stays what the flags say.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.cost_inputs import (
    may_leave_nodes,
    nodes_of_group,
    online_options,
    replica_price,
    scope_nodes,
    sends_fp8,
)
from megatron_smartmoe.adapter.flags.smartmoe_arguments import replicas_mode
from megatron_smartmoe.adapter.hooks import Callback, Order, reduce_through
from megatron_smartmoe.adapter.loops import saved_state
from megatron_smartmoe.adapter.moe.late_gradients import LateGradients
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.parameter_gathers import ParameterGathers
from megatron_smartmoe.adapter.moe.plan_place import plans_on_device
from megatron_smartmoe.adapter.moe.routers import passes_per_micro_batch
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.errors import PlanError
from megatron_smartmoe.placement.decisions import digest_of
from megatron_smartmoe.placement.replan import ReplanOptions
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.runtime.decisions.record import REPLICAS_LOG, ReplicasStart
from megatron_smartmoe.runtime.process_groups import new_message_group
from megatron_smartmoe.runtime.replicas.ahead import PlansAhead
from megatron_smartmoe.runtime.replicas.dispatch_plan import ExactOptions, by_home
from megatron_smartmoe.runtime.replicas.kernels import fastest_kernels
from megatron_smartmoe.runtime.replicas.replans import replans_of
from megatron_smartmoe.runtime.replicas.slots import SpareSlots
from megatron_smartmoe.runtime.replicas.split import BALANCED
from megatron_smartmoe.runtime.replicas.tally import LayerTally, MicroBatch, balance_line, imbalance, loads
from megatron_smartmoe.runtime.replicas.wire import ReplicaWire
from megatron_smartmoe.runtime.step_clock import STEP_CLOCK, Part
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import Placement, with_empty_slots

MIB = 2**20
BALANCE_FILE = "balance-stage{stage}-group{group}.jsonl"
STATE_FILE = "smartmoe_replicas_stage{stage}_group{group}.npz"  # in a checkpoint's folder
LAYERS_AHEAD = 2  # layers whose replicas from history are being fetched when a layer begins
FROM_HISTORY, FROM_COUNTS = frozenset({"history", "auto"}), frozenset({"exact", "auto"})  # modes by what they plan from
_GROUPS = "groups"  # number of expert-parallel groups, each of which has its own history


class ReplicaLoop(Callback):
    """Plans replicas before each step, and records what was routed after it.

    Args:
        modes: every way in which replicas may be planned in this run, `off` among them where it may be.
    """

    order = Order.REPLICAS

    def __init__(self, modes: frozenset[str]) -> None:
        self._modes = modes
        self._planner: ReplicaPlanner | None = None
        self._ahead: PlansAhead | None = None
        self._iteration = self._passes_left = 0  # passes through layers until this iteration's counts are complete

    def on_start(self, run: Run) -> None:
        """Give every layer its spare slots."""
        args = run.args
        self._run, self._mode, self._used_slots = run, replicas_mode(args), args.smartmoe_spare_slots
        needs_history = bool(self._modes & FROM_HISTORY)
        timeout = timedelta(minutes=args.distributed_timeout_minutes)
        messages = _own_group(mpu.get_expert_model_parallel_group(), timeout)
        self._wire = ReplicaWire(messages, nodes_of_group(messages.size()))
        self._layers: list[SmartMoELayer] = [layer for _, layer in run.layers]
        self._tallies = [LayerTally() for _ in self._layers]
        # once: the cluster file may be edited during the run
        self._price = {mode: replica_price(args, mode) for mode in ("history", "exact")}
        self._gathers = ParameterGathers.of(run)
        self._plans_on_device = plans_on_device(args, messages.size(), self._wire.num_nodes)
        for index, (layer, tally) in enumerate(zip(self._layers, self._tallies, strict=True)):
            self._equip(layer, tally, keeps=needs_history, index=index)
        parameters = [tuple(layer.experts.parameters()) for layer in self._layers]
        spares = [layer.experts.spare_slots for layer in self._layers]
        self._late = LateGradients(list(zip(parameters, spares, strict=True)))
        reduce_through(self._late)
        if needs_history and self._layers:
            online = online_options(args, review_records=1)
            numbers = [number for number, _ in run.layers]
            passes = [passes_per_micro_batch(layer) for layer in self._layers]
            group, kernels = run.ranks.edp_rank, fastest_kernels()
            self._planner = ReplicaPlanner(self._placement(), group, online, kernels, numbers, passes)
            self._ahead = PlansAhead(self._planner)
        if run.is_reporter:
            self._announce()
        self._restore()

    def _restore(self) -> None:
        """Plan on from the history that the checkpoint was saved with. It is a hint, like the placement."""
        run, planner = self._run, self._planner
        if planner is None or run.loaded_folder is None:
            return
        problem = ""
        try:
            pattern = STATE_FILE.format(stage="*", group=run.ranks.edp_rank)
            paths = sorted(run.loaded_folder.glob(pattern))
            if not paths:
                raise PlanError("it was saved without one")
            states = [saved_state.load(path) for path in paths]
            if any(state.pop(_GROUPS, np.zeros(1)).tolist() != [run.ranks.edp_size] for state in states):
                raise PlanError("it was saved with another number of expert-parallel groups")
            state = saved_state.of_layers(states, [number for number, _ in run.layers])
            planner.restore(state)
            digest = digest_of(*(state[name] for name in sorted(state)))
        except PlanError as error:
            problem, digest = str(error), f"{self._wire.rank:015x}"
        if not self._wire.is_equal_on_all_ranks(digest):
            problem = problem or "other ranks cannot read it"
            planner.forget(self._placement())
        if run.is_reporter:
            found = (
                f"the checkpoint's load history is not used: {problem}"
                if problem
                else "continuing with the checkpoint's load history"
            )
            print(f" smartmoe: iteration {run.args.iteration:8d} | replicas: {found} |", flush=True)

    def after_save(self, iteration: int, folder: Path) -> None:
        """Keep what the next plans depend on in the checkpoint, on the first rank of the group."""
        run, planner, ahead = self._run, self._planner, self._ahead
        ranks = run.ranks
        if planner is None or ahead is None or ranks.ep_rank or ranks.etp_rank:
            return
        ahead.observe()
        numbers = np.array([number for number, _ in run.layers])
        state = {**planner.state(), saved_state.LAYERS: numbers, _GROUPS: np.array([ranks.edp_size])}
        problem = saved_state.save(folder / STATE_FILE.format(stage=ranks.pp_rank, group=ranks.edp_rank), state)
        if problem:
            text = f"WARNING: replicas: {problem}; a run that resumes from here starts without load history"
            print(f" smartmoe: iteration {iteration:8d} | {text} |", flush=True)

    def recorded(self) -> tuple[ReplicasStart, saved_state.State]:
        """What a replay of the next plans begins with: settings, and the state of this rank's planner, if any."""
        args = self._run.args
        start = ReplicasStart(
            mode=self._mode,
            used_slots=self._used_slots,
            online=online_options(args, review_records=1),
            exact_price=self._price["exact"],
            scope_nodes=scope_nodes(args),
            num_nodes=self._wire.num_nodes,
        )
        return start, {} if self._planner is None else self._planner.state()

    def _announce(self) -> None:
        slots, spares = self._run.args.smartmoe_spare_slots, [layer.experts.spare_slots for layer in self._layers]
        kept, per_batch = sum(s.nbytes for s in spares) / MIB, sum(s.micro_batch_nbytes for s in spares) / MIB
        memory = f"{kept:.1f} MiB on this rank"
        if self._mode in FROM_COUNTS:
            at_most = "at most " if self._mode in FROM_HISTORY else ""
            memory += f" and {at_most}{per_batch:.1f} MiB for each micro-batch in flight"
        price = f"{self._price['exact' if self._mode == 'exact' else 'history'].each_tokens:,.0f} tokens"
        if self._mode == "auto":
            price += f" of an iteration ({self._price['exact'].each_tokens:,.0f} of a micro-batch)"
        hides = self._run.args.smartmoe_replicas_margin and not any(price.each_tokens for price in self._price.values())
        why = ": its transfers are hidden behind the computation" if hides else ""
        travel = ", weights travel as fp8 with a scale for each 128 x 128" if sends_fp8(self._run.args) else ""
        print(
            f"smartmoe: {slots} spare slot{'s' if slots != 1 else ''} per rank and layer, replicas: {self._mode}, "
            f"{memory}{travel}; a replica pays off above {price} taken from the busiest rank{why}",
            flush=True,
        )

    def switch_to(self, mode: str, used_slots: int) -> None:
        """Plan replicas in another way from the next iteration on. Called between steps, on all ranks alike.

        Args:
            mode: one of this loop's modes.
            used_slots: how many of the spare slots are used; the others stay empty.
        """
        self._mode, self._used_slots = mode, used_slots
        for layer in self._layers:
            layer.experts.spare_slots.keep(mode in FROM_HISTORY)
            layer.planner.plan_with(*self._from_counts())
        if self._planner is not None and self._ahead is not None:
            self._ahead.observe()
            self._ahead.discard()
            self._planner.switch_to(mode, self._placement())

    def _equip(self, layer: SmartMoELayer, tally: LayerTally, *, keeps: bool, index: int) -> None:
        """Give a layer's experts spare slots, and the layer a dispatcher that uses them."""
        experts = layer.experts
        weights = experts.slot_weights()
        spare = SpareSlots(
            weights,
            self._run.args.smartmoe_spare_slots,
            self._wire,
            lambda: [weight.main_grad for weight in weights],
            keeps=keeps,
            accumulates=experts.accumulates,
            packs=sends_fp8(self._run.args),
        )
        spare.keep(self._mode in FROM_HISTORY)
        exact, falls_short = self._from_counts()
        layer.add_replicas(
            spare,
            num_nodes=self._wire.num_nodes,
            exact=exact,
            on_device=self._plans_on_device,
            falls_short=falls_short,
            listener=partial(self._count, tally),
            begins=partial(self._begin_layer, index),
            ends=partial(self._end_layer, index),
        )

    def _from_counts(self) -> tuple[ExactOptions | None, ReplanOptions | None]:
        """How replicas are planned from the counts of one micro-batch, and when; see `LayerPlanner`."""
        if self._mode not in FROM_COUNTS:
            return None, None
        price = self._price["exact"]
        exact = ExactOptions(
            used_slots=self._used_slots,
            num_nodes=scope_nodes(self._run.args),
            or_group=may_leave_nodes(self._run.args),
            price=price,
        )
        falls_short = ReplanOptions(limit=BALANCED, price=price) if self._mode == "auto" else None
        return exact, falls_short

    def _placement(self) -> Placement:
        """The homes as the layers have them now, and empty spare slots."""
        slots_LRS = with_empty_slots(self._homes_LRH(), self._used_slots)
        return Placement(slots_LRS=slots_LRS, num_experts=self._run.args.num_experts)

    def _homes_LRH(self) -> IntArray:
        """The logical expert in each home slot, as the layers have it now."""
        expert_LE = np.array([layer.experts_by_slot for layer in self._layers])
        return expert_LE.reshape(len(self._layers), self._wire.num_ranks, -1)

    def _follow_homes(self, planner: ReplicaPlanner) -> None:
        """Pass homes that have moved on to the planner."""
        if not np.array_equal(self._homes_LRH(), planner.placement.homes_LRH):
            planner.rehome(self._placement())

    @STEP_CLOCK.within(Part.PLANNING)
    def before_step(self, iteration: int) -> None:
        """Plan this iteration's replicas and start to fetch their weights."""
        self._late.forget()  # what an iteration that was broken off has left
        self._wire.settle()
        planner, ahead = self._planner, self._ahead
        passes_L = [get_num_microbatches() * passes_per_micro_batch(layer) for layer in self._layers]
        self._iteration, self._passes_left = iteration, sum(passes_L)
        if planner is None or ahead is None:
            return
        ahead.observe()
        if self._mode not in FROM_HISTORY:  # only kept up to date, for the day when the pool switches to it
            self._follow_homes(planner)
            return
        problem = self._plan(planner, ahead, iteration)
        if problem is not None:
            planner.placement = self._placement()
            print(f" smartmoe: iteration {iteration:8d} | WARNING: no replicas: {problem} |", flush=True)
        unused = self._run.args.smartmoe_spare_slots - self._used_slots
        for layer, slots_RS, passes in zip(self._layers, planner.placement.slots_LRS, passes_L, strict=True):
            by_home_RS = with_empty_slots(by_home(slots_RS, layer.experts.num_local_experts), unused)
            layer.planner.slots_RS = by_home_RS
            layer.experts.spare_slots.use(by_home_RS, num_passes=passes)
        if not self._gathers.overlapped:
            for index in range(LAYERS_AHEAD):
                self._fetch(index)

    def _count(self, tally: LayerTally, load: MicroBatch) -> None:
        """Count a micro-batch of a layer. The last one of the iteration starts the planning of the next iteration."""
        tally.add(load)
        self._passes_left -= 1
        if self._passes_left == 0 and self._ahead is not None and self._mode in FROM_HISTORY:
            self._plan_ahead([tally.so_far for tally in self._tallies])

    def _plan_ahead(self, records: list[list[MicroBatch]]) -> None:
        """Start to plan the next iteration from this one's micro-batches, of each layer."""
        assert self._ahead is not None
        self._ahead.start(self._iteration + 1, partial(self._loads, records))

    def _loads(self, records: list[list[MicroBatch]]) -> IntArray:
        """Tokens of each logical expert in each micro-batch and layer, `[L, M, E]`."""
        assert self._planner is not None
        passes_L = [passes_per_micro_batch(layer) for layer in self._layers]
        load_LME = np.stack([loads(record, passes) for record, passes in zip(records, passes_L, strict=True)])
        return np.take_along_axis(load_LME, self._planner.placement.home_slot_LE[:, None], axis=2)

    def _fetch(self, index: int) -> None:
        """Start to fetch the weights of a layer's replicas from history; its home weights are complete.

        Fetched all at once they would be in front of the first layer's kernels where a GPU has one hardware queue.
        """
        if self._mode in FROM_HISTORY and index < len(self._layers):
            used = self._layers[index].experts.spare_slots.in_use
            if used is not None:
                used.start()

    def _begin_layer(self, index: int) -> None:
        """Called when a layer begins to dispatch in training, by its place among this rank's."""
        if self._gathers.overlapped:
            self._complete(index)
        else:
            self._fetch(index + LAYERS_AHEAD)

    def _end_layer(self, index: int) -> None:
        """Called when a layer's results are combined in training, by its place among this rank's.

        With --overlap-param-gather, the all-gather of the next layer's experts was posted when those of this layer were
        complete. What comes before the next layer's experts hides the fetch.
        """
        is_last = index + 1 == len(self._layers)
        if is_last or not self._gathers.overlapped or self._mode not in FROM_HISTORY:
            return
        if not self._gathers.is_first(self._layers[index + 1]):  # another model chunk is gathered when it begins
            self._complete(index + 1)

    def _complete(self, index: int) -> None:
        """Wait for the home weights of a layer, and start to fetch its replicas from history.

        With replicas or without: ranks that share experts have replicas of their own, and post all-gathers together.
        """
        if self._mode != "off":
            self._gathers.finish(self._layers[index])
            self._fetch(index)

    def _plan(self, planner: ReplicaPlanner, ahead: PlansAhead, iteration: int) -> str | None:
        """Plan, and compare the plan over the group's ranks; None, or why this iteration has no replicas."""
        problem, decision = None, None
        try:
            self._follow_homes(planner)
            decision = ahead.plan(iteration)
        except Exception as error:  # whatever it is, training continues without replicas
            problem = f"{type(error).__name__}: {error}"
        digest = planner.placement.digest if problem is None else f"{self._wire.rank:015x}"
        if not self._wire.is_equal_on_all_ranks(digest):
            return problem or "the plans of the group's ranks differ, or one rank could not plan"
        if problem is None and decision is not None:
            self._write(REPLICAS_LOG, decision.to_line())
        return problem

    def _write(self, name: str, line: str) -> None:
        """Append a line of JSON to a file, on the first rank of the group."""
        ranks = self._run.ranks
        if ranks.ep_rank == 0 and ranks.etp_rank == 0:
            self._run.append(name.format(stage=ranks.pp_rank, group=ranks.edp_rank), line)

    def after_step(self, iteration: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Record what was routed, and report how balanced it was."""
        records = [tally.take() for tally in self._tallies]
        if not records or not all(records):
            if self._ahead is not None:
                self._ahead.discard()
            return
        if self._planner is not None and self._ahead is not None:
            if self._mode not in FROM_HISTORY:
                self._planner.observe(self._loads(records))
            elif self._passes_left:  # not the passes that were expected: the iteration was run again
                self._plan_ahead(records)
        if self._mode == "auto":
            assert self._planner is not None
            placement, group = self._planner.placement, self._planner.group
            price = self._price["exact"]
            decision = replans_of(iteration, group, placement, records, used_slots=self._used_slots, price=price)
            if decision is not None:
                self._write(REPLICAS_LOG, decision.to_line())
        if iteration % self._run.args.log_interval:
            return
        numbers = [number for number, _ in self._run.layers]
        self._write(BALANCE_FILE, balance_line(iteration, numbers, records, self._wire.take_sent_bytes()))
        if self._run.is_reporter:
            before_split, after_split = imbalance(records)
            micros = [micro for record in records for micro in record]
            per_layer = float(np.mean([micro.num_replicas for micro in micros]))
            anew = float(np.mean([micro.replanned_RS is not None for micro in micros]))
            planned = f", {anew:.0%} planned anew" if self._mode == "auto" else ""
            if self._planner is not None and (suspended := self._planner.num_suspended):
                planned += f", those from history suspended in {suspended} of {len(records)} layers"
            print(
                f" smartmoe: iteration {iteration:8d} | replicas: {per_layer:.1f} per layer{planned} | "
                f"max/mean tokens per rank {before_split:.3f} -> {after_split:.3f} |",
                flush=True,
            )


def _own_group(ep_group: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    """A process group for the replicas alone, with the ranks of `ep_group`. A collective call of all ranks."""
    mine = tuple(dist.get_process_group_ranks(ep_group))
    everybody: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    groups = {
        ranks: new_message_group(ranks, timeout=timeout, description="SMARTMOE_REPLICAS")
        for ranks in sorted(set(everybody))
    }
    return groups[mine]
