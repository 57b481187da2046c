"""The door: how this project gets into a training process, ours or anybody else's.

    import megatron_smartmoe
    megatron_smartmoe.enable()

at the top of a script that trains with Megatron-LM puts a `Door` at the places where every such script comes by: the
parser, the validation of the flags, `initialize_megatron`, and `pretrain`. There it adds the `--smartmoe-*` flags,
checks them, chooses what layers are built from, attaches the callbacks, and ends them. Our own entry
(`adapter/pretrain.py`) opens the same door.

In somebody else's script nothing happens that was not asked for: without `--smartmoe` (or a `--smartmoe-*` flag that
writes a file) Megatron's loop, modules and optimizer are its own.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smartmoe.adapter.device import choose_device
from megatron_smartmoe.adapter.flags.parser import device_from
from megatron_smartmoe.adapter.flags.smartmoe_arguments import add_smartmoe_arguments
from megatron_smartmoe.adapter.moe.own_experts import declare_grouped, gemm_line, has_own_experts
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, CompatError, ConfigError, SmartMoEError

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.hooks import Callback

_MEGATRON = "megatron.training"


class Door:
    """One process's way into Megatron's training.

    Args:
        cpu: whether the CPU facade is in use.
        is_own_entry: whether the script is this project's own, which has checked the flags and set the defaults.
        callbacks: further ones, besides those that the flags ask for.

    Attributes:
        is_asked: whether the flags ask for anything; known when they are validated.
    """

    def __init__(self, *, cpu: bool, is_own_entry: bool, callbacks: Iterable[Callback] = ()) -> None:
        self.cpu, self.is_own_entry, self.callbacks = cpu, is_own_entry, tuple(callbacks)
        self._overlap_degree: Any = None
        self._wanted: list[Callback] = []  # what the flags ask for
        self.is_asked = False
        self._has_said = False
        self._held = ExitStack()  # the lock of the run directory, to the end of the process

    # --- What `hooks.open_door` puts around Megatron's functions ---------------------------------------------------

    def around_add_arguments(self, add_megatron_arguments: Callable[..., Any]) -> Callable[..., Any]:
        """Around the function that adds Megatron's flags to a parser: add the project's."""

        @functools.wraps(add_megatron_arguments)
        def add(parser: ArgumentParser) -> ArgumentParser:
            from megatron_smartmoe.adapter.flags.script_flags import set_machine_defaults

            parser = add_smartmoe_arguments(add_megatron_arguments(parser))
            if not self.is_own_entry:
                lines = set_machine_defaults(parser, cpu=self.cpu)
                self._say(lines)
            return parser

        return add

    def around_validate(self, validate_args: Callable[..., Any]) -> Callable[..., Any]:
        """Around Megatron's validation: check the project's flags before, prepare what they ask for after."""

        @functools.wraps(validate_args)
        def validate(args: Namespace, *rest: Any, **options: Any) -> Any:
            if not hasattr(args, "smartmoe") or self._overlap_degree is not None:
                return validate_args(args, *rest, **options)
            if not self.is_own_entry:
                self._check(args)
            result = validate_args(args, *rest, **options)
            self._prepare(args)
            return result

        return validate

    def around_initialize(self, initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
        """Around the function that forms process groups: attach the callbacks, now that all flags are known."""

        @functools.wraps(initialize_megatron)
        def initialize(*args: Any, **kwargs: Any) -> Any:
            result = initialize_megatron(*args, **kwargs)
            if self.is_asked:
                self._attach()
            return result

        return initialize

    def around_pretrain(self, pretrain: Callable[..., Any]) -> Callable[..., Any]:
        """Around all of the training: end the callbacks."""

        @functools.wraps(pretrain)
        def train(*args: Any, **kwargs: Any) -> Any:
            from megatron_smartmoe.adapter import hooks

            try:
                result = pretrain(*args, **kwargs)
            except CompatError as error:
                _stop(error, is_reporter=int(os.environ.get("LOCAL_RANK", "0")) == 0)
            except BaseException:
                hooks.fail()
                raise
            hooks.end()
            return result

        return train

    # --- The steps -------------------------------------------------------------------------------------------------

    def _say(self, lines: Sequence[str]) -> None:
        """Print lines on rank 0, the first time."""
        if not self._has_said and _is_rank_0():
            for line in lines:
                print(f"smartmoe: {line}", flush=True)
        self._has_said = True

    def _check(self, args: Namespace) -> None:
        from megatron_smartmoe.adapter.flags.script_flags import check_script

        try:
            check_script(args, cpu=self.cpu, subclass_gets_groups=_megatron_is_at_least(0, 18))
        except SmartMoEError as error:
            _stop(error.set_by("command line") if isinstance(error, ConfigError) else error, is_reporter=_is_rank_0())

    def _prepare(self, args: Namespace) -> None:
        """Choose what layers are built from, and mend what training here needs."""
        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.callbacks import callbacks_for
        from megatron_smartmoe.adapter.flags.script_flags import wants
        from megatron_smartmoe.adapter.moe.dispatch_nodes import DispatchNodes
        from megatron_smartmoe.adapter.moe.modules import Modules
        from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree

        declare_grouped(args)
        self._overlap_degree = OverlapDegree(args)
        everywhere = self.is_own_entry and args.spec is None
        nodes = DispatchNodes(args)
        hooks.use_modules(Modules.of(args, self._overlap_degree, everywhere=everywhere, dispatch_nodes=nodes))
        self.is_asked = self.is_own_entry or wants(args)
        if not self.is_asked:
            return
        hooks.prepare_megatron(cpu=self.cpu)
        self._wanted = callbacks_for(args, self._overlap_degree)  # before process groups form: their operations count
        if not self.cpu:
            import torch

            from megatron_smartmoe.adapter.records import flight_recorder
            from megatron_smartmoe.ops.grouped_linear import triton_fault

            flight_recorder.write_to(args.smartmoe_run_dir)
            if has_own_experts(args) and _is_rank_0():
                fault = triton_fault(torch.device("cuda", torch.cuda.current_device()))
                line = gemm_line(
                    torch.cuda.get_device_capability(),
                    args.params_dtype,
                    triton_fault=fault,
                    accumulates=args.gradient_accumulation_fusion,
                )
                print(f"smartmoe: {line}", flush=True)
        if not self.is_own_entry and args.smartmoe_run_dir is not None and _is_rank_0():
            self._hold(Path(args.smartmoe_run_dir))

    def _hold(self, directory: Path) -> None:
        """Make the run directory, and keep other runs out of it."""
        from megatron_smartmoe.adapter.launch import run_dir
        from megatron_smartmoe.adapter.launch.run_lock import RunLock

        try:
            run_dir.make(directory)
            lock = RunLock.acquire(directory)
        except SmartMoEError as error:
            _stop(error, is_reporter=True)
        self._held.enter_context(lock)

    def callbacks_of_session(self) -> list[Callback]:
        """What the flags ask for in a loop that is not Megatron's, which saves by itself."""
        return [*self._wanted, *self.callbacks] if self.is_asked else []

    def _attach(self) -> None:
        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.checkpoint.loading import CheckpointLoads
        from megatron_smartmoe.adapter.checkpoint.saving import CheckpointSaves, SavedDigests

        saves = CheckpointSaves()
        hooks.attach([saves, SavedDigests(saves), *self.callbacks_of_session()])
        hooks.attach_checkpoints(saves, CheckpointLoads())


