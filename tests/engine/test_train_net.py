"""train_net.py as a user runs it: training, resuming, evaluation, the files in OUTPUT_DIR."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from conftest import CHECKPOINT, ROOT, SHARED_DATA, SMALL_RESNET
from detectron2.config import CfgNode
from quick_processes import run_script
from safetensors.torch import load_file

from mask_head_plugin import load_config
from mask_head_plugin.checkpoint import export_safetensors
from mask_head_plugin.data import register_coco_files, shapes
from mask_head_plugin.engine import Trainer

CONFIG = "configs/shapes/mask_rcnn_shapes.yaml"


def run_in_new_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user would, including all imports."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a function that runs train_net.py on a data set of six images."""
    folder = tmp_path_factory.mktemp("run")
    for split in ("train", "val"):
        shapes.write_split(folder / "data", split, 6)
    files = [
        [f"six_{s}", str(folder / "data" / "annotations" / f"{s}.json"), str(folder / "data" / s)]
        for s in ("train", "val")
    ]
    fixed = [
        *("DATASETS.COCO_FILES", repr(files), "DATASETS.TRAIN", "('six_train',)"),
        *("DATASETS.TEST", "('six_val',)", "OUTPUT_DIR", str(folder / "output")),
        *("MODEL.DEVICE", "cpu"),
    ]

    def run_train_net(*args: str, start=run_script) -> subprocess.CompletedProcess[str]:
        flags = [a for a in args if a.startswith("--")]
        opts = [a for a in args if not a.startswith("--")]
        return start("train_net.py", "--config-file", CONFIG, *flags, *fixed, *opts)

    run_train_net.output = folder / "output"
    run_train_net.fixed = fixed
    return run_train_net


@pytest.fixture(scope="module")
def trained(run):
    # This config sets bit masks. Setting polygons tests that the files decide the format.
    opts = ["SOLVER.MAX_ITER", "20", "SOLVER.WARMUP_ITERS", "1", "INPUT.MASK_FORMAT", "polygon"]
    result = run(*opts, "SOLVER.IMS_PER_BATCH", "2", start=run_in_new_process)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def config_of(run, output: Path, *opts: str) -> CfgNode:
    """Returns the config of a run in this process, with its data sets registered."""
    cfg = load_config(str(ROOT / CONFIG), [*run.fixed, "OUTPUT_DIR", str(output), *opts])
    register_coco_files(cfg)
    return cfg


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run.output / "metrics.json").read_text().splitlines()]


def test_training_writes_checkpoint_metrics_events_log_and_contact_sheet(run, trained):
    names = {path.name for path in run.output.iterdir()}
    assert {"model_final.pth", "metrics.json", "log.txt", "config.yaml", "inference"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    written = {key for line in metrics(run) for key in line}
    wanted = {"bbox/AP", "segm/AP", "segm/AP-ring", "loss_mask", "mask_rcnn/accuracy"}
    assert wanted <= written
    sheet = cv2.imread(str(run.output / "contact_sheet_six_val.png"))
    assert sheet.shape[1] == 3 * (2 * 400 + 12) and sheet.std() > 10


def test_training_prints_the_time_left_and_the_ap_table(trained):
    assert "eta: " in trained.stdout
    assert "Evaluation of six_val" in trained.stdout
    assert "to see the model's errors: python tools/analyze.py" in trained.stdout
    table = [line.split("|")[1].strip() for line in trained.stdout.splitlines() if "|" in line]
    assert {"bbox", "segm", "boundary", "ring"} <= set(table)


def test_the_device_and_a_changed_mask_format_are_printed_and_logged(run, trained):
    log = (run.output / "log.txt").read_text()
    for text in ("INPUT.MASK_FORMAT is now bitmask", "running on cpu"):
        assert trained.stdout.count(text) == 1 and log.count(text) >= 1


def test_resume_continues_from_the_last_checkpoint(run, trained):
    result = run("--resume", "SOLVER.MAX_ITER", "22", "SOLVER.WARMUP_ITERS", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 20" in result.stdout
    assert [x["iteration"] for x in metrics(run) if "loss_mask" in x][-1] == 21


def test_exported_weights_are_evaluated_like_the_checkpoint(run, trained, tmp_path):
    results = []
    path = tmp_path / "x" / "weights.safetensors"
    export_safetensors(run.output / "model_final.pth", path)
    for weights in (run.output / "model_final.pth", path):
        cfg = config_of(run, tmp_path, "MODEL.WEIGHTS", str(weights))
        Trainer.test(cfg, Trainer.load_model(cfg))
        results.append((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert results[0] == results[1] != "[]"


def test_half_precision_export_rounds_only_kernels(run, trained, tmp_path):
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
        "--eval-only",
        "MODEL.WEIGHTS",
        str(run.output / "model_final.pth"),
        "TEST.AUG.ENABLED",
        "True",
        "TEST.AUG.MIN_SIZES",
        "(96,)",
        "TEST.AUG.MAX_SIZE",
        "128",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "evaluating with test-time augmentation" in result.stdout
    assert (run.output / "inference_TTA").is_dir()


def test_a_model_without_masks_trains_and_draws_no_sheet(run, tmp_path):
    Trainer(config_of(run, tmp_path, "SOLVER.MAX_ITER", "2", "MODEL.MASK_ON", "False")).train()
    assert (tmp_path / "metrics.json").is_file() and not list(tmp_path.glob("*.png"))


def test_help_shows_detectron2s_flags_and_examples():
    result = run_in_new_process("train_net.py", "--help")
    assert result.returncode == 0
    for flag in (
        *("--config-file", "--resume", "--eval-only", "--num-gpus"),
        *("--num-machines", "--machine-rank", "--dist-url", "opts", "contact_sheet"),
    ):
        assert flag in result.stdout


def test_train_net_has_fewer_than_80_lines():
    assert len((ROOT / "train_net.py").read_text().splitlines()) < 80


def test_the_repositorys_checkpoint_is_small():
    assert CHECKPOINT.stat().st_size < 3e6


def coco_files(kind: str) -> list[str]:
    entries = [
        [f"{kind}_{split}", f"{kind}_{split}/annotations.json", f"{kind}_{split}/images"]
        for split in ("train", "val")
    ]
    return ["DATASETS.COCO_FILES", repr(entries), "DATASETS.TRAIN", f"('{kind}_train',)"]


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("nuclei/mask_rcnn_nuclei.yaml", ["DATASETS.TEST", "()"]),
        (
            "coco/mask_rcnn_R_50_FPN_1x.yaml",
            [
                *(
                    *SMALL_RESNET,
                    "MODEL.ROI_HEADS.NUM_CLASSES",
                    "80",
                    "DATALOADER.NUM_WORKERS",
                    "2",
                ),
                *("INPUT.MASK_FORMAT", "polygon", "DATASETS.TEST", "('coco_photos_val',)"),
                *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01", *coco_files("coco_photos")),
            ],
        ),
    ],
    ids=["nuclei", "photographs"],
)
def test_training_works_on_real_images(config, opts, tmp_path):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real images are not at {SHARED_DATA}")
    fixed = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path)]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(SHARED_DATA)}
    result = run_script(
        "train_net.py", "--config-file", f"configs/{config}", *fixed, *opts, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "model_final.pth").is_file()
