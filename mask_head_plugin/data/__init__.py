"""Data sets: the embedded shapes, and the user's own COCO files. Importing registers the shapes."""

from .check import CheckOptions, check_coco_file
from .check_run import check_dataset_files
from .coco_files import check_datasets, dataset_categories, register_coco_files
from .dataset_fix import fix_coco_file
from .findings import Finding
from .shapes import register_shapes
from .train_loader import ImageNamingMapper, TrainLoader, seed_generators

register_shapes()

__all__ = [
    "CheckOptions",
    "Finding",
    "ImageNamingMapper",
    "TrainLoader",
    "check_coco_file",
    "check_dataset_files",
    "check_datasets",
    "dataset_categories",
    "fix_coco_file",
    "register_coco_files",
    "register_shapes",
    "seed_generators",
]
