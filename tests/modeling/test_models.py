"""Whole models: plugin against stock end to end, checkpoints both ways, other ROI heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    build_twins,
    copy_instances,
    random_instances,
    relative_error,
    small_config,
    stock_config,
)
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mask_head_plugin.modeling import FCNMaskHead, MultiLevelRoIPooler

BASES = {"FPN": "Base-MaskRCNN-FPN.yaml", "C4": "Base-MaskRCNN-C4.yaml"}
IMAGE_HW = (128, 160)


def make_batch(counts=(4, 2), num_classes=5, mask_format="polygon", sem_seg_classes=0):
    rng = np.random.default_rng(11)
    batch = []
    for count in counts:
        image = torch.as_tensor(rng.integers(0, 256, (3, *IMAGE_HW)), dtype=torch.uint8)
        instances = random_instances(count, IMAGE_HW, num_classes, rng, mask_format)
        batch.append({"image": image, "instances": instances})
        if sem_seg_classes:
            sem_seg = rng.integers(0, sem_seg_classes, IMAGE_HW)
            batch[-1]["sem_seg"] = torch.as_tensor(sem_seg, dtype=torch.int64)
    return batch


def losses_and_gradients(model, batch):
    model.train()
    model.zero_grad()
    torch.manual_seed(2)  # sampling of anchors and proposals
    copies = [{**x, "instances": copy_instances([x["instances"]])[0]} for x in batch]
    with EventStorage(0):
        losses = model(copies)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", BASES)
def test_end_to_end_losses_and_gradients_equal_stock(base):
    # Normalised as the zoo's models are: statistics of so small a batch would magnify rounding.
    plugin, stock = build_twins(small_config(BASES[base], "MODEL.RESNETS.NORM", "FrozenBN"))
    batch = make_batch()
    losses, gradients = losses_and_gradients(plugin, batch)
    stock_losses, stock_gradients = losses_and_gradients(stock, batch)
    assert losses.keys() == stock_losses.keys() and "loss_mask" in losses
    for name, expected in stock_losses.items():
        assert relative_error(losses[name], expected) <= 1e-5, name
    assert gradients.keys() == stock_gradients.keys()
    for name, expected in stock_gradients.items():
        assert relative_error(gradients[name], expected) <= 2e-3, name


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_fit_both_ways(base, tmp_path):
    cfg = small_config(BASES[base])
    for source, target in ((cfg, stock_config(cfg)), (stock_config(cfg), cfg)):
        saved, loaded = build_model(source), build_model(target)
        DetectionCheckpointer(saved, str(tmp_path)).save("model")
        path = tmp_path / "model.pth"
        state = torch.load(path, weights_only=True)["model"]
        result = loaded.load_state_dict(state, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        DetectionCheckpointer(loaded).load(str(path))
        assert all(torch.equal(x, saved.state_dict()[n]) for n, x in loaded.state_dict().items())


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)], ids=["no object", "one image without"])
@pytest.mark.parametrize("base", BASES)
def test_images_without_objects_train_without_nan(base, counts):
    plugin = build_model(small_config(BASES[base]))
    losses, gradients = losses_and_gradients(plugin, make_batch(counts, mask_format="bitmask"))
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(torch.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("base", BASES)
def test_no_detections_are_a_normal_result(base):
    plugin = build_model(
        small_config(BASES[base], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    ).eval()
    batch = [{**x, "height": 64, "width": 80} for x in make_batch()]
    with torch.no_grad():
        for output in plugin(batch):
            assert len(output["instances"]) == 0
            assert output["instances"].pred_masks.shape == (0, 64, 80)


def train_a_few_iterations(model, batch, iterations=12):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    history = []
    for i in range(iterations):
        torch.manual_seed(3)
        copies = [{**x, "instances": copy_instances([x["instances"]])[0]} for x in batch]
        with EventStorage(i):
            losses = model(copies)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(np.isfinite(list(losses.values())).all() for losses in history)
    assert history[-1]["loss_mask"] < history[0]["loss_mask"] - 0.01
    model.eval()
    with torch.no_grad():
        return model([{**x, "height": 64, "width": 80} for x in batch])


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ("coco/mask_rcnn_R_50_FPN_1x.yaml", "PerClassMaskROIHeads"),
        ("misc/mask_rcnn_R_50_FPN_1x_stock_roi_heads.yaml", "StandardROIHeads"),
        ("coco/mask_rcnn_R_50_C4_1x.yaml", "PerClassMaskRes5ROIHeads"),
        ("coco/mask_rcnn_R_50_DC5_1x.yaml", "PerClassMaskROIHeads"),
        ("misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "CascadeROIHeads"),
        ("misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml", "PerClassMaskROIHeads"),
    ],
)
def test_yaml_models_train(config, heads):
    model = build_model(small_config(config))
    assert type(model.roi_heads).__name__ == heads
    assert isinstance(model.roi_heads.mask_head, FCNMaskHead)
    outputs = train_a_few_iterations(model, make_batch())
    for output in outputs:
        assert output["instances"].pred_masks.shape[1:] == (64, 80)


def test_panoptic_fpn_trains_from_yaml():
    cfg = small_config(
        "panoptic/panoptic_fpn_R_50_1x.yaml",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        "4",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM",
        "16",
        "MODEL.SEM_SEG_HEAD.NORM",
        "",
    )
    model = build_model(cfg)
    assert isinstance(model.roi_heads.mask_head, FCNMaskHead)
    outputs = train_a_few_iterations(model, make_batch(sem_seg_classes=4))
    assert {"instances", "sem_seg", "panoptic_seg"} <= set(outputs[0])


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("mask_rcnn_R_50_FPN_1x", "StandardROIHeads"),
        ("cascade_mask_rcnn_R_50_FPN_1x", "CascadeROIHeads"),
        ("panoptic_fpn_R_50_1x", "StandardROIHeads"),
    ],
)
def test_lazy_configs_train(name, heads):
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / f"{name}.py"))
    # What detectron2's lazyconfig_train_net.py asks for.
    assert {"model", "dataloader", "optimizer", "lr_multiplier", "train"} <= set(cfg)
    shrink(cfg.model)
    torch.manual_seed(3)  # from some random weights the loss takes longer to fall
    model = instantiate(cfg.model)
    assert type(model.roi_heads).__name__ == heads
    assert isinstance(model.roi_heads.mask_head, FCNMaskHead)
    stock_pooler = name != "mask_rcnn_R_50_FPN_1x"
    assert isinstance(model.roi_heads.mask_pooler, MultiLevelRoIPooler) != stock_pooler
    panoptic = "sem_seg_head" in cfg.model
    train_a_few_iterations(model, make_batch(sem_seg_classes=54 if panoptic else 0), iterations=8)


def shrink(model):
    """Makes a LazyConfig's full-size model fit for a test: narrow ResNet, FPN and heads."""
    bottom_up = model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stem.norm = bottom_up.stages.norm = "BN"
    model.backbone.out_channels = 16
    model.proposal_generator.head.in_channels = 16
    heads = model.roi_heads
    heads.num_classes, heads.batch_size_per_image = 5, 32
    heads.mask_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
    heads.mask_head.conv_dims = [16] * 5
    box_heads = heads.box_heads if "box_heads" in heads else [heads.box_head]
    for box_head in box_heads:
        box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
        box_head.fc_dims = [32]
    predictors = heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]
    for predictor in predictors:
        predictor.input_shape = ShapeSpec(channels=32)
    if "sem_seg_head" in model:
        model.sem_seg_head.conv_dims = 32
