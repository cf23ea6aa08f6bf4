"""Evaluates boxes, masks and their boundaries with COCO's or LVIS's metrics."""

from __future__ import annotations

import itertools
import json
import logging
import math
import operator
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..class_names import matched_predictions, predicted_names
from ..durable_files import write_durably
from ..structures import run_lengths
from .coco_ap import ALL_DETECTIONS, COCO_MAX_DETECTIONS, METRICS, TASKS, Evaluation, GroundTruth
from .prediction_log import PredictionLog, Results, merge_lines
from .semantic import check_class_names, evaluate_semantic

logger = logging.getLogger(__name__)

CLASS_COLUMNS = 3  # columns of the table of classes

TaskResults = OrderedDict[str, dict[str, float]]


class MaskEvaluator(DatasetEvaluator):
    """Computes the AP of boxes, masks and boundaries.

    Replaces detectron2's COCO and LVIS evaluators.

    Results are ``{"bbox": ..., "segm": ..., "boundary": ...}`` with detectron2's keys (AP, AP50,
    AP75, APs, APm, APl, AP-<class>; for LVIS also APr, APc, APf). Boundary AP is COCO's AP with the
    minimum of mask IoU and boundary IoU (arXiv 2103.16562). Boxes are ranked by ``scores``. Masks
    are ranked by ``mask_scores`` if detections have them, and otherwise by ``scores``.

    Predictions are written to the output folder during the evaluation. After ``resume``, images
    that were predicted by an interrupted evaluation do not have to be predicted again.

    If a model's class names are known, its predictions are matched with the data set's classes by
    name, and the class numbers may differ.

    Attributes:
        predicted_classes: class names for predictions that have no class names; see class_names.py.
            None if the classes of these predictions are numbered as in the data set.

    Writes to the output folder:

    - ``coco_instances_results.json``: all detections in COCO's format. With mask scoring, each has
      both a ``mask_score`` and a ``score``.
    - ``metrics.json``: all metrics, overall and by class and size.
    - ``matches_<task>.npz``: which detections found an object; see matching.Matches.

    Differs from COCOEvaluator: without detections, AP is 0 instead of nan, and
    ``instances_predictions.pth`` is not written.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        semantic_threshold: float = 0.0,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set. If its metadata has no ``json_file``, the data set
                is first written to the output folder in COCO's format.
            tasks: some of "bbox", "segm" and "boundary". None evaluates boxes and, if predictions
                and data set have masks, masks and boundaries.
            distributed: whether to collect the predictions of all processes.
            output_dir: output folder; None writes no files.
            max_dets_per_image: how many detections count per image and class. None means COCO's
                100, and a negative value counts all. For LVIS, the best 300 per image always count.
            semantic_threshold: if above 0, adds the metrics of ``semantic.evaluate_semantic`` as
                "semantic", for detections with at least this score.

        Raises:
            ValueError: if a task is unknown, ``max_dets_per_image`` is 0, the file is not a COCO
                file, or the data set has no annotation file and there is no output folder to write
                one to.
        """
        if max_dets_per_image == 0:
            raise ValueError("max_dets_per_image is 0, so no detection would count; -1 counts all")
        unknown = set(tasks or ()) - set(TASKS)
        if unknown:
            raise ValueError(f"unknown tasks {sorted(unknown)}; choose from {TASKS}")
        self._dataset_name, self._tasks, self._distributed = dataset_name, tasks, distributed
        self._folder = Path(output_dir) if output_dir else None
        self._max_detections = max_dets_per_image or COCO_MAX_DETECTIONS
        self._semantic_threshold = semantic_threshold
        self.predicted_classes: list[str] | None = None
        metadata = MetadataCatalog.get(dataset_name)
        self._truth = GroundTruth(
            _annotation_file(dataset_name, self._folder),
            is_lvis=metadata.get("evaluator_type") == "lvis",
        )
        if semantic_threshold > 0:
            check_class_names(self._truth.class_names)
        self.resume("")

    def resume(self, fingerprint: str) -> None:
        """Loads the predictions of an interrupted evaluation, if there are any.

        Args:
            fingerprint: identifies everything that predictions depend on (weights, settings,
                images). Predictions with another fingerprint are ignored, and deleted by ``reset``.
                If empty, all predictions are ignored.
        """
        self._log = PredictionLog(
            self._folder,
            self._dataset_name,
            fingerprint,
            comm.get_rank() if self._distributed else 0,
        )

    @property
    def finished_image_ids(self) -> set[Any]:
        """Images that do not have to be predicted again, as read by the first process."""
        finished: set[Any] = self._log.finished
        return comm.all_gather(finished)[0] if self._distributed else finished

    @property
    def _category_ids(self) -> list[Any]:
        """The annotation file's category id of each class.

        Computed on each access, because detectron2 sets the ids only when it loads the data set.
        """
        metadata = MetadataCatalog.get(self._dataset_name)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping:
            ids = sorted(mapping, key=lambda category: mapping[category])
            return [_plain_id("thing_dataset_id_to_contiguous_id", i) for i in ids]
        ids = self._truth.category_ids
        count = len(metadata.get("thing_classes", ids))
        if count != len(ids):
            raise ValueError(
                f"{self._dataset_name} has {count} classes, but {self._truth.json_file} has "
                f"{len(ids)} categories; in the data set's metadata, set "
                "thing_dataset_id_to_contiguous_id, which maps category ids to class numbers"
            )
        return ids

    @property
    def _class_names(self) -> list[str]:
        """Names of the categories. Names in the metadata take precedence over those in the file."""
        names = self._names_by_category
        return [names[category] for category in self._truth.category_ids]

    @property
    def _names_by_category(self) -> dict[Any, str]:
        classes = MetadataCatalog.get(self._dataset_name).get("thing_classes", ())
        names = zip(self._truth.category_ids, self._truth.class_names, strict=True)
        return {**dict(names), **dict(zip(self._category_ids, classes, strict=False))}

    def reset(self) -> None:
        self._log.start()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: inputs of a detectron2 model, with ``image_id``.
            outputs: outputs of the model, with ``instances``.

        Raises:
            ValueError: if an output has no instances, a class number that the data set does not
                have, or a score that is NaN or infinite. Also if an id is neither a whole number
                nor text.
            ConfigError: if the data set has classes that the model does not have.
        """
        category_ids = self._category_ids
        names_by_category = self._names_by_category
        names = [names_by_category[x] for x in category_ids if x in names_by_category]
        for x, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                raise ValueError(f"outputs have {sorted(output)}, but no instances to evaluate")
            instances = output["instances"]
            found = predicted_names(instances) or self.predicted_classes
            instances = instances.to("cpu")
            if len(names) == len(category_ids):  # otherwise, some names are unknown
                instances = matched_predictions(instances, found, names, self._dataset_name)
            image_id = _plain_id("image_id", x["image_id"])
            self._log.append(image_id, coco_results(instances, image_id, category_ids))

    def evaluate(self) -> TaskResults:
        """Returns the metrics by task in the first process, and an empty dict in all others."""
        lines = self._log.lines()
        if self._distributed:
            comm.synchronize()
            lines = [line for part in comm.gather(lines, dst=0) for line in part]
            if not comm.is_main_process():
                self._log.close()
                return OrderedDict()
        if not lines:
            logger.warning("no predictions were made for %s", self._dataset_name)
            self._log.remove()
            return OrderedDict()
        results = merge_lines(lines)
        if self._folder:
            text = json.dumps(results)
            write_durably(self._folder / "coco_instances_results.json", text)
        metrics: TaskResults = OrderedDict()
        if self._truth.has_annotations:
            metrics = self._evaluate_tasks(results)
        else:
            logger.info("%s has no annotations to evaluate with", self._truth.json_file)
        self._log.remove()
        return metrics

    def _evaluate_tasks(self, results: Results) -> TaskResults:
        tasks = self._tasks or self._possible_tasks(results)
        evaluations: OrderedDict[str, Evaluation] = OrderedDict()
        if "bbox" in tasks:
            evaluations["bbox"] = self._evaluate_task(results, "bbox")
        if "segm" in tasks or "boundary" in tasks:
            of_masks = self._evaluate_task(results, "segm")
            if "segm" in tasks:
                evaluations["segm"] = of_masks
            if "boundary" in tasks:
                evaluations["boundary"] = of_masks.with_boundaries()
        summary: TaskResults = OrderedDict(
            (task, self._summary(evaluation)) for task, evaluation in evaluations.items()
        )
        self._log_tables(summary)
        if self._folder:
            for task, evaluation in evaluations.items():
                evaluation.matches().save(self._folder / f"matches_{task}.npz")
        if self._semantic_threshold > 0 and self._have_masks(results):
            summary["semantic"] = self._semantic(results)
        if self._folder:
            self._write_metrics(summary, evaluations)
        return summary

    def never_gives(self, metric: str) -> bool:
        """Returns whether a metric can never be a number, because there are no objects for it.

        Args:
            metric: such as ``segm/APl`` or ``bbox/AP-person``.
        """
        task, _, name = metric.partition("/")
        if task not in TASKS or not self._truth.has_annotations:
            return task in TASKS
        if task != "bbox" and not self._truth.has_masks:
            return True
        of_nothing = self._summary(self._evaluate_task([], "bbox"))
        return math.isnan(of_nothing.get(name, 0.0))

    def _possible_tasks(self, results: Results) -> tuple[str, ...]:
        if self._have_masks(results):
            return TASKS
        if results and "segmentation" in results[0]:
            logger.warning("%s has no masks: only boxes are evaluated", self._truth.json_file)
        return ("bbox",)

    def _have_masks(self, results: Results) -> bool:
        return self._truth.has_masks and (not results or "segmentation" in results[0])

    def _evaluate_task(self, results: Results, task: str) -> Evaluation:
        detections = self._truth.detections(results, task)
        return Evaluation(self._truth, detections, task, self._max_detections)

    def _summary(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns detectron2's metrics of a task."""
        metrics = evaluation.metrics()
        summary = {name: metrics[name] for name in METRICS}
        names = self._class_names
        if self._truth.is_lvis:
            return {**summary, **evaluation.frequency_metrics()}
        if len(names) > 1:
            summary |= {f"AP-{x}": evaluation.metrics([k])["AP"] for k, x in enumerate(names)}
        return summary

    def _semantic(self, results: Results) -> dict[str, float]:
        coco = self._truth.coco
        return evaluate_semantic(
            coco,
            self._truth.detections(results, "segm"),
            list(coco.imgs),
            {category: k for k, category in enumerate(coco.cats)},
            self._class_names,
            self._semantic_threshold,
        )

    def _log_tables(self, summary: TaskResults) -> None:
        names = [x for x in next(iter(summary.values())) if not x.startswith("AP-")]
        rows = [[task, *(metrics[x] for x in names)] for task, metrics in summary.items()]
        table = tabulate(rows, ["", *names], tablefmt="pipe", floatfmt=".3f")
        logger.info("Evaluation of %s:\n%s", self._dataset_name, table)
        classes = [x for x in next(iter(summary.values())) if x.startswith("AP-")]
        if classes:
            cells = [[x[3:], *(metrics[x] for metrics in summary.values())] for x in classes]
            columns = min(CLASS_COLUMNS, len(cells))
            cells += [[""] * len(cells[0])] * (-len(cells) % columns)
            rows = [
                list(itertools.chain(*cells[k : k + columns]))
                for k in range(0, len(cells), columns)
            ]
            header = ["class", *summary] * columns
            table = tabulate(rows, header, tablefmt="pipe", floatfmt=".2f")
            logger.info("AP by class:\n%s", table)

    def _write_metrics(
        self, summary: TaskResults, evaluations: OrderedDict[str, Evaluation]
    ) -> None:
        assert self._folder is not None
        names = self._class_names
        written: dict[str, Any] = {
            "dataset": self._dataset_name,
            "annotations": self._truth.json_file,
            "num_images": len(self._truth.image_ids),
            "max_detections": next(iter(evaluations.values())).limit if evaluations else None,
            **summary,
        }
        for task, evaluation in evaluations.items():
            by_class = {name: evaluation.metrics([k]) for k, name in enumerate(names)}
            own = {x: v for x, v in summary[task].items() if not x.startswith("AP-")}
            written[task] = {**own, "AR": evaluation.metrics()["AR"], "by_class": by_class}
        text = json.dumps(without_nan(written), indent=1)
        write_durably(self._folder / "metrics.json", text + "\n")


