"""One model's inference, watched: what its ROI heads hand out, time and memory."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch.profiler import ProfilerActivity, profile

from .agreement import Found


class WatchedModel:
    """Runs a model as users do, and sees where its network ends and its postprocessing starts.

    Attributes:
        network_seconds: of each call, up to the result of the ROI heads.
        seconds: of each call, with postprocessing.
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
            *(instances.pred_boxes.tensor, instances.scores, instances.pred_classes),
            *(raw.mask_probs, instances.pred_masks),
        )
        return instances, found

    @torch.no_grad()
    def peak_megabytes(self, x: dict[str, Any]) -> float:
        """Returns the most that PyTorch allocates for one image, beyond the weights."""
        return _peak_megabytes(lambda: self.model([x]), is_cuda=self._is_cuda)

    def _note(self, _module: Any, _inputs: Any, results: Any) -> None:
        """A hook of the ROI heads; its own time does not count."""
        end = self._now()
        self.network_seconds.append(end - self._start)
        found = results[0][0]
        # Boxes are copied, since postprocessing scales them in place. By their new name the masks
        # go through another postprocessing without being pasted.
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


def _peak_megabytes(step: Callable[[], object], *, is_cuda: bool) -> float:
    """Returns the peak of PyTorch's allocations, by its allocator or on the CPU by its profiler."""
    if is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop are no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0) / 1e6
