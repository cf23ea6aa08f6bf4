"""Chooses the keys and values of a new config, and writes comments that explain them.

Shape alphabet: N images, R objects, K classes.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from ..messages import listed
from .anchors import Anchors, choose_anchors
from .backbone import Backbone
from .commented_yaml import Setting
from .data_facts import DataFacts
from .device import Device
from .input_size import SMALLEST, InputSize, choose_input_size
from .schedule import CPU_MINUTES, LEAST_VIEWS, MOST_VIEWS, PASSES, Schedule, choose_schedule

CLASSES_LISTED = 20
COCO_DETECTIONS = 100
SPARE = 1.25
"""Detections per object in the most crowded image; more than 1 because some detections are wrong.
"""
RARE = 0.1
"""A class is rare if the share of images that contain it is smaller than this."""
MOST_REPEATED = 4
"""Largest number of times that an image of the rarest class is used per pass over the images."""
POSITIVE_SHARE = 0.25
"""detectron2's share of objects among the RoIs that train the heads."""


def choose_settings(
    train: DataFacts, val: DataFacts | None, backbone: Backbone, device: Device
) -> tuple[list[Setting], Schedule]:
    """Returns all settings except those that name files, and the schedule.

    Args:
        train: facts about the training data.
        val: facts about the validation data; None if there are none.
        backbone: the model's backbone.
        device: the device to train on.
    """
    size = choose_input_size(train, device)
    anchors = choose_anchors(train.object_hw * size.object_scale[:, None], train.class_of)
    num_val = 0 if val is None else len(val.image_hw)
    schedule = choose_schedule(
        device,
        len(np.unique(train.image_of)),
        size.view_pixels,
        num_val * size.image_pixels,
        backbone.pixels_per_second,
    )
    settings = [
        *_device_settings(device),
        *backbone.settings,
        *_anchor_settings(anchors, backbone),
        *_head_settings(train, val, size, device),
        *_input_settings(train, size, device),
        *_sampler_settings(train),
        *_solver_settings(schedule, backbone, device),
    ]
    if val is not None:
        settings.append(
            Setting(
                "TEST.EVAL_PERIOD",
                schedule.period,
                "Iterations between evaluations, each of which logs AP.",
            )
        )
    settings.append(_detections(train, val))
    return settings, schedule


def _device_settings(device: Device) -> list[Setting]:
    if device.kind == "cpu" and torch.cuda.is_available():
        return [Setting("MODEL.DEVICE", "cpu", "Set by --device; this machine also has a GPU.")]
    return []


def file_settings(
    files: list[tuple[str, Path, Path]], output_dir: str, split: str = ""
) -> list[Setting]:
    """Returns the settings that name files.

    Args:
        files: name, annotations and image folder of the training data and of any validation data.
        output_dir: OUTPUT_DIR of the run.
        split: explains where the validation data come from.
    """
    entries = [[name, str(json_file), str(images)] for name, json_file, images in files]
    names = [name for name, _, _ in files]
    why = f"Name, annotations, image folder. The paths work from any folder. {split}"
    settings = [
        Setting("DATASETS.COCO_FILES", entries, why.strip()),
        Setting("DATASETS.TRAIN", names[:1]),
    ]
    without = "" if names[1:] else "No photographs are left for validation, so AP is not measured."
    settings.append(Setting("DATASETS.TEST", names[1:], without))
    return [*settings, Setting("OUTPUT_DIR", output_dir)]


def describe(facts: DataFacts) -> str:
    """Returns the numbers of images, objects and classes as one line of text."""
    counts = {
        "images": len(facts.image_hw),
        "objects": len(facts.image_of),
        "classes": len(facts.class_names),
    }
    return ", ".join(_count(number, noun) for noun, number in counts.items())


def _count(number: int, noun: str) -> str:
    singular = noun[:-2] if noun == "classes" else noun[:-1]
    return f"{number:,} {noun if number != 1 else singular}"


