"""Run a function over items in processes and hand the results back in the items' order.

Processes are spawned by default, not forked: the parent may hold threads (tqdm, torch) that a fork would tear. A caller
without such threads may fork: then function and items are inherited, with all that they refer to, and nothing is
pickled or loaded again but the results. The executor is `concurrent.futures`, which notices a worker that was killed;
`multiprocessing.Pool` would wait for it for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from megatron_smartmoe.errors import ConfigError

# Items in flight per worker: enough that none waits for the parent, few enough that memory stays bounded.
IN_FLIGHT_PER_WORKER = 4

_function: Callable[[Any], Any]


def ordered_map[T, R](
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int | None,
    items_per_worker: int = 2,
    in_flight_per_worker: int = IN_FLIGHT_PER_WORKER,
    start: Literal["spawn", "fork"] = "spawn",
    flag: str = "--workers",
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, in order, whatever the number of workers. Closing it ends them at once.

    Args:
        function: sent once to each worker; picklable, unless workers are forked.
        items: picklable.
        workers: processes at most, None for one per CPU; with one, everything runs in this process.
        items_per_worker: starting a process pays off for this many items.
        in_flight_per_worker: a worker is at most this many items ahead of the oldest one that is not done.
        start: how processes start, see the module.
        flag: what the user sets the number of workers with, for errors.

    Raises:
        ConfigError: a worker was killed (most often for memory).
    """
    workers = min(workers or num_cpus(), len(items) // items_per_worker)
    if workers <= 1:
        yield from map(function, items)
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context(start), initializer=_start_worker, initargs=(function,)
    )
    try:
        yield from _in_order(executor, items, in_flight_per_worker * workers)
    except BrokenProcessPool as error:
        rule = "a worker process was killed, most likely for memory"
        raise ConfigError(flag, workers, rule, f"Pass {flag} {max(1, workers // 2)}.") from error
    except BaseException:  # an error, Ctrl-C, or nobody wants the rest: what still runs is in vain
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order[T](executor: ProcessPoolExecutor, items: Sequence[T], in_flight: int) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    for item in items:
        pending.append(executor.submit(_call, item))
        if len(pending) >= in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, so they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
