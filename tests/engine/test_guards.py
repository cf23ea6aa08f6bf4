"""A step that is not finite or runs out of memory ends the run; the error names its images."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_instances, small_config
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import Trainer, TrainingError
from mask_head_plugin.engine.guards import StepGuard
from mask_head_plugin.engine.replay import replay_step, save_step

NAME = "test_guarded"


@pytest.fixture(scope="module", autouse=True)
def _data_set():
    records = DatasetCatalog.get("shapes_train")[:4]
    DatasetCatalog.register(NAME, lambda: records)
    classes = MetadataCatalog.get("shapes_train").thing_classes
    MetadataCatalog.get(NAME).set(thing_classes=classes, evaluator_type="coco")
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def make_trainer(folder: Path, *opts: str) -> Trainer:
    data = ["DATASETS.TRAIN", f"('{NAME}',)", "OUTPUT_DIR", str(folder), "SEED", "1"]
    return Trainer(small_config("Base-Small.yaml", *data, "SOLVER.MAX_ITER", "4", *opts))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in trainer.model.named_parameters()}


def spoil_loss(trainer: Trainer, iteration: int, value: float) -> None:
    """Multiplies the mask loss of one iteration by a value such as nan."""
    head, original = trainer.model.roi_heads.mask_head, trainer.model.roi_heads.mask_head.forward

    def forward(*args):
        losses = original(*args)
        return {k: x * value for k, x in losses.items()} if trainer.iter == iteration else losses

    head.forward = forward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("period", [1, 20])
def test_a_bad_loss_stops_the_run_before_the_update(tmp_path, value, period):
    """detectron2 checks only the losses that it logs, and only after the update."""
    trainer = make_trainer(tmp_path)
    trainer._trainer.gather_metric_period = period
    trainer.cfg.IMPORTS = ["/code/my losses.py"]
    spoil_loss(trainer, 2, value)
    before = {}
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (step(), before.update(weights(trainer)))
    with pytest.raises(TrainingError) as error:
        trainer.train()
    message = str(error.value)
    images = [x["file_name"] for x in DatasetCatalog.get(NAME) if x["file_name"] in message]
    assert message.startswith(f"iteration 2: loss_mask is {value}, with the images ")
    assert len(images) == 2 and message.count("image_id") == 2
    for text in ("iteration_2_rank_0.pth", "python tools/replay_step.py", "lower SOLVER.BASE_LR"):
        assert text in message
    assert "iteration_2_rank_0.pth --import '/code/my losses.py' finds the layer" in message
    assert all(torch.equal(x, before[name]) for name, x in weights(trainer).items())


def test_a_bad_gradient_is_reported_with_its_layers(tmp_path):
    trainer = make_trainer(tmp_path)
    weight = trainer.model.roi_heads.mask_head.predictor.weight
    weight.register_hook(lambda x: x * float("nan") if trainer.iter == 1 else x)
    with pytest.raises(TrainingError, match=r"iteration 1: gradients .*mask_head\.predictor\.weig"):
        trainer.train()


def test_an_overflowing_gradient_norm_does_not_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, "SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-30")
    weight = trainer.model.roi_heads.mask_head.predictor.weight
    weight.register_hook(lambda x: x + 1e25)
    trainer.before_train = lambda: None  # only the step is tested
    trainer.after_train = lambda: None
    trainer.before_step = trainer.after_step = lambda: None
    trainer.train()
    assert trainer.iter == 1


class Scaler:
    """Replaces AMP's scaler, which needs CUDA.

    It has no get_scale, because calling that would synchronise.
    """

    def __init__(self, factor: float) -> None:
        self.scale = lambda outputs: outputs * factor


def test_amp_gradients_that_are_infinite_at_the_lowest_scale_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    weight = trainer.model.roi_heads.mask_head.predictor.weight
    weight.register_hook(lambda x: x * float("inf") if trainer.iter == 2 else x)
    trainer._trainer.grad_scaler = Scaler(2.0**-24)
    with pytest.raises(TrainingError, match=r"iteration 2: gradients .*mask_head\.predictor\.weig"):
        trainer.train()


def test_amp_gradients_that_a_lower_scale_may_make_finite_do_not_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    weight = trainer.model.roi_heads.mask_head.predictor.weight
    weight.register_hook(lambda x: x * float("inf"))
    trainer._trainer.grad_scaler = Scaler(2.0**-23)
    trainer._guard.trainer.optimizer.step = lambda: None  # AMP's scaler would skip the update
    trainer._hooks = trainer._hooks[:3]  # no evaluation
    trainer.train()


class Anything(torch.nn.Module):
    """A model that returns a given output."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, **_):
        return self.output


@pytest.mark.parametrize("output", [({"loss": torch.ones(())}, None), {"n": 1}, {}, None])
def test_models_that_return_no_losses_are_not_checked(tmp_path, output):
    cfg = small_config("Base-Small.yaml", "OUTPUT_DIR", str(tmp_path))
    model = Anything(output)
    guard = StepGuard(model, cfg)
    guard.trainer = object()
    model(batch=[])
    guard.after_backward()


