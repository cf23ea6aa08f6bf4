"""Ends a run when a metric stops improving (SOLVER.EARLY_STOPPING).

``early_stopping.json`` records the metric of each evaluation by iteration. All decisions depend
only on this file, and a repeated evaluation replaces its entry. A resumed run therefore ends at the
same iteration as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..checkpoint import MaskHeadCheckpointer
from ..checkpoint.checkpointer import write_run_file
from ..checkpoint.run_folder import EARLY_STOPPING
from ..config_check.chosen_metrics import STOPPING, improves
from .hooks import warn_of_missing_metric

logger = logging.getLogger(__name__)


class StoppedEarly(BaseException):
    """Ends a trainer's loop. It is a BaseException, so ``except Exception`` does not catch it."""


class EarlyStopping(HookBase):
    """Ends a run after ``patience`` evaluations in a row without a better value of a metric.

    The run then writes ``model_final.pth``, as if this had been its last iteration.
    """

    def __init__(
        self,
        checkpointer: MaskHeadCheckpointer,
        evaluation: hooks.EvalHook,
        metric: str,
        patience: int,
    ) -> None:
        """
        Args:
            checkpointer: writes the final weights, in the main process.
            evaluation: the hook that computes the metric. It must be registered before this hook.
            metric: a name in ``metrics.json``. chosen_metrics.improves defines which values are
                better.
            patience: number of evaluations; at least 1.
        """
        self._checkpointer, self._evaluation = checkpointer, evaluation
        self._metric, self._patience = metric, patience
        self._record = Path(checkpointer.save_dir) / EARLY_STOPPING
        self._values: dict[int, float] = {}
        self._has_warned = False

    def before_train(self) -> None:
        """Reads the evaluations that a resumed run made before its checkpoint was written.

        Includes the iteration after the checkpoint: if the run was stopped early and is now
        extended, the evaluation that stopped it was recorded there.
        """
        start = self.trainer.start_iter
        if comm.is_main_process() and start > 0 and self._record.is_file():
            try:
                known = json.loads(self._record.read_text(encoding="utf-8"))
                if known["metric"] == self._metric:
                    values = {int(k): float(value) for k, value in known["values"]}
                    self._values = {k: value for k, value in values.items() if k <= start}
                else:
                    told = "%s has values of %s: PATIENCE for %s counts from the next evaluation"
                    logger.warning(told, self._record, known["metric"], self._metric)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                told = "%s is damaged (%s): PATIENCE counts from the next evaluation"
                logger.warning(told, self._record, error)

    def after_step(self) -> None:
        trainer = self.trainer
        period = self._evaluation._period
        is_evaluated = period > 0 and (trainer.iter + 1) % period == 0
        if not is_evaluated or trainer.iter + 1 == trainer.max_iter:
            return
        # Only the main process has the metrics.
        if comm.all_gather(comm.is_main_process() and self._is_over())[0]:
            self._end()

    def _is_over(self) -> bool:
        """Records the metric of this iteration and returns whether patience has run out."""
        latest, iteration = self.trainer.storage.latest(), self.trainer.iter
        value, noted_at = latest.get(self._metric, (None, -1))
        if value is None or noted_at != iteration:
            if not self._has_warned:
                self._has_warned = warn_of_missing_metric(STOPPING, self._metric, self.trainer)
            return False
        self._values[iteration] = value
        content = {"metric": self._metric, "values": sorted(self._values.items())}
        write_run_file(self._record, json.dumps(content))
        best, best_at, waited = None, iteration, 0
        for k, each in sorted(self._values.items()):
            if k > iteration:
                break
            if improves(self._metric, each, best):
                best, best_at, waited = each, k, 0
            else:
                waited += 1
        if waited < self._patience:
            return False
        told = "a number" if best is None else f"better than {best:.4f} (iteration {best_at})"
        logger.info(
            "ending this run after iteration %d: in the last %d evaluation%s, %s was not %s",
            *(iteration, waited, "s" * (waited > 1), self._metric, told),
        )
        return True

    def _end(self) -> None:
        trainer = self.trainer
        trainer.max_iter, trainer.is_stopped = trainer.iter + 1, True
        self._evaluation._eval_after_train = False  # these weights were evaluated just now
        self._checkpointer.save("model_final", iteration=trainer.iter)
