"""A backbone that trains on the embedded data set from scratch within minutes on a CPU.

The smallest ResNets of detectron2 (18 and 34) have a fixed width of 64, and even a narrow ResNet-50
is slow to train from scratch. The backbone in this module has ResNet's stem and one basic block per
stage.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..shared_names import register_in


@register_in(BACKBONE_REGISTRY)
def build_small_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a stem, the stages res2 to res5 with one BasicBlock each, and an FPN (p2 to p6).

    Args:
        cfg: the keys read are BACKBONE.FREEZE_AT; RESNETS.STEM_OUT_CHANNELS, RES2_OUT_CHANNELS
            (res3, res4 and res5 have 2, 3 and 4 times as many channels as res2), OUT_FEATURES and
            NORM; and all keys of FPN.
        input_shape: only the number of image channels is read.
    """
    norm, width = cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=channels, norm=norm)
    stages = []
    for index in range(4):
        out_channels = width * (index + 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=1,
                stride_per_block=[1 if index == 0 else 2],
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        channels = out_channels
    bottom_up = ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES)
    fpn = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )
