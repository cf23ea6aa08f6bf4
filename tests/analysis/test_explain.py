"""The pictures of tools/explain.py and the data behind them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, load_script, small_config
from PIL import Image
from pycocotools import mask as coco_mask

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.analysis.explanation import (
    competition_figure,
    pooling_figure,
    stages_figure,
)
from mask_head_plugin.analysis.explanation import explain as explain_module
from mask_head_plugin.analysis.explanation.competition_figure import claimed_pixel
from mask_head_plugin.analysis.explanation.explain import embedded_image, explain
from mask_head_plugin.analysis.explanation.model_stages import (
    class_probs,
    features_of_box,
    run_stages,
)
from mask_head_plugin.analysis.explanation.pooling_reads import pooling_reads
from mask_head_plugin.analysis.explanation.style import DPI, PAGE_INCHES
from mask_head_plugin.engine.predictor import BGRPredictor, load_predictor
from mask_head_plugin.structures import run_lengths

SHAPES = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
ON_CPU = ["MODEL.DEVICE", "cpu"]


@pytest.fixture(scope="module")
def predictor():
    return load_predictor(load_config(SHAPES, [*ON_CPU, "MODEL.WEIGHTS", str(CHECKPOINT)]))


@pytest.fixture(scope="module")
def stages(predictor):
    return run_stages(predictor, embedded_image())


def test_the_stages_end_with_the_models_detections(predictor, stages):
    found = predictor(stages.image[:, :, ::-1])["instances"]
    assert len(found) == len(stages.boxes) > 1
    np.testing.assert_allclose(stages.boxes, found.pred_boxes.tensor, atol=1e-4)
    np.testing.assert_array_equal(stages.classes, found.pred_classes)
    assert (np.diff(stages.scores) <= 0).all()
    for number, expected in enumerate(run_lengths(found.pred_masks)):
        mask = coco_mask.decode(stages.pasted(number)[0])
        np.testing.assert_array_equal(mask, coco_mask.decode(expected))


def test_the_mask_of_the_predicted_class_is_selected(predictor, stages):
    head = predictor.model.roi_heads.mask_head
    for number, k in enumerate(stages.classes):
        probs = class_probs(head, stages.region_features[number : number + 1])
        assert probs.shape == (5, 28, 28)
        torch.testing.assert_close(probs[k], stages.mask_probs[number])


def test_a_second_model_gets_the_same_box(predictor, stages):
    features = features_of_box(predictor, stages.image, stages.rois[1], int(stages.classes[1]))
    torch.testing.assert_close(features, stages.region_features[1:2])
    assert "inference" not in vars(predictor.model)


def made_stages(name: str, *opts: str):
    """Returns an untrained predictor and its stages for an image that it enlarges."""
    rare = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "3"]
    torch.manual_seed(0)
    made = BGRPredictor(small_config(name, *rare, *opts))
    image = np.random.default_rng(0).integers(0, 256, (48, 60, 3)).astype(np.uint8)
    return made, run_stages(made, image)


STOCK = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
HEAD = "MODEL.ROI_MASK_HEAD."


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("Base-MaskRCNN-C4.yaml", []),
        ("Base-MaskRCNN-FPN.yaml", [*STOCK, HEAD + "NAME", "MaskRCNNConvUpsampleHead"]),
        ("Base-MaskRCNN-FPN.yaml", [HEAD + "CLS_AGNOSTIC_MASK", "True"]),
        ("Base-MaskRCNN-FPN.yaml", [HEAD + "LOSSES", '[["softmax_cross_entropy", 1.0]]']),
        ("misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", []),
    ],
)
def test_models_of_other_architectures_and_losses_are_drawn(name, opts):
    made, found = made_stages(name, *opts)
    probs = class_probs(made.model.roi_heads.mask_head, found.region_features[:1])
    k = 0 if len(probs) == 1 else found.classes[0]
    torch.testing.assert_close(probs[k], found.mask_probs[0], atol=1e-5, rtol=1e-4)
    assert found.classes_compete == ("softmax" in str(opts))
    if found.classes_compete:
        assert probs.sum(0).max() < 1
    assert (found.pooled_hw, found.sampling_ratio) == ((14, 14), 0)
    assert found.boxes[:, 2].max() <= 60 and found.rois[:, 2].max() <= 120
    pooling_figure.pooling_figure(found, 0, 0)
    stages_figure.stages_figure(found, 0, probs)


@pytest.mark.parametrize("roi", [[121, 2, 127.5, 95], [2, 90, 120, 95.7], [125, 94, 128, 96]])
def test_rounded_boxes_are_shown_completely_on_one_page(stages, roi):
    """Includes boxes at and beyond the border of the map."""
    rois = np.array([roi, *stages.rois[1:]], np.float64)
    figure = pooling_figure.pooling_figure(replace(stages, rois=rois), 0, 0)
    assert figure.get_figheight() < 9.6
    rounded = figure.axes[0]
    cells = np.array(roi) / 4
    assert rounded.get_xlim()[0] < cells[0] - 1 and rounded.get_xlim()[1] > cells[2] + 2
    assert rounded.get_ylim()[1] < cells[1] - 1 and rounded.get_ylim()[0] > cells[3] + 2


def test_the_lines_of_roi_pools_bins_bound_the_cells_that_each_bin_reads(stages):
    figure = pooling_figure.pooling_figure(stages, 0, 0)
    reads = pooling_reads("RoIPool", stages.rois[0] / 4, stages.map_hws[0], 6, 2)
    lines = [x.get_segments() for x in figure.axes[0].collections]
    drawn = {
        round(float(x), 6) for segments in lines for (x, _), (other, _) in segments if x == other
    }
    for weights in reads.x.weights:
        cells = np.flatnonzero(weights)
        assert {cells[0], cells[-1] + 1} <= drawn
    across = np.linspace(reads.x.start, reads.x.end, 7)
    assert not {x for x in across.tolist() if not x.is_integer()} & drawn


def test_both_halves_of_the_competition_have_the_same_axes(stages):
    sigmoid = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(0))
    figure = competition_figure.competition_figure(stages, 0, sigmoid, sigmoid / 5)
    for _ in range(2):
        figure.draw_without_rendering()
    bars = [axes for axes in figure.axes if axes.get_xlabel().startswith("Probability at")]
    first, second = (axes.get_window_extent() for axes in bars)
    assert (first.x0, first.x1) == pytest.approx((second.x0, second.x1), abs=1)
    assert all("which most classes claim" in axes.get_xlabel() for axes in bars)
    width = figure.get_window_extent().x1
    assert all(axes.xaxis.label.get_window_extent().x1 <= width for axes in bars)


def test_with_many_classes_the_strip_shows_the_chosen_and_the_most_probable(stages):
    probs = torch.zeros(80, 28, 28)
    probs[60:67] = torch.arange(1, 8)[:, None, None] / 8
    chosen = int(stages.classes[0])
    assert stages_figure.strip_classes(stages, 0, probs) == [chosen, *range(60, 67)]


def test_the_circled_pixel_of_the_mask_is_claimed_by_the_most_classes():
    chosen = [[0.9, 0.8, 0.4], [0.6, 0.9, 0.1]]
    others = [[0.2, 0.7, 1.0], [0.1, 0.6, 0.9]]
    assert claimed_pixel(torch.tensor([others, chosen]), 1) == (0, 1)
    assert claimed_pixel(torch.tensor([others, chosen]) / 3, 1) == (1, 1), (
        "an empty mask is represented by its maximum"
    )


def test_all_pictures_fit_a_page_and_have_descriptions(tmp_path):
    other = tmp_path / "another.safetensors"  # replaces softmax weights
    other.write_bytes(CHECKPOINT.read_bytes())
    written = explain(
        SHAPES,
        str(CHECKPOINT),
        "",
        tmp_path,
        opts=ON_CPU,
        detection=2,
        softmax_weights=str(other),
    )
    names = ("stages", "roi_pooling", "competition")
    assert [x.name for x in written] == [f"{x}.{kind}" for x in names for kind in ("png", "svg")]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == PAGE_INCHES * DPI and len(image.text["Description"]) > 50
        else:
            root = ElementTree.parse(path).getroot()
            assert float(root.get("width").removesuffix("pt")) == PAGE_INCHES * 72
            assert "box" in "".join(root.itertext())


def test_the_tool_reports_errors_in_one_line(monkeypatch, capsys, tmp_path):
    tool = load_script("tools/explain.py")
    flags = ["--input", str(tmp_path / "missing.jpg"), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["explain.py", *flags, "--opts", *ON_CPU])
    assert tool.main() == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("explain.py: ")]
    assert "missing.jpg" in line
    for wrong, message in (
        (["--weights", "x.pth"], "--config-file and --weights belong together"),
        (["--input", ""], "--input is empty: name an image"),
    ):
        monkeypatch.setattr("sys.argv", ["explain.py", *wrong])
        with pytest.raises(SystemExit):
            tool.main()
        assert message in capsys.readouterr().err


COMPETING = ["MODEL.ROI_MASK_HEAD.LOSSES", '[["softmax_cross_entropy", 1.0]]']


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"detection": 99}, r"--detection 99: the model finds \d+ objects"),
        ({"detection": 0}, "--detection 0"),
        ({"num_bins": -1}, "--bins -1 cannot be drawn: use 1 to 14"),
        ({"num_bins": 15}, "--bins 15 cannot be drawn: use 1 to 14"),
        ({"image_file": "missing.jpg"}, "missing.jpg"),
        ({"weights": "missing.pth"}, "file missing.pth does not exist"),
        ({"softmax_weights": "missing.pth"}, "file missing.pth does not exist"),
        ({"opts": ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]}, "finds no object in this image"),
        ({"opts": ["MODEL.MASK_ON", "False"]}, "no mask branch"),
        ({"opts": ["MODEL.WEIGHTS", "other.pth"]}, "file other.pth does not exist"),
        ({"opts": ["MODEL.MASK_ON"]}, "'MODEL.MASK_ON' has no value"),
        ({"opts": COMPETING, "softmax_weights": str(CHECKPOINT)}, "already compete"),
        ({"softmax_weights": str(CHECKPOINT)}, "the first model uses the same"),
    ],
)
def test_an_error_names_what_cannot_be_drawn_and_nothing_is_written(changed, message, tmp_path):
    arguments = {
        "config_file": SHAPES,
        "weights": str(CHECKPOINT),
        "image_file": "",
        "output": tmp_path / "out",
        **changed,
    }
    arguments["opts"] = [*ON_CPU, *changed.get("opts", [])]
    with pytest.raises(ConfigError, match=message):
        explain(**arguments)
    assert not list(Path(tmp_path).rglob("*.png"))


def test_an_unusable_output_folder_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(explain_module, "load_predictor", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output .*file is not a folder that can be written"):
        explain(SHAPES, str(CHECKPOINT), "", tmp_path / "file", opts=ON_CPU)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "softmax_cross_entropy"])
def test_weights_trained_without_softmax_are_reported(tmp_path, caplog, loss):
    cfg = load_config(SHAPES, ["MODEL.ROI_MASK_HEAD.LOSSES", f'[["{loss}", 1.0]]'])
    weights = str(tmp_path / "model_final.pth")
    explain_module._warn_of_other_losses(weights)
    (tmp_path / "config.yaml").write_text("no: config")
    explain_module._warn_of_other_losses(weights)
    assert "--softmax-weights" not in caplog.text, (
        "without a readable config, there must be no warning"
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    explain_module._warn_of_other_losses(weights)
    told = [x for x in caplog.messages if loss in x and str(tmp_path / "config.yaml") in x]
    assert len(told) == (loss == "binary_cross_entropy")


@pytest.mark.parametrize("score", [0.5, 0.4])
def test_the_last_stage_mentions_confident_boxes_only_if_there_are_some(stages, score):
    number = len(stages.scores) - 1
    scores = np.full_like(stages.scores, score)
    figure = stages_figure.stages_figure(
        replace(stages, scores=scores), number, stages.mask_probs[number : number + 1]
    )
    told = " ".join(axes.get_xlabel() for axes in figure.axes)
    assert ("No box scores 50% or more" in told) == (score < 0.5)
    assert ("masks of all boxes that score 50%" in told) == (score >= 0.5)


@pytest.mark.parametrize("hw", [(900, 90), (90, 900), (96, 128)])
def test_very_long_images_are_cropped_around_the_box(stages, hw):
    for x, y in ((0, 0), (hw[1] - 60, hw[0] - 50)):
        moved = np.array([x, y, x + 60, y + 50], float)
        long = replace(stages, image=np.zeros((*hw, 3), np.uint8), boxes=moved[None])
        x0, y0, x1, y1 = stages_figure.shown_part(long, 0)
        assert 0 <= x0 <= moved[0] and moved[2] <= x1 <= hw[1]
        assert 0 <= y0 <= moved[1] and moved[3] <= y1 <= hw[0]
        assert max(x1 - x0, y1 - y0) == min(max(hw), 2.5 * min(hw))
    assert (stages_figure.shown_part(stages, 0)[2:] == stages.image.shape[1::-1]).all()
