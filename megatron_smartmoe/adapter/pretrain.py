"""The entry: `torchrun -m megatron_smartmoe.adapter.pretrain [any Megatron flag...]`.

Megatron's own training loop, from the installed wheel, with this project's layer spec, data and forward step. The
order matters: where there is no GPU the facade has to be there before Megatron is imported, so imports of Megatron
live inside the functions. torch_dist checkpoints start a helper process that imports this module again: importing it
does nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smartmoe.adapter import log_filters
from megatron_smartmoe.adapter.allocator import keep_pages
from megatron_smartmoe.adapter.device import choose_device, refuse_old_megatron
from megatron_smartmoe.adapter.flags.parser import (
    device_from,
    has_apex,
    has_transformer_engine,
    machine_defaults,
    parse,
)
from megatron_smartmoe.adapter.launch import run_dir
from megatron_smartmoe.adapter.launch.batch_job import save_on_sigterm
from megatron_smartmoe.adapter.launch.run_lock import LOCKED_VARIABLE, RunLock
from megatron_smartmoe.adapter.launch.secrets import secrets_among
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.adapter.starting import starting
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError, SmartMoEError
from megatron_smartmoe.spec.secrets import MASK

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.hooks import Callback


def main(argv: Sequence[str] | None = None, callbacks: Iterable[Callback] = ()) -> None:
    """Train. One call per process; ranks and rendezvous come from torchrun's environment.

    Args:
        argv: flags; None for those of this process.
        callbacks: further ones, besides those that the flags ask for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    is_rank_0 = int(os.environ.get("RANK", "0")) == 0
    given = list(argv)
    try:
        with starting():
            cpu = choose_device(device_from(argv))
            refuse_old_megatron()
            if cpu:
                keep_pages(os.environ)
            argv = with_defaults(given, cpu=cpu, say=is_rank_0)
            args = check_flags(argv, cpu=cpu)
        if args.smartmoe and not cpu:
            _try_ops()
        if args.exit_signal_handler:
            save_on_sigterm(args.exit_signal)
        lock = _lock(args) if is_rank_0 else contextlib.nullcontext()
        rehearse_once(args, given, argv[: len(argv) - len(given)], cpu=cpu)
    except SmartMoEError as error:
        if isinstance(error, ConfigError) and error.field in given:
            error = error.set_by("command line")
        if is_rank_0:
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        note_exception(error)
        raise SystemExit(EXIT_CONFIG_ERROR) from None
    try:
        with lock:
            train(argv, cpu=cpu, callbacks=callbacks)
    except Exception as error:
        note_exception(error)
        raise


def _try_ops() -> None:
    """Call a compiled op on this rank's GPU.

    Raises:
        CompatError: it cannot run there.
    """
    import torch

    from megatron_smartmoe.adapter.gpus import refuse_unusable_ops

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    refuse_unusable_ops(torch.device("cuda", local_rank % torch.cuda.device_count()))


