"""The replicas loop in Megatron: puts spare slots into the layers, and plans the copies before each training step.

One planner per expert-parallel group and pipeline stage: it sees what its own group routes through its own layers,
which every rank of the group knows from the dispatch, so all of them plan the same copies without a word. Groups that
share homes (expert data parallelism) may have different copies.

The planner knows logical experts, the dispatchers know an expert by its home slot; `by_home` translates. So a history
stays true when homes move.

A pool of settings may change between iterations how copies are planned and how many of the spare slots are used
(`switch_to`); the slots' memory stays what the flags say.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.cost_inputs import copy_price_tokens, nodes_of_group, online_options, scope_nodes
from megatron_smartmoe.adapter.flags.smartmoe_arguments import replicas_mode
from megatron_smartmoe.adapter.hooks import after, before
from megatron_smartmoe.adapter.moe.layer import SmartMoELayer
from megatron_smartmoe.adapter.moe.replica_dispatcher import Planner, ReplicaDispatcher
from megatron_smartmoe.adapter.moe.routers import moe_layers
from megatron_smartmoe.placement.replica_planner import ReplicaPlanner
from megatron_smartmoe.runtime.replicas.slots import SpareSlots
from megatron_smartmoe.runtime.replicas.split import BALANCED, exact_slots, homes_only
from megatron_smartmoe.runtime.replicas.tally import LayerTally, balance_line, imbalance
from megatron_smartmoe.runtime.replicas.wire import ReplicaWire
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import EMPTY, Placement, with_empty_slots

MIB = 2**20
DECISIONS_FILE = "replicas-stage{stage}-group{group}.jsonl"
BALANCE_FILE = "balance-stage{stage}-group{group}.jsonl"


class ReplicaLoop:
    """Listens to one training run.

    Args:
        run_dir: where the decisions go, or None for nowhere.
        modes: how copies may come to be planned; None for what the flags say and nothing else.

    Attributes:
        layers: this rank's MoE layers.
    """

    def __init__(self, run_dir: Path | None, modes: frozenset[str] | None = None) -> None:
        self._run_dir, self._modes = run_dir, modes
        self.layers: list[SmartMoELayer] = []
        self._tallies: list[LayerTally] = []
        self._planner: ReplicaPlanner | None = None
        self._iteration = 0

    def listen(self) -> None:
        """Hook into Megatron's loop."""
        import megatron.training.training as training

        after(training, "setup_model_and_optimizer", self.on_model)
        before(training, "train_step", self.on_step_begin)
        after(training, "train_step", self.on_step_end)

    def on_model(self, result: tuple[list[Any], Any, Any], *args: Any, **kwargs: Any) -> None:
        """After `setup_model_and_optimizer`: give every layer its spare slots."""
        options = get_args()
        self._mode = mode = replicas_mode(options)
        self._used_slots = options.smartmoe_spare_slots
        remembers = "history" in (self._modes or (mode,))
        self._iteration = options.iteration
        self._fetch_early = not options.overlap_param_gather
        self._wire = ReplicaWire(_own_group(mpu.get_expert_model_parallel_group()))
        self.layers = [layer for _, layer in moe_layers(unwrap_model(result[0]))]
        self._tallies = [LayerTally() for _ in self.layers]
        self._price_tokens = copy_price_tokens(options)  # once: the cluster file may be edited while the run goes on
        for layer, tally in zip(self.layers, self._tallies, strict=True):
            self._equip(layer, tally, options, keeps=remembers)
        if remembers and self.layers:
            group = mpu.get_expert_data_parallel_rank()
            self._planner = ReplicaPlanner(self._placement(options), group, online_options(options, review_records=1))
        if options.rank == 0:
            spare_bytes = sum(layer.experts.spare_slots.nbytes for layer in self.layers)
            must = f"a copy must spare the busiest rank {self._price_tokens:,.0f} tokens"
            print(
                f"smartmoe: {options.smartmoe_spare_slots} spare slots a rank and layer, copies by {mode}, "
                f"{spare_bytes / MIB:.1f} MiB on this rank; {must}",
                flush=True,
            )

    def switch_to(self, mode: str, used_slots: int) -> None:
        """Plan copies another way from the next iteration on; between iterations, and on all ranks alike.

        Args:
            mode: one of REPLICAS, and of this loop's modes.
            used_slots: of the spare slots; the others stay empty.
        """
        options = get_args()
        self._mode, self._used_slots = mode, used_slots
        for layer in self.layers:
            layer.experts.spare_slots.keep(mode == "history")
            layer.token_dispatcher.plan_with(self._exact_planner(options) if mode == "exact" else None)
        if self._planner is not None:
            self._planner.placement = self._placement(options)

    def _equip(self, layer: SmartMoELayer, tally: LayerTally, options: Namespace, *, keeps: bool) -> None:
        """Spare slots for the experts, and a dispatcher that knows them."""
        experts = layer.experts
        weights = (experts.weight1, experts.weight2)
        experts.spare_slots = SpareSlots(
            weights,
            options.smartmoe_spare_slots,
            self._wire,
            lambda: [weight.main_grad for weight in weights],
            keeps=keeps,
        )
        experts.spare_slots.keep(self._mode == "history")
        layer.token_dispatcher = ReplicaDispatcher(
            layer.num_local_experts,
            layer.local_expert_indices,
            layer.config,
            get_default_pg_collection(),
            spare=experts.spare_slots,
            num_nodes=nodes_of_group(self._wire.num_ranks),
            fetch_early=self._fetch_early,
            plan=self._exact_planner(options) if self._mode == "exact" else None,
            listener=tally.add,
        )
        if layer.shared_experts is not None and layer.shared_expert_overlap:
            layer.token_dispatcher.set_shared_experts(layer.shared_experts)
        layer.register_forward_pre_hook(_tell_whether_training)

    def _exact_planner(self, options: Namespace) -> Planner:
        """Copies for the counts of one micro-batch, experts by their homes."""
        home_slots = options.num_experts // self._wire.num_ranks
        homes_RS = homes_only(options.num_experts, self._wire.num_ranks, self._used_slots)
        unused = options.smartmoe_spare_slots - self._used_slots
        num_nodes, price_tokens = scope_nodes(options), self._price_tokens

        def plan(counts_RE: IntArray) -> IntArray:
            slots_RS = exact_slots(
                counts_RE, homes_RS, home_slots, num_nodes=num_nodes, limit=BALANCED, price_tokens=price_tokens
            )
            return with_empty_slots(slots_RS, unused)

        return plan

    def _placement(self, options: Namespace) -> Placement:
        """The homes as the layers have them now, and empty spare slots."""
        slots_LRS = with_empty_slots(self._homes_LRH(), self._used_slots)
        return Placement(slots_LRS=slots_LRS, num_experts=options.num_experts)

    def _homes_LRH(self) -> IntArray:
        """Expert in each home slot, as the layers have it now."""
        expert_LE = np.array([layer.experts_by_slot for layer in self.layers])
        return expert_LE.reshape(len(self.layers), self._wire.num_ranks, -1)

    def _follow_homes(self, planner: ReplicaPlanner) -> None:
        """Tell the planner when homes have moved."""
        if not np.array_equal(self._homes_LRH(), planner.placement.homes_LRH):
            planner.rehome(self._placement(get_args()))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before `train_step`: plan this iteration's copies and start to fetch their weights."""
        self._iteration += 1
        if self._planner is None:
            return
        if self._mode != "history":  # it looks on, so that it knows the load when it is asked, and where homes are
            self._follow_homes(self._planner)
            return
        problem = self._plan(self._planner)
        if problem is not None:
            self._planner.placement = self._placement(get_args())
            print(f" smartmoe: iteration {self._iteration:8d} | WARNING: no copies: {problem} |", flush=True)
        num_passes, unused = get_num_microbatches(), get_args().smartmoe_spare_slots - self._used_slots
        for layer, slots_RS in zip(self.layers, self._planner.placement.slots_LRS, strict=True):
            by_home_RS = with_empty_slots(by_home(slots_RS, layer.experts.num_local_experts), unused)
            layer.token_dispatcher.slots_RS = by_home_RS
            used = layer.experts.spare_slots.use(by_home_RS, num_passes=num_passes)
            if used is not None and self._fetch_early:
                used.start()

    def _plan(self, planner: ReplicaPlanner) -> str | None:
        """Plan, and see that the group's ranks agree; None, or why this iteration goes without copies."""
        problem, decision = None, None
        try:
            self._follow_homes(planner)
            decision = planner.plan(self._iteration)
        except Exception as error:  # whatever it is, the training goes on without copies
            problem = f"{type(error).__name__}: {error}"
        digest = planner.placement.digest if problem is None else f"{self._wire.rank:015x}"
        if not self._wire.agrees(digest):
            return problem or "the ranks of the group planned different copies, or one could not plan"
        if problem is None and decision is not None:
            self._write(DECISIONS_FILE, decision.to_line())
        return problem

    def _write(self, name: str, line: str) -> None:
        """One line of JSON, by the first rank of the group."""
        first = self._wire.rank == 0 and mpu.get_expert_tensor_parallel_rank() == 0
        if self._run_dir is None or not first:
            return
        place = {"stage": mpu.get_pipeline_model_parallel_rank(), "group": mpu.get_expert_data_parallel_rank()}
        with (self._run_dir / name.format(**place)).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After `train_step`: remember what was routed, and say how balanced it was."""
        options = get_args()
        records = [tally.take() for tally in self._tallies]
        if not records or not all(records):
            return
        if self._planner is not None:
            load_LME = np.stack([np.stack([micro.load_E for micro in record]) for record in records])
            slot_LE = self._planner.placement.home_slot_LE
            self._planner.observe(np.take_along_axis(load_LME, slot_LE[:, None], axis=2))
        if self._iteration % options.log_interval:
            return
        self._write(
            BALANCE_FILE, balance_line(self._iteration, [layer.layer_number - 1 for layer in self.layers], records)
        )
        if options.rank == 0:
            before_split, after_split = imbalance(records)
            in_use = sum(m.num_copies for record in records for m in record) / sum(len(record) for record in records)
            print(
                f" smartmoe: iteration {self._iteration:8d} | replicas: {in_use:.1f} copies a layer | "
                f"max/mean tokens per rank {before_split:.3f} -> {after_split:.3f} |",
                flush=True,
            )


def by_home(slots_RS: IntArray, home_slots: int) -> IntArray:
    """A slot table with every expert named by its home: expert e is then at home in slot e % S of rank e // S.

    Args:
        slots_RS: logical experts, EMPTY for none.
        home_slots: S.
    """
    home_E = np.argsort(slots_RS[:, :home_slots].ravel())
    return np.where(slots_RS == EMPTY, EMPTY, home_E[slots_RS])


def _tell_whether_training(layer: torch.nn.Module, inputs: Any) -> None:
    layer.token_dispatcher.training = layer.training


def _own_group(ep_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks of this expert-parallel group, in its order, for the replicas alone; all ranks of the job take part."""
    mine = tuple(dist.get_process_group_ranks(ep_group))
    everybody: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    groups = {ranks: dist.new_group(list(ranks)) for ranks in sorted(set(everybody))}
    return groups[mine]
