"""Pure functions on tensors: no config, no registry."""

from .roi_pooling import roi_align

__all__ = ["roi_align"]
