"""`megatron_smartmoe.session()`: for a training loop that is not Megatron's, with Megatron's model and optimizer.

    with megatron_smartmoe.session(model, optimizer) as balanced:
        for iteration in range(1, num_iterations + 1):
            balanced.before_step(iteration)
            losses = ...  # forward and backward passes, optimizer.step()
            balanced.step(iteration, losses)

Megatron's own loop tells the callbacks where it is through hooks; here the loop says so itself. The callbacks are the
same. Arguments and process groups have to be Megatron's (`initialize_megatron`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smartmoe.adapter import door, hooks
from megatron_smartmoe.errors import CompatError, ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_smartmoe.adapter.hooks import _Loop


class Session:
    """One training; made by `session`. Iterations count from 1 over the whole training, and every rank calls all."""

    def __init__(self, loop: _Loop, iteration: int) -> None:
        self._loop = loop
        self._begun = self._done = iteration

    def before_step(self, iteration: int) -> None:
        """Before the first forward pass of an iteration.

        Args:
            iteration: its number.

        Raises:
            ConfigError: it is not the one after the last.
        """
        if iteration != self._done + 1:
            rule = f"must be {self._done + 1}, the one after the last: step() ends an iteration"
            raise ConfigError("session.before_step(iteration)", iteration, rule, "Call step() once per iteration.")
        self._begun = iteration
        self._loop.before_step(iteration)

    def step(self, iteration: int, losses: Mapping[str, torch.Tensor] | None = None) -> None:
        """After the optimizer's step: experts may move, replicas are planned. A collective call of all ranks.

        Args:
            iteration: its number.
            losses: scalars by name, reduced over data-parallel ranks, for the records.

        Raises:
            ConfigError: `before_step` was not called for this iteration.
        """
        if iteration != self._begun or iteration == self._done:
            rule = f"was not begun: before_step() was called for iteration {self._begun} last"
            raise ConfigError("session.step(iteration)", iteration, rule, "Call before_step(iteration) first.")
        self._loop.after_step(iteration, losses or {})
        self._loop.between_steps(iteration)
        self._done = iteration

    @contextlib.contextmanager
    def around_save(self, iteration: int, folder: str | Path | None = None) -> Iterator[None]:
        """Around the code that writes a checkpoint, between two iterations.

        Experts are in logical order in what Megatron's `sharded_state_dict` returns inside.

        Args:
            iteration: that is saved.
            folder: of the checkpoint: what the loops need to continue as if they had not stopped is added to it.
        """
        began_s = time.perf_counter()
        with self._loop.around_save(iteration):
            yield
            if folder is not None:
                self._loop.after_save(iteration, Path(folder))
        hooks.saved(iteration, time.perf_counter() - began_s)


@contextlib.contextmanager
def session(model: Sequence[torch.nn.Module] | torch.nn.Module, optimizer: Any) -> Iterator[Session]:
    """Balance a model in a loop of your own; see the module. A collective call of all ranks.

    Without `--smartmoe` or another flag that asks for something, the calls do nothing. At the end of the block, unless
    an exception ends it, the summary is printed and a trace is written.

    Args:
        model: Megatron's model, wrapped or not: a list of chunks, or one module.
        optimizer: Megatron's (`get_megatron_optimizer`).

    Raises:
        CompatError: `enable()` was not called, Megatron's arguments are not set, or the model's MoE layers are not this
            project's (see `moe_spec`).
    """
    door_of_process = door.current()
    if door_of_process is None:
        raise CompatError(
            "megatron_smartmoe.session(): megatron_smartmoe.enable() was not called. Call it at the top of the script."
        )
    from megatron.training import get_args

    from megatron_smartmoe.adapter.run import Run

    try:
        args = get_args()
    except AssertionError as error:
        raise CompatError(
            "megatron_smartmoe.session(): Megatron's arguments = not set. Call initialize_megatron() before."
        ) from error
    if not hasattr(args, "iteration"):
        args.iteration = 0  # which Megatron sets when it builds the model
    loop = hooks.listen(door_of_process.callbacks_of_session())
    chunks = list(model) if isinstance(model, Sequence) else [model]
    if door_of_process.is_asked:
        loop.start(Run.of(chunks, optimizer))
    yield Session(loop, int(args.iteration))
    if door_of_process.is_asked:
        hooks.end()
