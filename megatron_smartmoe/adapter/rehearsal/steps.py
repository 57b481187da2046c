"""What a rank goes through from its flags to its first micro-batch, a step at a time, in one process without ranks.

Each step is Megatron's own code, called as `megatron.training.pretrain` calls it. Left out is what writes to other
places (TensorBoard, W&B, signal handlers) and what says nothing about the run (initial weights).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_smartmoe.adapter.flags.ignored_options import remarks
from megatron_smartmoe.adapter.flags.parser import parse
from megatron_smartmoe.adapter.moe.own_experts import declare_grouped
from megatron_smartmoe.adapter.rehearsal.request import Attempt, DataReport, Failure, Report, Request
from megatron_smartmoe.errors import ConfigError, SmartMoEError

SPLITS = ("train", "validation", "test")
_MOCK_SAMPLES = 1000  # of mock data, of which every sample is as good as another
_MOST_STATEMENTS = 12  # of a traceback, from its innermost end


class Rehearsal:
    """One way through the steps. A process has one: Megatron's state is global."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._args: Namespace
        self._report = Report()

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """The steps by name, in their order."""
        return [
            ("flags", self._read_flags),
            ("tokenizer", self._read_tokenizer),
            ("learning-rate schedule", self._walk_learning_rates),
            ("batch sizes", self._walk_batch_sizes),
            ("process groups", self._form_groups),
            ("datasets", self._read_data),
            ("model", self._build_stages),
            ("memory", self._predict_memory),
        ]

    def attempt(self, last: int | None = None) -> Attempt:
        """Go through the steps, to the one with number `last`; the first error ends it."""
        printed = io.StringIO()
        for number, (name, step) in enumerate(self.steps()[: None if last is None else last + 1]):
            try:
                with contextlib.redirect_stdout(printed):
                    step()
            except (Exception, SystemExit) as error:
                return Attempt(report=self._report, failure=_failure(name, number, error, printed.getvalue()))
        return Attempt(report=self._report)

    def _read_flags(self) -> None:
        """Megatron's parser, validation, and the model's configuration with its post-initialization."""
        from megatron.training.argument_utils import core_transformer_config_from_args
        from megatron.training.arguments import validate_args
        from megatron.training.global_vars import set_global_variables

        request = self._request
        os.environ["WORLD_SIZE"], os.environ["RANK"] = str(request.world_size), "0"
        os.environ["LOCAL_WORLD_SIZE"] = str(request.ranks_per_node)
        args = parse(request.argv)
        if args.use_checkpoint_args:
            from megatron.training.checkpointing import load_args_from_checkpoint

            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        for remark in remarks(args):
            self._note(remark)
        validate_args(args, {})
        declare_grouped(args)
        core_transformer_config_from_args(args)
        _leave_the_world_alone(args)
        set_global_variables(args, build_tokenizer=False)
        self._args = args

    def _read_tokenizer(self) -> None:
        """The tokenizer, and with it the size of the embedding."""
        from megatron.training.argument_utils import gpt_config_from_args
        from megatron.training.global_vars import rebuild_tokenizer
        from megatron.training.vocab_utils import calculate_padded_vocab_size

        if self._request.data_exists:
            rebuild_tokenizer(self._args)
        elif self._args.padded_vocab_size is None:
            args = self._args
            args.padded_vocab_size = calculate_padded_vocab_size(
                self._request.vocabulary, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
            )
        gpt_config_from_args(self._args).finalize()

    def _walk_learning_rates(self) -> None:
        """The optimizer's schedule, from its first step to its last."""
        from megatron_smartmoe.adapter import hooks

        args = self._args
        if args.skip_train:
            return
        group: dict[str, Any] = {
            "lr": args.lr,
            "max_lr": args.lr,
            "min_lr": args.min_lr,
            "wd_mult": 1.0,
            "lr_mult": 1.0,
        }
        schedule = hooks.loop_module().get_optimizer_param_scheduler(SimpleNamespace(param_groups=[group]))
        total = args.train_samples or args.train_iters * args.global_batch_size
        for _ in range(4):
            schedule.step(increment=max(1, total // 4))

    def _walk_batch_sizes(self) -> None:
        """The batch size of every iteration to the end of the run."""
        from megatron.core.num_microbatches_calculator import (
            get_current_global_batch_size,
            get_num_microbatches,
            update_num_microbatches,
        )

        args = self._args
        consumed = 0
        for iteration in itertools.count():
            if args.train_samples and consumed >= args.train_samples:
                break
            if not args.train_samples and iteration >= (args.train_iters or 0):
                break
            update_num_microbatches(consumed, consistency_check=True)
            if get_num_microbatches() < 1:
                raise AssertionError(f"the batch of iteration {iteration + 1} holds no micro-batch")
            if args.step_batch_size_schedule is None:
                break  # all others are the same
            consumed += get_current_global_batch_size()
        update_num_microbatches(0, consistency_check=False)

    def _form_groups(self) -> None:
        """Process groups as rank 0 has them."""
        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.rehearsal.groups import become_rank, use_fake_groups

        hooks.prepare_megatron(cpu=True)
        use_fake_groups()
        become_rank(self._args, 0)

    def _read_data(self) -> None:
        """The datasets with as many samples as the run asks for, and its first micro-batch."""
        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.datasets import train_valid_test_datasets_provider

        args = self._args
        if not self._request.data_exists:
            self._note("The corpus is still to be prepared: datasets and tokenizer were not read.")
            return
        built: list[tuple[Any, int | None]] = []

        def provider(num_samples: list[int | None], vp_stage: int | None = None) -> Any:
            few = [min(number or 0, _MOCK_SAMPLES) for number in num_samples] if args.mock_data else num_samples
            datasets = train_valid_test_datasets_provider(few, vp_stage)  # type: ignore[arg-type]
            built[:] = zip(datasets, num_samples, strict=True)
            return datasets

        provider.is_distributed = True  # type: ignore[attr-defined]
        with self._index_place():
            train, _, _ = hooks.loop_module().build_train_valid_test_data_iterators(provider)
        reports = [
            DataReport(split=split, asked=asked, epoch=_epoch_samples(dataset))
            for split, (dataset, asked) in zip(SPLITS, built, strict=True)
            if dataset is not None
        ]
        self._report = replace(self._report, data=tuple(reports))
        _check_evaluation(args)
        if train is not None and not args.mock_data:
            next(train)  # the first micro-batch can be read

    @contextlib.contextmanager
    def _index_place(self) -> Any:
        """Where Megatron's index of the dataset is written: nowhere that stays, when nothing is to be started."""
        if self._request.keep_index or self._args.mock_data:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="smartmoe-rehearsal-") as folder:
            kept, self._args.data_cache_path = self._args.data_cache_path, self._args.data_cache_path or folder
            yield
            self._args.data_cache_path = kept

    def _build_stages(self) -> None:
        """The model of every kind of pipeline stage, with one micro-batch forward and backward."""
        args = self._args
        if args.spec is not None or args.hybrid_layer_pattern:
            self._note("A model from --spec or --hybrid-layer-pattern is not rehearsed.")
            return
        from megatron_smartmoe.adapter import hooks
        from megatron_smartmoe.adapter.rehearsal.model import Stages

        hooks.keep_views()
        stages = Stages(args)
        for rank, alike in list(stages.distinct()):
            found = stages.build_and_run(rank, alike)
            self._report = replace(self._report, stages=(*self._report.stages, found))
        for note in stages.notes:
            self._note(note)

    def _predict_memory(self) -> None:
        """The fullest rank's memory, as the planner predicts it."""
        from megatron_smartmoe.adapter.cost_inputs import launch_of_run, machine, model_of_run
        from megatron_smartmoe.cost.memory.budget import memory_budget
        from megatron_smartmoe.planner.load import LoadModel, scenarios_from_model
        from megatron_smartmoe.planner.pricing import Pricing

        args = self._args
        if args.num_experts is None:
            self._note("The planner predicts memory of models with experts only.")
            return
        if args.smartmoe_cluster is None and not self._request.cpu:
            self._note("The memory of a rank is predicted when --smartmoe-cluster names the machine.")
            return
        try:
            cluster, spec = machine(args), launch_of_run(args)
            model = replace(model_of_run(args), vocab=args.padded_vocab_size)
            pricing = Pricing(model, cluster, LoadModel(scenarios_from_model(model)))
            budget, _ = memory_budget(model, spec, cluster.gpu, pricing.hot(spec))
        except SmartMoEError as error:
            self._note(f"The planner has no prediction of a rank's memory: {error}")
            return
        self._report = replace(self._report, memory=tuple(budget.parts()))

    def _note(self, text: str) -> None:
        self._report = replace(self._report, notes=(*self._report.notes, text))


def _leave_the_world_alone(args: Namespace) -> None:
    """Switch off what a rank starts or writes for other programs, and what would read values that are not there."""
    values: dict[str, Any] = {
        "tensorboard_dir": None,
        "wandb_project": "",
        "enable_one_logger": False,
        "exit_signal_handler": False,
        "exit_signal_handler_for_training": False,
        "async_save": False,
        "flight_recorder_dump_path": None,
        "error_injection_rate": 0,
        "rerun_mode": "disabled",
        "check_for_nan_in_loss_and_grad": False,
        "check_for_spiky_loss": False,
        "perform_initialization": False,
        "adlr_autoresume": False,
        "num_workers": 0,
        "dataloader_type": args.dataloader_type,
        "iteration": 0,
    }
    for name, value in values.items():
        setattr(args, name, value)


def _epoch_samples(dataset: Any) -> int | None:
    """Samples of one pass over the data of a dataset, which may be a blend."""
    if isinstance(dataset, list):
        return _sum([_epoch_samples(part) for part in dataset])
    if hasattr(dataset, "datasets"):
        return _sum([_epoch_samples(part) for part in dataset.datasets])
    tokens = getattr(dataset, "_get_num_tokens_per_epoch", None)
    if tokens is None or "Mock" in type(dataset).__name__:
        return None
    return int(tokens()) // int(dataset.config.sequence_length)


def _sum(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _check_evaluation(args: Namespace) -> None:
    """An evaluation that is asked for has data."""
    if args.full_validation or not args.eval_iters or args.do_valid:
        return
    rule = f"leaves no samples for the validation that --eval-iters {args.eval_iters} asks for"
    way_out = "Pass a --split with a second number, for example 99,1,0, or --eval-iters 0."
    raise ConfigError("--split", args.split, rule, way_out)


def _failure(step: str, number: int, error: BaseException, printed: str) -> Failure:
    """An exception as data."""
    frames = traceback.extract_tb(error.__traceback__)[::-1][:_MOST_STATEMENTS]
    text = "".join(traceback.format_exception(error))
    refusal = None
    if isinstance(error, ConfigError):
        refusal = error
    return Failure(
        step=step,
        number=number,
        kind=type(error).__name__,
        message=_message(error, frames, printed),
        statements=tuple(_statement(frame) for frame in frames),
        place=_place(frames),
        details=f"{text}\n--- printed before it, without Megatron's list of arguments\n{_without_arguments(printed)}",
        refusal=refusal,
        is_limit=_is_limit(error, text),
    )


def _message(error: BaseException, frames: list[traceback.FrameSummary], printed: str) -> str:
    """What Megatron or torch said: the exception's text, else the last printed line, else the assertion itself."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if isinstance(error, SystemExit):
        return lines[-1] if lines else "exit"
    said = " ".join(str(error).split())
    return said if said else (frames[0].line or type(error).__name__ if frames else type(error).__name__)


def _without_arguments(printed: str) -> str:
    """What was printed, without values of arguments, some of which are secrets."""
    return "\n".join(line for line in printed.splitlines() if not re.match(r"  \w+ \.{3,} ", line))


def _place(frames: list[traceback.FrameSummary]) -> str:
    """`file:line` of the innermost line that is Megatron's, for who wants to read it."""
    inside = [frame for frame in frames if "/megatron/" in frame.filename] or frames
    return f"{Path(inside[0].filename).name}:{inside[0].lineno}" if inside else ""


def _statement(frame: traceback.FrameSummary) -> str:
    """All lines of the statement, where Python knows them."""
    return " ".join((frame.line or "").split())


def _is_limit(error: BaseException, text: str) -> bool:
    """Whether this says something about tensors without data, and nothing about the run."""
    module = type(error).__module__
    if module.startswith("torch._subclasses") or module.startswith("torch.fx"):
        return True
    return isinstance(error, NotImplementedError) and ("'Meta'" in text or "fake" in text.lower())


def rehearse_here(request: Request, last: int | None = None) -> Attempt:
    """Go through the steps in this process, which is of no further use then."""
    torch.set_num_threads(1)
    if not request.cpu:
        from megatron_smartmoe.adapter.cpu.devices import replace as replace_in

        replace_in(torch.cuda, get_device_capability=lambda device=None: request.capability)
    sys.argv[1:] = list(request.argv)
    return Rehearsal(request).attempt(last)
