"""Chooses the evaluator of a data set and the folder for its results."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..config import ConfigError
from ..config_check.chosen_metrics import chosen_metrics, of_dataset
from ..evaluation import ALL_DETECTIONS, COCO_MAX_DETECTIONS, MaskEvaluator, counted_detections

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Returns the evaluator for the data set's ``evaluator_type``.

    Args:
        cfg: the run's config.
        dataset_name: a registered data set.
        output_folder: folder for results. None means ``OUTPUT_DIR/inference`` or, if DATASETS.TEST
            has several data sets, the subfolder ``OUTPUT_DIR/inference/<dataset_name>``.

    Raises:
        ValueError: if the type is unknown.
    """
    folder = output_folder or inference_folder(cfg, "inference", dataset_name)
    match MetadataCatalog.get(dataset_name).get("evaluator_type"):
        case "coco" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            return COCOEvaluator(dataset_name, output_dir=folder)  # recall of the proposals
        case "coco" if cfg.MODEL.KEYPOINT_ON:
            own_folder = str(Path(folder) / "keypoints")  # both evaluators use the same file names
            keypoints = COCOEvaluator(dataset_name, ("keypoints",), output_dir=own_folder)
            return DatasetEvaluators([_mask_evaluator(cfg, dataset_name, folder), keypoints])
        case "coco" | "lvis":
            return _mask_evaluator(cfg, dataset_name, folder)
        case "coco_panoptic_seg":
            coco = _mask_evaluator(cfg, dataset_name, folder)
            sem_seg = SemSegEvaluator(dataset_name, output_dir=folder)
            return DatasetEvaluators([coco, sem_seg, COCOPanopticEvaluator(dataset_name, folder)])
        case "sem_seg":
            return SemSegEvaluator(dataset_name, output_dir=folder)
        case "cityscapes_instance":
            return CityscapesInstanceEvaluator(dataset_name)
        case "cityscapes_sem_seg":
            return CityscapesSemSegEvaluator(dataset_name)
        case "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        case kind:
            raise ValueError(
                f"data set {dataset_name!r} has evaluator_type {kind!r}, for which there is no "
                "evaluator; set the type in its metadata, e.g. to 'coco'"
            )


def check_chosen_objects(cfg: CfgNode) -> None:
    """Refuses a metric if the data set has no objects for it, because it would always be NaN.

    Raises:
        ConfigError: naming the key, the metric and the data set.
    """
    for key, metric in chosen_metrics(cfg).items():
        name, own = of_dataset(cfg.DATASETS.TEST, metric)
        if name in cfg.DATASETS.TEST:
            check_objects(cfg, name, own, f"{key} {metric!r}")


def check_objects(cfg: CfgNode, name: str, metric: str, what: str) -> None:
    """Refuses a metric for objects that a data set lacks.

    Args:
        cfg: gives the evaluator.
        name: the data set.
        metric: such as ``segm/APl``.
        what: key and metric, for the error.

    Raises:
        ConfigError: if the metric would always be NaN.
    """
    evaluator = build_evaluator(cfg, name)
    if isinstance(evaluator, MaskEvaluator) and evaluator.never_gives(metric):
        raise ConfigError(
            f"{what} is not a number in any evaluation, because {name} has none of the objects "
            "that it measures; choose another metric"
        )


def inference_folder(cfg: CfgNode, name: str, dataset_name: str) -> str:
    """Returns a folder in OUTPUT_DIR, or a subfolder per data set if DATASETS.TEST has several."""
    folder = Path(cfg.OUTPUT_DIR) / name
    return str(folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder)


def _mask_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> MaskEvaluator:
    """Returns a MaskEvaluator that counts all detections that a model may return per image."""
    if MetadataCatalog.get(dataset_name).get("made_on_first_use", False):
        DatasetCatalog.get(dataset_name)  # writes the annotation file, which MaskEvaluator reads
    limit = counted_detections(cfg.TEST.DETECTIONS_PER_IMAGE)
    if limit != COCO_MAX_DETECTIONS:
        logger.info(
            "AP on %s counts %s detections per image and class (TEST.DETECTIONS_PER_IMAGE), not "
            "COCO's %d",
            dataset_name,
            "all" if limit == ALL_DETECTIONS else limit,
            COCO_MAX_DETECTIONS,
        )
    return MaskEvaluator(
        dataset_name,
        output_dir=folder,
        max_dets_per_image=limit,
        semantic_threshold=cfg.TEST.SEMANTIC_THRESHOLD,
    )
