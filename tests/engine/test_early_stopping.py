"""SOLVER.EARLY_STOPPING: when a run ends, what it writes, and that a kill changes neither."""

from __future__ import annotations

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import hooks as detectron2_hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from killed_run import (
    assert_same_run,
    config,
    few_shapes,
    final_state,
    metrics,
    train,
    train_until_killed,
)

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint import MaskHeadCheckpointer
from mask_head_plugin.config_check.chosen_metrics import improves
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.early_stopping import EarlyStopping
from mask_head_plugin.engine.evaluators import check_chosen_objects
from mask_head_plugin.engine.hooks import BestCheckpointer

AP = {1: 10.0, 3: 30.0, 5: 20.0, 7: 30.0, 9: 25.0, 11: 31.0}
"""AP by iteration. With patience 2, a run ends at iteration 7, because a second 30.0 is no
improvement; with patience 3, it ends at iteration 9."""


@pytest.fixture(scope="module", autouse=True)
def _few_shapes():
    with few_shapes():
        yield


@pytest.fixture(autouse=True, scope="module")
def evaluated(_few_shapes):
    """Yields the iterations at which evaluations took place."""
    seen = []

    def test(_cfg, _model):
        seen.append(get_event_storage().iter)
        return {"bbox": {"AP": AP.get(seen[-1], 0.0)}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "test", staticmethod(test))
        yield seen


def stopping(folder, *opts: str):
    """Returns the config of a run.

    It writes a checkpoint between two evaluations (iteration 2) and at an evaluation (iteration 5).
    """
    return config(
        *(folder, "SOLVER.EARLY_STOPPING.METRIC", "bbox/AP", "SOLVER.EARLY_STOPPING.PATIENCE"),
        *("2", "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "14", "SOLVER.CHECKPOINT_PERIOD", "3"),
        *("TEST.EXPECTED_RESULTS", '[["bbox", "AP", 30.0, 0.1]]', *opts),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, evaluated):
    """Returns the folder, the trainer and the evaluations of a run that has stopped early."""
    folder, drawn = tmp_path_factory.mktemp("undisturbed"), []
    evaluated.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "draw_contact_sheets", lambda *_: drawn.append(1))
        trainer = train(stopping(folder))
    return SimpleNamespace(folder=folder, trainer=trainer, evaluated=evaluated[:], drawn=drawn)


def test_a_run_stops_completely_when_patience_is_exhausted(undisturbed):
    trainer, folder = undisturbed.trainer, undisturbed.folder
    assert (trainer.iter, trainer.max_iter, trainer.is_stopped) == (8, 8, True)
    assert undisturbed.evaluated == [1, 3, 5, 7], "the last weights must not be evaluated twice"
    assert final_state(folder)["iteration"] == 7 and undisturbed.drawn == [1]
    assert trainer._last_eval_results["bbox"]["AP"] == 30.0
    assert json.loads((folder / "model_best.json").read_text())["iteration"] == 3
    lines = metrics(folder)
    assert lines[-1]["iteration"] == "7" and lines[-1]["bbox/AP"] == "30.0"
    assert "total_loss" in lines[-1]


KILLS = {
    "in the last evaluation": (Trainer, "test", 4, False),
    "between the last evaluation and the last weights": (MaskHeadCheckpointer, "save", 3, False),
    "after the last weights": (MaskHeadCheckpointer, "save", 3, True),
}


@pytest.mark.parametrize(("owner", "name", "call", "after"), KILLS.values(), ids=KILLS)
def test_a_killed_and_resumed_run_stops_where_the_uninterrupted_run_does(
    tmp_path, undisturbed, monkeypatch, owner, name, call, after
):
    cfg = stopping(tmp_path)
    train_until_killed(cfg, monkeypatch, owner, name, call, after=after)
    assert train(cfg, resume=True).iter == 8
    assert_same_run(tmp_path, undisturbed.folder)


def test_a_stopped_run_stops_again_on_resume_unless_patience_is_raised(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.folder, folder)
    again = train(stopping(folder), resume=True)
    assert (again.iter, again.is_stopped) == (8, True)
    assert_same_run(folder, undisturbed.folder)
    more = ["SOLVER.EARLY_STOPPING.PATIENCE", "3", "TEST.EXPECTED_RESULTS", "[]"]
    longer = train(stopping(folder, *more), resume=True)
    assert (longer.iter, longer.is_stopped) == (10, True)
    record = json.loads((folder / "early_stopping.json").read_text())
    assert record["values"] == [[k, AP[k]] for k in (1, 3, 5, 7, 9)]


def test_values_of_an_abandoned_continuation_are_dropped(tmp_path):
    """Values may be from a run killed at iteration 9 and resumed at 4, or from an earlier run."""
    record = tmp_path / "early_stopping.json"
    values = [[1, 10.0], [3, 30.0], [9, 50.0]]
    for start, metric, expected in ((4, "bbox/AP", [1, 3]), (4, "segm/AP", []), (0, "bbox/AP", [])):
        record.write_text(json.dumps({"metric": "bbox/AP", "values": values}))
        hook = made_hook(tmp_path, metric)
        hook.trainer = SimpleNamespace(start_iter=start)
        hook.before_train()
        assert list(hook._values) == expected
    for damaged in ("", '{"metric"', "[1]", '{"metric": "bbox/AP", "values": [1]}'):
        record.write_text(damaged)
        hook = made_hook(tmp_path, "bbox/AP")
        hook.trainer = SimpleNamespace(start_iter=4)
        hook.before_train()
        assert hook._values == {}


