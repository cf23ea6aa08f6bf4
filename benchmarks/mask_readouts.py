#!/usr/bin/env python3
"""Reads the mask logits of trained models in ways that they were not trained for.

In Table 2b of Mask R-CNN, the softmax model is trained with a softmax, and a pixel belongs to an
object if its softmax probability is at least one half. Does the gap to the sigmoid come from
training, or from this way of reading the logits? To find out, this script evaluates the models of
`tools/ablate.py --config-file configs/ablations/independent_vs_softmax.yaml` again, with the same
weights, boxes and classes; only their mask logits are read differently. It then evaluates them
again in the true boxes with the true classes. Nothing is trained. Writes a table and a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from every_class import own_class
from measure import machine, write_json
from tabulate import tabulate
from torch import Tensor

from mask_head_plugin.ablation.report.study import Study, read_study
from mask_head_plugin.checkpoint import MaskHeadCheckpointer
from mask_head_plugin.config import load_config
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.evaluators import build_evaluator
from mask_head_plugin.evaluation.bootstrap import image_weights, resampled_ap
from mask_head_plugin.evaluation.difference import difference_of
from mask_head_plugin.evaluation.matching import Matches
from mask_head_plugin.modeling.class_selection import of_class
from mask_head_plugin.modeling.mask_loss import softmax_probs
from mask_head_plugin.modeling.rcnn import rle_postprocess
from mask_head_plugin.progress import progress

TRAINED = {"sigmoid": "own class against background", "softmax": "softmax at 0.5"}
"""For each variant, the reading that it is trained for."""
THRESHOLDS = (0.1, 0.2, 0.3, 0.4)
METRICS = ("AP", "AP50", "AP75")

Reading = Callable[[Tensor, Tensor], Tensor]
Drawn = npt.NDArray[np.float64]


def largest(class_logits: Tensor, classes: Tensor) -> Tensor:
    """Returns a number above one half where the class beats all others and the background."""
    logits = class_logits.scatter(1, classes[:, None, None, None].expand_as(class_logits[:, :1]), 0)
    return (of_class(class_logits, classes) - logits.amax(1).clamp(min=0)).sigmoid()


def any_class(class_logits: Tensor, _: Tensor) -> Tensor:
    """Returns the softmax probability that a pixel belongs to any class, not to the background."""
    return class_logits.logsumexp(1).sigmoid()


def at_threshold(threshold: float, reading: Reading) -> Reading:
    """Returns a reading whose probabilities are rescaled so that ``threshold`` becomes one half."""

    def read(class_logits: Tensor, classes: Tensor) -> Tensor:
        probs = reading(class_logits, classes)
        above = 0.5 + 0.5 * (probs - threshold) / (1 - threshold)
        return torch.where(probs < threshold, 0.5 * probs / threshold, above)

    return read


READINGS: dict[str, Reading] = {
    "own class against background": own_class,
    "softmax at 0.5": softmax_probs,
    "largest": largest,
    "any class against background": any_class,
    **{f"softmax at {t}": at_threshold(t, softmax_probs) for t in THRESHOLDS},
    **{f"own class at {t}": at_threshold(t, own_class) for t in THRESHOLDS},
}

READINGS_OF = {
    "sigmoid": [name for name in READINGS if name == "softmax at 0.5" or name.startswith("own")],
    "softmax": list(READINGS),
}
"""Readings that are tried on each variant. Only one reading of the sigmoid uses the logits of other
classes, because those are not trained."""
OWN, ANY = "own class against background", "any class against background"
TUNED = "own class at 0.3"
CHANGES = {
    "softmax": (OWN, ANY, "largest", "softmax at 0.2", TUNED),
    "sigmoid": ("softmax at 0.5", TUNED),
}
"""Readings whose change gets an interval. A table with fewer rows has narrower intervals."""
GAPS = (("softmax at 0.5", OWN), (OWN, OWN), (ANY, OWN), (TUNED, TUNED))
"""Pairs of a reading of the softmax and a reading of the sigmoid. Each pair's gap gets an
interval."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    cfg: CfgNode,
    readings: Sequence[str],
    in_true_boxes: bool,
    num_images: int | None,
) -> dict[str, Matches]:
    """Returns the matches of each reading on the images of the first test set."""
    dataset = cfg.DATASETS.TEST[0]
    truth = {x["image_id"]: x for x in DatasetCatalog.get(dataset)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / str(number) for number, name in enumerate(readings)}
        evaluators = {name: build_evaluator(cfg, dataset, str(paths[name])) for name in readings}
        for evaluator in evaluators.values():
            evaluator.reset()
        for inputs in itertools.islice(Trainer.build_test_loader(cfg, dataset), num_images):
            given = [true_instances(truth[x["image_id"]], x) for x in inputs]
            for name, outputs in read_all(
                model, inputs, readings, given if in_true_boxes else None
            ):
                evaluators[name].process(inputs, outputs)
        for evaluator in evaluators.values():
            evaluator.evaluate()
        return {name: Matches.load(path / "matches_segm.npz") for name, path in paths.items()}


