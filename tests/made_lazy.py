"""Shrinks LazyConfig models so that tests can train them quickly."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import RegNet, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from made_training import IMAGE_HW


def shrink(model):
    """Shrinks a full-size LazyConfig model for tests: narrow backbone, FPN and heads."""
    backbone, heads = model.backbone, model.roi_heads
    heads.num_classes, heads.batch_size_per_image = 5, 32
    predictors = heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]
    for predictor in predictors:
        predictor.test_score_thresh = 0.01
    if "net" in backbone:
        backbone.net.update(
            embed_dim=32, depth=2, num_heads=2, img_size=64, window_size=4, window_block_indexes=[0]
        )
        backbone.square_pad = max(IMAGE_HW)
    elif backbone.get("bottom_up", {}).get("_target_") is RegNet:
        backbone.bottom_up.update(depth=6, w_a=16, w_0=16, w_m=2.0, group_width=8)
    else:
        resnet = backbone.get("bottom_up", backbone)
        resnet.stem.out_channels = 8
        resnet.stages._target_ = narrow_stages
    if "res5" in heads:
        model.proposal_generator.head.in_channels = 32
        heads.res5.update(in_channels=32, bottleneck_channels=8, out_channels=40)
        return
    backbone.out_channels = model.proposal_generator.head.in_channels = 16
    heads.mask_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
    heads.mask_head.conv_dims = [16] * 5
    box_heads = heads.box_heads if "box_heads" in heads else [heads.box_head]
    for box_head in box_heads:
        box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
        box_head.conv_dims = [16] * len(box_head.conv_dims)
        box_head.fc_dims = [32]
    for predictor in predictors:
        predictor.input_shape = ShapeSpec(channels=32)
    if "sem_seg_head" in model:
        model.sem_seg_head.conv_dims = 32


def narrow_stages(norm, **_):
    """Makes ResNet stages with one block each. Replaces ResNet.make_default_stages."""
    sizes = ((8, 16, 1), (16, 24, 2), (24, 32, 2), (32, 40, 2))
    return [
        ResNet.make_stage(
            BasicBlock, 1, in_channels=before, out_channels=after, stride_per_block=[s], norm=norm
        )
        for before, after, s in sizes
    ]
