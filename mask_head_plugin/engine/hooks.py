"""Trainer hooks that let a killed run resume as if it had never been interrupted."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm, events

from ..checkpoint import MaskHeadCheckpointer
from ..checkpoint.checkpointer import write_run_file
from ..checkpoint.run_folder import BEST_CHECKPOINT, FINISHED_ITERATION, remove_old_checkpoints
from ..config_check.chosen_metrics import BEST, improves, is_validation_loss
from ..data import TrainLoader, seed_generators

logger = logging.getLogger(__name__)

SMOOTHING_WINDOW = 20
"""Iterations over which detectron2's writers smooth a scalar."""


class StepSeed(hooks.HookBase):
    """Seeds the generators for proposals, RoIs and dropout by iteration and rank."""

    def before_step(self) -> None:
        seed_generators(self.trainer.seed, self.trainer.iter, comm.get_rank())


class PreciseBN(hooks.PreciseBN):
    """A PreciseBN whose batches depend on the iteration, not on the number of earlier updates."""

    def update_stats(self) -> None:
        if not self._disabled and isinstance(self._data_loader, TrainLoader):
            self._data_loader.go_to(self.trainer.seed, self.trainer.iter)
            self._data_iter = None
        super().update_stats()


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """A PeriodicCheckpointer that keeps only the newest checkpoints, even if a run is resumed."""

    def __init__(self, checkpointer: MaskHeadCheckpointer, period: int, keep_last: int) -> None:
        """
        Args:
            checkpointer: writes the files.
            period: iterations between checkpoints.
            keep_last: number of checkpoints to keep in addition to ``model_final``; 0 keeps all.
        """
        super().__init__(checkpointer, period)
        self._keep_last = keep_last

    def after_step(self) -> None:
        super().after_step()
        if self._keep_last and (self.trainer.iter + 1) % self.period == 0:
            remove_old_checkpoints(Path(self.checkpointer.save_dir), self._keep_last)


class BestCheckpointer(hooks.HookBase):
    """Keeps the weights with the best evaluation as ``model_best.pth``, even if a run is resumed.

    ``model_best.json`` records the metric, its value and the iteration.
    """

    def __init__(self, checkpointer: MaskHeadCheckpointer, metric: str) -> None:
        """
        Args:
            checkpointer: writes the file.
            metric: a name in ``metrics.json``, such as ``segm/AP``. chosen_metrics.improves defines
                which values are better.
        """
        self._checkpointer, self._metric = checkpointer, metric
        self._record = Path(checkpointer.save_dir) / f"{BEST_CHECKPOINT}.json"
        self._best: float | None = None
        self._last_seen, self._has_warned = -1, False

    def before_train(self) -> None:
        # Evaluations before the checkpoint's iteration were considered before the interruption.
        self._last_seen = self.trainer.start_iter - 2
        if self.trainer.start_iter > 0 and self._record.is_file():
            try:
                best = json.loads(self._record.read_text(encoding="utf-8"))
                if best["metric"] == self._metric:
                    self._best = float(best["value"])
                else:
                    told = "%s has a value of %s: the next evaluation counts as the best %s so far"
                    logger.warning(told, self._record, best["metric"], self._metric)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                logger.warning(
                    "%s is damaged (%s): the next evaluation counts as the best so far",
                    self._record,
                    error,
                )

    def after_step(self) -> None:
        self._check()

    def after_train(self) -> None:
        self._check()

    def _check(self) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            if not self._has_warned:
                self._has_warned = warn_of_missing_metric(BEST, self._metric, self.trainer)
            return
        value, iteration = latest[self._metric]
        if iteration <= self._last_seen:
            return
        self._last_seen = iteration
        if math.isnan(value):
            told = "%s %r is not a number at iteration %d: these weights cannot be the best"
            logger.warning(told, BEST, self._metric, iteration)
        if not improves(self._metric, value, self._best):
            return
        self._best = value
        found = {"metric": self._metric, "value": value, "iteration": iteration}
        self._checkpointer.save_weights(BEST_CHECKPOINT, best=found)
        write_run_file(self._record, json.dumps(found))
        logger.info("best %s so far: %.3f at iteration %d", self._metric, value, iteration)


def warn_of_missing_metric(key: str, metric: str, trainer: Any) -> bool:
    """Warns that an evaluation did not compute the metric chosen by a config key.

    Returns:
        Whether a warning was logged. None is logged if there has been no evaluation yet.
    """
    names = list(flatten_results_dict(getattr(trainer, "_last_eval_results", None) or {}))
    if names:
        told = "%s %r is not a metric of this evaluation; choose from %s"
        logger.warning(told, key, metric, ", ".join(names))
    return bool(names)


class MetricPrinter(events.CommonMetricPrinter):
    """A CommonMetricPrinter that omits the losses of TEST.EVAL_LOSS.

    detectron2's printer would print medians of them. This one also prints nothing at the end of a
    run that was stopped early.
    """

    def write(self) -> None:
        storage = events.get_event_storage()
        _, last_step = storage.latest().get("total_loss", (0, storage.iter))
        if last_step < storage.iter:
            return
        histories = storage.histories()
        hidden = {name: histories.pop(name) for name in list(histories) if is_validation_loss(name)}
        try:
            super().write()
        finally:
            histories.update(hidden)


class JSONWriter(events.JSONWriter):
    """A JSONWriter that continues the file of an interrupted run."""

    def __init__(self, json_file: Path) -> None:
        super().__init__(str(json_file), SMOOTHING_WINDOW)
        self._path = json_file

    def go_on(self, start_iter: int, *, is_finished: bool) -> None:
        """Removes the lines from ``start_iter`` on, and any line cut off when a process was killed.

        Args:
            start_iter: the first iteration that will be logged again.
            is_finished: whether the run has finished training, so that only its last evaluation is
                repeated. If not, an evaluation at ``start_iter``, which ended a shorter run, is
                kept.
        """
        last = -1
        kept: list[bytes] = []
        with self._path.open("rb") as file:
            for line in file:
                entry = _entry(line)
                if entry is None:  # cut off by the last or an earlier interruption
                    continue
                if entry["iteration"] > start_iter:
                    break
                if entry["iteration"] == start_iter and (is_finished or "total_loss" in entry):
                    break
                kept.append(line)
                last = max(last, min(entry["iteration"], start_iter - 1))
        self._file_handle.close()
        write_run_file(self._path, lambda file: file.writelines(kept))
        self._file_handle: IO[str] = self._path.open("a")
        self._last_write = last


class TensorboardXWriter(events.TensorboardXWriter):
    """A TensorboardXWriter that hides points from after the checkpoint that a run resumes from."""

    def go_on(self, start_iter: int, **_: bool) -> None:
        """Makes TensorBoard discard points from ``start_iter`` on."""
        self._writer_args["purge_step"] = start_iter
        self._last_write = start_iter - 1


class Resume(hooks.HookBase):
    """Continues a run from its checkpoint. Register it after the trainer's other hooks.

    A checkpoint is written before the evaluation of the same iteration, so that no training is lost
    if the evaluation fails. The file ``finished_iteration`` contains the iteration of the newest
    checkpoint whose evaluation and logging also finished. If the run resumes from a later
    checkpoint, the evaluation and logging of that checkpoint are done first. Everything logged
    after the checkpoint is removed, because it will be logged again. If an evaluation ends a run
    early, its iteration is not recorded in the file. If this run is resumed, it therefore repeats
    the evaluation and ends again.
    """

    def __init__(self, others: Sequence[hooks.HookBase]) -> None:
        """
        Args:
            others: the trainer's hooks. The evaluation and all hooks that follow it run after the
                checkpoint is written. Only the main process has a checkpointer and writers.
        """
        evaluations = [k for k, x in enumerate(others) if isinstance(x, hooks.EvalHook)]
        self._after_checkpoint = list(others[min(evaluations, default=len(others)) :])
        writers = [y for x in others if isinstance(x, hooks.PeriodicWriter) for y in x._writers]
        self._files = [x for x in writers if isinstance(x, JSONWriter | TensorboardXWriter)]
        checkpointers = (x for x in others if isinstance(x, hooks.PeriodicCheckpointer))
        self._checkpointer = next(checkpointers, None)
        if self._checkpointer:
            self._mark = Path(self._checkpointer.checkpointer.save_dir) / FINISHED_ITERATION

    def before_train(self) -> None:
        trainer, last = self.trainer, self.trainer.start_iter - 1
        is_done = comm.all_gather(last < 0 or self._finished_iteration() == last)[0]
        for writer in self._files:
            is_finished = trainer.start_iter >= trainer.max_iter
            writer.go_on(last + 1 if is_done else last, is_finished=is_finished)
        if last < 0:
            if self._checkpointer:
                self._mark.unlink(missing_ok=True)  # left by another run
            return
        for name, scalar in trainer.restored_scalars.items():
            for value, iteration in scalar["values"]:
                trainer.storage.put_scalar(
                    name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration
                )
        trainer.iter = trainer.storage.iter = last
        if not is_done:
            for hook in self._after_checkpoint:
                hook.after_step()
            self.after_step()

    def after_step(self) -> None:
        if self.trainer.is_stopped:
            return
        if self._checkpointer and (self.trainer.iter + 1) % self._checkpointer.period == 0:
            for writer in self._files:  # before the iteration is recorded as finished
                writer.write()
            self._note_finished(self.trainer.iter)

    def after_train(self) -> None:
        is_finished = self.trainer.iter >= self.trainer.max_iter and not self.trainer.is_stopped
        if self._checkpointer and is_finished:
            self._note_finished(self.trainer.max_iter - 1)

    def _note_finished(self, iteration: int) -> None:
        write_run_file(self._mark, str(iteration))

    def _finished_iteration(self) -> int:
        """Returns the recorded iteration.

        Returns -1 if no iteration is recorded, or if this is not the main process.
        """
        try:
            return int(self._mark.read_bytes()) if self._checkpointer else -1
        except (OSError, ValueError):
            return -1


def scalar_state(storage: events.EventStorage) -> dict[str, dict[str, Any]]:
    """Returns the logged scalars that writers may still need, to be stored in a checkpoint."""
    hints = storage.smoothing_hints()
    return {
        name: {
            "values": [list(x) for x in history.values()[-SMOOTHING_WINDOW:]],
            "smoothed": hints[name],
        }
        for name, history in storage.histories().items()
    }


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parses a line of metrics.json; returns None if the line is incomplete."""
    try:
        entry = json.loads(line)
        is_whole = line.endswith(b"\n") and isinstance(entry["iteration"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if is_whole else None
