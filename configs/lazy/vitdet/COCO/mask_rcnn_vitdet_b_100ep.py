"""detectron2's config of the same name with the plugin's modules."""

from mask_head_plugin.lazy_config import counterpart

model, dataloader, optimizer, lr_multiplier, train = counterpart(
    "projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py"
)