def test_losses_with_several_values_are_checked(tmp_path):
    losses = {"a": torch.ones(1), "b": torch.tensor([1.0, float("nan")]), "c": torch.ones(())}
    model = Anything(losses)
    guard = StepGuard(model, small_config("Base-Small.yaml", "OUTPUT_DIR", str(tmp_path)))
    guard.trainer = SimpleNamespace(iter=7)
    model(batch=[])
    with pytest.raises(TrainingError, match="iteration 7: b is nan"):
        guard.after_backward()


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_a_saved_step_is_replayed_exactly_and_its_layer_is_found(tmp_path, mask_format):
    trainer = make_trainer(tmp_path, "INPUT.MASK_FORMAT", "bitmask")
    if mask_format == "polygon":
        _use_polygons(trainer)
    spoil_loss(trainer, 2, float("nan"))
    with pytest.raises(TrainingError):
        trainer.train()
    path = tmp_path / "failed_steps" / "iteration_2_rank_0.pth"
    replay = replay_step(Trainer.build_model(trainer.cfg), path)
    assert replay.bad_weights == replay.bad_outputs == replay.bad_gradients == []
    assert replay.losses.keys() == replay.saved_losses.keys()
    for name, value in replay.saved_losses.items():
        if name != "loss_mask":  # was set by the test
            assert replay.losses[name] == value, name
    content = torch.load(path, weights_only=True)
    content["model"]["roi_heads.mask_head.deconv.bias"][0] = float("inf")
    torch.save(content, path)
    replay = replay_step(Trainer.build_model(trainer.cfg), path)
    assert replay.bad_weights == ["roi_heads.mask_head.deconv.bias"]
    assert replay.bad_outputs[0] == "roi_heads.mask_head.deconv"
    assert replay.bad_gradients


def _use_polygons(trainer: Trainer) -> None:
    rng = np.random.default_rng(0)
    batches = [
        [
            {
                "image": torch.rand(3, 96, 128) * 255,
                "instances": random_instances(3, (96, 128), 5, rng, "polygon"),
                "file_name": "made.png",
                "image_id": k,
            }
        ]
        for k in range(4)
    ]
    trainer._trainer._data_loader_iter_obj = iter(batches)


def test_replay_refuses_other_files(tmp_path):
    model = Trainer.build_model(small_config("Base-Small.yaml"))
    (tmp_path / "text.pth").write_text("no")
    torch.save({"model": {}}, tmp_path / "weights.pth")
    for name in ("text.pth", "weights.pth"):
        with pytest.raises(ConfigError, match=rf"{name} is not a failed step"):
            replay_step(model, tmp_path / name)
    save_step(tmp_path / "other.pth", torch.nn.Linear(2, 2), [], {}, (1, 2, 3))
    with pytest.raises(ConfigError, match=r"other\.pth do not fit the config.*--config-file"):
        replay_step(model, tmp_path / "other.pth")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate me"
            "mory: you tried to allocate 4 bytes."
        ),
        MemoryError(),
    ],
)
def test_an_out_of_memory_error_names_images_and_keys_to_lower(tmp_path, error):
    trainer = make_trainer(tmp_path)

    def fail(*_):
        raise error

    trainer.model.roi_heads.forward = fail
    with pytest.raises(TrainingError) as told:
        trainer.train()
    message = str(told.value)
    assert "\n" not in message and message.startswith("iteration 0: out of memory (")
    for text in (
        *("(image_id ", "128 x 96", "objects", "64 RoIs, up to 16 of them", "Raise "),
        *("SOLVER.ACCUMULATE_STEPS (now 1), or lower ",),
        *("SOLVER.IMS_PER_BATCH (now 2)", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE (now 32)"),
    ):
        assert text in message, text


def test_diverged_weights_are_reported_before_any_losses_and_can_be_replayed(tmp_path):
    """detectron2's RPN would raise an error that does not name the images."""
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.backbone.fpn_output2.weight.fill_(1e38)
    with pytest.raises(TrainingError, match=r"^iteration 0: Predicted boxes .*image_id") as error:
        trainer.train()
    assert "BASE_LR" not in str(error.value), "no step has been taken"
    assert str(error.value).endswith("the data or MODEL.WEIGHTS is at fault")
    path = tmp_path / "failed_steps" / "iteration_0_rank_0.pth"
    replay = replay_step(Trainer.build_model(trainer.cfg), path)
    assert replay.losses == {} and replay.bad_outputs[0].startswith("backbone.fpn_output2")


def test_other_errors_are_not_changed(tmp_path):
    trainer = make_trainer(tmp_path)

    def fail(*_):
        raise RuntimeError("something else")

    trainer.model.roi_heads.forward = fail
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


def test_the_tool_prints_the_layer_and_reports_errors_in_one_line(tmp_path, capsys, monkeypatch):
    trainer = make_trainer(tmp_path)
    (tmp_path / "config.yaml").write_text(trainer.cfg.dump())
    path = tmp_path / "failed_steps" / "iteration_2_rank_0.pth"
    with torch.no_grad():
        trainer.model.roi_heads.mask_head.deconv.bias[0] = float("nan")
    trainer.data_loader.go_to(1, 2)
    save_step(path, trainer.model, next(iter(trainer.data_loader)), {}, (1, 2, 0))
    tool = str(ROOT / "tools" / "replay_step.py")
    monkeypatch.setattr(sys, "argv", [tool, str(path)])
    runpy.run_path(tool, run_name="__main__")
    printed = capsys.readouterr().out
    assert "before the step: roi_heads.mask_head.deconv.bias\n" in printed
    assert "in order: roi_heads.mask_head.deconv, " in printed
    wrong = [str(tmp_path / "config.yaml"), "--config-file", str(tmp_path / "no.yaml")]
    monkeypatch.setattr(sys, "argv", [tool, *wrong])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(tool, run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("replay_step.py: config file ")
