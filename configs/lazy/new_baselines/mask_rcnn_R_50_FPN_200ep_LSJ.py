"""detectron2's config of the same name with the plugin's modules."""

from mask_head_plugin.lazy_config import counterpart

model, dataloader, optimizer, lr_multiplier, train = counterpart(
    "new_baselines/mask_rcnn_R_50_FPN_200ep_LSJ.py"
)