def note_exception(error: Exception) -> None:
    """Leave an exception where the parent of this rank looks for it (torchrun names a file)."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _lock(args: Namespace) -> AbstractContextManager[object]:
    """The lock of the run directory, which the launcher holds where there is one.

    Raises:
        ConfigError: another run uses the directory, or it cannot be written.
    """
    if args.smartmoe_run_dir is None or LOCKED_VARIABLE in os.environ:
        return contextlib.nullcontext()
    run_dir.make(Path(args.smartmoe_run_dir))
    lock = RunLock.acquire(Path(args.smartmoe_run_dir))
    if lock.taken_over is not None:
        print(f"smartmoe: {lock.taken_over}", flush=True)
    return lock


def with_defaults(argv: Sequence[str], *, cpu: bool, say: bool) -> list[str]:
    """The flags with the defaults of machine and run in front, where any later flag beats them; printed if `say`."""
    from megatron_smartmoe.adapter.flags.run_defaults import run_defaults

    defaults = machine_defaults(cpu=cpu, transformer_engine=has_transformer_engine(), apex=has_apex())
    defaults += run_defaults(argv)
    if say:
        for default in defaults:
            print(f"smartmoe: default {' '.join(default.flags)}   ({default.reason})", flush=True)
    return [flag for default in defaults for flag in default.flags] + list(argv)


def check_flags(argv: Sequence[str], *, cpu: bool, data_exists: bool = True) -> Namespace:
    """Parse and check the flags before any process group forms.

    Raises:
        ConfigError: see `megatron_checks.check`.
    """
    from megatron_smartmoe.adapter.flags.megatron_checks import check_args

    args = parse(argv)
    check_args(args, cpu=cpu, data_exists=data_exists)
    return args


def rehearse_once(args: Namespace, tokens: Sequence[str], defaults: Sequence[str], *, cpu: bool) -> None:
    """Rehearse the run on rank 0 before process groups form, unless the launcher has done it.

    Raises:
        ConfigError: on rank 0: what would stop the ranks. Other ranks exit.
    """
    from megatron_smartmoe.adapter.flags.start_checks import start_lines
    from megatron_smartmoe.adapter.rehearsal.lines import lines_of
    from megatron_smartmoe.adapter.rehearsal.rehearse import ALREADY, digest_of, rehearse
    from megatron_smartmoe.adapter.rehearsal.request import Request
    from megatron_smartmoe.adapter.rehearsal.word import rank_0_first

    if args.smartmoe_rehearsal == "off" or os.environ.get(ALREADY) == digest_of(list(tokens)):
        return
    request = Request(
        defaults=tuple(defaults),
        tokens=tuple(tokens),
        world_size=args.world_size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        cpu=cpu,
        capability=device_capability(cpu=cpu),
    )

    def rehearsal() -> None:
        for line in (*start_lines(args), *lines_of(rehearse(request))):
            print(f"smartmoe: {line}", flush=True)

    rank_0_first(rehearsal)


def device_capability(*, cpu: bool) -> tuple[int, int]:
    """Compute capability of the GPUs; (0, 0) without one."""
    import torch

    return (0, 0) if cpu else torch.cuda.get_device_capability()


def train(argv: Sequence[str], *, cpu: bool, callbacks: Iterable[Callback] = ()) -> None:
    """Parse, attach the callbacks to Megatron's loop, and run it.

    Args:
        argv: flags with this machine's defaults, checked.
        cpu: whether the CPU facade is in use.
        callbacks: further ones, besides those that the flags ask for.
    """
    with starting():
        import torch
        from megatron.core.enums import ModelType
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_smartmoe.adapter import door
        from megatron_smartmoe.adapter.batch import embedding_ranks, forward_step
        from megatron_smartmoe.adapter.datasets import train_valid_test_datasets_provider
        from megatron_smartmoe.adapter.hooks import loop_module

        door.open_door(cpu=cpu, is_own_entry=True, callbacks=callbacks)
        args = megatron_args(argv)
        from megatron_smartmoe.adapter.moe.wide_norms import model_config_of

    loop_module().pretrain(
        pretrain_cfg_container_from_args(args, model_config_of(args)),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )
    torch.distributed.destroy_process_group()


def megatron_args(argv: Sequence[str]) -> Namespace:
    """Megatron's arguments, parsed, validated and set globally. Its 900 lines of output go to arguments.txt.

    Raises:
        SystemExit: Megatron refuses the flags (the reason is printed on rank 0).
    """
    from megatron.training.arguments import parse_and_validate_args

    sys.argv[1:] = list(argv)
    args = parse(argv)
    log_filters.set_log_level(args.logging_level)
    directory = args.smartmoe_run_dir
    with _stdout_to(Path(directory) / "arguments.txt" if directory else None, secrets=secrets_among(argv)):
        validated: Namespace = parse_and_validate_args()
    return validated


@contextlib.contextmanager
def _stdout_to(path: Path | None, secrets: Sequence[str]) -> Iterator[None]:
    if path is None or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        content = text.getvalue()
        for secret in secrets:
            content = content.replace(secret, MASK)
        write_text(path, content)
    print(f"smartmoe: all of Megatron's arguments are in {path}", flush=True)


if __name__ == "__main__":
    main()
