"""What runs where a rank's files are written: in the rank, or in a process in the background.

It imports little: it may be a new process.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_smartmoe.adapter.orphans import forked_beside_rank


def copying_in_background(preload: Callable[..., Any]) -> Callable[..., Any]:
    """Around what brings tensors to the host: in a process of its own, tensors that are there already are copied.

    Such a process shares their memory with the rank, which waits for this call and then goes on to change them.
    """

    @functools.wraps(preload)
    def copied(*args: Any, **kwargs: Any) -> Any:
        buckets = preload(*args, **kwargs)
        if multiprocessing.parent_process() is None or not multiprocessing.current_process().daemon:
            return buckets  # a synchronous save, in the rank itself
        forked_beside_rank()
        return [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in buckets
        ]

    return copied


def results_queue(start: Callable[..., Any], *, cpu: bool) -> Callable[..., Any]:
    """Around what makes the queue that writers put their results in.

    Megatron starts a process for it on every rank, which imports torch (seconds, half a GB) and outlives a rank that is
    killed. Only a writer in another process needs one, and on CPU ranks it is forked.
    """
    own: queue.Queue[Any] = queue.Queue()
    managers: list[SyncManager] = []  # one at most; a manager ends when it is forgotten

    @functools.wraps(start)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if not get_args().async_save:
            return own
        if not cpu:
            return start(*args, **kwargs)
        if not managers:
            managers.append(SyncManager(ctx=multiprocessing.get_context("fork")))
            managers[0].start(forked_beside_rank)
        return managers[0].Queue()

    return chosen
