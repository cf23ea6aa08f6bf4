"""Times one model's inference and keeps what its ROI heads return."""

from __future__ import annotations

import time
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances

from ..machine import peak_megabytes
from .image_differences import Found


class TimedModel:
    """Runs a model as users would, and measures the time with and without postprocessing.

    Attributes:
        network_seconds: for each call, the seconds until the ROI heads return.
        seconds: for each call, the seconds including postprocessing.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: a model in evaluation mode whose last part before postprocessing is
                ``roi_heads``.
        """
        self.model = model
        self.network_seconds: list[float] = []
        self.seconds: list[float] = []
        self._is_cuda = next(model.parameters()).is_cuda
        self._start = self._noting = 0.0
        self._raw: Instances | None = None

    @torch.no_grad()
    def detect(self, x: dict[str, Any]) -> tuple[Instances, Found]:
        """Returns the output for one image, and the same detections with mask probabilities.

        Args:
            x: an input of the model, with ``height`` and ``width``.
        """
        hook = self.model.get_submodule("roi_heads").register_forward_hook(self._note)
        try:
            self._start = self._now()
            instances = self.model([x])[0]["instances"]
            self.seconds.append(self._now() - self._start - self._noting)
        finally:
            hook.remove()
        instances = instances.to("cpu")
        assert self._raw is not None
        raw = detector_postprocess(self._raw, x["height"], x["width"]).to("cpu")
        found = Found(
            instances.pred_boxes.tensor,
            instances.scores,
            instances.pred_classes,
            raw.mask_probs,
            instances.pred_masks,
        )
        return instances, found

    @torch.no_grad()
    def peak_megabytes(self, x: dict[str, Any]) -> float:
        """Returns the peak memory in MB that PyTorch allocates for an image besides the weights."""
        return peak_megabytes(lambda: self.model([x]), "cuda" if self._is_cuda else "cpu")

    def _note(self, _module: Any, _inputs: Any, results: Any) -> None:
        """Forward hook that keeps the output of the ROI heads. The hook's time is not counted."""
        end = self._now()
        self.network_seconds.append(end - self._start)
        found = results[0][0]
        # Boxes are copied, because postprocessing scales them in place. Masks are renamed, so that
        # a second postprocessing does not paste them.
        self._raw = Instances(
            found.image_size,
            pred_boxes=Boxes(found.pred_boxes.tensor.clone()),
            mask_probs=found.pred_masks[:, 0],
        )
        self._noting = self._now() - end

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
