"""Data sets: the embedded shapes, and the user's own COCO files. Importing registers the shapes."""

from .coco_files import check_datasets, register_coco_files
from .shapes import register_shapes

register_shapes()

__all__ = ["check_datasets", "register_coco_files", "register_shapes"]
