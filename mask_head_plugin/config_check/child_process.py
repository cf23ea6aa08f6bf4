"""Calls functions in a copy of this process, so that they cannot affect the original."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

T = TypeVar("T")

MOST_SECONDS = 60.0
"""Time limit of a call. The copy may hang, because locks of other threads stay locked in it."""


class ChildError(RuntimeError):
    """A call did not return, or its result could not be sent."""


def call_in_child(call: Callable[[], T]) -> T:
    """Makes a call in a copy of this process and returns its result.

    The copy is made with fork(), like the workers of a data loader. It therefore starts quickly and
    has everything that is registered in this process, but it cannot use CUDA. Where fork() is
    unreliable (macOS, Windows) or fails, the call is made in this process. In that case, only the
    random generators of Python, NumPy and PyTorch are restored afterwards.

    Args:
        call: a function whose result can be pickled and that does not raise errors.

    Raises:
        ChildError: if the copy ended, failed, or returned nothing within MOST_SECONDS.
    """
    for stream in (sys.stdout, sys.stderr):  # otherwise the copy would print buffered text again
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        child = _fork()
        if child == 0:
            _answer(call, sender)
        if child is None:
            with _generators_kept():
                return call()
        sender.close()
        try:
            return _received(receiver)
        finally:
            # If SIGCHLD is ignored, the process may already be gone.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _fork() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    with warnings.catch_warnings(), contextlib.suppress(OSError):
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about threads
        return os.fork()
    return None


def _answer(call: Callable[[], Any], sender: Connection) -> NoReturn:
    """Sends the result or error and ends the process without running exit handlers."""
    try:
        gc.freeze()  # the copy must not finalize objects of the original process
        torch.set_num_threads(1)  # OpenMP would wait forever for threads that were not copied
        sender.send((call(), None))
    except BaseException as error:  # includes SystemExit
        sender.send((None, f"{type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def _received(receiver: Connection) -> Any:
    if not receiver.poll(MOST_SECONDS):
        raise ChildError(f"it was not built within {MOST_SECONDS:g} s")
    try:
        result, error = receiver.recv()
    except EOFError as ended:
        raise ChildError("the process that built it ended") from ended
    if error:
        raise ChildError(error)
    return result


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
