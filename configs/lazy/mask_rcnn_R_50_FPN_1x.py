"""The plugin in a LazyConfig: detectron2's mask_rcnn_R_50_FPN_1x.py with three targets exchanged.

Run it with detectron2's tools/lazyconfig_train_net.py.
"""

from detectron2.model_zoo import get_config

from mask_head_plugin.modeling import FCNMaskHead, MultiLevelRoIPooler

_stock = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")

model = _stock.model
model.roi_heads.box_pooler._target_ = MultiLevelRoIPooler
model.roi_heads.mask_pooler._target_ = MultiLevelRoIPooler
model.roi_heads.mask_head._target_ = FCNMaskHead

dataloader = _stock.dataloader
lr_multiplier = _stock.lr_multiplier
optimizer = _stock.optimizer
train = _stock.train