def counted_detections(per_image: int) -> int:
    """Returns how many detections per image should count in AP.

    This is COCO's limit of 100 or the model's limit, whichever is higher. A limit of 100 would cap
    the recall in images with more objects.

    Args:
        per_image: TEST.DETECTIONS_PER_IMAGE, the model's limit. A negative value means no limit.
    """
    return max(per_image, COCO_MAX_DETECTIONS) if per_image >= 0 else ALL_DETECTIONS


def coco_results(instances: Instances, image_id: Any, category_ids: Sequence[Any]) -> Results:
    """Returns detections in COCO's result format.

    Args:
        instances: detections on the CPU; ``pred_masks`` may be RLEMasks, an (N, H, W) tensor, or
            missing.
        image_id: the image's id in the annotation file.
        category_ids: category ids in the annotation file, in the order of the classes.

    Raises:
        ValueError: if a class has no category, or a score is NaN or infinite.
    """
    if not instances.scores.isfinite().all():
        raise ValueError(f"image {image_id!r}: the model returned scores that are NaN or infinite")
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    classes = instances.pred_classes.tolist()
    if classes and max(classes) >= len(category_ids):
        raise ValueError(
            f"image {image_id!r}: predicted class {max(classes)}, but the data set has "
            f"{len(category_ids)} classes; is MODEL.ROI_HEADS.NUM_CLASSES right?"
        )
    results = [
        {"image_id": image_id, "category_id": category_ids[k], "bbox": box, "score": score}
        for k, box, score in zip(classes, boxes.tolist(), instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        for result, rle in zip(results, run_lengths(instances.pred_masks), strict=True):
            result["segmentation"] = rle
    if instances.has("mask_scores"):
        for result, score in zip(results, instances.mask_scores.tolist(), strict=True):
            result["mask_score"] = score
    return results


def _annotation_file(dataset_name: str, folder: Path | None) -> str:
    """Returns the path of a data set's annotations in COCO's format; writes the file if needed."""
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        if folder is None:
            raise ValueError(f"{dataset_name} has no json_file; pass output_dir to write one")
        path = folder / f"{dataset_name}_coco_format.json"
        convert_to_coco_json(dataset_name, str(path), allow_cached=False)
        return str(path)
    return str(PathManager.get_local_path(metadata.json_file))


def without_nan(value: Any) -> Any:
    """Replaces nan by None in nested results, because JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _plain_id(field: str, value: Any) -> int | str:
    """Returns an id that JSON can store. Converts NumPy integers, which pandas also uses."""
    if isinstance(value, str):
        return value
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(
            f"{field} {value!r} is of type {type(value).__name__}; ids must be whole numbers or "
            "text"
        ) from error
