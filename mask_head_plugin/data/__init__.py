"""Data sets: the embedded shapes, and the user's own COCO files. Importing registers the shapes."""

from .shapes import register_shapes

register_shapes()

__all__ = ["register_shapes"]
