"""Pure functions on tensors: no config, no registry."""

from .roi_pooling import precise_roi_pool, roi_align, roi_pool, roi_warp

__all__ = ["precise_roi_pool", "roi_align", "roi_pool", "roi_warp"]