_door: Door | None = None  # Megatron's names are one per process, and so is what stands at them


def open_door(*, cpu: bool, is_own_entry: bool, callbacks: Iterable[Callback] = ()) -> None:
    """Put a door into this process.

    Raises:
        CompatError: this Megatron lacks a name that has to be hooked.
    """
    global _door
    from megatron_smartmoe.adapter import hooks

    door = Door(cpu=cpu, is_own_entry=is_own_entry, callbacks=callbacks)
    hooks.open_door(door)
    if cpu and not is_own_entry:
        atexit.register(_leave_groups)
    _door = door


def _leave_groups() -> None:
    """Scripts end without it, and on gloo some then end in an abort: its threads outlive the interpreter."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def enable(argv: Sequence[str] | None = None) -> None:
    """Let the script that calls this train with `--smartmoe`; the first thing that it does.

    Adds the `--smartmoe-*` flags to Megatron's parser, and does what they ask for while training. Without such a flag
    nothing changes, but that a machine without a GPU trains on gloo, and that flags which this machine needs (without
    TransformerEngine, for example) become the defaults; a line on rank 0 says which. `sys.argv` is only read.

    A second call does nothing, and neither does a call from a script that a worker process imports again.

    Args:
        argv: where to look for --smartmoe-device, which is needed before Megatron can be imported; None for `sys.argv`.

    Raises:
        CompatError: Megatron was imported before, is not there, or lacks a name that has to be hooked.
        ConfigError: --smartmoe-device has another value than auto, cpu or cuda.
    """
    caller = sys._getframe(1)
    is_imported_by_worker = caller.f_globals.get("__name__") == "__mp_main__" and caller.f_code.co_name == "<module>"
    if _door is not None or is_imported_by_worker:
        return
    if _MEGATRON in sys.modules:
        raise CompatError(
            "megatron_smartmoe.enable() = called late: megatron.training has been imported, and what was imported from "
            "it by name would not be hooked. Move the call to the top of the script."
        )
    cpu = choose_device(device_from(sys.argv[1:] if argv is None else argv), with_filters=False)
    try:
        importlib.import_module(f"{_MEGATRON}.training")
    except ImportError as error:
        raise CompatError(
            f"megatron_smartmoe.enable(): import megatron.training = {type(error).__name__}: {error}. Start the script "
            "from a checkout of Megatron-LM, put one on PYTHONPATH, or pip install megatron-core."
        ) from error
    open_door(cpu=cpu, is_own_entry=False)


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the `--smartmoe-*` flags to a parser that does not come from Megatron; once, a second call does nothing.

    Returns:
        The parser, so that this can be Megatron's `extra_args_provider`.
    """
    return add_smartmoe_arguments(parser)


