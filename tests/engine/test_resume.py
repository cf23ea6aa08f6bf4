"""A run that is killed at any moment and resumed ends exactly as if it had not been interrupted."""

from __future__ import annotations

import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, TrainerBase
from killed_run import (
    MAX_ITER,
    Killed,
    assert_same_run,
    config,
    few_shapes,
    metrics,
    train,
    train_until_killed,
)

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint.checkpointer import MaskHeadCheckpointer
from mask_head_plugin.durable_files import sole_writer
from mask_head_plugin.engine import Trainer, hooks
from mask_head_plugin.evaluation import MaskEvaluator


@pytest.fixture(scope="module", autouse=True)
def _few_shapes():
    with few_shapes():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, _few_shapes):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(config(folder))
    return folder


KILLS = {
    "in a step": (Trainer, "run_step", 6, False),
    "before the first checkpoint": (Trainer, "run_step", 2, False),
    "in the middle of a checkpoint": (os, "fsync", 9, False),
    "between a checkpoint and last_checkpoint": (
        *(MaskHeadCheckpointer, "tag_last_checkpoint"),
        *(2, False),
    ),
    "in an evaluation": (MaskEvaluator, "process", 2, True),
    "before the metrics of an evaluation": (MaskEvaluator, "evaluate", 1, False),
    "between an evaluation and its best weights": (MaskHeadCheckpointer, "save_weights", 1, False),
    "before an evaluation is logged": (hooks.BestCheckpointer, "_check", 4, True),
}


@pytest.mark.parametrize(("owner", "name", "call", "after"), KILLS.values(), ids=KILLS)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_by_bit(
    tmp_path, undisturbed, monkeypatch, owner, name, call, after
):
    cfg = config(tmp_path)
    train_until_killed(cfg, monkeypatch, owner, name, call, after=after)
    assert not (tmp_path / "model_final.pth").exists()
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


