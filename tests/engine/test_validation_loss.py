"""TEST.EVAL_LOSS: the values of the losses, and that computing them changes nothing else."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from conftest import small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from killed_run import assert_same_run, config, few_shapes, metrics, train, train_until_killed

from mask_head_plugin import ConfigError
from mask_head_plugin.class_names import name_classes
from mask_head_plugin.data import seed_generators
from mask_head_plugin.engine import Trainer, validation_loss
from mask_head_plugin.engine.validation_loss import (
    SEED,
    check_losses,
    validation_losses,
)
from mask_head_plugin.image_file_mapper import ImageFileMapper

LOSS = ["TEST.EVAL_LOSS", "True"]
NORM_IN_HEAD = ["MODEL.ROI_MASK_HEAD.NORM", "BN"]


@pytest.fixture(scope="module", autouse=True)
def _few_shapes():
    with few_shapes():
        yield


def made_model(cfg, *, eval_mode: bool = False) -> torch.nn.Module:
    torch.manual_seed(1)
    return Trainer.build_model(cfg).train(not eval_mode)


def few_config(*opts: str):
    return small_config("Base-Small.yaml", "DATASETS.TEST", "('test_few_val',)", *LOSS, *opts)


def test_validation_losses_are_means_of_the_training_losses_over_images():
    """Compares with a plain loop over a model in training mode with frozen batch norm."""
    cfg = few_config(*NORM_IN_HEAD)
    model = made_model(cfg)
    found = validation_losses(cfg, model)["test_few_val"]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0
            module.eval()
    mapper = ImageFileMapper(cfg, True)
    mapper.augmentations = ImageFileMapper(cfg, False).augmentations
    images = []
    for index, record in enumerate(DatasetCatalog.get("test_few_val")):
        seed_generators(SEED, index)
        with EventStorage(0):
            images.append(model([mapper(record)]))
    for name in images[0]:
        expected = sum(x[name].item() for x in images) / len(images)
        assert found[name] == pytest.approx(expected, rel=1e-6), name
    assert found["total_loss"] == pytest.approx(sum(found[name] for name in images[0]))
    assert set(found) == {"total_loss", *images[0]} and found["loss_mask"] > 0


def test_the_model_and_the_random_state_do_not_change(tmp_path):
    cfg = few_config(*NORM_IN_HEAD)
    model = made_model(cfg)
    model.backbone.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    drawn = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    with EventStorage(5) as storage:
        validation_losses(cfg, model)
    assert storage.latest() == {} and model.roi_heads.mask_head._num_pixels == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert random.getstate() == drawn[0] and np.array_equal(np.random.get_state()[1], drawn[1])
    assert torch.equal(torch.get_rng_state(), drawn[2])


def test_processes_modes_and_seeds_do_not_change_the_losses(monkeypatch):
    cfg = few_config()
    model = made_model(cfg)
    expected = validation_losses(cfg, model)
    torch.manual_seed(9)
    model.eval()
    parts = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)  # more processes than images
    for rank in (3, 2, 1, 0):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "is_main_process", lambda rank=rank: rank == 0)
        monkeypatch.setattr(comm, "gather", lambda part: parts.append(part) or parts)
        found = validation_losses(cfg, model)
    assert found == expected and [len(part) for part in parts] == [0, 1, 1, 1]


def test_a_ramped_loss_term_has_its_full_weight():
    losses = ["MODEL.ROI_MASK_HEAD.LOSSES"]
    full = few_config(*losses, '[["dice", 2.0]]')
    growing = few_config(*losses, '[["dice", 2.0, 1000]]')
    found = [validation_losses(cfg, made_model(cfg))["test_few_val"] for cfg in (full, growing)]
    assert found[0] == found[1] and found[0]["loss_mask"] > 0


def test_images_without_objects_are_left_out_as_in_training(monkeypatch):
    cfg = few_config()
    records = DatasetCatalog.get("test_few_val")
    expected = validation_losses(cfg, made_model(cfg))
    empty = {**records[0], "annotations": []}
    monkeypatch.setitem(DatasetCatalog.data, "test_few_val", lambda: [*records, empty])
    assert validation_losses(cfg, made_model(cfg)) == expected
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with_empty = validation_losses(cfg, made_model(cfg))["test_few_val"]
    ratio = with_empty["loss_mask"] / expected["test_few_val"]["loss_mask"]
    assert ratio == pytest.approx(len(records) / (len(records) + 1))


@pytest.mark.parametrize(
    ("records", "classes", "message"),
    [
        ([{"file_name": "x.png", "image_id": 1}], None, "has no annotations to compute losses"),
        ([{"file_name": "x.png", "annotations": []}], None, "has no annotations to compute losses"),
        (None, ["a", "b", "c", "d", "e"], "has the classes a, b, c, d, e, but the model has ring"),
    ],
)
def test_data_sets_without_usable_losses_are_named_before_training(
    records, classes, message, monkeypatch, tmp_path
):
    if records:
        monkeypatch.setitem(DatasetCatalog.data, "test_few_val", lambda: records)
    if classes:
        monkeypatch.setattr(MetadataCatalog, "get", lambda _: {"thing_classes": classes})
    cfg = few_config()
    model = made_model(cfg)
    name_classes(model, ["ring", "disk", "cross", "arrow", "frame"] if classes else None)
    with pytest.raises(ConfigError, match=f"^TEST.EVAL_LOSS: test_few_val {message}"):
        check_losses(cfg, model)


def test_an_object_without_a_mask_is_named_before_training(monkeypatch):
    """Only the second image has such an object, so the losses of the first would not reveal it."""
    cfg = few_config()
    records = copy.deepcopy(DatasetCatalog.get("test_few_val"))
    without = {k: v for k, v in records[1]["annotations"][0].items() if k != "segmentation"}
    records[1]["annotations"].append({**without, "iscrowd": 1})
    monkeypatch.setitem(DatasetCatalog.data, "test_few_val", lambda: records)
    check_losses(cfg, made_model(cfg))
    records[1]["annotations"].append(without)
    number, file = len(records[1]["annotations"]) - 1, records[1]["file_name"]
    with pytest.raises(ConfigError, match=f"annotation {number} of {file} .* has no segmentation"):
        check_losses(cfg, made_model(cfg))
    cfg.MODEL.MASK_ON = False
    check_losses(cfg, made_model(cfg))


def test_all_data_sets_are_checked_before_any_losses_are_computed(monkeypatch):
    cfg = few_config("DATASETS.TEST", "('test_few_val', 'test_few_train')")
    monkeypatch.setitem(DatasetCatalog.data, "test_few_train", lambda: [{"file_name": "x.png"}])
    monkeypatch.setattr(
        validation_loss,
        "_losses_of_images",
        lambda *_: pytest.fail("losses were computed too early"),
    )
    with pytest.raises(ConfigError, match="test_few_train has no annotations"):
        validation_losses(cfg, made_model(cfg))


def test_a_loss_unknown_to_the_model_is_refused_before_training(tmp_path):
    best = ["SOLVER.CHECKPOINT_BEST_METRIC", "validation/loss_masc"]
    with pytest.raises(ConfigError, match=r"loss_masc': this model has no such loss; .*loss_mask"):
        train(config(tmp_path, *LOSS, *best))


def test_a_killed_run_logs_the_same_losses_and_training_is_unaffected(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", lambda *_: {})
    short = [
        *("SOLVER.CHECKPOINT_BEST_METRIC", "validation/total_loss", "SOLVER.MAX_ITER", "4"),
        *("TEST.EVAL_PERIOD", "2"),
    ]
    expected = train(config(tmp_path / "expected", *LOSS, *short))
    cfg = config(tmp_path / "killed", *LOSS, *short)
    train_until_killed(cfg, monkeypatch, Trainer, "test", 1)
    train(cfg, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "expected")
    lines = [x for x in metrics(tmp_path / "killed") if "validation/total_loss" in x]
    assert [x["iteration"] for x in lines] == ["1", "4"]
    found = [float(x["validation/total_loss"]) for x in lines]
    kept = json.loads((tmp_path / "killed" / "model_best.json").read_text())
    assert kept["value"] == min(found) and found[0] != found[1]
    without = train(config(tmp_path / "without", "SOLVER.MAX_ITER", "4"))
    for name, weight in without.model.state_dict().items():
        assert torch.equal(expected.model.state_dict()[name], weight), name


def test_losses_use_the_average_in_distributed_training_with_accumulation(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", lambda *_: {})
    recipe = ["SOLVER.EMA_DECAY", "0.9", "SOLVER.ACCUMULATE_STEPS", "2"]
    cfg = config(tmp_path, *LOSS, *recipe, "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0")
    trainer = train(cfg)
    found = trainer._last_eval_results["validation"]
    assert found == validation_losses(cfg, trainer.average.module)["test_few_val"]
    assert found != validation_losses(cfg, trainer.model)["test_few_val"]
    final = Trainer.load_model(cfg, resume=True)
    assert Trainer.evaluate(cfg, final)["validation"] == found


def test_the_terminal_shows_only_training_losses(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Trainer, "test", lambda *_: {})
    caplog.set_level("INFO")
    train(config(tmp_path, *LOSS, "SOLVER.MAX_ITER", "5"))
    lines = [x for x in caplog.messages if "total_loss: " in x]
    assert lines and not any("validation/" in line for line in lines)
    assert any(x.startswith("losses on test_few_val: total_loss ") for x in caplog.messages)
