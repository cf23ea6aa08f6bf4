"""Ctrl-C ends a training with a checkpoint, from which it resumes exactly."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys

import pytest
from conftest import load_script
from detectron2.engine import TrainerBase
from killed_run import assert_same_run, config, few_shapes, train

from mask_head_plugin.engine import Trainer, launch, run
from mask_head_plugin.engine.interruption import Interrupted
from mask_head_plugin.evaluation import MaskEvaluator

PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "3")


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored():
    """Restores Python's handler, because processes started in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def _few_shapes():
    with few_shapes():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, _few_shapes):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(config(folder, *PERIODS))
    return folder


def interrupted(cfg, monkeypatch, owner, name: str, call: int, *, signals: int = 1) -> Interrupted:
    """Trains and sends Ctrl-C during the given call of a method."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(None)
        for _ in range(signals if len(calls) == call else 0):
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as info:
        patch.setattr(owner, name, method)
        train(cfg)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return info.value


MOMENTS = {
    "in a step": (Trainer, "run_step", 2, "at iteration 1; newest checkpoint: {}/model_0000001"),
    "in a step that ends with a checkpoint": (Trainer, "run_step", 5, "{}/model_0000004"),
    "in a step that ends with an evaluation": (Trainer, "run_step", 3, "{}/model_0000002"),
    "in an evaluation": (MaskEvaluator, "process", 2, "{}/model_0000002"),
    "in the last step": (Trainer, "run_step", 8, "at iteration 7; .*{}/model_final"),
    "in the last evaluation": (MaskEvaluator, "evaluate", 3, "at iteration 7; .*{}/model_final"),
}


@pytest.mark.parametrize(("owner", "name", "call", "told"), MOMENTS.values(), ids=MOMENTS)
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_by_bit(
    tmp_path, undisturbed, monkeypatch, owner, name, call, told
):
    cfg = config(tmp_path, *PERIODS)
    stop = interrupted(cfg, monkeypatch, owner, name, call)
    assert stop.can_resume
    with pytest.raises(Interrupted, match=told.format(tmp_path) + r"\.pth$"):
        raise stop
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


def test_the_workers_of_the_loader_finish_the_iteration(tmp_path, undisturbed, monkeypatch, capfd):
    """Ctrl-C in a terminal reaches all processes of the run."""
    cfg = config(tmp_path, *PERIODS, "DATALOADER.NUM_WORKERS", "2")
    original, calls = Trainer.run_step, []

    def step(self):
        calls.append(None)
        if len(calls) == 2:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for process in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(process, signal.SIGINT)
        original(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"model_0000001\.pth$"):
        patch.setattr(Trainer, "run_step", step)
        train(cfg)
    assert capfd.readouterr().err.count("press Ctrl-C again to stop at once") == 1
    train(cfg, resume=True)
    assert_same_run(tmp_path, undisturbed)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    stop = interrupted(config(tmp_path, *PERIODS), monkeypatch, Trainer, "run_step", 2, signals=2)
    assert str(stop).endswith(
        "at iteration 1; newest checkpoint: none yet (the first is due at iteration 5)"
    )
    assert not stop.can_resume and not list(tmp_path.glob("*.pth"))


def test_a_programs_own_handler_of_ctrl_c_is_kept(tmp_path, monkeypatch):
    received = []
    cfg = config(tmp_path, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    before = signal.signal(signal.SIGINT, lambda *_: received.append(None))
    try:
        monkeypatch.setattr(TrainerBase, "after_step", lambda _: signal.raise_signal(signal.SIGINT))
        train(cfg)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(received) == 1


@pytest.mark.parametrize(
    ("flags", "stop", "told"),
    [
        ("", Interrupted("at iteration 7"), "at iteration 7; continue with: {} --resume {}"),
        ("--resume", Interrupted("x"), "x; continue with: {} --resume {}"),
        ("", Interrupted("x", can_resume=False), "x; start again with: {} {}"),
        ("--eval-only", Interrupted(), "the same command continues with the remaining images"),
        ("", KeyboardInterrupt(), "interrupted"),
    ],
)
def test_train_net_says_in_one_line_how_to_continue(monkeypatch, capsys, flags, stop, told):
    def train_or_evaluate(*_):
        raise stop

    script = load_script("train_net.py")
    rest = [*flags.split(), "--config-file", "a file.yaml", "SOLVER.MAX_ITER", "9"]
    monkeypatch.setattr(sys, "argv", ["train_net.py", *rest])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", *sys.argv])
    cfg = argparse.Namespace(MODEL=argparse.Namespace(DEVICE="cpu"))
    monkeypatch.setattr(run, "set_up", lambda _: cfg)
    monkeypatch.setattr(run, "train_or_evaluate", train_or_evaluate)
    assert script.main() == 130
    command = ".venv/bin/python train_net.py", "--config-file 'a file.yaml' SOLVER.MAX_ITER 9"
    error = capsys.readouterr().err
    assert error.startswith("train_net.py: ") and error.endswith(told.format(*command) + "\n")
    assert error.count("\n") == 1


def test_several_processes_are_ended_by_their_launcher(monkeypatch):
    def stopped(*_):
        raise launch.SignalException("received", signal.SIGINT)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: stopped)
    with pytest.raises(Interrupted, match=r"^interrupted$"):
        launch.launch(print, 2, device="cpu")
