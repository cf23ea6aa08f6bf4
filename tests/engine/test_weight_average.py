"""The average of the weights: how it is computed, evaluated, saved and resumed."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import small_config
from torch import nn

from mask_head_plugin.checkpoint import MaskHeadCheckpointer
from mask_head_plugin.class_names import class_names_of
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.weight_average import WeightAverage


def test_the_average_drops_the_first_weights_and_then_decays():
    """Update 0 copies the weights. Update n keeps a share of (1 + n) / (10 + n) of the average, but
    never more than the decay."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.6)
    expected = {}
    for count in range(30):
        for value in (*model.parameters(), model[1].running_mean):
            value.detach().normal_()
        average.update_parameters(model)
        keep = 0 if count == 0 else min(0.6, (1 + count) / (10 + count))
        for name, value in model.state_dict().items():
            before = expected.get(name, torch.zeros(()))
            expected[name] = keep * before.double() + (1 - keep) * value.double()
    assert keep == 0.6
    for name in ("0.weight", "1.bias", "1.running_mean"):
        torch.testing.assert_close(average.module.state_dict()[name].double(), expected[name])


def config(folder, *opts: str):
    return small_config(
        *("Base-Small.yaml", "OUTPUT_DIR", str(folder), "SEED", "1", "SOLVER.MAX_ITER", "2"),
        *("SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "1", *opts),
    )


AVERAGE = ["SOLVER.EMA_DECAY", "0.9"]


def train(cfg, monkeypatch, *, resume: bool = False) -> tuple[Trainer, list[dict]]:
    """Trains, and returns the trainer and the weights of each model that was evaluated or used to
    draw contact sheets."""
    seen = []

    def note(_cfg, model):
        seen.append(copy.deepcopy(model.state_dict()))
        return {"segm": {"AP": float(len(seen))}}

    monkeypatch.setattr(Trainer, "test", staticmethod(note))
    monkeypatch.setattr(Trainer, "draw_contact_sheets", staticmethod(note))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, seen


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("average")
    opts = ["SOLVER.CHECKPOINT_BEST_METRIC", "segm/AP", "TEST.PRECISE_BN.ENABLED", "True"]
    with pytest.MonkeyPatch.context() as patch:
        cfg = config(folder, *AVERAGE, *opts, "TEST.PRECISE_BN.NUM_ITER", "1")
        return folder, *train(cfg, patch)


def test_the_average_is_evaluated_drawn_and_saved(run):
    folder, trainer, seen = run
    averaged, trained = trainer.average.module.state_dict(), trainer.model.state_dict()
    assert not same(averaged, trained) and not same(seen[0], seen[1])
    assert len(seen) == 3 and same(seen[1], averaged) and same(seen[2], averaged)
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert same(final["model"], averaged) and same(final["trainer"]["trained_weights"], trained)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert same(best["model"], averaged) and "trainer" not in best
    loaded = Trainer.build_model(trainer.cfg)
    MaskHeadCheckpointer(loaded).load(str(folder / "model_final.pth"))  # as for any checkpoint
    assert same(loaded.state_dict(), averaged)
    assert class_names_of(loaded) == class_names_of(trainer.model)


def test_precise_batch_statistics_are_computed_for_the_average(run):
    """Precise statistics of a single iteration are those of its batch; moving averages are not."""
    _, trainer, _ = run
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    norm = trainer.average.module.get_submodule(name.rpartition(".")[0])
    maps = []
    norm.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0].mean((0, 2, 3))))
    before = norm.running_mean.clone()
    precise = next(x for x in trainer._hooks if type(x).__name__ == "PreciseBN")
    trainer.iter = trainer.max_iter - 1
    precise.update_stats()
    torch.testing.assert_close(norm.running_mean, maps[-1])
    torch.testing.assert_close(norm.running_mean, before)


def test_averaging_does_not_affect_training(run, tmp_path, monkeypatch):
    _, trainer, _ = run
    without, _ = train(config(tmp_path), monkeypatch)
    assert same(without.model.state_dict(), trainer.model.state_dict())
    assert without.evaluated_model is without.model
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(final["trainer"]).isdisjoint({"trained_weights", "num_averaged"})


def test_a_resumed_run_may_drop_or_start_the_average(run, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    folder, trainer, _ = run
    dropped = Trainer(config(folder))
    dropped.resume_or_load(resume=True)
    assert same(dropped.model.state_dict(), trainer.model.state_dict())
    assert "averaged weights are dropped" in caplog.text
    without, _ = train(config(tmp_path), monkeypatch)
    begun = Trainer(config(tmp_path, *AVERAGE, "SOLVER.MAX_ITER", "3"))
    begun.resume_or_load(resume=True)
    assert "a new average starts here" in caplog.text
    for model in (begun.model, begun.evaluated_model):
        assert same(model.state_dict(), without.model.state_dict())


def test_pretrained_weights_are_trained_and_start_the_average(run, tmp_path):
    folder, trainer, _ = run
    file = folder / "model_best.pth"
    weights = ["MODEL.WEIGHTS", str(file)]
    other = Trainer(config(tmp_path, *AVERAGE, *weights))
    other.resume_or_load(resume=False)
    expected = torch.load(file, weights_only=True)["model"]
    for model in (other.model, other.evaluated_model):
        assert same(model.state_dict(), expected)
    assert class_names_of(other.model) == class_names_of(trainer.model)
