"""Short runs that are killed at a chosen moment and resumed.

A kill is simulated by an exception after which the run writes nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import TrainerBase

from mask_head_plugin.engine import Trainer

MAX_ITER = 8
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}


class Killed(BaseException):
    pass


@contextlib.contextmanager
def few_shapes() -> Iterator[None]:
    """Registers test_few_train and test_few_val with a few of the embedded images."""
    for split, count in (("train", 7), ("val", 3)):
        records = DatasetCatalog.get(f"shapes_{split}")[:count]
        DatasetCatalog.register(f"test_few_{split}", lambda records=records: records)
        classes = MetadataCatalog.get("shapes_val").thing_classes
        metadata = MetadataCatalog.get(f"test_few_{split}")
        metadata.set(thing_classes=classes, evaluator_type="coco")
    with pytest.MonkeyPatch.context() as patch:  # drawing would take a third of the time
        patch.setattr(Trainer, "draw_contact_sheets", lambda *_: None)
        yield
    for split in ("train", "val"):
        DatasetCatalog.remove(f"test_few_{split}")
        MetadataCatalog.remove(f"test_few_{split}")


def config(folder: Path, *opts: str):
    return small_config(
        "Base-Small.yaml",
        "OUTPUT_DIR",
        str(folder),
        "SEED",
        "3",
        "SOLVER.MAX_ITER",
        str(MAX_ITER),
        "DATASETS.TRAIN",
        "('test_few_train',)",
        "DATASETS.TEST",
        "('test_few_val',)",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
        "TEST.EVAL_PERIOD",
        "4",
        "SOLVER.CHECKPOINT_BEST_METRIC",
        "bbox/AP",
        "SOLVER.WARMUP_ITERS",
        "2",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "0.0",
        "TEST.DETECTIONS_PER_IMAGE",
        "3",
        *opts,
    )


def train(cfg, *, resume: bool = False) -> Trainer:
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def train_until_killed(cfg, monkeypatch, owner, name: str, call: int, *, after: bool = False):
    """Kills a run at the given call of a method, before or after the method itself runs."""
    original, calls = getattr(owner, name), []

    def method(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, method)
        patch.setattr(TrainerBase, "after_train", lambda *_: None)  # a killed process skips this
        train(cfg)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    # repr, because nan != nan
    return [{k: repr(v) for k, v in line.items() if k not in TIMES} for line in lines]


def final_state(folder: Path):
    return torch.load(folder / "model_final.pth", weights_only=True)


def assert_same_run(folder: Path, expected: Path) -> None:
    states = final_state(folder), final_state(expected)
    for name, weight in states[1]["model"].items():
        assert torch.equal(states[0]["model"][name], weight), name
    momenta = [state["trainer"]["_trainer"]["optimizer"]["state"] for state in states]
    for key, entry in momenta[1].items():
        for name, moment in entry.items():
            assert torch.equal(momenta[0][key][name], moment), (key, name)
    assert metrics(folder) == metrics(expected)
    best = [json.loads((each / "model_best.json").read_text()) for each in (folder, expected)]
    assert best[0] == best[1]
