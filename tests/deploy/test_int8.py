"""8-bit models: calibrated on the user's images, and refused if they lose accuracy."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import CHECKPOINT, CONFIGS

from mask_head_plugin.config import ConfigError
from mask_head_plugin.data import shapes
from mask_head_plugin.deploy import accuracy, export
from mask_head_plugin.deploy.accuracy import Accuracy
from mask_head_plugin.deploy.export import ExportOptions, export_model
from mask_head_plugin.deploy.model_folder import read_model_folder
from mask_head_plugin.deploy.runtime import Predictor
from mask_head_plugin.evaluation.difference import PairedDifference

SHAPES = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
WEIGHTS = ["MODEL.WEIGHTS", str(CHECKPOINT)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Returns options of a config whose data sets contain a few shapes."""
    folder = tmp_path_factory.mktemp("data")
    shapes.write_split(folder, "train", 6)
    shapes.write_split(folder, "val", 6)
    files = [
        [f"few_{split}", str(folder / "annotations" / f"{split}.json"), str(folder / split)]
        for split in ("train", "val")
    ]
    names = ["DATASETS.TRAIN", "('few_train',)", "DATASETS.TEST", "('few_val',)"]
    return [*WEIGHTS, "DATASETS.COCO_FILES", str(files), *names]


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """Exports to int8; returns the folder and the comparison with the trained model."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "MOST_AP_LOSS", 10)  # with so few images, one mask can cost a point
        return folder, export_model(SHAPES, data, folder, ExportOptions("onnx", precision="int8"))


@pytest.fixture
def no_conversion(exported, monkeypatch):
    """Replaces the conversion with a copy of the model in ``exported``."""

    def copy(*args):
        return Path(shutil.copy(exported[0] / "model.onnx", args[-1]))

    monkeypatch.setattr(export, "converted", copy)


def test_the_int8_model_is_small_and_has_no_custom_operators(exported):
    folder, _ = exported
    model = onnx.load(folder / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 17)]
    # Weights take one byte each, half as much as in the checkpoint.
    assert (folder / "model.onnx").stat().st_size < 0.65 * CHECKPOINT.stat().st_size
    assert read_model_folder(folder).model.precision == "int8"


def test_the_int8_model_finds_the_same_objects_as_the_trained_one(exported):
    _, found = exported
    assert found.dataset == "6 images of few_val" and len(found.counts) == 6
    assert set(found.ap) == {"bbox", "segm"}
    assert all(min(ap.baseline, ap.value) > 50 for ap in found.ap.values())
    assert found.num_sure > 12 and min(found.agreement.values()) > 0.9


def test_the_int8_model_runs_on_an_image_without_detections(exported):
    found = Predictor(exported[0], threads=1)(np.full((40, 61, 3), 128, np.uint8))
    assert len(found) == 0 and found.masks == []


@pytest.mark.usefixtures("no_conversion")
def test_calibration_images_without_detections_are_refused(data, tmp_path):
    cv2.imwrite(str(tmp_path / "blank.png"), np.full((96, 128, 3), 128, np.uint8))
    options = ExportOptions(
        "onnx", precision="int8", calibration_images=[str(tmp_path / "blank.png")]
    )
    with pytest.raises(ConfigError, match="finds nothing in any calibration image"):
        export_model(SHAPES, data, tmp_path / "x", options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("DATASETS.TRAIN", r"pass --calibration-images \(data set 'nowhere' is not registered"),
        ("DATASETS.TEST", r"pass --images \(data set 'nowhere' is not registered"),
    ],
)
def test_missing_data_sets_are_reported_before_anything_is_converted(
    data, missing, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "converted", None)
    with pytest.raises(ConfigError, match=message):
        export_model(
            SHAPES,
            [*data, missing, "('nowhere',)"],
            tmp_path,
            ExportOptions("onnx", precision="int8"),
        )


def test_a_missing_calibration_image_is_reported_before_anything_is_converted(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "converted", None)
    options = ExportOptions("onnx", precision="int8", calibration_images=["nowhere.png"])
    with pytest.raises(ConfigError, match=r"--calibration-images: nowhere.png is not a file"):
        export_model(SHAPES, data, tmp_path, options)


def outputs(scores, *, shift=0.0):
    """Returns detections of one class in a row, 10 x 10 pixels each, with 2 x 2 masks."""
    left = 20.0 * np.arange(len(scores)) + shift
    masks = np.zeros((len(scores), 2, 2), np.float32)
    masks[:, 0] = 0.9
    return {
        "boxes": np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1),
        "scores": np.array(scores, float),
        "classes": np.zeros(len(scores), int),
        "mask_probs": masks,
    }


def test_agreement_is_the_fraction_of_confident_detections_found_by_both():
    compared = Accuracy()
    compared.add(outputs([0.9, 0.9, 0.6]), outputs([0.9, 0.4]))
    # Three detections of the first model and one of the second are confident. A confident
    # detection may match one that is not confident, here the one with score 0.4.
    assert (compared.num_agreeing, compared.num_sure) == (3, 4)
    assert compared.unlike == ["the agreement of detections is 75.0%, but must be at least 90%"]
    moved = Accuracy()
    moved.add(outputs([0.9]), outputs([0.9], shift=5.0))
    assert moved.agreement == {"detections": 0.0}


def test_mask_agreement_is_the_mean_iou():
    compared, found = Accuracy(), outputs([0.9, 0.9, 0.2])
    found["mask_probs"][0] = 0.9  # covers 4 cells; the trained model's mask covers 2
    compared.add(outputs([0.9, 0.9, 0.2]), found)
    assert compared.ious == [0.5, 1.0]
    assert compared.unlike == ["the agreement of masks is 75.0%, but must be at least 90%"]


def ap_of(found, low, high):
    return Accuracy(
        counts=[1],
        dataset="9 images of mine",
        ap={
            "segm": PairedDifference(
                metric="AP",
                value=found,
                baseline=83.0,
                difference=found - 83.0,
                low=low,
                high=high,
                image_low=low,
                image_high=high,
                seed_std=0.0,
                detectable=0.0,
                has_training=False,
            )
        },
    )


@pytest.mark.parametrize(
    ("ap", "is_like"),
    [
        (ap_of(82.1, -1.2, -0.6), True),
        (ap_of(81.9, -1.4, -0.8), False),
        (ap_of(80.0, -7.0, 1.0), True),  # may be chance, as there are few images
        (ap_of(84.5, 1.0, 2.0), False),
    ],
)
def test_a_loss_of_up_to_one_point_of_ap_is_accepted(ap, is_like):
    assert (ap.unlike == []) == is_like
    assert "AP on 9 images of mine: segm 8" in str(ap) and "(trained 83.00)" in str(ap)


@pytest.mark.usefixtures("no_conversion")
def test_a_model_that_lost_accuracy_is_not_written(data, tmp_path, monkeypatch):
    def lossy(*_args):
        return ap_of(70.0, -14.0, -12.0)

    monkeypatch.setattr(export, "_quantise", lambda *_: None)
    monkeypatch.setattr(export, "compare_accuracy", lossy)
    with pytest.raises(ConfigError, match=r"segm AP on 9 images of mine is 70.00, .* 83.00"):
        export_model(SHAPES, data, tmp_path / "x", ExportOptions("onnx", precision="int8"))
    assert not (tmp_path / "x").exists()
