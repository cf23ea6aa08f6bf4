"""Keeps an exponential moving average of a model's weights, to be evaluated and saved instead.

The average over many iterations is often better than the weights of the last iteration, especially
while the learning rate is high (Polyak and Juditsky, 1992). Mean Teacher (arXiv 1703.01780) uses
the same average.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..class_names import class_names_of, name_classes
from .distributed import undistributed

logger = logging.getLogger(__name__)

TRAINED, COUNT = "trained_weights", "num_averaged"
"""Keys that a checkpoint of an averaged model contains in addition to the averaged weights."""


class WeightAverage(AveragedModel):
    """A resumable AveragedModel of torch that averages over fewer iterations at the start.

    Batch statistics are averaged as well. ``module`` is the averaged model. It has the class and
    the training mode of the trained model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the trained model, which is copied; not wrapped in DistributedDataParallel.
            decay: share of the previous average in the new one, in [0, 1). The first iterations use
                a lower value, (1 + n) / (10 + n) after n iterations, so that the influence of the
                initial weights fades quickly.
        """
        super().__init__(model, use_buffers=True)
        self._decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Adds the weights of an iteration to the average. The first weights become the average.

        Args:
            model: the trained model; may be wrapped in DistributedDataParallel.
        """
        count = int(self.n_averaged)  # on the CPU, so reading it does not synchronise
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self._decay, (1 + count) / (10 + count)))
        super().update_parameters(model)

    def start(self, model: nn.Module) -> None:
        """Starts a new average from the weights in ``module``, and copies them to the model."""
        inner = undistributed(model)
        inner.load_state_dict(self.module.state_dict())
        name_classes(inner, class_names_of(self.module))
        self.n_averaged.zero_()

    def trained(self, model: nn.Module) -> dict[str, Any]:
        """Returns the state that a resumed run needs in addition to the averaged weights."""
        return {TRAINED: undistributed(model).state_dict(), COUNT: int(self.n_averaged)}


def resume_average(average: WeightAverage | None, model: nn.Module, state: dict[str, Any]) -> None:
    """Restores the weights being trained after a checkpoint's averaged weights were loaded.

    Args:
        average: the run's average, into which the checkpoint's weights were loaded. None if the run
            has no average; in this case, the weights were loaded into the model.
        model: the trained model.
        state: the trainer's state in the checkpoint. It has no entries from ``trained()`` if the
            run that wrote the checkpoint had no average.
    """
    has_average = TRAINED in state
    if average:
        average.start(model)
    if has_average:
        undistributed(model).load_state_dict(state[TRAINED])
    if average and has_average:
        average.n_averaged.fill_(state[COUNT])
    elif average:
        logger.warning("the checkpoint has no averaged weights: a new average starts here")
    elif has_average:
        logger.warning("SOLVER.EMA_DECAY is 0: the checkpoint's averaged weights are dropped")
