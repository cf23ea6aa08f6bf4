"""Pure functions on tensors: no config, no registry."""

from .mask_rle import encode_masks
from .mask_target import crop_masks
from .roi_pooling import precise_roi_pool, roi_align, roi_pool, roi_warp

__all__ = ["crop_masks", "encode_masks", "precise_roi_pool", "roi_align", "roi_pool", "roi_warp"]