def moe_spec(spec: Any) -> Any:
    """The spec of a MoE layer with this project's layer, for models that do not ask Megatron for theirs.

    Args:
        spec: `partial(MoELayer, submodules=...)`, or `ModuleSpec(module=MoELayer, submodules=...)` as up to 0.17; the
            class may be a subclass of MoELayer that overrides nothing between the layer's input and its output.

    Returns:
        A spec of the same kind; `spec` itself without `--smartmoe`. Passing it twice is the same as once.

    Raises:
        CompatError: `enable()` was not called, the flags are not parsed yet, or this layer cannot be stood for; the
            message names the method, the router or the experts.
    """
    from megatron_smartmoe.adapter import hooks

    modules = hooks.modules_in_use()
    if modules is None:
        raise CompatError(
            "megatron_smartmoe.moe_spec(): called before Megatron's flags were validated, so that --smartmoe is not "
            "known. Call megatron_smartmoe.enable() at the top of the script, and this while the model is built."
        )
    return modules.moe_spec(spec)


def current() -> Door | None:
    """The door of this process, if there is one."""
    return _door


def is_open() -> bool:
    """Whether this process has a door."""
    return _door is not None


def _stop(error: Exception, *, is_reporter: bool) -> Any:
    """End this rank with the error in one line.

    Raises:
        SystemExit: always.
    """
    if is_reporter:
        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CONFIG_ERROR) from None


def _is_rank_0() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _megatron_is_at_least(major: int, minor: int) -> bool:
    from megatron.core import package_info

    return (int(package_info.MAJOR), int(package_info.MINOR)) >= (major, minor)
