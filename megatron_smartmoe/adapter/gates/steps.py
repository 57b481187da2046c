"""What a run tells its gates: which tokens a rank routes, which router follows another, where an iteration begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.gates.draws import Draws, Part
from megatron_smartmoe.adapter.gates.residuals import Link, linked
from megatron_smartmoe.adapter.gates.router import GateRouter
from megatron_smartmoe.adapter.gates.table import GATE, RESIDUALS
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.moe.routers import is_prediction, moe_layers
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.errors import CompatError


class GateSteps(Callback):
    """Gives gates their random numbers and residuals, and makes sure that every MoE layer has the gate asked for."""

    order = Order.REPLAY

    def on_start(self, run: Run) -> None:
        """Prepare the routers.

        Raises:
            CompatError: a layer was built without the gate.
        """
        self._draws = []
        for number, layer in run.layers:
            router = layer.router
            if not isinstance(router, GateRouter):
                name = f"{type(router).__module__}.{type(router).__qualname__}"
                raise CompatError(
                    f"{GATE}: the router of MoE layer {number} = {name}: "
                    "was not built through Megatron's get_moe_module_spec_for_backend, where this project puts its "
                    f"gates. Build the layer there, or remove {GATE}."
                )
            router.draws = Draws(run.args.seed, number, _part_of(router))
            self._draws.append(router.draws)
        self._links = [link for chunk in run.chunks for link in _linked(chunk)]
        num_stages = run.args.pipeline_model_parallel_size * (run.args.virtual_pipeline_model_parallel_size or 1)
        if self._links and num_stages > 1 and run.is_reporter:
            print(
                f" smartmoe: gating residuals begin with 0 in each of the {num_stages} pipeline stages: another number "
                f"of stages trains another model ({RESIDUALS} off: none)",
                flush=True,
            )

    def before_step(self, iteration: int) -> None:
        """Tell the random numbers and the residuals where the training is."""
        num_micro_batches = get_num_microbatches()
        for draws in self._draws:
            draws.begin(iteration, num_micro_batches)
        for link in self._links:
            link.begin(num_micro_batches)


def _linked(chunk: torch.nn.Module) -> Iterator[Link]:
    """Link the routers of a model chunk that have residuals; each prediction block (MTP) begins with 0 too."""
    layers = [layer for _, layer in moe_layers([chunk])]
    decoder = [layer for layer in layers if not is_prediction(layer)]
    for row in (decoder, *([layer] for layer in layers if is_prediction(layer))):
        routers = [layer.router for layer in row if getattr(layer.router, "has_residuals", False)]
        for router, link in zip(routers, linked(len(routers)), strict=True):
            router.link = link
            yield link


def _part_of(router: GateRouter) -> Part:
    is_split = bool(router.config.sequence_parallel)
    return Part(
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        cp_rank=router.cp_group.rank(),
        cp_size=router.cp_group.size(),
        sp_rank=router.tp_group.rank() if is_split else 0,
        sp_size=router.tp_group.size() if is_split else 1,
    )
