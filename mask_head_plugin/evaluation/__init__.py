"""Evaluation of masks, in numbers and pictures."""

from .coco_engine import COCO_MAX_DETECTIONS
from .coco_evaluator import MaskEvaluator
from .contact_sheet import write_contact_sheet

__all__ = ["COCO_MAX_DETECTIONS", "MaskEvaluator", "write_contact_sheet"]
