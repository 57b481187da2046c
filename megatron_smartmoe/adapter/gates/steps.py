"""What a run tells its gates: which tokens a rank routes, and when an iteration begins."""

from __future__ import annotations

from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_smartmoe.adapter.gates.draws import Draws, Part
from megatron_smartmoe.adapter.gates.router import GateRouter
from megatron_smartmoe.adapter.gates.table import GATE
from megatron_smartmoe.adapter.hooks import Callback, Order
from megatron_smartmoe.adapter.run import Run
from megatron_smartmoe.errors import CompatError


class GateSteps(Callback):
    """Gives every gate its random numbers, and makes sure that every MoE layer has the gate that was asked for."""

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

    def before_step(self, iteration: int) -> None:
        """Tell the random numbers where the training is."""
        num_micro_batches = get_num_microbatches()
        for draws in self._draws:
            draws.begin(iteration, num_micro_batches)


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
