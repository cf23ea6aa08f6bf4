"""FCNMaskHead in PanopticFPN, as a LazyConfig: detectron2's panoptic_fpn_R_50_1x.py otherwise.

Run it with detectron2's tools/lazyconfig_train_net.py.
"""

from detectron2.model_zoo import get_config

from mask_head_plugin.modeling import FCNMaskHead

_stock = get_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")

model = _stock.model
model.roi_heads.mask_head._target_ = FCNMaskHead

dataloader = _stock.dataloader
lr_multiplier = _stock.lr_multiplier
optimizer = _stock.optimizer
train = _stock.train
