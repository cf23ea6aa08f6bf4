"""Data sets: the embedded shapes, which importing this package registers, and your COCO files."""

from ..dataset_check import (
    CheckOptions,
    Finding,
    check_coco_file,
    check_dataset_files,
    fix_coco_file,
)
from .coco_files import (
    check_registered_datasets,
    dataset_categories,
    register_coco_files,
    register_found_coco_files,
)
from .shapes import register_shapes
from .train_loader import ImageNamingMapper, TrainLoader, seed_generators
from .usable_copies import check_and_leave_out

register_shapes()

__all__ = [
    "CheckOptions",
    "Finding",
    "ImageNamingMapper",
    "TrainLoader",
    "check_and_leave_out",
    "check_coco_file",
    "check_dataset_files",
    "check_registered_datasets",
    "dataset_categories",
    "fix_coco_file",
    "register_coco_files",
    "register_found_coco_files",
    "register_shapes",
    "seed_generators",
]