def _anchor_settings(anchors: Anchors, backbone: Backbone) -> list[Setting]:
    heads = backbone.head_levels(anchors.levels)
    share, default = f"{anchors.covered:.0%}", f"{anchors.covered_by_default:.0%}"
    why = (
        "Sides of the anchors in pixels of the model's input, two for each map below, chosen by "
        "k-means on the boxes. Each class is weighted by the square root of its number of objects. "
        f"{share} of the boxes have an anchor with an IoU of at least 0.5; COCO's anchors would "
        f"cover {default}."
    )
    return [
        Setting("MODEL.ANCHOR_GENERATOR.SIZES", anchors.sizes, why),
        Setting(
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
            [anchors.ratios],
            "Height over width, chosen by k-means.",
        ),
        Setting(
            "MODEL.RPN.IN_FEATURES", anchors.levels, "Maps on which objects span 3 to 16 cells."
        ),
        *([Setting("MODEL.ROI_HEADS.IN_FEATURES", heads)] if heads else []),
    ]


def _head_settings(
    train: DataFacts, val: DataFacts | None, size: InputSize, device: Device
) -> list[Setting]:
    """Returns the settings for the number of classes, proposals and RoIs."""
    counts = train.objects_per_class
    order = np.argsort(-counts, kind="stable")
    told = [f"{train.class_names[k]} {counts[k]:,}" for k in order if counts[k]]
    why = f"Objects of each class in the file: {listed(told, CLASSES_LISTED)}."
    if unused := [train.class_names[k] for k in order if not counts[k]]:
        why += (
            f" Without objects: {listed(unused, CLASSES_LISTED)}. The model cannot learn these; "
            f"tools/check_dataset.py --categories removes them."
        )
    detections = int(_detections(train, val).value)
    settings = [Setting("MODEL.ROI_HEADS.NUM_CLASSES", len(counts), why)]
    if device.kind == "cpu":
        seen = _objects_in_view(train, size)
        rois = 2 ** round(math.log2(min(max(seen / POSITIVE_SHARE, 64), 256)))
        why = (
            f"RoIs per image that train the heads. Up to a quarter of them are objects, and three "
            f"quarters of the training images show {seen:.0f} objects or fewer. More RoIs would be "
            f"slower."
        )
        settings.append(Setting("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", rois, why))
        proposals = {
            "PRE_NMS_TOPK_TRAIN": 1000,
            "PRE_NMS_TOPK_TEST": max(1000, 2 * detections),
            "POST_NMS_TOPK_TRAIN": max(400, rois),
            "POST_NMS_TOPK_TEST": max(400, 2 * detections),
        }
        why = "Numbers of proposals; those of detectron2 would be too slow on a CPU."
    elif detections > COCO_DETECTIONS:
        proposals = {
            "PRE_NMS_TOPK_TEST": max(1000, 2 * detections),
            "POST_NMS_TOPK_TEST": max(1000, 2 * detections),
        }
        why = "Numbers of proposals: two for each detection."
    else:
        return settings
    for name, number in proposals.items():
        settings.append(Setting(f"MODEL.RPN.{name}", number, why))
        why = ""
    return settings


def _objects_in_view(train: DataFacts, size: InputSize) -> float:
    seen = float(np.percentile(train.objects_per_image, 75))
    return seen * min(size.view_pixels / size.image_pixels, 1)


def _detections(train: DataFacts, val: DataFacts | None) -> Setting:
    parts = [facts.objects_per_image.max() for facts in (train, val) if facts is not None]
    most = int(max(parts))
    number = max(COCO_DETECTIONS, math.ceil(SPARE * most / 50) * 50)
    why = f"The most crowded image has {most} objects, and some detections are wrong."
    if number > COCO_DETECTIONS:
        why += " AP counts this many detections per image, whereas COCO's AP counts 100."
    return Setting("TEST.DETECTIONS_PER_IMAGE", number, why)


def _input_settings(train: DataFacts, size: InputSize, device: Device) -> list[Setting]:
    shown = (
        f"At this size, a tenth of the objects are smaller than {size.smallest:.0f} pixels (square "
        "root of the box's area)."
    )
    if not size.short_edge:
        why = f"0 keeps the size of the images. {shown}"
    else:
        why = f"Short edge of the images in evaluation. {shown}"
        if size.smallest < 0.95 * SMALLEST:
            why += (
                f" A short edge of {size.wanted} would raise this to {SMALLEST} pixels, but would "
                f"take too much time or memory on {device}. Cutting the images into tiles helps."
            )
    settings = [Setting("INPUT.MIN_SIZE_TEST", size.short_edge, why)]
    if size.short_edge:
        settings.append(Setting("INPUT.MAX_SIZE_TEST", size.longest))
    why = "Training uses " + (
        "one of these sizes at random" if size.short_edge else "the same size as evaluation"
    )
    if size.crop is not None:
        why += ". They are sizes of the crops below, so objects are as large as in evaluation"
    settings.append(Setting("INPUT.MIN_SIZE_TRAIN", size.train_sizes, why + "."))
    if size.short_edge:
        settings.append(Setting("INPUT.MAX_SIZE_TRAIN", size.longest))
    settings += _crop_settings(size)
    return [*settings, _mask_format(train, size)]


