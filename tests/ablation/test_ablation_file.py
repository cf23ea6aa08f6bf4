"""Ablation files: the rows of the paper's tables; errors that name the file, variant and key."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import CONFIGS

from mask_head_plugin import ConfigError
from mask_head_plugin.ablation import load_ablation
from mask_head_plugin.config_check import check_config
from mask_head_plugin.engine import Trainer

ABLATIONS = CONFIGS / "ablations"
SIZES = [
    (path.stem, size)
    for path in sorted(ABLATIONS.glob("*.yaml"))
    for size in yaml.safe_load(path.read_text())["SIZES"]
]
ROWS = [
    (file, name)
    for file, size in SIZES
    if size == "shapes"
    for name in load_ablation(ABLATIONS / f"{file}.yaml", size).configs
]


@pytest.mark.parametrize(("file", "size"), SIZES)
def test_every_variant_is_a_config_that_passes_the_check(file, size, tmp_path):
    ablation = load_ablation(ABLATIONS / f"{file}.yaml", size)
    assert ablation.baseline in ablation.configs and set(ablation.paper) <= set(ablation.configs)
    for cfg in ablation.configs.values():
        cfg.OUTPUT_DIR = str(tmp_path)
        cfg.MODEL.TIMM.CHECKPOINT = ""  # the file must be fetched before a real run
        check_config(cfg, train=True)
    texts = {cfg.dump() for cfg in ablation.configs.values()}
    assert len(texts) == len(ablation.configs), "two variants have the same config"


def test_table_2c_sets_both_heads():
    configs = load_ablation(ABLATIONS / "roi_pooling.yaml", "shapes").configs
    rows = [
        ("ROIPool, max", "ROIPool", "mean"),
        ("ROIWarp, max", "ROIWarp", "max"),
        ("ROIWarp, mean", "ROIWarp", "mean"),
        ("ROIAlign, max", "ROIAlignV2", "max"),
        ("ROIAlign, mean", "ROIAlignV2", "mean"),
    ]
    for name, pooler_type, reduction in rows:
        for head in (configs[name].MODEL.ROI_BOX_HEAD, configs[name].MODEL.ROI_MASK_HEAD):
            assert (head.POOLER_TYPE, head.POOLER_REDUCTION) == (pooler_type, reduction)
    ratios = {configs[name].MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO for name in configs}
    assert ratios == {0, 1, 2, 4}


def test_table_2d_pools_at_stride_32():
    shapes, coco = (
        load_ablation(ABLATIONS / "roi_pooling_stride32.yaml", size).configs["ROIPool"]
        for size in ("shapes", "coco")
    )
    assert shapes.MODEL.ROI_HEADS.IN_FEATURES == ["p5"]
    assert coco.MODEL.ROI_HEADS.IN_FEATURES == ["res5"] and coco.MODEL.RESNETS.RES5_DILATION == 1


@pytest.mark.parametrize(("file", "name"), ROWS)
def test_every_row_trains(file, name, tmp_path):
    cfg = load_ablation(ABLATIONS / f"{file}.yaml", "shapes").configs[name]
    opts = {"OUTPUT_DIR": str(tmp_path), "SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 1}
    opts["SOLVER.IMS_PER_BATCH"] = 2
    cfg.merge_from_list([x for pair in opts.items() for x in pair])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TEST", (), "SEED", 1])
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 1
    assert all(torch.isfinite(torch.tensor(line["total_loss"])) for line in lines)


def write(path, **changes):
    content = {
        "TITLE": "x",
        "METRIC": "segm/AP",
        "SEEDS": [1],
        "SIZES": {"shapes": {"CONFIG": str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")}},
        "BASELINE": "a",
        "VARIANTS": {"a": {}, "b": {"SOLVER": {"GAMMA": 0.5}}},
        **changes,
    }
    path.write_text(yaml.safe_dump({key: v for key, v in content.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"VARIANTS": {"a": {"MODEL": {"ROI_BOX_HEAD": {"POOLER_TIPE": "x"}}}}},
            r"'a'.*POOLER_TIPE",
        ),
        ({"VARIANTS": {"a": {"SEED": "many"}}}, r"variant 'a': SEED takes a value of type int"),
        ({"VARIANTS": {"a": {"SEED": 3}}}, r"'a': SEED has no effect, .* from SEEDS or --seed"),
        ({"VARIANTS": {"a": {"OUTPUT_DIR": "x"}}}, r"OUTPUT_DIR has no effect, .* from --output"),
        ({"VARIANTS": {"a": [3]}}, r"variant 'a' does not contain"),
        ({"BASELINE": "c"}, r"BASELINE names 'c', which is not a variant"),
        ({"PAPER": {"aa": {"segm/AP": 1.0}}}, r"PAPER names 'aa'.*did you mean 'a'"),
        ({"PAPER": {"a": 3}}, r"PAPER of 'a' must be a dict of metrics"),
        ({"PAPER": {"a": {"segm/AP": "high"}}}, r"PAPER of 'a' must be a dict of metrics"),
        ({"PAPER": ["a"]}, r"PAPER must be a dict"),
        ({"SEEDS": [1, 1]}, r"SEEDS \[1, 1\]"),
        ({"SIZES": {"shapes": {"CONFIG": 3}}}, r"size 'shapes' needs a CONFIG"),
        (
            {"VARIANTS": {"a": {"SOLVER": {"MAX_ITER": None}}}},
            r"SOLVER.MAX_ITER has no value",
        ),
        ({"SEEDS": [1, "2"]}, r"SEEDS \[1, '2'\]: seeds must be distinct whole"),
        ({"TITLE": None}, r"TITLE must be a non-empty str"),
        ({"VARIANT": {}}, r"unknown keys \['VARIANT'\]"),
        ({"SIZES": {"coco": {"CONFIG": "x.yaml"}}}, r"no size 'shapes'; choose from \['coco'\]"),
        ({"SIZES": {"shapes": {"BASE": "x.yaml"}}}, r"size 'shapes' needs a CONFIG"),
        ({"SIZES": {"shapes": {"CONFIG": "x.yaml"}}}, r"x.yaml does not exist"),
    ],
)
def test_an_error_names_the_entry_that_does_not_fit(changes, message, tmp_path):
    path = write(tmp_path / "ablation.yaml", **changes)
    with pytest.raises(ConfigError, match=message):
        load_ablation(path, "shapes")


def test_a_repeated_variant_is_refused(tmp_path):
    path = write(tmp_path / "ablation.yaml")
    path.write_text(path.read_text() + "  b:\n    SEED: 4\n")
    with pytest.raises(ConfigError, match=r"'b' appears twice"):
        load_ablation(path, "shapes")


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00", "[" * 5000])
def test_files_that_are_not_yaml_sections_are_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_ablation(tmp_path / "x.yaml", "shapes")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_ablation(tmp_path / "nowhere.yaml", "shapes")
