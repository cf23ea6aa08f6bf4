"""Stops a training run before it is spoilt, with an error that says at which images to look."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import comm
from torch import nn

from .checkpoint import write_checkpoint

logger = logging.getLogger(__name__)

FAILED_FOLDER = "failed_steps"
"""Folder of OUTPUT_DIR for the batches of steps that failed."""

NAMES_LISTED = 5

Sample = dict[str, Any]


class TrainingError(RuntimeError):
    """A run that cannot go on, in one line that names the iteration, the images and the fix."""


class StepGuard(HookBase):
    """Looks at losses and gradients of every step before the weights are changed.

    Registered with the inner trainer (SimpleTrainer, AMPTrainer), it sees batch and losses by hooks
    on the model. Costs one pass over the gradients; where detectron2 waits for the losses, it waits
    a little earlier.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        """
        Args:
            model: as it is trained, in DistributedDataParallel or not.
            cfg: gives OUTPUT_DIR and the settings that messages name. With SOLVER.AMP gradients are
                not looked at: the scaler of AMP finds its factor by infinite ones.
        """
        self._model, self._cfg = model, cfg
        self._batch: list[Sample] = []
        self._losses: dict[str, torch.Tensor] = {}
        model.register_forward_pre_hook(self._note_batch)
        model.register_forward_hook(self._note_losses)

    def _note_batch(self, model: nn.Module, inputs: tuple[list[Sample]]) -> None:
        if model.training:
            self._batch, self._losses = inputs[0], {}

    def _note_losses(self, model: nn.Module, _: object, losses: Any) -> None:
        if model.training:
            named = losses if isinstance(losses, Mapping) else {"total_loss": losses}
            self._losses = {name: loss.detach() for name, loss in named.items()}

    def after_backward(self) -> None:
        """Raises TrainingError, on all processes, where a loss or gradient is not finite."""
        total = torch.stack(list(self._losses.values())).sum()
        gradients = self._gradients()
        if gradients:
            total = total + torch.nn.utils.get_total_norm(list(gradients.values()))
        is_bad = (~total.isfinite()).to(torch.float32)
        if comm.get_world_size() > 1:  # all stop together, or the others would wait for this one
            torch.distributed.all_reduce(is_bad, torch.distributed.ReduceOp.MAX)
        if is_bad.item():
            self._stop_if_not_finite(gradients)

    def _gradients(self) -> dict[str, torch.Tensor]:
        if self._cfg.SOLVER.AMP.ENABLED:
            return {}
        named = self._model.named_parameters()
        return {name: each.grad for name, each in named if each.grad is not None}

    def _stop_if_not_finite(self, gradients: dict[str, torch.Tensor]) -> None:
        """Looks at each value, since the norm of large gradients may be infinite by itself."""
        values = {name: loss.item() for name, loss in self._losses.items()}
        terms = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
        layers = [name for name, each in gradients.items() if not each.isfinite().all()]
        reports = comm.all_gather((terms, layers, _describe_batch(self._batch)))
        guilty = [report for report in reports if report[0]]
        guilty = guilty or [report for report in reports if report[1]]
        if not guilty:
            return
        path = save_step(self._cfg, self.trainer.iter, self._model, self._batch, values)
        told = []
        for terms, layers, images in guilty:
            what = ", ".join(terms) or f"gradients are not finite, of {_listed(layers)}"
            told.append(f"{what}, with the images {images}")
        raise TrainingError(
            f"iteration {self.trainer.iter}: {'; '.join(told)}. The weights from before this step "
            f"and its batch are in {path}; tools/replay_step.py finds the layer. Often a lower "
            "SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True "
            "helps"
        )

    def explain(self, error: BaseException) -> TrainingError | None:
        """Returns an error that says what to lower if memory ran out, else None."""
        if not is_out_of_memory(error):
            return None
        heads, images = self._cfg.MODEL.ROI_HEADS, len(self._batch)
        rois = images * heads.BATCH_SIZE_PER_IMAGE
        return TrainingError(
            f"iteration {self.trainer.iter}: out of memory ({_first_line(error)}) with the images "
            f"{_describe_batch(self._batch)}: {rois} RoIs, up to "
            f"{int(rois * heads.POSITIVE_FRACTION)} of them with masks. Lower "
            f"SOLVER.IMS_PER_BATCH (now {self._cfg.SOLVER.IMS_PER_BATCH}), INPUT.MIN_SIZE_TRAIN "
            f"(now {tuple(self._cfg.INPUT.MIN_SIZE_TRAIN)}) or "
            f"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE (now {heads.BATCH_SIZE_PER_IMAGE}); on CUDA "
            "SOLVER.AMP.ENABLED True helps, too"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the memory of a device or of the machine ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def save_step(
    cfg: CfgNode,
    iteration: int,
    model: nn.Module,
    batch: list[Sample],
    losses: dict[str, float],
) -> Path:
    """Writes what is needed to repeat a step: its batch, and the weights from before it.

    Returns:
        The file, in ``OUTPUT_DIR/failed_steps``. It holds tensors and plain values only.
    """
    folder = Path(cfg.OUTPUT_DIR) / FAILED_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iteration_{iteration:07d}_rank_{comm.get_rank()}.pth"
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    write_checkpoint(
        path,
        {
            "model": inner.state_dict(),
            "batch": [{key: _plain(value) for key, value in x.items()} for x in batch],
            "iteration": iteration,
            "losses": losses,
        },
    )
    return path


def load_batch(path: Path) -> list[Sample]:
    """Returns the batch of a file of save_step, as the model takes it."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return [{key: _restored(value) for key, value in x.items()} for x in content["batch"]]


def _plain(value: Any) -> Any:
    """Returns tensors, numbers, strings and containers of them, which no reader need vouch for."""
    if isinstance(value, Instances):
        fields = {name: _plain(field) for name, field in value.get_fields().items()}
        return {"Instances": list(value.image_size), "fields": fields}
    if isinstance(value, Boxes | BitMasks | Keypoints):
        return {type(value).__name__: value.tensor}
    if isinstance(value, PolygonMasks):
        return {"PolygonMasks": [[torch.as_tensor(y) for y in x] for x in value.polygons]}
    is_plain = value is None or isinstance(value, torch.Tensor | int | float | str)
    return value if is_plain else repr(value)


def _restored(value: Any) -> Any:
    match value:
        case {"Instances": [height, width], "fields": fields}:
            result = Instances((height, width))
            for name, field in fields.items():
                result.set(name, _restored(field))
            return result
        case {"Boxes": tensor}:
            return Boxes(tensor)
        case {"BitMasks": tensor}:
            return BitMasks(tensor)
        case {"Keypoints": tensor}:
            return Keypoints(tensor)
        case {"PolygonMasks": polygons}:
            return PolygonMasks([[y.numpy() for y in x] for x in polygons])
    return value


def _describe_batch(batch: list[Sample]) -> str:
    told = []
    for sample in batch:
        height, width = sample["image"].shape[-2:]
        objects = f", {len(sample['instances'])} objects" if "instances" in sample else ""
        told.append(
            f"{sample.get('file_name')} (image_id {sample.get('image_id')!r}, "
            f"{width} x {height}{objects})"
        )
    return ", ".join(told)


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