def read_all(
    model: Any,
    inputs: list[dict[str, Any]],
    readings: Sequence[str],
    given: list[Instances] | None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the model's outputs for each reading, in given boxes or in boxes that it finds."""
    head = model.roi_heads.mask_head
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    if given is None:
        proposals, _ = model.proposal_generator(images, features, None)
        given, _ = model.roi_heads(images, features, proposals, None)
    for name in readings:
        head.losses = [SimpleNamespace(activation=READINGS[name])]
        found = model.roi_heads.forward_with_given_boxes(
            features, [Instances(x.image_size, **x.get_fields()) for x in given]
        )
        yield (
            name,
            [
                {"instances": rle_postprocess(x, y["height"], y["width"])}
                for x, y in zip(found, inputs, strict=True)
            ],
        )


def true_instances(record: dict[str, Any], seen: dict[str, Any]) -> Instances:
    """Returns an image's objects as detections in the resized image that the model sees."""
    height, width = seen["image"].shape[1:]
    objects = [x for x in record["annotations"] if not x.get("iscrowd", 0)]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_boxes.scale(width / record["width"], height / record["height"])
    instances.pred_classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.int64)
    instances.scores = torch.ones(len(objects))
    return instances


def load_model(folder: Path) -> tuple[torch.nn.Module, CfgNode]:
    """Returns a trial's final model, for inference, and its config."""
    cfg = load_config(str(folder / "config.yaml"))
    model = Trainer.build_model(cfg)
    MaskHeadCheckpointer(model).load(str(folder / "model_final.pth"))
    return model.eval(), cfg


def measure(study: Study, num_images: int | None, num_draws: int) -> dict[str, Any]:
    """Returns each variant's AP for each reading, in the boxes found and in the true boxes."""
    parts: dict[str, dict[str, list[Matches]]] = {"boxes found": {}, "true boxes": {}}
    for trial in progress(study.finished, "models read", "model"):
        model, cfg = load_model(trial.folder)
        for part, found in parts.items():
            in_true_boxes = part == "true boxes"
            readings = READINGS_OF[trial.variant]
            matches = evaluate(model, cfg, readings, in_true_boxes, num_images)
            for name, of_reading in matches.items():
                found.setdefault(f"{trial.variant}: {name}", []).append(of_reading)
    return {
        part: {
            "readings": [describe(name, of_seeds) for name, of_seeds in found.items()],
            "changes": changes(found, num_draws),
            "gaps": gaps(found, num_draws),
        }
        for part, found in parts.items()
    }


def drawn_aps(
    found: dict[str, list[Matches]], pairs: Sequence[tuple[str, str]], num_draws: int
) -> dict[str, Drawn]:
    """Returns (N, 1 + S) APs of each row in ``pairs``: for all images, then for each draw."""
    num_images = len(next(iter(found.values()))[0].image_ids)
    draws = image_weights(num_images, num_draws, seed=0)
    weights = np.concatenate([np.ones((1, num_images), draws.dtype), draws])
    return {
        name: np.stack([resampled_ap(x, weights, ("AP",))["AP"] for x in found[name]])
        for name in dict.fromkeys(itertools.chain(*pairs))
        if name in found
    }


def interval(
    name: str, variant: Drawn, baseline: Drawn, found: dict[str, list[Matches]], num_rows: int
) -> dict[str, Any]:
    """Returns a difference and its interval. All ``num_rows`` intervals hold jointly."""
    num_images = len(next(iter(found.values()))[0].image_ids)
    result = difference_of("AP", variant, baseline, num_images, num_rows)
    return {
        "row": name,
        "seeds": len(variant),
        "difference": round(result.difference, 2),
        "interval": [round(result.low, 2), round(result.high, 2)],
    }


def describe(name: str, of_seeds: list[Matches]) -> dict[str, Any]:
    """Returns the metrics of a row as means over seeds, and the AP of each seed, in percent."""
    weights = np.ones((1, len(of_seeds[0].image_ids)), np.int64)
    found = [resampled_ap(matches, weights, METRICS) for matches in of_seeds]
    means = {metric: round(float(np.mean([x[metric] for x in found])), 2) for metric in METRICS}
    return {"row": name, **means, "seeds": [round(float(x["AP"][0]), 2) for x in found]}


def changes(found: dict[str, list[Matches]], num_draws: int) -> list[dict[str, Any]]:
    """Returns the AP of each reading minus the AP of the reading that the models were trained for.

    Both readings come from the same model, so they are compared seed by seed. An effect of training
    that is the same for both readings cancels.
    """
    pairs = [(f"{arm}: {x}", f"{arm}: {TRAINED[arm]}") for arm in CHANGES for x in CHANGES[arm]]
    drawn = drawn_aps(found, pairs, num_draws)
    present = [(row, usual) for row, usual in pairs if row in drawn and usual in drawn]
    moved = {row: drawn[row] - drawn[usual] for row, usual in present}
    return [interval(row, x, np.zeros_like(x), found, len(moved)) for row, x in moved.items()]


def gaps(found: dict[str, list[Matches]], num_draws: int) -> list[dict[str, Any]]:
    """Returns the softmax's AP minus the sigmoid's, for each pair of readings in GAPS."""
    pairs = [(f"softmax: {x}", f"sigmoid: {y}") for x, y in GAPS]
    drawn = drawn_aps(found, pairs, num_draws)
    present = [(row, base) for row, base in pairs if row in drawn and base in drawn]
    return [
        interval(f"{row} against {base}", drawn[row], drawn[base], found, len(present))
        for row, base in present
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="an ablation's --output")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws (default 1000)")
    parser.add_argument("--images", type=int, help="number of images to evaluate (default: all)")
    args = parser.parse_args()
    study = read_study(args.input, args.draws)
    found = measure(study, args.images, args.draws)
    for part, name in itertools.product(found, ("readings", "changes", "gaps")):
        print(f"\n{part}: {name}\n{tabulate(found[part][name], headers='keys')}")
    if args.json:
        write_json({"machine": machine("cpu"), "trials": len(study.finished), **found}, args.json)


if __name__ == "__main__":
    main()
