"""Class names and their rows of weights stay together, however a model is loaded.

In the checkpoint, the classes are ordered from ring to arrow. These tests also export the same
images with the classes in reverse order. If only class numbers were used, nearly every detection
would have the wrong name.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, small_config
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.checkpoint import MaskHeadCheckpointer, WeightsPolicy, export_safetensors
from mask_head_plugin.class_names import (
    class_names_of,
    matched_predictions,
    name_classes,
    predicted_names,
)
from mask_head_plugin.comparison.twins import load_twins
from mask_head_plugin.data import register_coco_files, shapes
from mask_head_plugin.demo.demo import run_demo
from mask_head_plugin.engine import Trainer, load_predictor
from mask_head_plugin.evaluation import MaskEvaluator, contact_sheet, write_contact_sheet

CONFIG = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
NAMES = list(shapes.CLASS_NAMES)
STRAIGHT, REVERSED = "names_straight", "names_reversed"


def write_export(source: Path, target: Path, names: list[str]) -> None:
    """Writes an annotation file with its categories in the order of ``names``, numbered from 1."""
    content = json.loads(source.read_text())
    name_of = {x["id"]: x["name"] for x in content["categories"]}
    content["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    for annotation in content["annotations"]:
        annotation["category_id"] = names.index(name_of[annotation["category_id"]]) + 1
    target.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    shapes.write_split(folder, "val", 8)
    source = folder / "annotations" / "val.json"
    write_export(source, folder / "straight.json", NAMES)
    write_export(source, folder / "reversed.json", NAMES[::-1])
    return folder


@pytest.fixture(autouse=True)
def _forget_data_sets():
    yield
    for name in (STRAIGHT, REVERSED):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def config(data, *opts, test=(REVERSED,)):
    """Returns the config of the checkpoint, with the data sets of this module."""
    files = {STRAIGHT: "straight.json", REVERSED: "reversed.json"}
    entries = [[name, str(data / files[name]), str(data / "val")] for name in test]
    return load_config(
        CONFIG,
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(CHECKPOINT), "DATASETS.TRAIN", "()"),
            *("DATASETS.COCO_FILES", repr(entries), "DATASETS.TEST", repr(tuple(test))),
            *("DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(data / "output"), *opts),
        ],
    )


def evaluate(cfg, model, evaluator) -> float:
    loader = build_detection_test_loader(cfg, REVERSED, num_workers=0)
    return inference_on_dataset(model, loader, evaluator)["segm"]["AP"]


@pytest.fixture(scope="module")
def right_ap(data):
    cfg = config(data, test=(STRAIGHT,))
    register_coco_files(cfg)
    ap = Trainer.test(cfg, Trainer.load_model(cfg))["segm"]["AP"]
    assert ap > 50
    return ap


def test_trainer_evaluates_by_name(data, right_ap):
    cfg = config(data)
    register_coco_files(cfg)
    model = Trainer.load_model(cfg)
    assert class_names_of(model) == NAMES[::-1]
    assert Trainer.test(cfg, model)["segm"]["AP"] == pytest.approx(right_ap)


@pytest.mark.parametrize("evaluator", [MaskEvaluator, COCOEvaluator])
def test_weights_loaded_before_the_data_set_is_registered_are_evaluated_by_name(
    data, right_ap, evaluator, tmp_path
):
    cfg = config(data, "MODEL.WEIGHTS", "")
    predictor = DefaultPredictor(cfg)
    MaskHeadCheckpointer(predictor.model).load(str(CHECKPOINT))
    register_coco_files(cfg)
    found = evaluator(REVERSED, output_dir=str(tmp_path))
    assert evaluate(cfg, predictor.model, found) == pytest.approx(right_ap)


def test_a_model_built_without_a_data_set_is_evaluated_by_name(data, right_ap, tmp_path):
    model = build_model(config(data, test=())).eval()
    MaskHeadCheckpointer(model).load(str(CHECKPOINT))
    assert class_names_of(model) == NAMES
    name = REVERSED  # detectron2 sets its class names only when the data set is loaded
    register_coco_instances(name, {}, str(data / "reversed.json"), str(data / "val"))
    cfg = config(data, test=())
    evaluator = MaskEvaluator(name, output_dir=str(tmp_path / "stock"))
    assert evaluate(cfg, model, evaluator) == pytest.approx(right_ap)
    cfg.DATASETS.TEST = (name,)
    MetadataCatalog.get(name).evaluator_type = "coco"
    assert Trainer.test(cfg, model)["segm"]["AP"] == pytest.approx(right_ap)


def test_each_of_several_data_sets_is_evaluated_by_name(data, right_ap):
    cfg = config(data, test=(STRAIGHT,))
    register_coco_files(cfg)
    other = config(data)
    register_coco_files(other)
    cfg.DATASETS.TEST = (REVERSED, STRAIGHT)
    results = Trainer.test(cfg, Trainer.load_model(cfg))
    for name in (REVERSED, STRAIGHT):
        assert results[name]["segm"]["AP"] == pytest.approx(right_ap)


def test_test_time_augmentation_is_evaluated_by_name(data):
    opts = ["TEST.AUG.MIN_SIZES", "(128,)", "TEST.AUG.MAX_SIZE", "200", "TEST.AUG.FLIP", "False"]
    found = []
    for name in (STRAIGHT, REVERSED):
        cfg = config(data, *opts, test=(name,))
        model = build_model(cfg).eval()
        MaskHeadCheckpointer(model, policy=WeightsPolicy()).load(str(CHECKPOINT))
        assert class_names_of(model) == NAMES
        register_coco_files(cfg)
        found.append(Trainer.test_with_tta(cfg, model)["segm_TTA"]["AP"])
    assert found[0] == pytest.approx(found[1]) and found[0] > 50


def test_an_evaluator_that_uses_only_numbers_refuses_another_class_order(data, monkeypatch):
    cfg = config(data)
    model = build_model(cfg)
    MaskHeadCheckpointer(model, policy=WeightsPolicy()).load(str(CHECKPOINT))
    register_coco_files(cfg)
    evaluator = COCOEvaluator(REVERSED, output_dir=cfg.OUTPUT_DIR)
    with pytest.raises(
        ConfigError, match="COCOEvaluator needs the classes of names_reversed in the model's order"
    ):
        Trainer.test(cfg, model, evaluator)


def test_a_data_set_with_other_classes_is_refused_by_evaluation_and_training(data, tmp_path):
    write_export(data / "straight.json", tmp_path / "other.json", NAMES)
    text = (tmp_path / "other.json").read_text().replace('"ring"', '"tree"')
    (tmp_path / "other.json").write_text(text)
    register_coco_instances(REVERSED, {}, str(tmp_path / "other.json"), str(data / "val"))
    cfg = config(data, test=())
    model = build_model(cfg).eval()
    MaskHeadCheckpointer(model).load(str(CHECKPOINT))
    evaluator = MaskEvaluator(REVERSED, output_dir=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"'names_reversed' has classes .*new: tree; dropped: rin"
    ):
        evaluate(cfg, model, evaluator)
    small = small_config("Base-Small.yaml", "OUTPUT_DIR", str(tmp_path))
    small.DATASETS.TEST = (REVERSED,)
    with pytest.raises(ConfigError, match=r"'names_reversed' has classes .*new: tree"):
        Trainer(small)


def test_training_on_data_without_class_names_drops_those_of_the_weights(data, tmp_path, caplog):
    records = DatasetCatalog.get("shapes_val")[:2]
    DatasetCatalog.register(STRAIGHT, lambda: records)
    cfg = config(data, "OUTPUT_DIR", str(tmp_path), test=())
    cfg.DATASETS.TRAIN = (STRAIGHT,)
    with pytest.raises(ConfigError, match=r"has class names \(ring, .*DATASETS\.TRAIN does not"):
        Trainer(cfg).resume_or_load(resume=False)
    cfg.MODEL.WEIGHTS_STRICT = False
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert class_names_of(trainer.model) is None and "rows keep their order" in caplog.text


def overlap(a, b) -> float:
    return float(coco_mask.iou([a], [b], [0])[0, 0])


def count_names(predictions: Path, annotations: Path) -> tuple[int, int]:
    """Counts detections with the name and id of the object that they cover, and all others."""
    truth, right, wrong = COCO(str(annotations)), 0, 0
    for found in json.loads(predictions.read_text())["annotations"]:
        for x in truth.imgToAnns[int(Path(found["file_name"]).stem)]:
            if overlap(found["segmentation"], truth.annToRLE(x)) > 0.7:
                name = truth.cats[x["category_id"]]["name"]
                same = (name, x["category_id"]) == (found["category_name"], found["category_id"])
                right, wrong = right + same, wrong + (not same)
    return right, wrong


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_demo_uses_the_class_names_of_the_weights(data, suffix, tmp_path):
    weights = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        content = {name: x.float() for name, x in load_file(CHECKPOINT).items()}
        torch.save({"model": content, "class_names": NAMES}, weights)
    else:
        weights.write_bytes(CHECKPOINT.read_bytes())
    cfg = config(data)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(weights), "DATASETS.TRAIN", "()"]
    mine = ["DATASETS.COCO_FILES", repr([list(x) for x in cfg.DATASETS.COCO_FILES])]
    mine += ["DATASETS.TEST", repr((REVERSED,))]
    image = str(data / "val")
    run_demo(CONFIG, [*opts, *mine], [image], tmp_path / "reversed")
    right, wrong = count_names(tmp_path / "reversed" / "predictions.json", data / "reversed.json")
    assert right >= 8 > wrong * 8
    run_demo(CONFIG, [*opts, "DATASETS.TEST", "()"], [image], tmp_path / "none")
    assert count_names(tmp_path / "none" / "predictions.json", data / "straight.json")[0] == right
    for path in (data / "val").iterdir():  # the overlays must show the same names
        overlays = [(tmp_path / x / path.name).read_bytes() for x in ("reversed", "none")]
        assert overlays[0] == overlays[1]


def test_the_demo_keeps_the_names_of_the_weights_if_the_data_has_other_classes(
    data, tmp_path, caplog
):
    text = (data / "straight.json").read_text().replace('"star"', '"tree"')
    (tmp_path / "other.json").write_text(text)
    files = [["names_other", str(tmp_path / "other.json"), str(tmp_path / "no images here")]]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(CHECKPOINT), "DATASETS.TRAIN", "()"]
    opts += ["DATASETS.COCO_FILES", repr(files), "DATASETS.TEST", "('names_other',)"]
    run_demo(CONFIG, opts, [str(data / "val" / "000001.png")], tmp_path / "out")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [x["name"] for x in content["categories"]] == NAMES
    assert [x["id"] for x in content["categories"]] == [1, 6, 3, 4, 5]  # 2 is the id of tree
    assert "new category ids for star" in caplog.text


def test_a_predictor_uses_the_class_names_of_its_weights(data):
    cfg = config(data)
    cfg.freeze()
    predictor = load_predictor(cfg)  # in the data set's order
    assert predictor.metadata.thing_classes == class_names_of(predictor.model) == NAMES[::-1]
    missing = config(data, "DATASETS.COCO_FILES", f"[['{REVERSED}','no.json','no']]")
    assert load_predictor(missing).metadata.thing_classes == NAMES
    with pytest.raises(ConfigError, match=r"does not fit the model: 6 of another shape"):
        load_predictor(config(data, "MODEL.ROI_HEADS.NUM_CLASSES", "7"))
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty"):
        load_predictor(config(data, "MODEL.WEIGHTS", ""))


def test_a_predictor_of_unnamed_weights_uses_the_names_of_its_data(data, tmp_path):
    save_file(load_file(CHECKPOINT), tmp_path / "a.safetensors")
    cfg = config(data, "MODEL.WEIGHTS", str(tmp_path / "a.safetensors"))
    assert load_predictor(cfg).metadata.thing_classes == NAMES[::-1]
    cfg.DATASETS.TEST = cfg.DATASETS.COCO_FILES = ()
    assert load_predictor(cfg).metadata.get("thing_classes") is None


def test_both_models_of_a_comparison_use_the_class_order_of_the_data(data):
    cfg = config(data, "MODEL.WEIGHTS", "")
    register_coco_files(cfg)
    twins = load_twins(cfg, CHECKPOINT)
    weights = load_file(CHECKPOINT)
    for model in (twins.stock, twins.plugin):
        assert class_names_of(model) == NAMES[::-1]
        for layer, rows in (("box_predictor.cls_score", 5), ("mask_head.predictor", 5)):
            expected = weights[f"roi_heads.{layer}.weight"][:rows].float().flip(0)
            found = model.state_dict()[f"roi_heads.{layer}.weight"]
            assert torch.equal(found[:rows], expected)
    file = json.loads((data / "reversed.json").read_text())
    file["categories"][0]["name"] = "tree"
    (data / "tree.json").write_text(json.dumps(file))
    entries = [[REVERSED, str(data / "tree.json"), str(data / "val")]]
    cfg = config(data, "DATASETS.COCO_FILES", repr(entries))
    register_coco_files(cfg)
    with pytest.raises(ConfigError, match=r"was not trained on all classes of the data set .*tree"):
        load_twins(cfg, CHECKPOINT)


def test_a_contact_sheet_uses_the_class_names_of_the_weights(data, monkeypatch, tmp_path):
    drawn: dict[str, list[list[str]]] = {}
    for name in (STRAIGHT, REVERSED):
        cfg = config(data, test=(name,))
        model = build_model(cfg)
        MaskHeadCheckpointer(model, policy=WeightsPolicy()).load(str(CHECKPOINT))
        register_coco_files(cfg)
        texts = drawn.setdefault(name, [])
        monkeypatch.setattr(
            contact_sheet, "write_labels", lambda *args, texts=texts: texts.append(args[1])
        )
        write_contact_sheet(cfg, model, name, tmp_path / f"{name}.png")
    assert drawn[STRAIGHT] == drawn[REVERSED] and any(drawn[STRAIGHT])


def test_saved_weights_keep_their_class_names(data, tmp_path):
    model = build_model(config(data, test=()))
    checkpointer = MaskHeadCheckpointer(model, str(tmp_path))
    checkpointer.load(str(CHECKPOINT))
    checkpointer.save("again")
    assert torch.load(tmp_path / "again.pth", weights_only=True)["class_names"] == NAMES
    assert class_names_of(copy.deepcopy(model)) == NAMES


def test_weights_are_exported_only_with_one_name_per_row(tmp_path):
    save_file(load_file(CHECKPOINT), tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"cls_score\.weight has rows for 5 classes, .* names is 2"
    ):
        names = ["cat", "dog"]
        export_safetensors(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", class_names=names
        )


def test_a_head_with_unknown_rows_keeps_its_class_order_and_refuses_others(data):
    @ROI_MASK_HEAD_REGISTRY.register()
    class HeadOfMine(torch.nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.rows = torch.nn.Linear(input_shape.channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    model = build_model(config(data, "MODEL.ROI_MASK_HEAD.NAME", "HeadOfMine"))
    path = data / "mine.pth"
    torch.save({"model": model.state_dict(), "class_names": NAMES}, path)
    before = copy.deepcopy(model.state_dict())
    for policy in (None, WeightsPolicy(NAMES[::-1], whole=True)):
        MaskHeadCheckpointer(model, policy=policy).load(str(path))
        assert class_names_of(model) == NAMES
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ConfigError, match="which rows of a MaskRCNN belong to which class"):
        MaskHeadCheckpointer(model, policy=WeightsPolicy(NAMES[::-1])).load(str(path))


def found_in_image(*classes: int) -> Instances:
    boxes = Boxes(torch.arange(len(classes) * 4.0).reshape(-1, 4))
    return Instances((9, 9), pred_classes=torch.tensor(classes), pred_boxes=boxes)


def test_predictions_are_renumbered_to_the_classes_of_the_data_set():
    instances = found_in_image(0, 2, 1)
    result = matched_predictions(instances, ["cat", "dog", "eel"], ["eel", "cat", "dog"], "d")
    assert result.pred_classes.tolist() == [1, 0, 2]
    assert instances.pred_classes.tolist() == [0, 2, 1]
    fewer = matched_predictions(instances, ["cat", "dog", "eel"], ["eel", "dog"], "d")
    assert fewer.pred_classes.tolist() == [0, 1]
    assert fewer.pred_boxes.tensor[:, 0].tolist() == [4, 8]
    assert len(matched_predictions(found_in_image(), ["a"], ["b", "a"][1:], "d")) == 0
    assert matched_predictions(instances, None, ["eel"], "d") is instances
    numbered = matched_predictions(
        instances, ["7", "8", "9"], [9, 8, 7], "d"
    )  # class names in JSON may be numbers
    assert numbered.pred_classes.tolist() == [2, 0, 1]
    for wanted, told in ((["cat", "fox"], "new: fox; dropped: dog, eel"), (["cat"] * 2, "twice")):
        with pytest.raises(ConfigError, match=told):
            matched_predictions(instances, ["cat", "dog", "eel"], wanted, "d")


class Constant(torch.nn.Module):
    def forward(self, inputs):
        return {"loss": 0} if self.training else [{"instances": x} for x in inputs]


def test_predictions_have_class_names_even_if_the_model_is_wrapped():
    model = Constant()
    name_classes(model, None)
    assert predicted_names(model.eval()([found_in_image(0)])[0]["instances"]) is None
    name_classes(model, ["cat"])
    name_classes(model, ["dog"])
    wrapped = torch.nn.DataParallel(model)
    assert class_names_of(wrapped) == ["dog"] and class_names_of(torch.nn.ReLU()) is None
    assert predicted_names(model([found_in_image(0)])[0]["instances"]) == ["dog"]
    assert model.train()([]) == {"loss": 0} and len(model._forward_hooks) == 1
    name_classes(model, None)
    assert not model._forward_hooks and class_names_of(model) is None


def test_an_annotation_file_that_changes_after_registration_is_refused(data, tmp_path):
    path = tmp_path / "a.json"
    write_export(data / "straight.json", path, NAMES)
    cfg = config(data, "DATASETS.COCO_FILES", repr([[REVERSED, str(path), str(data / "val")]]))
    register_coco_files(cfg)
    assert len(DatasetCatalog.get(REVERSED)) == 8
    write_export(data / "straight.json", path, NAMES[::-1])
    with pytest.raises(ConfigError, match=r"categories of .*a\.json have changed"):
        DatasetCatalog.get(REVERSED)
    register_coco_files(cfg)
    assert np.array(DatasetCatalog.get(REVERSED)[0]["annotations"]).size > 0
