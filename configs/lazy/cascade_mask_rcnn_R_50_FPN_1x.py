"""FCNMaskHead in CascadeROIHeads, as a LazyConfig: mask_rcnn_R_50_FPN_1x.py with another model.

Run it with detectron2's tools/lazyconfig_train_net.py.
"""

from detectron2.model_zoo import get_config

from mask_head_plugin.modeling import FCNMaskHead

# Imported to be part of this config: LazyConfig takes the names of the module.
from .mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = get_config("common/models/cascade_rcnn.py").model
model.backbone.bottom_up.freeze_at = 2
model.roi_heads.mask_head._target_ = FCNMaskHead
