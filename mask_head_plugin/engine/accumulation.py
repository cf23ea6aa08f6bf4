"""Computes a batch in parts and adds up their gradients, which needs less memory.

The update is the same as without parts if the losses are means over images, like the RPN's losses,
or if all parts have the same number of RoIs. Otherwise, it differs, because all parts have the same
weight, regardless of their number of RoIs. The processes in DistributedDataParallel also have the
same weight. Batch normalization uses the statistics of one part at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import ConfigError
from ..data import seed_generators


class AccumulatingTrainer(SimpleTrainer):
    """A SimpleTrainer that computes the batch of each iteration in parts.

    The hooks' ``after_backward`` is called after each part, so that StepGuard can tell which losses
    are not finite. Processes exchange gradients once per iteration, and the optimizer clips
    gradients after the gradients of all parts are added up.

    Attributes:
        seed: the run's seed. Random numbers depend on seed, iteration, rank and part, so that each
            part can be repeated separately.
        part: number of the part that is being computed, starting from 0.
    """

    def __init__(
        self, model: nn.Module, data_loader: Iterable[Any], optimizer: Optimizer, num_parts: int
    ) -> None:
        """
        Args:
            model: see SimpleTrainer.
            data_loader: yields lists of samples whose lengths are divisible by ``num_parts``.
            optimizer: see SimpleTrainer.
            num_parts: SOLVER.ACCUMULATE_STEPS.
        """
        super().__init__(model, data_loader, optimizer)
        self.num_parts, self.seed, self.part = num_parts, 0, 0

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size, rest = divmod(len(batch), self.num_parts)
        if rest:
            raise ConfigError(
                f"the loader yielded {len(batch)} images, which cannot be divided into SOLVER."
                f"ACCUMULATE_STEPS {self.num_parts} parts"
            )
        means: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for part in range(self.num_parts):
            self.part = part
            seed_generators(self.seed, self.iter, comm.get_rank(), part)
            with self._shared_at_last():
                losses = self._losses(batch[part * size : (part + 1) * size])
                shares = {name: loss / self.num_parts for name, loss in losses.items()}
                total: Any = sum(shares.values())
                self._scaled(total).backward()
            self.after_backward()
            for name, share in shares.items():
                means[name] = means.get(name, 0) + share.detach()
        self._write_metrics(means, data_time)
        self._step()

    def _shared_at_last(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context that exchanges gradients between processes only in the last part."""
        is_parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        if is_parallel and self.part < self.num_parts - 1:
            no_sync: contextlib.AbstractContextManager[None] = self.model.no_sync()
            return no_sync
        return contextlib.nullcontext()

    def _losses(self, samples: list[Any]) -> dict[str, Tensor]:
        losses = self.model(samples)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss

    def _step(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """An AccumulatingTrainer with the mixed precision and loss scaling of AMPTrainer."""

    def _losses(self, samples: list[Any]) -> dict[str, Tensor]:
        with torch.autocast(next(self.model.parameters()).device.type, dtype=self.precision):
            return super()._losses(samples)

    def _scaled(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self.grad_scaler.scale(loss)
        return scaled

    def _step(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def build_inner_trainer(
    model: nn.Module,
    data_loader: Iterable[Any],
    optimizer: Optimizer,
    *,
    amp: bool,
    num_parts: int,
) -> SimpleTrainer:
    """Returns one of detectron2's trainers or, if batches have several parts, of this module's.

    Args:
        model: see SimpleTrainer.
        data_loader: yields batches.
        optimizer: optimizer of the model.
        amp: SOLVER.AMP.ENABLED.
        num_parts: SOLVER.ACCUMULATE_STEPS.
    """
    if num_parts == 1:
        return (AMPTrainer if amp else SimpleTrainer)(model, data_loader, optimizer)
    trainer = AccumulatingAMPTrainer if amp else AccumulatingTrainer
    return trainer(model, data_loader, optimizer, num_parts)
