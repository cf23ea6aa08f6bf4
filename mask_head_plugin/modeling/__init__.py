"""detectron2 modules of the mask branch. Importing this package registers them."""

from .channels_last import to_channels_last
from .mask_head import FCNMaskHead, MLPMaskHead
from .mask_loss import MASK_LOSS_REGISTRY, couples_classes, mean_over_rois
from .pooler import MultiLevelRoIPooler
from .rcnn import MaskRCNN
from .roi_heads import PerClassMaskRes5ROIHeads, PerClassMaskROIHeads
from .small_backbone import build_small_resnet_fpn_backbone
from .timm_backbone import build_timm_backbone, build_timm_fpn_backbone

__all__ = [
    "MASK_LOSS_REGISTRY",
    "FCNMaskHead",
    "MLPMaskHead",
    "MaskRCNN",
    "MultiLevelRoIPooler",
    "PerClassMaskROIHeads",
    "PerClassMaskRes5ROIHeads",
    "build_small_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "couples_classes",
    "mean_over_rois",
    "to_channels_last",
]
