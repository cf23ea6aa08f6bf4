"""Stops a run before its weights become NaN or infinite. The error names the images."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..messages import first_line, listed
from .replay import Sample, save_step

FAILED_FOLDER = "failed_steps"
"""Folder in OUTPUT_DIR for the batches of failed training steps."""


LEAST_SCALE = 2.0**-24
"""Smallest loss scale with AMP: the smallest positive float16. A gradient that overflows even at
this scale is genuinely infinite.
"""


class TrainingError(RuntimeError):
    """Ends a run that cannot continue. The message is one line: iteration, images and advice."""


class StepGuard(HookBase):
    """Checks losses and gradients in every iteration, before the weights change.

    Register this hook with the inner trainer (SimpleTrainer, AMPTrainer). It gets the batch and the
    losses from hooks on the model. Its cost is one pass over the gradients. It also synchronises
    with the device, but detectron2 would do so shortly afterwards to read the losses.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        """
        Args:
            model: the trained model; may be wrapped in DistributedDataParallel.
            cfg: the run's config. With SOLVER.AMP, gradients are checked only at the smallest loss
                scale. At larger scales, infinite gradients are normal, because the scaler raises
                the scale until they occur.
        """
        self.seed = 0  # the run's seed; set later, because a resumed run reads it from a checkpoint
        self._model, self._cfg = model, cfg
        # Collected once: iterating over R50-FPN's modules takes longer than checking gradients.
        self._parameters = dict(model.named_parameters())
        self._batch: list[Sample] = []
        self._losses: dict[str, torch.Tensor] = {}
        model.register_forward_pre_hook(self._note_batch)
        model.register_forward_hook(self._note_losses)

    def _note_batch(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self._batch, self._losses = inputs[0] if inputs else [], {}

    def _note_losses(self, model: nn.Module, _: object, losses: Any) -> None:
        # If run_step is a user's, its model may return other types, which are not checked.
        if model.training and isinstance(losses, Mapping | torch.Tensor):
            named = losses if isinstance(losses, Mapping) else {"total_loss": losses}
            self._losses = {
                name: x.detach() for name, x in named.items() if isinstance(x, torch.Tensor)
            }

    def after_backward(self) -> None:
        """Raises TrainingError in all processes if any loss or gradient is not finite."""
        terms = [loss if loss.dim() == 0 else loss.sum() for loss in self._losses.values()]
        scaler = getattr(self.trainer, "grad_scaler", None)
        if scaler is None:
            self._look_at(terms, self._gradients())
        elif self._look_at(terms, {}, scaler) <= LEAST_SCALE:
            self._look_at([], self._gradients())

    def _look_at(
        self, terms: list[torch.Tensor], gradients: dict[str, torch.Tensor], scaler: Any = None
    ) -> float:
        """Raises TrainingError if a loss term or gradient is not finite; synchronises only once.

        Returns:
            The factor by which the scaler multiplies losses, or 1 without a scaler. It is read
            together with the result of the check, because scaler.get_scale() would synchronise
            again.
        """
        if gradients:
            terms = [*terms, torch.nn.utils.get_total_norm(list(gradients.values()))]
        if not terms:
            return 1.0 if scaler is None else float(scaler.get_scale())
        is_bad = (~torch.stack(terms).sum().isfinite()).to(torch.float32)
        factor = torch.ones_like(is_bad)
        answer = torch.stack([is_bad, factor if scaler is None else scaler.scale(factor)])
        if comm.get_world_size() > 1:  # all processes must stop, or the others would wait forever
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
        found, scale = answer.tolist()
        if found:
            self._stop_if_not_finite(gradients)
        return float(scale)

    def _gradients(self) -> dict[str, torch.Tensor]:
        named = self._parameters.items()
        return {name: each.grad for name, each in named if each.grad is not None}

    def _stop_if_not_finite(self, gradients: dict[str, torch.Tensor]) -> None:
        """Raises TrainingError if a loss or any element of a gradient is not finite.

        The norm is not enough, because the norm of large but finite gradients can be infinite.
        """
        values = {name: loss.sum().item() for name, loss in self._losses.items()}
        terms = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
        layers = [name for name, each in gradients.items() if not each.isfinite().all()]
        reports = comm.all_gather((terms, layers, describe_batch(self._batch)))
        guilty = [report for report in reports if report[0]]
        guilty = guilty or [report for report in reports if report[1]]
        if not guilty:
            return
        told = []
        for terms, layers, images in guilty:
            what = ", ".join(terms) or f"gradients are not finite in {listed(layers)}"
            told.append(f"{what}, with the images {images}")
        raise self._diverged("; ".join(told), values)

    def _diverged(self, told: str, losses: dict[str, float]) -> TrainingError:
        path = self._save(losses)
        imports = [text for code in self._cfg.IMPORTS for text in ("--import", code)]
        command = shlex.join(["python", "tools/replay_step.py", str(path), *imports])
        advice = (
            "It often helps to lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
        if self.trainer.iter == 0:  # no step has changed the weights yet
            advice = "At iteration 0, the loss function, the data or MODEL.WEIGHTS is at fault"
        return TrainingError(
            f"iteration {self.trainer.iter}: {told}. The batch, and the weights from before this "
            f"step, are saved; {command} finds the layer. {advice}"
        )

    def _save(self, losses: dict[str, float]) -> Path:
        iteration, rank = self.trainer.iter, comm.get_rank()
        part = getattr(self.trainer, "part", None)  # if batches have parts, see accumulation
        path = Path(self._cfg.OUTPUT_DIR) / FAILED_FOLDER / f"iteration_{iteration}_rank_{rank}.pth"
        seeds = (self.seed, iteration, rank, *([] if part is None else [part]))
        save_step(path, self._model, self._batch, losses, seeds)
        return path

    def explain(self, error: BaseException) -> TrainingError | None:
        """Turns an error about memory or diverged boxes into one that names images and advises.

        Returns:
            The error to raise instead, or None if ``error`` has another cause.
        """
        if isinstance(error, FloatingPointError):  # raised by detectron2's RPN, before the losses
            what = first_line(error).rstrip(".")
            return self._diverged(f"{what}, with the images {describe_batch(self._batch)}", {})
        if not is_out_of_memory(error):
            return None
        heads, images = self._cfg.MODEL.ROI_HEADS, len(self._batch)
        rois = images * heads.BATCH_SIZE_PER_IMAGE
        given = self._cfg.INPUT
        size = f"INPUT.MIN_SIZE_TRAIN (now {tuple(given.MIN_SIZE_TRAIN)})"
        if given.LSJ.ENABLED:
            size = f"INPUT.LSJ.IMAGE_SIZE (now {given.LSJ.IMAGE_SIZE})"
        return TrainingError(
            f"iteration {self.trainer.iter}: out of memory ({first_line(error)}) with the images "
            f"{describe_batch(self._batch)}: {rois} RoIs, up to "
            f"{int(rois * heads.POSITIVE_FRACTION)} of them with masks. Raise "
            f"SOLVER.ACCUMULATE_STEPS (now {self._cfg.SOLVER.ACCUMULATE_STEPS}), or lower "
            f"SOLVER.IMS_PER_BATCH (now {self._cfg.SOLVER.IMS_PER_BATCH}), {size} or "
            f"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE (now {heads.BATCH_SIZE_PER_IMAGE}); on CUDA "
            "SOLVER.AMP.ENABLED True also helps"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that the device or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def describe_batch(batch: list[Sample]) -> str:
    """Describes each image of a batch for messages: file, id, size and number of objects."""
    told = []
    for sample in batch:
        height, width = sample["image"].shape[-2:]
        objects = f", {len(sample['instances'])} objects" if "instances" in sample else ""
        if "pasted_from" in sample:
            objects += f", some from {sample['pasted_from']}"
        told.append(
            f"{sample.get('file_name')} (image_id {sample.get('image_id')!r}, "
            f"{width} x {height}{objects})"
        )
    return ", ".join(told)