RECIPE = [
    *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001", "SOLVER.EMA_DECAY", "0.9"),
    *("SOLVER.ACCUMULATE_STEPS", "2", "SOLVER.LR_FACTORS", '[["roi_heads.mask_head", 2.0]]'),
    *("SOLVER.LAYER_DECAY", "0.8", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
]


def test_a_run_with_average_accumulation_and_adamw_resumes_bit_by_bit(tmp_path, monkeypatch):
    (tmp_path / "expected").mkdir()
    expected = train(config(tmp_path / "expected", *RECIPE))
    cfg = config(tmp_path / "killed", *RECIPE)
    train_until_killed(cfg, monkeypatch, Trainer, "run_step", 6)
    trainer = train(cfg, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "expected")
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name
    assert int(trainer.average.n_averaged) == MAX_ITER


def test_workers_do_not_change_a_resumed_run(tmp_path, undisturbed, monkeypatch):
    cfg = config(tmp_path, "DATALOADER.NUM_WORKERS", "2")
    train_until_killed(cfg, monkeypatch, Trainer, "run_step", 6)
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


def test_precise_batch_statistics_equal_those_of_the_uninterrupted_run(tmp_path, monkeypatch):
    opts = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    for name in ("killed", "expected"):
        (tmp_path / name).mkdir()
    train(config(tmp_path / "expected", *opts))
    cfg = config(tmp_path / "killed", *opts)
    train_until_killed(cfg, monkeypatch, Trainer, "run_step", 6)
    train(cfg, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "expected")


def test_a_random_seed_is_stored_in_the_checkpoint(tmp_path, monkeypatch):
    cfg = config(tmp_path, "SEED", "-1")
    train_until_killed(cfg, monkeypatch, Trainer, "run_step", 6)
    seed = torch.load(tmp_path / "model_0000003.pth", weights_only=True)["trainer"]["seed"]
    assert train(cfg, resume=True).seed == seed


def test_a_failed_evaluation_is_repeated_on_resume(tmp_path, undisturbed, monkeypatch):
    """After an error, unlike after a kill, the writers still write what they have."""
    cfg = config(tmp_path)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(MaskEvaluator, "evaluate", fail)
        train(cfg)
    assert metrics(tmp_path)[-1]["iteration"] == "3"
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


def test_a_run_killed_in_its_last_evaluation_repeats_it_on_resume(
    tmp_path, undisturbed, monkeypatch
):
    """The last evaluation is logged at iteration MAX_ITER, as in the uninterrupted run."""
    cfg = config(tmp_path)
    monkeypatch.setattr("mask_head_plugin.engine.trainer._draw_contact_sheets", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(TrainerBase, "after_train", lambda *_: None)
        train(cfg)
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


def test_a_resumed_run_uses_the_settings_of_its_config_not_of_the_checkpoint(tmp_path, caplog):
    train(config(tmp_path, "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()"))
    logging.getLogger("detectron2").propagate = True  # the first trainer turns it off
    changed = ["SOLVER.BASE_LR", "0.003", "SOLVER.WEIGHT_DECAY", "0.5", "SOLVER.MOMENTUM", "0.8"]
    trainer = Trainer(config(tmp_path, *changed, "SEED", "5"))
    trainer.resume_or_load(resume=True)
    weights = trainer.optimizer.param_groups[0]
    assert weights["lr"] == pytest.approx(0.003 * 0.5), (
        "after half of the iterations, a cosine is at one half"
    )
    assert (weights["weight_decay"], weights["momentum"], trainer.seed) == (0.5, 0.8, 5)
    trainer.scheduler.step()
    assert weights["lr"] == pytest.approx(0.003 * (1 + math.cos(math.pi * 5 / 8)) / 2)
    told = " ".join(caplog.messages)
    assert "learning rate 0.003 instead of 0.03, momentum 0.8 instead of 0.9" in told
    assert "SEED 5 instead of the checkpoint's 3" in told

    caplog.clear()
    trainer = Trainer(config(tmp_path, "SEED", "-1"))
    trainer.resume_or_load(resume=True)
    assert trainer.seed == 3
    told = " ".join(caplog.messages)
    assert (
        "schedule of the learning rate has changed since the checkpoint: SOLVER.MAX_ITER 8" in told
    )
    assert told.count("instead of") == 1

    caplog.clear()
    Trainer(config(tmp_path, "SOLVER.MAX_ITER", "4", "SEED", "-1")).resume_or_load(resume=True)
    assert "instead of" not in " ".join(caplog.messages)

    with pytest.raises(ConfigError, match=r"optimizer does not fit .*FREEZE_AT and .* set them ba"):
        Trainer(config(tmp_path, "MODEL.BACKBONE.FREEZE_AT", "2")).resume_or_load(resume=True)


def test_optimizer_changes_that_cannot_be_resumed_are_refused(tmp_path):
    factors = ["SOLVER.LR_FACTORS", '[["roi_heads.mask_head.mask_fcn1", 2.0]]']
    train(config(tmp_path, *factors, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"))
    rest = "its parameter groups differ.*SOLVER.LR_FACTORS"
    for opts, message in (
        (["SOLVER.LR_FACTORS", '[["roi_heads.mask_head.mask_fcn2", 2.0]]'], rest),
        ([*factors, "SOLVER.OPTIMIZER", "AdamW"], r"is SGD, but SOLVER\.OPTIMIZER is AdamW"),
        ([*factors, "SOLVER.BIAS_LR_FACTOR", "2.0"], "does not fit this config"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(config(tmp_path, *opts)).resume_or_load(resume=True)


def test_two_runs_cannot_write_to_the_same_folder(tmp_path):
    with sole_writer(tmp_path), pytest.raises(ConfigError, match="another run is writing to"):
        train(config(tmp_path))


def test_extending_a_finished_run_keeps_its_last_evaluation(tmp_path, undisturbed):
    train(config(tmp_path))
    train(config(tmp_path, "SOLVER.MAX_ITER", "10"), resume=True)
    evaluated = [int(x["iteration"]) for x in metrics(tmp_path) if "bbox/AP" in x]
    assert evaluated == [3, 8, 10]
    assert metrics(tmp_path)[:2] == metrics(undisturbed)[:2]


def test_a_checkpoint_beyond_max_iter_is_refused(tmp_path):
    train(config(tmp_path))
    with pytest.raises(ConfigError, match=r"iteration 7, but SOLVER\.MAX_ITER is 5; raise it"):
        train(config(tmp_path, "SOLVER.MAX_ITER", "5"), resume=True)


def test_a_new_run_moves_an_earlier_one_aside(tmp_path, undisturbed):
    cfg = config(tmp_path, "SOLVER.MAX_ITER", "4")
    train(cfg)
    first = (tmp_path / "model_final.pth").read_bytes(), metrics(tmp_path)
    train(cfg)
    aside = tmp_path / "earlier_run_1"
    assert ((aside / "model_final.pth").read_bytes(), metrics(aside)) == first
    assert len(metrics(tmp_path)) == len(first[1])


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    train(config(tmp_path, "SOLVER.CHECKPOINT_KEEP_LAST", "2"))
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"model_0000005.pth", "model_0000007.pth", "model_final.pth", "model_best.pth"}
    assert {path.name for path in tmp_path.glob("*.sha256")} == {f"{x}.sha256" for x in names}


def test_log_lines_after_a_truncated_one_are_kept(tmp_path):
    lines = ['{"iteration": 1, "lr": 0.1}', '{"iteration": 2, "l', '{"iteration": 3, "lr": 0.2}']
    path = tmp_path / "metrics.json"
    path.write_text("\n".join([*lines, '{"iteration": 6, "lr": 0.3}', '{"iteration": 7']))
    writer = hooks.JSONWriter(path)
    writer.go_on(5, is_finished=False)
    writer.close()
    assert path.read_text().splitlines() == [lines[0], lines[2]]


def test_precise_batch_statistics_accept_detectron2s_loader(tmp_path):
    class Stock(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    opts = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    trainer = Stock(config(tmp_path, *opts, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"))
    trainer.train()
    assert (tmp_path / "model_final.pth").exists()


def test_results_with_test_time_augmentation_are_added_to_the_others(tmp_path, monkeypatch):
    cfg = config(tmp_path, "TEST.AUG.ENABLED", "True", "SOLVER.MAX_ITER", "1")
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": 1.0}})
    monkeypatch.setattr(Trainer, "test_with_tta", lambda *_: {"bbox_TTA": {"AP": 2.0}})
    assert train(cfg)._last_eval_results == {"bbox": {"AP": 1.0}, "bbox_TTA": {"AP": 2.0}}


def test_no_contact_sheet_is_drawn_if_the_last_step_failed(tmp_path, monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run_step", fail)
    monkeypatch.setattr(Trainer, "test", lambda *_: {})
    monkeypatch.setattr(Trainer, "draw_contact_sheets", lambda *_: pytest.fail("a sheet was drawn"))
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, "SOLVER.MAX_ITER", "1"))


def test_evaluating_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint in OUTPUT_DIR .*set MODEL\.WEIGHTS"):
        Trainer.load_model(config(tmp_path), resume=True)


class Validation(HookBase):
    """A typical user hook: logs a value, and runs before the writers."""

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("validation", self.trainer.iter, smoothing_hint=False)


def test_a_users_hook_before_the_writers_is_logged_and_resumed(tmp_path, monkeypatch):
    class Own(Trainer):
        def build_hooks(self):
            result = super().build_hooks()
            result.insert(-1, Validation())  # as with DefaultTrainer
            return result

    cfg = config(tmp_path, "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()")
    monkeypatch.setattr(Own, "test", lambda *_: {})
    monkeypatch.setattr(Own, "draw_contact_sheets", lambda *_: None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainerBase, "after_train", lambda *_: None)
        patch.setattr(hooks.BestCheckpointer, "after_step", _kill)
        Own(cfg).train()
    trainer = Own(cfg)
    trainer.resume_or_load()
    trainer.train()
    logged = {line["iteration"]: line["validation"] for line in metrics(tmp_path)}
    assert logged == {"1": "1.0", "3": "3.0"}


def _kill(*_):
    raise Killed


def test_extending_a_run_keeps_its_evaluation_for_any_period(tmp_path):
    train(config(tmp_path, "SOLVER.MAX_ITER", "3"))
    train(config(tmp_path, "SOLVER.MAX_ITER", "4"), resume=True)
    assert [int(x["iteration"]) for x in metrics(tmp_path) if "bbox/AP" in x] == [3, 4]


def test_the_finished_iteration_of_another_run_is_ignored(tmp_path, monkeypatch):
    """Simulates a folder in which the user has deleted the other run's checkpoints."""
    cfg = config(tmp_path, "SOLVER.MAX_ITER", "5")
    (tmp_path / "finished_iteration").write_text("3")
    train_until_killed(cfg, monkeypatch, MaskEvaluator, "evaluate", 1)
    train(cfg, resume=True)
    assert [int(x["iteration"]) for x in metrics(tmp_path) if "bbox/AP" in x] == [3, 5]


@pytest.mark.parametrize(
    "record", [b"", b'{"metric": ', b"[5]", b'{"metric": "segm/AP", "value": "x"}']
)
def test_a_damaged_record_of_the_best_weights_does_not_prevent_resuming(tmp_path, record):
    (tmp_path / "model_best.json").write_bytes(record)
    hook = hooks.BestCheckpointer(
        MaskHeadCheckpointer(torch.nn.Linear(2, 2), str(tmp_path)), "segm/AP"
    )
    hook.trainer = SimpleNamespace(start_iter=5)
    hook.before_train()
    assert hook._best is None
