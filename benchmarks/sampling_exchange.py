#!/usr/bin/env python3
"""Evaluates one trained model with every way to pool; trains nothing.

At test time, the box head and the mask head get the features of each way in turn. The outputs of
the backbone and the proposals are computed once, so they are the same for all ways. Differences in
AP are free of training noise. They have two causes: a way may read the maps less well, and its
features may be unlike those that the heads were trained on (mismatch). Intervals of 95% cover the
images and hold jointly for all ways (Bonferroni). They are Student's t times the standard
error over random draws of the images. All ways use the same draws.

Writes a table, and a JSON file with machine, versions and date. Takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, write_json
from sampling_case import BASELINE, WAYS, Case, add_case_arguments, case_of
from tabulate import tabulate

from mask_head_plugin.engine.evaluators import build_evaluator
from mask_head_plugin.evaluation.bootstrap import image_weights, resampled_ap
from mask_head_plugin.evaluation.difference import LEVEL, student_t
from mask_head_plugin.evaluation.matching import Matches
from mask_head_plugin.modeling.rcnn import rle_postprocess
from mask_head_plugin.progress import progress

METRICS = ("AP", "AP50", "AP75")
TASKS = ("bbox", "segm")
NUM_DRAWS = 1000


@torch.inference_mode()
def predict_all(case: Case, limit: int, folder: Path) -> list[str]:
    """Writes the results and matches of each way to a subfolder; returns the ids of the images."""
    model, heads = case.model, case.model.roi_heads
    evaluators, image_ids = {}, []
    for name in WAYS:
        evaluators[name] = build_evaluator(case.cfg, case.cfg.DATASETS.TEST[0], str(folder / name))
        evaluators[name].reset()
    pairs = {name: (make(case.box_pooler), make(case.mask_pooler)) for name, make in WAYS.items()}
    for number, inputs in enumerate(progress(case.test_loader(), case.name, "image")):
        if number == limit:
            break
        image_ids.append(str(inputs[0]["image_id"]))
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        for name, poolers in pairs.items():
            heads.box_pooler, heads.mask_pooler = poolers
            found, _ = heads(images, features, proposals, None)
            output = rle_postprocess(found[0], inputs[0]["height"], inputs[0]["width"])
            evaluators[name].process(inputs, [{"instances": output}])
    for evaluator in evaluators.values():
        evaluator.evaluate()
    return image_ids


def differences(matches: dict[str, Matches], image_ids: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each way and metric.

    Args:
        matches: the matches of each way.
        image_ids: ids of the images that were evaluated; other images do not count.
    """
    used = np.nonzero(np.isin(matches[BASELINE].image_ids, image_ids))[0]
    drawn = np.zeros((NUM_DRAWS + 1, len(matches[BASELINE].image_ids)), np.int32)
    drawn[0, used] = 1
    drawn[1:, used] = image_weights(len(used), NUM_DRAWS, seed=0)
    values = {name: resampled_ap(x, drawn, METRICS) for name, x in matches.items()}
    tail, rows = (1 - LEVEL) / (len(matches) - 1) / 2, []
    factor = student_t(1 - tail, len(used) - 1)
    for name, of_way in values.items():
        for metric in METRICS:
            change = of_way[metric] - values[BASELINE][metric]
            reach = factor * float(np.nanstd(change[1:], ddof=1))
            rows.append(
                {
                    "way": name,
                    "metric": metric,
                    "value": round(float(of_way[metric][0]), 2),
                    "difference": round(float(change[0]), 2),
                    "low": round(float(change[0]) - reach, 2),
                    "high": round(float(change[0]) + reach, 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/sampling/exchange_shapes.json"))
    add_case_arguments(parser)
    args = parser.parse_args()
    case = case_of(args)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        image_ids = predict_all(case, args.images, folder)
        tasks = {
            task: differences(
                {name: Matches.load(folder / name / f"matches_{task}.npz") for name in WAYS},
                image_ids,
            )
            for task in TASKS
        }
    for task, rows in tasks.items():
        print(task)
        print(tabulate(rows, headers="keys", tablefmt="github"))
    pooler = case.cfg.MODEL.ROI_MASK_HEAD
    trained = f"{pooler.POOLER_TYPE}, POOLER_SAMPLING_RATIO {pooler.POOLER_SAMPLING_RATIO}"
    facts = {
        "name": args.name,
        "images": len(image_ids),
        "draws": NUM_DRAWS,
        "trained with": trained,
        **case.facts,
    }
    write_json({**machine("cpu"), **facts, **tasks}, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
