"""COCO metrics of boxes and masks."""

from __future__ import annotations

import itertools
from typing import Any

from detectron2.evaluation import COCOEvaluator


class MaskEvaluator(COCOEvaluator):
    """COCOEvaluator that ranks masks by ``mask_scores`` where detections have them.

    Boxes are always ranked by ``scores``, so their AP does not depend on mask scoring. In
    ``coco_instances_results.json`` such a detection has a ``mask_score`` beside its ``score``.
    """

    _tasks: tuple[str, ...] | None

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        known = len(self._predictions)
        super().process(inputs, outputs)
        found = [x["instances"] for x in outputs if "instances" in x]
        for prediction, instances in zip(self._predictions[known:], found, strict=True):
            if instances.has("mask_scores"):
                scores = instances.mask_scores.tolist()
                for result, score in zip(prediction["instances"], scores, strict=True):
                    result["mask_score"] = score

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        results = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        if not results or "mask_score" not in results[0]:
            super()._eval_predictions(predictions, img_ids)
            return
        tasks = self._tasks or self._tasks_from_predictions(results)
        ranked = [{**result, "score": result["mask_score"]} for result in results]
        try:
            if "segm" in tasks:
                self._tasks = ("segm",)
                super()._eval_predictions([{"instances": ranked}], img_ids)
            self._tasks = tuple(task for task in tasks if task != "segm")
            if self._tasks:  # last, so that these are the results that stay in the file
                super()._eval_predictions([{"instances": results}], img_ids)
        finally:
            self._tasks = tasks
