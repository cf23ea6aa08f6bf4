"""Evaluates masks: computes metrics and draws pictures."""

from ..detectron2_import import IMPORT_ERROR, refuse

if IMPORT_ERROR is None:
    from .coco_ap import ALL_DETECTIONS, COCO_MAX_DETECTIONS
    from .coco_evaluator import MaskEvaluator, counted_detections
    from .contact_sheet import write_contact_sheet

__all__ = [
    "ALL_DETECTIONS",
    "COCO_MAX_DETECTIONS",
    "MaskEvaluator",
    "counted_detections",
    "write_contact_sheet",
]

__getattr__ = refuse(__name__, __all__)
