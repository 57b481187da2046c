"""Child processes: a step that fails, or that sets Megatron's global state, leaves this process as it was."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class ChildDied(Exception):
    """A child ended without an answer; the text says how."""


def in_child[Result](function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a fork of this process, without its output.

    Raises:
        ChildDied: it raised, or was killed.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sending, function, args))
    child.start()
    sending.close()
    try:
        is_answer, content = receiving.recv()
    except EOFError:
        is_answer, content = False, ""
    child.join()
    if not is_answer:
        code = child.exitcode or 0
        raise ChildDied(content or (f"ended by signal {-code}" if code < 0 else f"ended with status {code}"))
    result: Result = content
    return result


def _answer(sending: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.disable()  # a collection would copy every page that it looks at
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        with contextlib.suppress(BrokenPipeError):
            sending.send(answer)
        sending.close()
    os._exit(0)
