"""An exponential moving average of a model's weights, which is evaluated and saved in its place.

An average over many steps is often better than the last step's weights, above all while the
learning rate is high (Polyak and Juditsky, 1992; as in Mean Teacher, arXiv 1703.01780).
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
"""What a checkpoint holds for an average in addition to the averaged weights."""


class WeightAverage(AveragedModel):
    """torch's AveragedModel with a shorter average at first, which a run can be resumed with.

    Batch statistics are also averaged. ``module`` is the averaged model, of the same class as the
    trained one and in the same training mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: copied; not in DistributedDataParallel.
            decay: share of the average that a step keeps, from 0 to below 1. It is lower in the
                first steps, (1 + n) / (10 + n) after n, so that the initial weights are soon
                forgotten.
        """
        super().__init__(model, use_buffers=True)
        self._decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Adds the weights of a step to the average; the first ones become the average.

        Args:
            model: in DistributedDataParallel or not.
        """
        count = int(self.n_averaged)  # on the CPU, so nothing waits for a device
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self._decay, (1 + count) / (10 + count)))
        super().update_parameters(model)

    def start(self, model: nn.Module) -> None:
        """Starts from the weights loaded into ``module``, and copies them to the trained model."""
        inner = undistributed(model)
        inner.load_state_dict(self.module.state_dict())
        name_classes(inner, class_names_of(self.module))
        self.n_averaged.zero_()

    def trained(self, model: nn.Module) -> dict[str, Any]:
        """Returns what a resumed run needs besides the averaged weights of the checkpoint."""
        return {TRAINED: undistributed(model).state_dict(), COUNT: int(self.n_averaged)}


def resume_average(average: WeightAverage | None, model: nn.Module, state: dict[str, Any]) -> None:
    """Gives a model its own weights after the averaged ones of a checkpoint were loaded.

    Args:
        average: the run's, filled with the checkpoint's weights; None if the run keeps none, in
            which case the model is filled.
        model: the trained one.
        state: the trainer's in the checkpoint; without ``trained()`` if its run had no average.
    """
    has_average = TRAINED in state
    if average:
        average.start(model)
    if has_average:
        undistributed(model).load_state_dict(state[TRAINED])
    if average and has_average:
        average.n_averaged.fill_(state[COUNT])
    elif average:
        logger.warning("the checkpoint has no average of the weights: a new one starts here")
    elif has_average:
        logger.warning("SOLVER.EMA_DECAY is 0: the checkpoint's average of the weights is dropped")
