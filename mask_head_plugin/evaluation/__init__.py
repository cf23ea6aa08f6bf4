"""Evaluation of masks, in numbers and pictures."""

from .coco_evaluator import MaskEvaluator
from .contact_sheet import write_contact_sheet

__all__ = ["MaskEvaluator", "write_contact_sheet"]
