"""detectron2's Cascade R-CNN with the plugin's modules, trained like mask_rcnn_R_50_FPN_1x.py."""

from detectron2.model_zoo import get_config

from mask_head_plugin.lazy_config import use_plugin_modules

# These names are part of the config: LazyConfig reads the names of this module.
from .mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = use_plugin_modules(get_config("common/models/cascade_rcnn.py").model)
model.backbone.bottom_up.freeze_at = 2