def _crop_settings(size: InputSize) -> list[Setting]:
    if size.crop is None:
        return []
    kind = "relative" if size.short_edge else "absolute"
    unit = "shares of height and width" if size.short_edge else "pixels"
    why = (
        f"Training uses random crops ({unit}). Whole images would cost "
        f"{size.image_pixels / size.view_pixels:.1f} times as much, and nine out of ten objects "
        "are no larger than a third of a crop's side."
    )
    return [
        Setting("INPUT.CROP.ENABLED", True, why),
        Setting("INPUT.CROP.TYPE", kind),
        Setting("INPUT.CROP.SIZE", [size.crop, size.crop]),
    ]


def _mask_format(train: DataFacts, size: InputSize) -> Setting:
    if train.has_run_lengths:
        kinds = "run lengths" + (" and polygons" if train.has_polygons else "")
        return Setting("INPUT.MASK_FORMAT", "bitmask", f"Required: the masks are {kinds}.")
    if size.crop is not None:
        why = "Polygons are cropped as bit masks, because fvcore needs shapely to crop polygons."
        return Setting("INPUT.MASK_FORMAT", "bitmask", why)
    return Setting("INPUT.MASK_FORMAT", "polygon", "All masks are polygons.")


def _sampler_settings(train: DataFacts) -> list[Setting]:
    shares = train.image_shares
    used = np.flatnonzero(shares)
    rare = used[shares[used] < RARE]
    if len(used) < 2 or not len(rare):
        return []
    rarest = float(shares[rare].min())
    threshold = min(RARE, MOST_REPEATED**2 * rarest)
    order = rare[np.argsort(shares[rare], kind="stable")]
    names = [f"{train.class_names[k]} {shares[k]:.1%}" for k in order if shares[k] < threshold]
    why = (
        f"Some classes occur in few images ({listed(names)}). If a class occurs in a share f of "
        "the images, these images are repeated sqrt(REPEAT_THRESHOLD / f) times (LVIS, appendix "
        f"B.2), here up to {math.sqrt(threshold / rarest):.1f} times."
    )
    return [
        Setting("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", why),
        Setting("DATALOADER.REPEAT_THRESHOLD", round(threshold, 6)),
    ]


def _solver_settings(schedule: Schedule, backbone: Backbone, device: Device) -> list[Setting]:
    why = (
        f"{schedule.passes:.0f} passes over the images"
        if schedule.passes >= 2
        else f"{schedule.passes:.0%} of a pass over the images"
    )
    if schedule.is_cut:
        why += (
            f", which take about {CPU_MINUTES} minutes on {device}. If you have more time, raise "
            f"only this value: the learning rate always falls to 0 at the end of the run."
        )
    else:
        why += (
            f". The rule is {PASSES} passes, but at least {LEAST_VIEWS:,} images, because the "
            f"heads start untrained, and at most {MOST_VIEWS:,} images, as in COCO's 1x schedule."
        )
    settings = [
        Setting("SOLVER.IMS_PER_BATCH", schedule.batch_size, f"Chosen for {device}."),
        Setting(
            "SOLVER.BASE_LR",
            backbone.learning_rate(schedule.batch_size),
            backbone.why_learning_rate,
        ),
        Setting("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        Setting("SOLVER.WARMUP_ITERS", schedule.warmup),
        Setting("SOLVER.MAX_ITER", schedule.iterations, why),
        Setting("SOLVER.CHECKPOINT_PERIOD", schedule.period),
    ]
    if device.kind == "cuda":
        settings.append(
            Setting(
                "SOLVER.REFERENCE_WORLD_SIZE",
                1,
                "For one GPU; --num-gpus N scales batch, learning rate and schedule to N GPUs.",
            )
        )
    return settings
