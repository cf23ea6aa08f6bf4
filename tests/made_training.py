"""Batches with synthetic objects, and functions that train models on them."""

from __future__ import annotations

import numpy as np
import torch
from conftest import copy_instances, random_instances, relative_error
from detectron2.utils.events import EventStorage

IMAGE_HW = (128, 160)


def make_batch(counts=(4, 2), num_classes=5, mask_format="polygon", sem_seg_classes=0):
    rng = np.random.default_rng(11)
    batch = []
    for count in counts:
        image = torch.as_tensor(rng.integers(0, 256, (3, *IMAGE_HW)), dtype=torch.uint8)
        instances = random_instances(count, IMAGE_HW, num_classes, rng, mask_format)
        batch.append({"image": image, "instances": instances})
        if sem_seg_classes:
            sem_seg = rng.integers(0, sem_seg_classes, IMAGE_HW)
            batch[-1]["sem_seg"] = torch.as_tensor(sem_seg, dtype=torch.int64)
    return batch


def losses_and_gradients(model, batch):
    model.train()
    model.zero_grad()
    torch.manual_seed(2)  # sampling of anchors and proposals
    copies = [{**x, "instances": copy_instances([x["instances"]])[0]} for x in batch]
    with EventStorage(0):
        losses = model(copies)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_losses_and_gradients(plugin, stock, batch):
    """Compares losses and gradients as closely as float rounding allows."""
    losses, gradients = losses_and_gradients(plugin, batch)
    stock_losses, stock_gradients = losses_and_gradients(stock, batch)
    assert losses.keys() == stock_losses.keys() and "loss_mask" in losses
    for name, expected in stock_losses.items():
        assert relative_error(losses[name], expected) <= 1e-5, name
    assert gradients.keys() == stock_gradients.keys()
    for name, expected in stock_gradients.items():
        assert relative_error(gradients[name], expected) <= 2e-3, name


def train_a_few_iterations(model, batch, iterations=12):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    history = []
    for i in range(iterations):
        torch.manual_seed(3)
        copies = [{**x, "instances": copy_instances([x["instances"]])[0]} for x in batch]
        with EventStorage(i):
            losses = model(copies)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(np.isfinite(list(losses.values())).all() for losses in history)
    assert history[-1]["loss_mask"] < history[0]["loss_mask"] - 0.01
    model.eval()
    with torch.no_grad():
        return model([{**x, "height": 64, "width": 80} for x in batch])
