"""For models without batch norm, an accumulated step equals one step with the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_instances, small_config
from detectron2.modeling import build_model, sampling
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from made_run import in_one_process
from torch import nn

from mask_head_plugin import ConfigError
from mask_head_plugin.data import seed_generators
from mask_head_plugin.engine import TrainingError
from mask_head_plugin.engine.accumulation import AccumulatingAMPTrainer, build_inner_trainer
from mask_head_plugin.engine.distributed import distribute
from mask_head_plugin.engine.gradient_clipping import clip_gradients
from mask_head_plugin.engine.guards import StepGuard
from mask_head_plugin.engine.replay import replay_step

NO_NORM = [
    *("MODEL.RESNETS.NORM", "", "MODEL.FPN.NORM", "", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "32"),
]


def made_batch(num_images: int = 4) -> list[dict]:
    """Returns images of one size, with at least as many objects as sampled mask RoIs."""
    rng, batch = np.random.default_rng(5), []
    for number in range(num_images):
        image = torch.as_tensor(rng.integers(0, 256, (3, 64, 64)), dtype=torch.uint8)
        instances = random_instances(2 + number, (64, 64), 5, rng, "bitmask")
        batch.append(
            {"image": image, "height": 64, "width": 64, "instances": instances, "image_id": number}
        )
    return batch


def made_model(*opts: str) -> nn.Module:
    torch.manual_seed(1)
    return build_model(small_config("Base-Small.yaml", *NO_NORM, *opts))


def made_trainer(model, num_parts, batch, *, rate=1.0, amp=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = build_inner_trainer(model, [batch] * 3, optimizer, amp=amp, num_parts=num_parts)
    trainer.iter = 0
    return trainer


def gradients_of_step(num_parts: int) -> dict[str, torch.Tensor]:
    model = made_model()
    trainer = made_trainer(model, num_parts, made_batch())
    with EventStorage(0) as storage:
        trainer.run_step()
    assert storage.latest()["total_loss"][0] > 0
    found = {name: x.grad for name, x in model.named_parameters()}
    return {**found, "total_loss": torch.tensor(storage.latest()["total_loss"][0])}


def test_an_accumulated_step_equals_that_of_the_large_batch(monkeypatch):
    """Always samples the first candidates; otherwise, the parts would draw other random numbers."""
    monkeypatch.setattr(sampling.torch, "randperm", lambda n, **_: torch.arange(n))
    whole, parts = gradients_of_step(1), gradients_of_step(2)
    assert set(whole) == set(parts) and len(whole) > 40
    for name, gradient in whole.items():
        if gradient is None:
            assert parts[name] is None
            continue
        error = (parts[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
        assert error < 1e-4, name


class Squares(nn.Module):
    """A model whose loss is a mean over samples, so that its gradient is easy to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": (self.weight * torch.stack(batch)).mean()}


def step_of(trainer) -> float:
    with EventStorage(0):
        trainer.run_step()
    return 1 - trainer.model.weight.item()


def test_gradients_are_clipped_after_accumulation():
    """Gradients 1 and 5 average to 3, which is clipped to 2; clipping each first would give 1.5."""
    batch = [torch.tensor(1.0), torch.tensor(5.0)]
    assert step_of(made_trainer(Squares(), 2, batch)) == 3
    clipped = made_trainer(Squares(), 2, batch)
    clip = small_config("Base-Small.yaml").SOLVER.CLIP_GRADIENTS
    clip.CLIP_VALUE = 2.0
    clip_gradients(clipped.optimizer, clip)
    assert step_of(clipped) == 2


def test_amp_scales_the_loss_of_each_part_but_not_the_step():
    batch = [torch.tensor(1.0), torch.tensor(5.0)]
    trainer = made_trainer(Squares(), 2, batch, amp=True)
    assert isinstance(trainer, AccumulatingAMPTrainer)
    trainer.precision = torch.bfloat16
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["params"][0].grad.item())
    )
    assert step_of(trainer) == 3 and seen == [3]
    assert trainer.grad_scaler.get_scale() == 16
    assert "grad_scaler" in trainer.state_dict()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=0.5)
    trainer.data_loader[1][1] = torch.tensor(1e38)  # makes the scaled gradient overflow
    before = trainer.model.weight.item()
    step_of(trainer)
    assert trainer.model.weight.item() == before and trainer.grad_scaler.get_scale() == 2.0**119


def test_processes_share_gradients_once_per_step(tmp_path, monkeypatch):
    """A hook of DistributedDataParallel records each sum over processes."""
    with in_one_process(tmp_path):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        model = distribute(Squares(), in_parts=True)
        sums = []

        def note(_, bucket):
            sums.append(bucket.buffer().item())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, note)
        trainer = made_trainer(model, 2, [torch.tensor(1.0), torch.tensor(5.0)], rate=0.0)
        with EventStorage(0):
            for _ in range(3):
                trainer.run_step()
        assert sums == [3.0, 3.0, 3.0]


def test_a_bad_loss_names_the_images_of_its_part_and_can_be_replayed(tmp_path):
    model = made_model("OUTPUT_DIR", str(tmp_path))
    trainer = made_trainer(model, 2, made_batch())
    trainer.seed = 7
    guard = StepGuard(model, small_config("Base-Small.yaml", "OUTPUT_DIR", str(tmp_path)))
    guard.seed = 7
    trainer.register_hooks([guard])
    forward, calls = model.roi_heads.mask_head.forward, []

    def spoilt(*args):
        calls.append(None)
        losses = forward(*args)
        return {k: x * (float("nan") if len(calls) == 2 else 1) for k, x in losses.items()}

    model.roi_heads.mask_head.forward = spoilt
    with EventStorage(0), pytest.raises(TrainingError) as error:
        trainer.run_step()
    ids = [number for number in range(4) if f"image_id {number}" in str(error.value)]
    assert ids == [2, 3] and "loss_mask is nan" in str(error.value)
    model.roi_heads.mask_head.forward = forward
    replay = replay_step(model, tmp_path / "failed_steps" / "iteration_0_rank_0.pth")
    assert [x["image_id"] for x in replay.batch] == [2, 3]
    assert replay.saved_losses.pop("loss_mask") != replay.losses.pop("loss_mask")
    assert replay.losses == replay.saved_losses


def test_random_numbers_of_a_step_do_not_depend_on_previous_work():
    drawn = []

    class Drawing(Squares):
        def forward(self, batch):
            drawn.append(torch.rand(()).item())
            return super().forward(batch)

    for number in (1, 2):
        seed_generators(number)
        step_of(made_trainer(Drawing(), 2, [torch.tensor(1.0)] * 2))
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_a_batch_of_the_users_loader_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"yielded 3 images, .* into SOLVER\.ACCUMULATE_STEPS 2"):
        step_of(made_trainer(Squares(), 2, [torch.tensor(1.0)] * 3))
