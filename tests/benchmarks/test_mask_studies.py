"""The scripts that compare ways to read masks from logits, each run once on a few images."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT, load_script
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_head_plugin import load_config
from mask_head_plugin.engine import Trainer

DATASET = "readouts_val"


@pytest.fixture(scope="module", autouse=True)
def _scripts_import_each_other():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def run(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def test_heads_on_the_maps_of_a_model_are_compared_and_trained_once(monkeypatch, tmp_path, capsys):
    script = load_script("benchmarks/mask_real_images.py")
    output, work = tmp_path / "found.json", tmp_path / "work"
    model = ["--config-file", CONFIGS / "shapes" / "mask_rcnn_shapes.yaml", "--weights", CHECKPOINT]
    flags = ["--output", output, "--work", work, "--seeds", 1, 2, "--bins", 4, "--iterations", 2]
    flags += ["--train-images", 3, "--images", 3, "--objects", 8, 8, *model]
    run(script, monkeypatch, *flags)
    found = json.loads(output.read_text())
    assert found["objects"]["train"] <= 8 and 1 < found["images"] <= 3 and found["classes"] == 5
    rows = {(row["arm"], row["reading"]): row for row in found["rows"]}
    of_class = {(arm, name) for arm in script.ARMS for name in (script.OWN, "own class, tuned")}
    assert set(rows) == of_class | {("softmax", x) for x in (*script.READINGS, *script.TUNED)}
    assert all(row["seeds"] == 2 and 0 <= row["iou"] <= 100 for row in rows.values())
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows.values())
    by_hand = rows["softmax", script.OWN]["iou"] - rows["sigmoid", script.OWN]["iou"]
    assert rows["softmax", script.OWN]["difference"] == pytest.approx(by_hand, abs=0.011)
    assert len(list(work.iterdir())) == 8 and "class-agnostic" in capsys.readouterr().out
    monkeypatch.setattr(
        script,
        "read",
        lambda *_: pytest.fail("heads that are already trained must not be trained again"),
    )
    run(script, monkeypatch, *flags)
    assert json.loads(output.read_text())["rows"] == found["rows"]


@pytest.fixture
def few_images():
    """Registers three images of the embedded data set under a new name."""
    records = DatasetCatalog.get("shapes_val")[:3]
    DatasetCatalog.register(DATASET, lambda: records)
    classes = MetadataCatalog.get("shapes_val").thing_classes
    MetadataCatalog.get(DATASET).set(thing_classes=classes, evaluator_type="coco")
    yield
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def write_trial(folder, seed: int) -> float:
    """Writes a finished trial of the embedded model and returns its mask AP.

    The mask logits depend on the seed.
    """
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(CHECKPOINT), "DATALOADER.NUM_WORKERS", "0"]
    opts += ["DATASETS.TEST", f"('{DATASET}',)", "OUTPUT_DIR", str(folder)]
    cfg = load_config(str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"), opts)
    model = Trainer.load_model(cfg)
    with torch.no_grad():
        model.roi_heads.mask_head.predictor.bias.sub_(0.5 * seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "trial.json").write_text('{"status": "finished"}')
    return Trainer.test(cfg, model)["segm"]["AP"]


def test_reading_masks_as_in_training_reproduces_the_ap_and_other_readings_are_compared(
    few_images, monkeypatch, tmp_path, capsys
):
    """The softmax model has the sigmoid model's weights, so equal readings give equal masks."""
    script = load_script("benchmarks/mask_readouts.py")
    own, softmax = script.OWN, "softmax at 0.5"
    monkeypatch.setattr(script, "READINGS_OF", {"sigmoid": [own], "softmax": [own, softmax]})
    description = {"title": "T", "metric": "segm/AP", "baseline": "sigmoid", "dataset": DATASET}
    names = ("sigmoid", "softmax")
    description |= {"seeds": [1, 2], "variants": [{"name": x, "folder": x} for x in names]}
    (tmp_path / "ablation.json").write_text(json.dumps(description))
    aps = {x: [write_trial(tmp_path / x / f"seed_{k}", k) for k in (1, 2)] for x in names}
    assert aps["sigmoid"] == aps["softmax"] and aps["sigmoid"][0] != aps["sigmoid"][1]
    path = tmp_path / "found.json"
    run(script, monkeypatch, "--input", tmp_path, "--json", path, "--draws", 20)
    found = json.loads(path.read_text())
    for part in ("boxes found", "true boxes"):
        rows = {row["row"]: row for row in found[part]["readings"]}
        assert set(rows) == {f"sigmoid: {own}", f"softmax: {own}", f"softmax: {softmax}"}
        change = rows[f"softmax: {own}"]["AP"] - rows[f"softmax: {softmax}"]["AP"]
        assert [x["difference"] for x in found[part]["changes"]] == [
            pytest.approx(change, abs=0.011)
        ]
        gaps = {row["row"]: row for row in found[part]["gaps"]}
        assert gaps[f"softmax: {own} against sigmoid: {own}"]["difference"] == 0
    row = found["boxes found"]["readings"][0]
    assert row["seeds"] == pytest.approx(aps["sigmoid"], abs=0.006) and row["AP"] > 30
    assert found["trials"] == 4 and "true boxes: gaps" in capsys.readouterr().out