def made_hook(folder, metric: str, patience: int = 2) -> EarlyStopping:
    checkpointer = SimpleNamespace(save_dir=str(folder), save=lambda *_, **__: None)
    return EarlyStopping(checkpointer, detectron2_hooks.EvalHook(1, dict), metric, patience)


def ends_at(folder, metric: str, values: list[float]) -> int | None:
    hook = made_hook(folder, metric)
    trainer = SimpleNamespace(max_iter=100, is_stopped=False)
    hook.trainer = trainer
    with EventStorage(0) as trainer.storage:
        for trainer.iter, value in enumerate(values):
            trainer.storage.iter = trainer.iter
            trainer.storage.put_scalar(metric, value)
            hook.after_step()
            if trainer.is_stopped:
                return trainer.iter
    return None


def test_losses_improve_by_falling_and_nan_is_never_an_improvement(tmp_path):
    loss = "shapes_val/validation/loss_mask"
    assert improves(loss, 1.0, 2.0) and not improves(loss, 2.0, 2.0)
    assert improves("segm/AP", 2.0, 1.0) and improves("validation/segm/AP", 2.0, 1.0)
    for metric in (loss, "segm/AP"):
        assert improves(metric, -1.0, None) and not improves(metric, math.nan, None)
        assert not improves(metric, math.nan, 1.0)
    falling = [3.0, 2.0, 1.0, math.nan, 0.5]
    assert ends_at(tmp_path, loss, falling) is None
    assert ends_at(tmp_path, "segm/AP", falling) == 2
    assert ends_at(tmp_path, "segm/AP", [math.nan, math.nan]) == 1


def test_all_processes_stop_when_the_first_one_does(tmp_path, monkeypatch):
    """Only the first process has metrics; if it stopped alone, the others would wait for it."""
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda own: [True, own])
    hook = made_hook(tmp_path, "segm/AP")
    hook.trainer = SimpleNamespace(iter=4, max_iter=100, is_stopped=False)
    hook.after_step()
    assert hook.trainer.is_stopped and hook.trainer.max_iter == 5


def test_a_metric_that_is_never_measured_stops_nothing_and_is_reported(tmp_path, caplog):
    hook = made_hook(tmp_path, "segm/APx", patience=1)
    trainer = SimpleNamespace(max_iter=100, is_stopped=False)
    hook.trainer = trainer
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(3):
            trainer.storage.iter = trainer.iter
            trainer._last_eval_results = {"sem_seg": {"mIoU": 1.0}}  # a metric of any evaluator
            hook.after_step()
    assert not trainer.is_stopped
    told = "METRIC 'segm/APx' is not a metric of this evaluation; choose from sem_seg/mIoU"
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize("metric", ["segm/APl", "bbox/AP-none_of_them", "boundary/AP"])
def test_a_metric_that_is_never_a_number_is_refused_before_training(tmp_path, monkeypatch, metric):
    """The causes, in order: no large objects in small images, an absent class, missing masks."""
    records = copy.deepcopy(DatasetCatalog.get("test_few_val"))
    for annotation in (y for x in records for y in x["annotations"]):
        del annotation["segmentation"]
    if metric == "boundary/AP":
        monkeypatch.setitem(DatasetCatalog.data, "test_few_val", lambda: records)
    metadata = MetadataCatalog.get("test_few_val")
    more = [*metadata.thing_classes, "none_of_them"]
    monkeypatch.setitem(vars(metadata), "thing_classes", more)
    for key in ("SOLVER.EARLY_STOPPING.METRIC", "SOLVER.CHECKPOINT_BEST_METRIC"):
        cfg = stopping(tmp_path, "SOLVER.CHECKPOINT_BEST_METRIC", "", key, metric)
        with pytest.raises(ConfigError, match=f"^{key} '{metric}' is not a number in any evalua"):
            check_chosen_objects(cfg)
        check_chosen_objects(stopping(tmp_path, key, "bbox/APm"))


def test_a_change_of_the_metric_on_resume_is_reported(tmp_path, caplog):
    content = {"metric": "bbox/AP", "value": 30.0, "values": [[1, 30.0]]}
    for name in ("early_stopping.json", "model_best.json"):
        (tmp_path / name).write_text(json.dumps(content))
    best = BestCheckpointer(SimpleNamespace(save_dir=str(tmp_path)), "segm/AP")
    for hook in (best, made_hook(tmp_path, "segm/AP")):
        hook.trainer = SimpleNamespace(start_iter=4)
        hook.before_train()
    assert "model_best.json has a value of bbox/AP: the next evaluation counts" in caplog.text
    assert "early_stopping.json has values of bbox/AP: PATIENCE for segm/AP counts" in caplog.text


def test_a_best_metric_that_is_not_a_number_keeps_nothing_and_is_reported(tmp_path, caplog):
    hook = BestCheckpointer(SimpleNamespace(save_dir=str(tmp_path)), "validation/loss_mask")
    with EventStorage(5) as storage:
        storage.put_scalar("validation/loss_mask", math.nan)
        hook.trainer = SimpleNamespace(storage=storage)
        hook.after_step()
    assert not list(tmp_path.iterdir())
    assert "METRIC 'validation/loss_mask' is not a number at iteration 5" in caplog.text
