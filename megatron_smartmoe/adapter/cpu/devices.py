"""Facade group 1: questions about the device, its memory, its streams and its random state.

On a CPU work happens in program order and in one memory, so each has one exact answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import types
from collections import defaultdict
from collections.abc import Iterator

import psutil
import torch

CPU = torch.device("cpu")


def replace(owner: object, **values: object) -> None:
    """Replace attributes of a torch module or class by the facade's."""
    for name, value in values.items():
        setattr(owner, name, value)


def install() -> None:
    """Install all replacements of this group."""
    _device_queries()
    _memory_statistics()
    _streams_and_events()
    _nvtx()
    _random_state()


def _device_queries() -> None:
    """Megatron passes `current_device()` on as `device=`; a torch.device is as good there as an index.

    `device_count` is one per rank of this node, because Megatron builds its process groups only if it is positive.
    `is_available` stays False: torch and other libraries need the truth (the data loader would pin memory).
    """
    properties = types.SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count(), total_memory=psutil.virtual_memory().total
    )
    replace(
        torch.cuda,
        current_device=lambda: CPU,
        device_count=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        get_device_capability=lambda device=None: (0, 0),
        get_device_name=lambda device=None: "cpu",
        get_device_properties=lambda device=None: properties,
        _lazy_init=lambda: None,
        _lazy_call=lambda callable, **kwargs: callable(),
    )


def _memory_statistics() -> None:
    """The memory that a rank holds is its resident set; allocated and reserved are the same without an allocator."""
    process = psutil.Process()

    def resident_bytes(device: object = None) -> int:
        return int(process.memory_info().rss)

    peak_bytes = 0

    def max_resident_bytes(device: object = None) -> int:
        nonlocal peak_bytes
        peak_bytes = max(peak_bytes, resident_bytes())
        return peak_bytes

    def statistics(device: object = None) -> dict[str, int]:
        return defaultdict(int)

    replace(
        torch.cuda,
        memory_allocated=resident_bytes,
        memory_reserved=resident_bytes,
        max_memory_allocated=max_resident_bytes,
        max_memory_reserved=max_resident_bytes,
        memory_stats=statistics,
        device_memory_used=resident_bytes,
        reset_peak_memory_stats=lambda device=None: None,
        mem_get_info=lambda device=None: (psutil.virtual_memory().available, psutil.virtual_memory().total),
    )
    replace(torch.cuda.memory, memory_stats=statistics)


class Event:
    """A point in program order: it has passed as soon as it was recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self._recorded_s = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always reached."""
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`, as torch.cuda.Event."""
        return (end_event._recorded_s - self._recorded_s) * 1e3


class Stream:
    """The one stream of a CPU: program order. It is always idle when someone asks."""

    device = CPU
    cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return 0, 0

    def __new__(cls, *args: object, **kwargs: object) -> Stream:
        """Return the only instance."""
        return _THE_STREAM

    def wait_stream(self, stream: object) -> None:
        """Program order already holds."""

    def wait_event(self, event: object) -> None:
        """Program order already holds."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record and return `event`, or a new one."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always idle."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


_THE_STREAM: Stream = object.__new__(Stream)


def _streams_and_events() -> None:
    """Side streams exist to overlap work; in program order the overlap is empty and the result the same."""
    replace(
        torch.cuda,
        Stream=Stream,
        Event=Event,
        current_stream=lambda device=None: _THE_STREAM,
        default_stream=lambda device=None: _THE_STREAM,
        set_stream=lambda stream: None,
        is_current_stream_capturing=lambda: False,
        stream=lambda stream: contextlib.nullcontext(stream),
    )
    replace(torch.Tensor, record_stream=lambda self, stream: None)


def _nvtx() -> None:
    """Profiler marks for a profiler that cannot be there."""
    replace(
        torch.cuda.nvtx,
        range_push=lambda *args, **kwargs: None,
        range_pop=lambda *args, **kwargs: None,
        range=lambda *args, **kwargs: contextlib.nullcontext(),
    )


class _Generators:
    """`torch.cuda.default_generators`, of which Megatron takes item [index]."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[torch.Generator]:
        return iter((torch.default_generator,))


def _random_state() -> None:
    """The "cuda" generator is the CPU generator, so Megatron's RNG tracker forks and restores the real one."""
    generator = torch.default_generator

    def set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    answers = {
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        # torch.manual_seed calls this after seeding the CPU generator itself
        "manual_seed_all": lambda seed: None,
        "initial_seed": lambda: generator.initial_seed(),
    }
    replace(torch.cuda, **answers, default_generators=_Generators())
    replace(torch.cuda.random, **answers)
    # The tracker warns when the CPU state moves inside a fork, which is what a fork is for here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
