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
    """Runs a model as users do, and times its network and its postprocessing separately.

    Attributes:
        network_seconds: for each call, up to the result of the ROI heads.
        seconds: for each call, with postprocessing.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: with ``roi_heads`` as its last part before postprocessing; in evaluation mode.
        """
        self.model = model
        self.network_seconds: list[float] = []
        self.seconds: list[float] = []
        self._is_cuda = next(model.parameters()).is_cuda
        self._start = self._noting = 0.0
        self._raw: Instances | None = None

    @torch.no_grad()
    def detect(self, x: dict[str, Any]) -> tuple[Instances, Found]:
        """Returns the model's own output for one image, and the same with mask probabilities.

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
        """Returns the most that PyTorch allocates for one image, beyond the weights."""
        return peak_megabytes(lambda: self.model([x]), "cuda" if self._is_cuda else "cpu")

    def _note(self, _module: Any, _inputs: Any, results: Any) -> None:
        """A hook of the ROI heads; its own time does not count."""
        end = self._now()
        self.network_seconds.append(end - self._start)
        found = results[0][0]
        # Boxes are copied, since postprocessing scales them in place. Under their new name, the
        # masks pass through another postprocessing without being pasted.
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
