"""tools/lazyconfig_train_net.py: training, resuming and evaluation; errors that name the key."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from conftest import CONFIGS

from mask_head_plugin import ConfigError
from mask_head_plugin.comparison.measurement import choose_images
from mask_head_plugin.engine import lazy_run

LAZY = CONFIGS / "lazy"
ON_CPU = ("train.device=cpu", "train.amp.enabled=False")
SMALL = """
from detectron2.model_zoo import get_config
from made_lazy import shrink
from mask_head_plugin.lazy_config import PARTS, use_plugin_mapper, use_plugin_modules

_cfg = get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, dataloader, optimizer, lr_multiplier, train = (_cfg[x] for x in PARTS)
shrink(use_plugin_modules(model))
use_plugin_mapper(dataloader)
for _size in ("target_height", "target_width"):
    dataloader.train.mapper.augmentations[0][_size] = 96
dataloader.train.mapper.augmentations[1].crop_size = (96, 96)
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations[0].short_edge_length = 96
optimizer.lr = 0.002
"""


def run(file, *opts, resume=False, eval_only=False):
    flags = {"resume": resume, "eval_only": eval_only}
    lazy_run.train_or_evaluate(argparse.Namespace(config_file=str(file), opts=list(opts), **flags))


def test_a_run_trains_resumes_and_is_evaluated(tmp_path):
    file, folder = tmp_path / "small.py", tmp_path / "run"
    file.write_text(SMALL)
    test = choose_images("shapes_val", 3, tmp_path)
    opts = [
        *(*ON_CPU, f"train.output_dir={folder}", "dataloader.train.dataset.names=shapes_val"),
        *(f"dataloader.test.dataset.names={test}", "train.checkpointer.period=1"),
    ]
    run(file, *opts, "train.max_iter=1", "train.log_period=1")
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert saved["class_names"][0] == "ring" and saved["trainer"]["iteration"] == 0
    run(file, *opts, "train.max_iter=3", resume=True)
    trainer = torch.load(folder / "model_final.pth", weights_only=True)["trainer"]
    assert (trainer["iteration"], trainer["hooks"]["LRScheduler"]["last_epoch"]) == (2, 3)
    lines = [json.loads(x) for x in (folder / "metrics.json").read_text().splitlines()]
    assert lines[0]["loss_mask"] > 0 and "bbox/AP" in lines[-1]
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    ours = "dataloader.evaluator._target_=mask_head_plugin.evaluation.MaskEvaluator"
    run(file, *opts, weights, ours, eval_only=True)
    assert "copypaste: Task: boundary" in (folder / "log.txt").read_text()
    run(file, *opts, "train.max_iter=1", "train.eval_period=0")
    assert (folder / "earlier_run_1" / "model_0000002.pth").is_file()
    assert not (folder / "model_0000002.pth").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("train.amp.enabled=False",), r"train.device is cuda, .*add train.device=cpu"),
        (("train.device=cpu",), r"train.amp.enabled needs a GPU; add train.amp.enabled=False"),
        (("train.max_itr=3",), r"the config has no train.max_itr; did you mean train.max_iter\?"),
        (("trein.max_iter=3",), r"no trein; did you mean train.max_iter\?"),
        (
            ("model.roi_heads.mask_hed.losses=[]",),
            r"mask_hed; did you .*roi_heads.mask_head.losses",
        ),
        (
            ("model.roi_heads.mask_head.losess=[]",),
            r"^model.roi_heads.mask_head.losess: FCNMaskHead has no argument losess; did you "
            r"mean model.roi_heads.mask_head.losses\?",
        ),
        (("model.roi_heads.num_clases=5",), r"StandardROIHeads has no .*roi_heads.num_classes\?"),
        (
            ("dataloader.train.mapper.instance_mask_fromat=bitmask",),
            r"has no .* did you mean dataloader.train.mapper.instance_mask_format",
        ),
        (
            ("dataloader.evaluator._target_=mask_head_plugin.evaluation.MaskEvaluatr",),
            r"^dataloader.evaluator._target_: .*MaskEvaluatr cannot be imported",
        ),
        (("train.max_iter",), r"option train.max_iter has no '='"),
        (("train.max_iter=[",), r"options train.max_iter=\[: "),
        (
            (*ON_CPU, "dataloader.train.dataset.names=shapes_trein"),
            r"did you mean 'shapes_train'\? .*register_coco_",
        ),
        (
            (*ON_CPU, "dataloader.train.dataset.names=shapes_train"),
            r"model.roi_heads.num_classes is 80, but data set 'shapes_train' has 5 classes",
        ),
    ],
    ids=lambda x: x[-1] if isinstance(x, tuple) else "",
)
def test_errors_are_one_line_with_the_nearest_key(opts, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message) as error:
        run(LAZY / "new_baselines" / "mask_rcnn_R_50_FPN_100ep_LSJ.py", *opts)
    assert "\n" not in str(error.value)


def test_unusable_config_files_are_named(tmp_path):
    for content, message in (
        ("train = dict()", r"x.py must also set model and dataloader and optimizer"),
        ("train = ", r"config file .*x.py: .*syntax error"),
        ("from .y import train", r"config file .*x.py: .*y.py does not exist"),
    ):
        (tmp_path / "x.py").write_text(content)
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "x.py")
    with pytest.raises(ConfigError, match=r"is not a \.py file"):
        run(CONFIGS / "Base-Small.yaml")
    with pytest.raises(ConfigError, match=r"--eval-only needs train\.init_checkpoint"):
        run(LAZY / "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py", *ON_CPU, eval_only=True)
