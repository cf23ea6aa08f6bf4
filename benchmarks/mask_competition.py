#!/usr/bin/env python3
"""Trains only the mask branch, with and without competition between the classes.

Mask R-CNN's Table 2b compares a sigmoid per class with a softmax over classes, but several things
differ between the two models. This study changes one thing at a time. Its synthetic objects
(made_objects.py) come with their true boxes and classes, so detection plays no part. A small stem
and the plugin's FCNMaskHead are trained for combinations of training method (arm), number of
classes, confusion and seed. The output of each trained model is turned into masks in several ways.

Each training writes one file to --output. If you run the script again, it runs only the trainings
whose files are missing. The summary is written to --json. Its intervals cover training and images.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from competition_summary import summarise
from detectron2.layers import ShapeSpec
from every_class import every_class_cross_entropy, own_class
from made_objects import TEST, TRAINING, TUNING, MadeObjects, make_objects
from measure import machine, write_json
from tabulate import tabulate
from torch import Tensor, nn

from mask_head_plugin.modeling.class_selection import of_class
from mask_head_plugin.modeling.mask_head import FCNMaskHead
from mask_head_plugin.modeling.mask_loss import (
    binary_cross_entropy,
    softmax_cross_entropy,
    softmax_probs,
)
from mask_head_plugin.progress import progress_bar

FloatArray = npt.NDArray[np.float64]
CHANNELS = 16
BATCH = 8
RATE = 0.1
OTHER_RATES = (0.025, 0.4)
CONFUSIONS = (0.0, 0.5)
CURVE = (62, 125, 250, 500, 1000, 2000, 4000, 8000)
"""Iterations after which a model is evaluated."""
NUM_TRAINING, NUM_TEST = 16384, 1000
THRESHOLDS = np.linspace(0.02, 0.98, 49)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        loss: a function of (R, K, M, M) logits, (R,) classes and (R, M, M) masks. The background's
            logit is already subtracted from the logits.
        extra: 1 if the head has an output for the background in addition to one per class, else 0.
        even: whether logits start at -log K. In a softmax, the background is then as likely as all
            classes together; with sigmoids, the probabilities of the classes add up to about 1.
        agnostic: whether all classes share one output.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    extra: int = 0
    even: bool = False
    agnostic: bool = False


def _own_sigmoid(logits: Tensor, classes: Tensor, masks: Tensor) -> Tensor:
    return binary_cross_entropy(of_class(logits, classes), masks)


ARMS = {
    "sigmoid": Arm(_own_sigmoid),
    "softmax": Arm(softmax_cross_entropy),
    "softmax, even start": Arm(softmax_cross_entropy, even=True),
    "softmax, learned background": Arm(softmax_cross_entropy, extra=1),
    "sigmoid of every class": Arm(every_class_cross_entropy),
    "sigmoid of every class, even start": Arm(every_class_cross_entropy, even=True),
    "class-agnostic": Arm(_own_sigmoid, agnostic=True),
}


@dataclass(frozen=True)
class Training:
    """One training of the study.

    Attributes:
        arm: a name in ARMS.
        num_classes: K.
        confusion: see made_objects.
        rate: base learning rate, with a cosine schedule after 100 iterations of warm-up.
        iterations: number of updates, each with BATCH objects.
        seed: seed of the weights and of the order of the objects.
    """

    arm: str
    num_classes: int
    confusion: float
    rate: float
    iterations: int
    seed: int

    @property
    def name(self) -> str:
        arm = self.arm.replace(",", "").replace(" ", "_")
        return (
            f"{arm}-{self.num_classes}-{self.confusion}-{self.rate}-{self.iterations}-{self.seed}"
        )


class MaskBranch(nn.Module):
    """A stem that turns images into 14 x 14 region features, and the plugin's mask head."""

    def __init__(self, arm: Arm, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 2), (CHANNELS, 1)):
            convolution = nn.Conv2d(inputs, CHANNELS, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(CHANNELS), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.num_outputs = 1 if arm.agnostic else num_classes + arm.extra
        shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
        self.head = FCNMaskHead(shape, num_classes=self.num_outputs, conv_dims=[CHANNELS] * 3)
        self.arm, self.num_classes = arm, num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Returns (R, K, M, M) logits minus the background's, for (R, 3, SIDE, SIDE) images."""
        logits = self.head.class_logits(self.stem(images))
        if self.arm.extra:
            logits = logits[:, :-1] - logits[:, -1:]
        if self.arm.even:
            logits = logits - math.log(self.num_classes)
        return logits.expand(-1, self.num_classes, -1, -1) if self.arm.agnostic else logits


def train(training: Training, objects: MadeObjects, tests: Tests) -> dict[str, Any]:
    """Trains a model; returns its curve with gradients, and the IoU of each test object."""
    torch.manual_seed(training.seed)
    arm = ARMS[training.arm]
    model = MaskBranch(arm, training.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=training.rate, momentum=0.9)
    images, masks = torch.from_numpy(objects.images), torch.from_numpy(objects.masks).float()
    classes = torch.from_numpy(objects.classes)
    curve = []
    for iteration in range(1, training.iterations + 1):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.param_groups[0]["lr"] = training.rate * schedule(iteration, training.iterations)
        loss = arm.loss(model(images[batch]), classes[batch], masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration in CURVE or iteration == training.iterations:
            curve.append({"iteration": iteration, **tests.curve_point(model)})
    return {"curve": curve, **tests.final(model)}


def schedule(iteration: int, iterations: int) -> float:
    """Returns the factor of the learning rate: linear for 100 iterations, then a cosine."""
    return min(iteration / 100, 1.0) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


class Tests:
    """The objects that a model is tested on, and its results for them.

    Args:
        num_classes: K.
        confusion: see made_objects.
        num_test: number of test objects. Thresholds are tuned on half as many other objects.
    """

    def __init__(self, num_classes: int, confusion: float, num_test: int) -> None:
        self.tuning = make_objects(TUNING, num_test // 2, num_classes, confusion)
        self.test = make_objects(TEST, num_test, num_classes, confusion)

    def curve_point(self, model: MaskBranch) -> dict[str, Any]:
        ious = read_out(logits_of(model, self.test), self.test)
        point = {name: float(values.mean()) for name, values in ious.items()}
        return {**point, "gradients": gradients(model, self.test)}

    def final(self, model: MaskBranch) -> dict[str, Any]:
        tuning = logits_of(model, self.tuning)
        logits = logits_of(model, self.test)
        ious = read_out(logits, self.test)
        thresholds = {}
        for name, probs_of in TUNED.items():
            probs = probs_of(tuning, _tensor(self.tuning.classes)).numpy()
            reached = [iou(probs > t, self.tuning.masks).mean() for t in THRESHOLDS]
            thresholds[name] = float(THRESHOLDS[int(np.argmax(reached))])
            probs = probs_of(logits, _tensor(self.test.classes)).numpy()
            ious[name] = iou(probs > thresholds[name], self.test.masks)
        return {
            "thresholds": thresholds,
            "ious": {name: values.round(4).tolist() for name, values in ious.items()},
        }


TUNED = {"own class, tuned": own_class, "softmax, tuned": softmax_probs}


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)


@torch.no_grad()
def logits_of(model: MaskBranch, objects: MadeObjects) -> Tensor:
    """Returns the (N, K, M, M) logits of a model in evaluation mode."""
    model.eval()
    logits = torch.cat([model(part) for part in _tensor(objects.images).split(100)])
    model.train()
    return logits


def read_out(logits: Tensor, objects: MadeObjects) -> dict[str, FloatArray]:
    """Returns the (N,) IoUs of the true class's masks for each reading with a fixed threshold."""
    classes = _tensor(objects.classes)
    own = of_class(logits, classes)
    masks = {
        "own class against background": own > 0,
        "softmax at 0.5": softmax_probs(logits, classes) > 0.5,
        "largest": own >= logits.amax(1).clamp(min=0),
        "any class against background": logits.logsumexp(1) > 0,
    }
    return {name: iou(mask.numpy(), objects.masks) for name, mask in masks.items()}


def iou(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> FloatArray:
    """Returns the (N,) IoUs of (N, M, M) masks."""
    union = (found | true).sum((1, 2))
    return np.asarray((found & true).sum((1, 2)) / np.maximum(union, 1), np.float64)


def gradients(model: MaskBranch, objects: MadeObjects) -> dict[str, float]:
    """Returns the mean absolute gradient of the loss for a logit, times the number of pixels.

    The loss is a mean over the pixels of all RoIs, so this product does not depend on the number of
    pixels. There are four values: inside and outside the object's mask, for the RoI's class and for
    the sum over all other classes.
    """
    part = slice(0, 64)
    masks, classes = _tensor(objects.masks[part]), _tensor(objects.classes[part])
    model.eval()
    with torch.no_grad():
        logits = model(_tensor(objects.images[part]))
    model.train()
    logits = logits.clone().requires_grad_()
    loss = model.arm.loss(logits, classes, masks.float())
    (size,) = torch.autograd.grad(loss, logits)
    size = size.abs() * masks.numel()
    own = of_class(size, classes)
    others = size.sum(1) - own
    return {
        "own class inside": float(own[masks].mean()),
        "own class outside": float(own[~masks].mean()),
        "other classes inside": float(others[masks].mean()),
        "other classes outside": float(others[~masks].mean()),
    }


def plan(short: int, long: int, seeds: Sequence[int]) -> list[Training]:
    """Returns the trainings of the study, the most informative first.

    Args:
        short: iterations of most trainings.
        long: iterations of the long trainings, which show with 10 classes how much of the gap
            remains.
        seeds: the seeds that each setting is trained with.
    """
    two = ("sigmoid", "softmax")
    three = (*two, "sigmoid of every class")
    others = tuple(arm for arm in ARMS if arm not in two)
    clear = CONFUSIONS[:1]
    parts = [
        (two, (10,), CONFUSIONS, (RATE,), short),
        (others, (10,), CONFUSIONS, (RATE,), short),
        (two, (1, 2, 5, 20, 40), clear, (RATE,), short),
        (three, (10,), clear, (RATE,), long),
        (three, (10,), clear, OTHER_RATES, short),
    ]
    return [
        Training(arm, num_classes, confusion, rate, iterations, seed)
        for arms, counts, confusions, rates, iterations in parts
        for num_classes, confusion, rate, arm, seed in itertools.product(
            counts, confusions, rates, arms, seeds
        )
    ]


def run(trainings: list[Training], output: Path, num_objects: int, num_test: int) -> None:
    """Runs the trainings that have no file yet."""
    output.mkdir(parents=True, exist_ok=True)
    left = [x for x in trainings if not (output / f"{x.name}.json").exists()]
    groups = itertools.groupby(left, key=lambda x: (x.num_classes, x.confusion))
    with progress_bar("trainings", "it", sum(x.iterations for x in left)) as advance:
        for (num_classes, confusion), group in groups:
            objects = make_objects(TRAINING, num_objects, num_classes, confusion)
            tests = Tests(num_classes, confusion, num_test)
            for training in group:
                start = time.monotonic()
                result = train(training, objects, tests)
                seconds = round(time.monotonic() - start, 1)
                content = {**dataclasses.asdict(training), "seconds": seconds, **result}
                path = output / f"{training.name}.json"
                path.with_suffix(".part").write_text(json.dumps(content))
                path.with_suffix(".part").rename(path)
                advance(training.iterations)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--json", type=Path, help="file for the summary")
    parser.add_argument("--short", type=int, default=2000, help="iterations of most trainings")
    parser.add_argument("--long", type=int, default=8000, help="iterations of long trainings")
    parser.add_argument("--objects", type=int, default=NUM_TRAINING, help="training objects")
    parser.add_argument("--tests", type=int, default=NUM_TEST, help="test objects")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default 1 to 5")
    args = parser.parse_args()
    trainings = plan(args.short, args.long, args.seeds)
    run(trainings, args.output, args.objects, args.tests)
    found = summarise(args.output, RATE, args.short, args.long)
    tables = [name for name, table in found.items() if name not in ("curves", "seconds")]
    for name in tables:
        print(f"\n{name}\n{tabulate(found[name], headers='keys')}")
    if args.json:
        write_json({"machine": machine("cpu"), "trainings": len(trainings), **found}, args.json)


if __name__ == "__main__":
    main()
