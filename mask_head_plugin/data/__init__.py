"""Data sets: the embedded shapes, and the user's own COCO files. Importing registers the shapes."""

from .coco_files import check_datasets, register_coco_files
from .shapes import register_shapes
from .train_loader import NamedErrors, TrainLoader, seed_generators

register_shapes()

__all__ = [
    "NamedErrors",
    "TrainLoader",
    "check_datasets",
    "register_coco_files",
    "register_shapes",
    "seed_generators",
]
