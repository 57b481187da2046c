"""Without the launcher: rank 0 rehearses before process groups form, and the other ranks wait for its word.

They meet in the store that torch.distributed's own start uses (torchrun's, or rank 0's): nothing else exists yet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_smartmoe.errors import EXIT_CONFIG_ERROR, ConfigError

_WORD, _READ = "word", "read"
_GO, _STOP = "go", "stop"
_LONGEST = timedelta(days=1)  # an index of a very large dataset takes hours; torchrun ends ranks that wait in vain
_GRACE_S = 10.0  # that rank 0, whose store it may be, waits for the others to read a refusal
_stores: list[dist.Store] = []  # kept: when rank 0 hosts the store, it ends with the object


def rank_0_first(rehearsal: Callable[[], None]) -> None:
    """Do the rehearsal on rank 0; the other ranks return when it has passed.

    Raises:
        ConfigError: on rank 0: what the rehearsal found.
        SystemExit: on other ranks, when rank 0 found something.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        rehearsal()
        return
    store = dist.PrefixStore("smartmoe rehearsal", next(iter(dist.rendezvous("env://")))[0])
    _stores.append(store)
    if rank != 0:
        _wait_for_word(store)
        return
    try:
        rehearsal()
    except BaseException as error:
        store.set(_WORD, _STOP)
        if isinstance(error, ConfigError):
            _wait_until_read(store, world_size - 1)
        raise
    store.set(_WORD, _GO)


def _wait_for_word(store: dist.Store) -> None:
    try:
        store.wait([_WORD], _LONGEST)
        word = store.get(_WORD).decode()
        store.add(_READ, 1)
    except RuntimeError:  # rank 0, which hosts the store, has ended
        word = _STOP
    if word == _STOP:
        raise SystemExit(EXIT_CONFIG_ERROR)


def _wait_until_read(store: dist.Store, others: int) -> None:
    deadline = time.monotonic() + _GRACE_S
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < deadline and store.add(_READ, 0) < others:
            time.sleep(0.05)
