"""The command line of tools/compare_zoo.py: verdicts, files, exit codes and one-line errors."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import cv2
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_head_plugin import ConfigError
from mask_head_plugin.comparison import compare, measurement, twins
from mask_head_plugin.comparison.zoo import ZOO_MODELS, find_config

CONFIG = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
NUM_IMAGES = 16
# Only about 30 detections in so few images are confident. With a low threshold, there are enough.
MANY = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0005"]
JOB = ["--config", CONFIG, "--weights", CHECKPOINT]


def tool(capsys, *args):
    """Runs tools/compare_zoo.py in this process.

    Returns the exit code, stdout, and the last line of stderr.
    """
    spec = importlib.util.spec_from_file_location("compare_tool", ROOT / "tools/compare_zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare_zoo.py", *map(str, args)])
        code = module.main()
    out, err = capsys.readouterr()
    return code, out, (err.strip().splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("compare") / "new" / "folder"
    args = (CONFIG, str(CHECKPOINT), "shapes_val", output, NUM_IMAGES, MANY, 0.0005)
    return output, compare.compare_config(*args)


def test_identical_weights_are_reported_as_equal(result):
    output, found = result
    assert found.verdict == "equal"
    agreement = found.agreement
    assert agreement.images == NUM_IMAGES and agreement.confident >= 100
    assert agreement.images_with_other_set == agreement.far_mask_pixels == 0
    # The two models compute masks differently. A difference of exactly 0 would mean that the same
    # model ran twice.
    assert agreement.score < 1e-4 and agreement.box < 1e-3 and 0 < agreement.mask_prob
    written = json.loads((output / "comparison.json").read_text())
    assert written["verdict"] == "equal" and written["agreement"]["score"] == agreement.score
    assert written["num_tensors"] == 140 and len(written["weights_sha256"]) == 64


def test_ap_is_computed_on_the_chosen_images_and_equal_for_both_models(result):
    output, found = result
    assert list(found.ap) == ["bbox", "segm", "boundary"]
    for task, ap in found.ap.items():
        assert 20 < ap.stock <= 100 and abs(ap.difference) < 0.1 and ap.low <= 0 <= ap.high
        for side, value in (("stock", ap.stock), ("plugin", ap.plugin)):
            metrics = json.loads((output / side / "metrics.json").read_text())
            assert metrics["num_images"] == NUM_IMAGES and metrics[task]["AP"] == value


def test_costs_are_reported_for_both_models(result):
    for cost in result[1].costs.values():
        assert 0 < cost.network_seconds < cost.seconds < 10 and 1 < cost.peak_megabytes < 1000
    assert result[1].costs["stock"] != result[1].costs["plugin"]


def test_the_markdown_report_links_valid_pictures(result):
    output, found = result
    text = (output / "comparison.md").read_text()
    assert "Verdict: **equal**" in text and f"{found.ap['segm'].plugin:.3f}" in text
    assert "nan" not in text and "published" in text
    pictures = sorted((output / "pictures").iterdir())
    assert len(pictures) == max(3, min(6, len(found.differing)))
    for path in pictures:
        assert cv2.imread(str(path)).shape == (316, 1170, 3)  # three panels of 288 x 384 pixels
        assert f"](pictures/{path.name})" in text


def test_images_are_chosen_evenly_over_the_data_set(tmp_path):
    name = measurement.choose_images("shapes_val", 3, tmp_path)
    records = DatasetCatalog.get("shapes_val")
    chosen = [x["image_id"] for x in DatasetCatalog.get(name)]
    last = len(records) - 1
    assert chosen == [records[k]["image_id"] for k in (0, last // 2, last)]
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert [x["id"] for x in content["images"]] == chosen
    assert {x["image_id"] for x in content["annotations"]} <= set(chosen)
    assert MetadataCatalog.get(name).json_file == str(tmp_path / "annotations.json")
    assert measurement.choose_images("shapes_val", len(records), tmp_path) == "shapes_val"


@pytest.mark.parametrize(
    ("layer", "amount"), [("mask_head.predictor.weight", 0.05), ("box_predictor.cls_score.bias", 1)]
)
def test_changed_weights_in_one_layer_are_reported_as_different(layer, amount, tmp_path):
    config = find_config(CONFIG)
    cfg = twins.load_model_config(config, MANY)
    cfg.OUTPUT_DIR = str(tmp_path)
    both = twins.load_twins(cfg, CHECKPOINT)
    parameter = both.plugin.roi_heads.get_parameter(layer)
    with torch.no_grad():
        parameter[0] += amount
    name = measurement.choose_images("shapes_val", 4, tmp_path)
    found = measurement.compare_twins(both, config, CHECKPOINT, name, tmp_path, 0.0005)
    assert found.verdict == "different" and found.differing
    if "mask" in layer:
        assert found.agreement.images_with_other_set == 0 and found.agreement.box < 1e-3
        assert found.agreement.far_mask_pixels > 0
    else:
        assert found.agreement.score > 1e-4


def test_too_few_detections_give_no_verdict(capsys, tmp_path):
    output = tmp_path / "few"
    code, out, _ = tool(capsys, *JOB, "--output", output, "--num-images", 3, *MANY[:2])
    assert code == 1 and "not enough detections" in out and str(output / "comparison.md") in out
    assert "random weights detect nothing" in (output / "comparison.md").read_text()
    code, _, err = tool(capsys, *JOB, "--output", output)
    assert code == 2 and "already has comparison.json" in err


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "equal"),
        ({"confident": 99}, "not enough detections"),
        ({"all_equal": False}, "different"),
        ({"confident": 0, "all_equal": False}, "different"),
    ],
)
def test_the_verdict_depends_on_agreement_and_number_of_detections(result, changed, verdict):
    agreement = measurement.Agreement(**{**vars(result[1].agreement), "confident": 100, **changed})
    assert agreement.verdict == verdict


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "no.yaml", "--weights", CHECKPOINT], "neither a file nor a config"),
        (["--config", CONFIG, "--weights", "no.pkl"], "--weights no.pkl does not exist"),
        (["--config", CONFIG, "--weights", "zoo"], "the zoo has no weights for"),
        ([*JOB, "--num-images", 0], "--num-images 0 must be at least 1"),
        ([*JOB, "--score", 1.5], "--score 1.5 must be at least 0 and below 1"),
        ([*JOB, "--dataset", "shapes_vol"], "did you mean 'shapes_val'"),
        ([*JOB, "--dataset", "coco_2017_val"], "coco_2017_val"),
        ([*JOB, "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"], "of another shape: roi_heads.mask_head"),
        ([*JOB, "MODEL.NO_KEY", "1"], "MODEL.NO_KEY"),
        (["--all", "--weights", CHECKPOINT], "--all needs --weights zoo or a folder of weights"),
    ],
)
def test_errors_are_one_line(args, message, capsys, tmp_path):
    code, out, err = tool(capsys, "--output", tmp_path / "out", *args)
    assert code == 2 and out == ""
    assert err.startswith("compare_zoo.py: ") and message in err


def test_all_continues_after_failures_and_ends_with_one_table(
    result, monkeypatch, capsys, tmp_path
):
    answers = iter([result[1], ConfigError("no weights"), MemoryError("too\nlarge")])
    asked = []

    def answer(config, weights, dataset, output, *_):
        asked.append((config, output))
        found = next(answers, result[1])
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(compare, "compare_config", answer)
    code, out, _ = tool(capsys, "--all", "--weights", "zoo", "--output", tmp_path)
    assert asked == [(x.config, tmp_path / x.config) for x in ZOO_MODELS]
    assert code == 2 and f"{ZOO_MODELS[1].config}: not compared, no weights" in out
    text = (tmp_path / "comparison.md").read_text()
    assert len(re.findall(r"\| equal +\|", text)) == len(ZOO_MODELS) - 2
    assert f"- {ZOO_MODELS[1].config}: no weights" in text and "MemoryError: too large" in text


def test_help_gives_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        tool(capsys, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--weights zoo --dataset coco_2017_val" in text
    assert "not enough detections" in text and text.count("python tools/compare_zoo.py") == 6
