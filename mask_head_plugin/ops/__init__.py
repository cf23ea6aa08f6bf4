"""Pure functions on tensors, which use no config and no registry."""

from .mask_rle import encode_masks
from .mask_target import crop_masks
from .roi_pooling import precise_roi_pool, roi_align, roi_pool, roi_warp

__all__ = ["crop_masks", "encode_masks", "precise_roi_pool", "roi_align", "roi_pool", "roi_warp"]
