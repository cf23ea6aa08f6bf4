"""Calls that leave no trace in this process: no cached tensor, no random number drawn."""

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
"""A lock that another thread held when the process was copied stays locked in the copy."""


class ChildError(RuntimeError):
    """A call that did not return, or returned what cannot be sent."""


def call_in_child(call: Callable[[], T]) -> T:
    """Makes a call in a copy of this process and returns its result.

    The copy is made by fork(), as workers of a data loader are, so it starts at once and knows
    everything that is registered here, but cannot use CUDA. Where fork() is unreliable (macOS,
    Windows) or fails, the call is made in this process, and only the random generators of Python,
    NumPy and PyTorch are restored.

    Args:
        call: must return something that can be pickled, and raise no errors.

    Raises:
        ChildError: if the copy ended, or did not answer within MOST_SECONDS.
    """
    for stream in (sys.stdout, sys.stderr):  # or the copy would print it again
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
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # SIGCHLD is ignored
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _fork() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    with warnings.catch_warnings(), contextlib.suppress(OSError):
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, if there are threads
        return os.fork()
    return None


def _answer(call: Callable[[], Any], sender: Connection) -> NoReturn:
    """Sends the result or error, and ends the process without running exit handlers."""
    try:
        gc.freeze()  # the copy must not finalize objects of the other process
        torch.set_num_threads(1)  # OpenMP would wait forever for threads that were not copied
        sender.send((call(), None))
    except BaseException as error:  # also SystemExit
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
