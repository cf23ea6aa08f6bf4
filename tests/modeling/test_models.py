"""Complete models: equality with stock, checkpoints in both directions, and other ROI heads."""

from __future__ import annotations

import pytest
import torch
from conftest import build_twins, small_config, stock_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from made_training import (
    assert_same_losses_and_gradients,
    losses_and_gradients,
    make_batch,
    train_a_few_iterations,
)

from mask_head_plugin.modeling import FCNMaskHead

BASES = {"FPN": "Base-MaskRCNN-FPN.yaml", "C4": "Base-MaskRCNN-C4.yaml"}


@pytest.mark.parametrize("base", BASES)
def test_end_to_end_losses_and_gradients_equal_stock(base):
    # FrozenBN, as in the zoo: the batch statistics of a small batch would amplify rounding errors.
    plugin, stock = build_twins(small_config(BASES[base], "MODEL.RESNETS.NORM", "FrozenBN"))
    batch = make_batch()
    assert_same_losses_and_gradients(plugin, stock, batch)


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_load_in_both_directions(base, tmp_path):
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


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)], ids=["no objects", "one empty image"])
@pytest.mark.parametrize("base", BASES)
def test_images_without_objects_train_without_nan(base, counts):
    plugin = build_model(small_config(BASES[base]))
    losses, gradients = losses_and_gradients(plugin, make_batch(counts, mask_format="bitmask"))
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(torch.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("base", BASES)
def test_an_image_without_detections_is_a_normal_result(base):
    plugin = build_model(
        small_config(BASES[base], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    ).eval()
    batch = [{**x, "height": 64, "width": 80} for x in make_batch()]
    with torch.no_grad():
        for output in plugin(batch):
            assert len(output["instances"]) == 0
            assert output["instances"].pred_masks.shape == (0, 64, 80)


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
