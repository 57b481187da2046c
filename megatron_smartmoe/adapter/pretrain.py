"""The entry: `torchrun -m megatron_smartmoe.adapter.pretrain [any Megatron flag...]`.

Megatron's own training loop, from the installed wheel, with this project's layer spec, data and forward step. The
order matters: where there is no GPU the facade has to be there before Megatron is imported, so imports of Megatron
live inside the functions. torch_dist checkpoints start a helper process that imports this module again: importing it
does nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_smartmoe.adapter import log_filters
from megatron_smartmoe.adapter.flags.parser import (
    device_from,
    has_apex,
    has_transformer_engine,
    machine_defaults,
    parse,
)
from megatron_smartmoe.adapter.flags.smartmoe_arguments import add_smartmoe_arguments
from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, CompatError, SmartMoEError

if TYPE_CHECKING:
    from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
    from megatron_smartmoe.adapter.records.metrics import Recorder
    from megatron_smartmoe.adapter.records.trace import TraceRecorder


def main(argv: Sequence[str] | None = None) -> None:
    """Train. One call per process; ranks and rendezvous come from torchrun's environment."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_rank_0 = int(os.environ.get("RANK", "0")) == 0
    try:
        cpu = choose_device(device_from(argv))
        argv = with_defaults(argv, cpu=cpu, say=is_rank_0)
        check_flags(argv, cpu=cpu)
    except SmartMoEError as error:
        if is_rank_0:
            print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CONFIG_ERROR) from None
    train(argv, cpu=cpu)


def choose_device(asked: str) -> bool:
    """Load the CPU facade when there is no GPU, or when asked. Returns whether this run is on the CPU.

    Raises:
        CompatError: a GPU was asked for and there is none.
    """
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: nothing below may see the GPU
    log_filters.install()
    import torch

    if torch.cuda.is_available():
        return False
    if asked == "cuda":
        raise CompatError(
            "--smartmoe-device cuda: torch sees no CUDA device here. Leave the flag out to train on the CPU."
        )
    from megatron_smartmoe.adapter import cpu

    cpu.install()
    return True


def with_defaults(argv: Sequence[str], *, cpu: bool, say: bool) -> list[str]:
    """The flags with this machine's defaults in front, where any later flag beats them; printed if `say`."""
    defaults = machine_defaults(cpu=cpu, transformer_engine=has_transformer_engine(), apex=has_apex())
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


def train(argv: Sequence[str], *, cpu: bool) -> None:
    """Parse for good, hook into Megatron's loop, run it, and say how it went."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from megatron_smartmoe.adapter.batch import forward_step
    from megatron_smartmoe.adapter.datasets import train_valid_test_datasets_provider
    from megatron_smartmoe.adapter.embeddings import embedding_ranks
    from megatron_smartmoe.adapter.hooks import prepare_megatron
    from megatron_smartmoe.adapter.moe.layer_spec import install_prediction_blocks, spec_for
    from megatron_smartmoe.adapter.moe.overlap_degree import OverlapDegree
    from megatron_smartmoe.adapter.records.metrics import Recorder

    prepare_megatron(cpu=cpu)
    args = parse_for_good(argv)
    run_dir = Path(args.smartmoe_run_dir) if args.smartmoe_run_dir else None
    recorder = Recorder(run_dir)
    overlap_degree = OverlapDegree(args)
    trace_recorder = listen(args, recorder, overlap_degree)
    model_config = gpt_config_from_args(args)
    if args.spec is None:
        install_prediction_blocks()
        model_config.transformer_layer_spec = spec_for(args, overlap_degree)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )
    if trace_recorder is not None:
        trace_recorder.flush()
    report(recorder, get_args(), run_dir)
    torch.distributed.destroy_process_group()


def listen(args: Namespace, recorder: Recorder, overlap_degree: OverlapDegree) -> TraceRecorder | None:
    """Hook everything that the flags ask for into Megatron's loop; returns the trace's recorder, if there is one."""
    from megatron_smartmoe.adapter.flags.pool_settings import modes_of
    from megatron_smartmoe.adapter.loops.homes import Balancer
    from megatron_smartmoe.adapter.loops.pool import PoolLoop
    from megatron_smartmoe.adapter.loops.replicas import ReplicaLoop
    from megatron_smartmoe.adapter.records.replay import RoutingReplay
    from megatron_smartmoe.adapter.records.trace import TraceRecorder

    if args.smartmoe_replay_trace is not None:  # first: the others count what it forces
        RoutingReplay(Path(args.smartmoe_replay_trace)).listen()
    recorder.listen()
    balancer = replicas = None
    if args.smartmoe and args.smartmoe_homes != "off" and args.expert_model_parallel_size > 1:
        balancer = Balancer(recorder.run_dir)
        balancer.listen()
    if args.smartmoe and (modes := modes_of(args)) != {"off"}:
        replicas = ReplicaLoop(recorder.run_dir, modes)
        replicas.listen()
    if args.smartmoe_pool is not None:  # after the loops whose settings it changes
        PoolLoop(recorder.run_dir, balancer, replicas, overlap_degree).listen()
    if args.smartmoe_record_trace is None:
        return None
    trace_recorder = TraceRecorder(Path(args.smartmoe_record_trace))
    trace_recorder.listen()
    return trace_recorder


def parse_for_good(argv: Sequence[str]) -> Namespace:
    """Let Megatron parse, validate and set its global variables. Its 900 lines of arguments go to arguments.txt.

    Raises:
        SystemExit: Megatron refuses the flags (the reason is printed on rank 0).
    """
    from megatron.training.arguments import parse_and_validate_args

    sys.argv[1:] = list(argv)
    args = parse(argv)
    log_filters.lower_voice(args.logging_level)
    run_dir = args.smartmoe_run_dir
    with _stdout_to(Path(run_dir) / "arguments.txt" if run_dir else None):
        return parse_and_validate_args(extra_args_provider=add_smartmoe_arguments)


@contextlib.contextmanager
def _stdout_to(path: Path | None) -> Iterator[None]:
    if path is None or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield
    print(f"smartmoe: all of Megatron's arguments are in {path}", flush=True)


def report(recorder: Recorder, args: Namespace, run_dir: Path | None) -> None:
    """Print the summary on rank 0 and write summary.json."""
    from megatron_smartmoe.adapter.records import summary

    gathered = recorder.gather()
    if args.rank == 0:
        content = summary.summarise(gathered, args)
        print(summary.render(content, args, run_dir), flush=True)
        if run_dir is not None:
            summary.write(content, run_dir)
        if marker := os.environ.get("SMARTMOE_TO_BE_CONTINUED"):
            Path(marker).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
