"""Trains only the mask branch, on fixed features of ground-truth boxes.

In a full training run, the effect of a pooler or a loss is mixed with the noise of proposals,
classification and backbone. Here, a new mask head is trained on region features that were computed
once, and its masks are compared on validation objects. One training run takes seconds, so many
seeds are affordable. This setup cannot show how the backbone and the box branch would have adapted.

Shape alphabet: R objects, K classes, C channels, P pooled side, M = 2P mask side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from mask_head_plugin.config import DEFAULT_LOSSES
from mask_head_plugin.modeling import FCNMaskHead
from mask_head_plugin.modeling.mask_head import Losses
from mask_head_plugin.modeling.mask_loss_terms import weighted_mask_losses


@dataclass(frozen=True)
class Objects:
    """Inputs and targets of the mask branch.

    Attributes:
        features: (R, C, P, P), pooled from the boxes of the objects.
        targets: (R, M, M) bool, the masks within the boxes.
        classes: (R,) int64 in [0, K).
    """

    features: Tensor
    targets: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Schedule:
    """Settings for training a head with Adam and a learning rate that follows a cosine to 0.

    Attributes:
        iterations: number of updates of the weights.
        batch_size: objects per update. No object is drawn again before all have been drawn.
        learning_rate: the highest rate, after WARM_UP iterations.
        conv_dims: output channels of the 3 x 3 convolutions and, last, of the deconvolution.
    """

    iterations: int = 600
    batch_size: int = 48
    learning_rate: float = 2e-3
    conv_dims: Sequence[int] = (32, 32, 32)

    def factor(self, iteration: int) -> float:
        """Returns the factor of the learning rate, 0 to 1."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(iteration / self.iterations, 1))
        return min((iteration + 1) / WARM_UP, 1) * cosine


WARM_UP = 20

OnIteration = Callable[[int, FCNMaskHead, float], None]


def train_head(
    train: Objects,
    num_classes: int,
    seed: int,
    schedule: Schedule | None = None,
    losses: Losses = DEFAULT_LOSSES,
    on_iteration: OnIteration | None = None,
) -> FCNMaskHead:
    """Trains a new FCNMaskHead in float32, on the device of the objects.

    Args:
        train: one or more objects.
        num_classes: K; with 1, the head is class-agnostic, whatever the classes of the objects.
        seed: seed of initial weights and batches. Heads with the same sizes and seed start from the
            same weights and see the objects in the same order.
        schedule: settings for training; None means Schedule().
        losses: as in MODEL.ROI_MASK_HEAD.LOSSES; ``softmax_cross_entropy`` makes classes compete.
        on_iteration: called before the first update and after every update with the number of
            updates so far, the head, and the loss of the last update (nan before the first), for
            example to record learning curves. Parameters still have the gradients of that update.
    """
    schedule = schedule or Schedule()
    device = train.features.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = ShapeSpec(channels=train.features.shape[1])
        head = FCNMaskHead(
            shape, num_classes=num_classes, conv_dims=schedule.conv_dims, losses=losses
        )
    # torch's type stubs accept memory_format only in a call without a device.
    head = head.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(head.parameters(), schedule.learning_rate)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    batches = _Batches(len(train), schedule.batch_size, seed)
    if on_iteration is not None:
        on_iteration(0, head, float("nan"))
    for iteration in range(schedule.iterations):
        chosen = batches.draw().to(device)
        loss = _loss(head, train, chosen, iteration)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        if on_iteration is not None:
            on_iteration(iteration + 1, head, float(loss.detach()))
    return head.eval()


def predict(head: FCNMaskHead, objects: Objects, all_classes: bool = False) -> Tensor:
    """Returns (R, M, M) logits of each object's class, or (R, K, M, M) logits of all classes.

    Args:
        head: a trained head.
        objects: the objects to predict masks for; their targets are not used.
        all_classes: whether to return all classes. Losses that couple classes need all of them.
    """
    parts = []
    with torch.inference_mode():
        for rows in torch.arange(len(objects)).split(PREDICTED_AT_ONCE):
            features = objects.features[rows]
            if all_classes:
                parts.append(head.class_logits(features))
            else:
                parts.append(head.selected_logits(features, _rows(head, objects.classes[rows])))
    return torch.cat(parts).clone()  # gradients cannot flow through an inference tensor


PREDICTED_AT_ONCE = 128


def mask_iou(pred_masks: Tensor, targets: Tensor) -> Tensor:
    """Returns the (R,) IoU of masks on the grid of their boxes; 1 if both masks are empty.

    Args:
        pred_masks: (R, M, M) bool.
        targets: (R, M, M) bool.
    """
    both = (pred_masks & targets).flatten(1).sum(1)
    either = (pred_masks | targets).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _loss(head: FCNMaskHead, objects: Objects, rows: Tensor, iteration: int) -> Tensor:
    features, classes = objects.features[rows], _rows(head, objects.classes[rows])
    if head.losses[0].activation is None:
        logits = head.selected_logits(features, classes)
    else:
        logits = head.class_logits(features)
    terms = weighted_mask_losses(head.losses, logits, classes, objects.targets[rows], iteration)
    return torch.stack(list(terms.values())).sum()


def _rows(head: FCNMaskHead, classes: Tensor) -> Tensor:
    """Returns the output channel of each object."""
    return torch.zeros_like(classes) if head.num_classes == 1 else classes


class _Batches:
    """Draws indices of objects in random order; none is repeated before all have been drawn."""

    def __init__(self, num_objects: int, batch_size: int, seed: int) -> None:
        if num_objects < 1:
            raise ValueError("a mask head needs at least one object to train on")
        self._num_objects, self._batch_size = num_objects, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.int64)

    def draw(self) -> Tensor:
        while len(self._left) < self._batch_size:
            order = torch.randperm(self._num_objects, generator=self._generator)
            self._left = torch.cat([self._left, order])
        batch, self._left = self._left.split([self._batch_size, len(self._left) - self._batch_size])
        return batch
