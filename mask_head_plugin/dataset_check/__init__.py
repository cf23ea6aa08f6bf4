"""Finds faults in COCO files and their images, explains how to fix them, and repairs copies."""

from .check import CheckOptions, check_coco_file
from .config_datasets import check_dataset_files
from .corrected_copy import fix_coco_file
from .findings import Finding

__all__ = ["CheckOptions", "Finding", "check_coco_file", "check_dataset_files", "fix_coco_file"]
