"""Ends a run after Ctrl-C without losing iterations, and says how to continue it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import MaskHeadCheckpointer
from ..checkpoint.run_folder import checkpoint_files

NOTICE = b"stopping after this iteration, with a checkpoint; press Ctrl-C again to stop at once\n"


class Interrupted(KeyboardInterrupt):
    """Ends a training after Ctrl-C. The message is one line: iteration and newest checkpoint.

    Attributes:
        can_resume: whether there may be a checkpoint to resume from.
    """

    def __init__(self, told: str = "interrupted", *, can_resume: bool = True) -> None:
        super().__init__(told)
        self.can_resume = can_resume

    def advice(self) -> str:
        """Returns the command line of this process, with ``--resume`` if it can be resumed."""
        script, *arguments = sys.argv
        if self.can_resume and "--resume" not in arguments:
            arguments.insert(0, "--resume")
        command = shlex.join([sys.orig_argv[0], script, *arguments])
        return f"{'continue' if self.can_resume else 'start again'} with: {command}"


class Interruption(HookBase):
    """Lets a run finish the current iteration after Ctrl-C and save a checkpoint.

    An evaluation ends at once, because a resumed run continues it. A second Ctrl-C also ends the
    run at once; the iterations since its newest checkpoint are then lost. So they are if the run
    has several processes: their launcher ends them.

    The checkpoint does not change the resumed run: its iteration is not recorded in
    ``finished_iteration``, so evaluation and logging of that iteration are done or repeated (see
    hooks.Resume). Register this hook last.
    """

    def __init__(self, checkpointer: MaskHeadCheckpointer, period: int) -> None:
        """
        Args:
            checkpointer: writes the file.
            period: SOLVER.CHECKPOINT_PERIOD, in iterations.
        """
        self._checkpointer, self._period = checkpointer, period
        self._is_requested = self._ends_at_once = False
        self._process = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Handles Ctrl-C inside the block, unless the user's program has its own handler.

        Raises:
            Interrupted: after Ctrl-C.
        """
        self._is_requested, self._process = False, os.getpid()
        is_ours = (
            comm.get_world_size() == 1
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if is_ours:
            signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        except KeyboardInterrupt:
            raise self._describe() from None
        finally:
            if is_ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets Ctrl-C end the block, an evaluation, which does not change the weights."""
        self._ends_at_once = True
        try:
            if self._is_requested:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            self._ends_at_once = False

    def after_step(self) -> None:
        if self._is_requested:
            self._save()
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader, whose batch may be needed to end the iteration
        if self._is_requested or self._ends_at_once:
            raise KeyboardInterrupt
        self._is_requested = True
        os.write(2, NOTICE)  # unlike print, safe in a signal handler

    def _save(self) -> None:
        """Saves a checkpoint of the last completed iteration unless the run has saved one."""
        done = self.trainer.iter + 1
        is_saved = done >= self.trainer.max_iter or done % self._period == 0
        if comm.get_world_size() == 1 and not is_saved:
            self._checkpointer.save(f"model_{done - 1:07d}", iteration=done - 1)

    def _describe(self) -> Interrupted:
        newest = next(iter(checkpoint_files(Path(self._checkpointer.save_dir))), None)
        due = min(self._period, self.trainer.max_iter)
        told = newest or f"none yet (the first is due at iteration {due})"
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        return Interrupted(
            f"interrupted at iteration {iteration}; newest checkpoint: {told}",
            can_resume=newest is not None,
        )
