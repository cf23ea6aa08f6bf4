"""train_net.py as a user runs it: train, resume, evaluate; what lies in OUTPUT_DIR afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT, SHARED_DATA
from safetensors.torch import load_file

from mask_head_plugin.data import shapes
from mask_head_plugin.engine import export_safetensors

CONFIG = "configs/shapes/mask_rcnn_shapes.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs train_net.py on a six-image data set; returns the finished process."""
    folder = tmp_path_factory.mktemp("run")
    for split in ("train", "val"):
        shapes.write_split(folder / "data", split, 6)
    files = [
        [f"six_{s}", str(folder / "data" / "annotations" / f"{s}.json"), str(folder / "data" / s)]
        for s in ("train", "val")
    ]

    def run_train_net(*args: str, config: str = CONFIG) -> subprocess.CompletedProcess[str]:
        flags = [a for a in args if a.startswith("--")]
        opts = [a for a in args if not a.startswith("--")]
        command = [
            *(sys.executable, "train_net.py", "--config-file", config, *flags),
            *("DATASETS.COCO_FILES", repr(files), "DATASETS.TRAIN", "('six_train',)"),
            *("DATASETS.TEST", "('six_val',)", "OUTPUT_DIR", str(folder / "output")),
            *("MODEL.DEVICE", "cpu", *opts),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    run_train_net.output = folder / "output"
    return run_train_net


@pytest.fixture(scope="module")
def trained(run):
    result = run("SOLVER.MAX_ITER", "20", "SOLVER.WARMUP_ITERS", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run.output / "metrics.json").read_text().splitlines()]


def test_training_leaves_checkpoint_metrics_events_log_and_contact_sheet(run, trained):
    names = {path.name for path in run.output.iterdir()}
    assert {"model_final.pth", "metrics.json", "log.txt", "config.yaml", "inference"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    last = metrics(run)[-1]
    assert {"bbox/AP", "segm/AP", "segm/AP-ring", "loss_mask", "mask_rcnn/accuracy"} <= set(last)
    sheet = cv2.imread(str(run.output / "contact_sheet_six_val.png"))
    assert sheet.shape[1] == 3 * (2 * 400 + 12) and sheet.std() > 10


def test_training_prints_the_time_left_and_the_ap_table(trained):
    assert "eta: " in trained.stdout
    assert "Evaluation results for segm" in trained.stdout


def test_resume_goes_on_from_the_last_checkpoint(run, trained):
    result = run("--resume", "SOLVER.MAX_ITER", "22", "SOLVER.WARMUP_ITERS", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 20" in result.stdout
    assert metrics(run)[-1]["iteration"] == 21


def test_evaluation_of_exported_weights_equals_that_of_the_checkpoint(run, trained, tmp_path):
    results = []
    path = tmp_path / "x" / "weights.safetensors"
    export_safetensors(run.output / "model_final.pth", path)
    for weights in (run.output / "model_final.pth", path):
        result = run("--eval-only", "MODEL.WEIGHTS", str(weights))
        assert result.returncode == 0, result.stderr[-3000:]
        predictions = run.output / "inference" / "coco_instances_results.json"
        results.append(predictions.read_text())
    assert results[0] == results[1]


def test_half_precision_export_rounds_kernels_only(run, trained, tmp_path):
    path = tmp_path / "half.safetensors"
    export_safetensors(run.output / "model_final.pth", path, half=True)
    exact = torch.load(run.output / "model_final.pth", weights_only=True)["model"]
    for name, weight in load_file(path).items():
        if weight.dim() > 1:
            assert weight.dtype == torch.float16
            torch.testing.assert_close(weight.float(), exact[name], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(weight, exact[name])


def test_evaluation_with_test_time_augmentation(run, trained):
    result = run(
        *("--eval-only", "MODEL.WEIGHTS", str(run.output / "model_final.pth")),
        *("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.MAX_SIZE", "128"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "evaluating with test-time augmentation" in result.stdout
    assert (run.output / "inference_TTA").is_dir()


def test_a_tampered_checkpoint_is_not_executed(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    result = run("--eval-only", "MODEL.WEIGHTS", str(path))
    assert result.returncode != 0
    assert not (tmp_path / "executed").exists()


def test_help_shows_detectron2s_flags_and_examples():
    result = subprocess.run(
        [sys.executable, "train_net.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0
    for flag in (
        *("--config-file", "--resume", "--eval-only", "--num-gpus"),
        *("--num-machines", "--machine-rank", "--dist-url", "opts", "contact_sheet"),
    ):
        assert flag in result.stdout


def test_train_net_is_under_80_lines():
    assert len((ROOT / "train_net.py").read_text().splitlines()) < 80


def test_checkpoint_of_the_repository_is_small():
    assert CHECKPOINT.stat().st_size < 3e6


@pytest.mark.parametrize("name", ["nuclei"])
def test_config_for_real_images_trains(run, name, tmp_path):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real images are not at {SHARED_DATA}")
    (config,) = (CONFIGS / name).glob("mask_rcnn_*.yaml")
    command = [
        *(sys.executable, "train_net.py", "--config-file", str(config), "MODEL.DEVICE", "cpu"),
        *("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)),
    ]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(SHARED_DATA)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "model_final.pth").is_file()
