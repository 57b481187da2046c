"""One training run as this project's callbacks see it: computed once, when model and optimizer exist."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_smartmoe.adapter.moe.routers import all_layer_numbers, moe_layers
from megatron_smartmoe.adapter.run_files import append_line


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the process groups that experts are spread over.

    Attributes:
        rank: in the whole job.
        ep_rank, ep_size: expert parallelism: each rank has other experts.
        edp_rank, edp_size: expert data parallelism: each rank has the same experts and other tokens.
        etp_rank: expert tensor parallelism: each rank has a part of every expert.
        pp_rank: pipeline stage.
    """

    rank: int
    ep_rank: int
    ep_size: int
    edp_rank: int
    edp_size: int
    etp_rank: int
    pp_rank: int

    @classmethod
    def of_this_process(cls) -> Ranks:
        """Read them from Megatron's process groups."""
        return cls(
            rank=torch.distributed.get_rank(),
            ep_rank=mpu.get_expert_model_parallel_rank(),
            ep_size=mpu.get_expert_model_parallel_world_size(),
            edp_rank=mpu.get_expert_data_parallel_rank(),
            edp_size=mpu.get_expert_data_parallel_world_size(),
            etp_rank=mpu.get_expert_tensor_parallel_rank(),
            pp_rank=mpu.get_pipeline_model_parallel_rank(),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the callbacks of a run share.

    Attributes:
        args: Megatron's arguments, after validation. Megatron goes on writing to them while it trains.
        model_chunks: this rank's model chunks, wrapped as Megatron's loop has them.
        chunks: the same chunks without the wrappers.
        optimizer: Megatron's.
        ranks: this process's place in the process groups.
        layers: (number, layer) of each MoE layer on this rank. Numbers count all layers of the model, from 0.
        layer_numbers: the numbers of all MoE layers of the model, on whichever pipeline stage they are, ascending.
        directory: where the run's files go, or None for nowhere.
        incomplete: files that could not be written, or lack lines.
    """

    args: Namespace
    model_chunks: Sequence[torch.nn.Module]
    chunks: Sequence[torch.nn.Module]
    optimizer: Any
    ranks: Ranks
    layers: tuple[tuple[int, MoELayer], ...]
    layer_numbers: tuple[int, ...]
    directory: Path | None
    incomplete: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, model_chunks: Sequence[torch.nn.Module], optimizer: Any) -> Run:
        """The run with this model and optimizer. A collective call of all ranks."""
        args, chunks = get_args(), unwrap_model(list(model_chunks))
        layers = tuple(moe_layers(chunks))
        numbers = all_layer_numbers([number for number, _ in layers]) if args.num_experts is not None else []
        return cls(
            args=args,
            model_chunks=model_chunks,
            chunks=chunks,
            optimizer=optimizer,
            ranks=Ranks.of_this_process(),
            layers=layers,
            layer_numbers=tuple(numbers),
            directory=Path(args.smartmoe_run_dir) if args.smartmoe_run_dir else None,
        )

    @property
    def is_reporter(self) -> bool:
        """Whether this is rank 0, which prints for all ranks."""
        return self.ranks.rank == 0

    @property
    def loaded_folder(self) -> Path | None:
        """Folder of the checkpoint that this run continues from; None for a run that began with iteration 1."""
        args, folder = self.args, getattr(self.args, "smartmoe_loaded_folder", None)
        return Path(folder) if folder is not None and args.iteration and not args.finetune else None

    @property
    def num_layers(self) -> int:
        """All layers of the model that may have experts, prediction blocks (MTP) included."""
        return int(self.args.num_layers + (self.args.mtp_num_layers or 0))

    def append(self, name: str, line: str) -> None:
        """Append a line to one of the run's files, where the run writes any. Each file is written by one rank.

        A full disk costs lines and not the training: what was written of a line is taken back, and one line says so.
        """
        if self.directory is not None:
            path = self.directory / name
            self.attempt(path, functools.partial(append_line, path, line))

    def attempt(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file that training can do without; if that fails, the first time, one line says so."""
        try:
            write()
        except OSError as error:
            if path not in self.incomplete:
                self.incomplete.add(path)
                text = f"{path} cannot be written: {error.strerror}; training continues, and it is incomplete"
                print(f" smartmoe: WARNING: {text}", flush=True)
