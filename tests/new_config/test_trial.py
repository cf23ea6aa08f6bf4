"""try_config measures the training and evaluation of a config and does not change the config."""

from __future__ import annotations

from conftest import small_config

from mask_head_plugin.new_config import trial


def test_a_trial_measures_training_and_evaluation(monkeypatch):
    monkeypatch.setattr(trial, "TIMED", 2)
    cfg = small_config("coco/mask_rcnn_R_50_FPN_1x.yaml", "MODEL.WEIGHTS", "no such file")
    estimate = trial.try_config(cfg)
    assert 0 < estimate.seconds_per_iteration < 100 and 0 < estimate.seconds_per_image < 100
    assert 1e8 < estimate.memory < 1e11
    assert cfg.MODEL.WEIGHTS == "no such file"
