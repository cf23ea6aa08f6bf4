"""Writes a config for a data set: checks the files, chooses the values and tries the config."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import ConfigError, read_config
from ..config_check.unread_keys import own_keys
from ..dataset_check.config_datasets import (
    CocoSource,
    check_with_cache,
    describe_errors,
    find_faults,
    sources_of,
)
from ..dataset_check.findings import WARNING, Finding, errors_of
from ..dataset_check.photographs import photographs
from ..dataset_check.split import split
from ..durable_files import write_durably
from ..engine.run import check_and_register
from .backbone import CONFIGS, Backbone, choose_backbone
from .commented_yaml import render
from .data_facts import DataFacts, facts_of, read_facts
from .device import Device, find_device
from .schedule import Schedule
from .settings import choose_settings, describe, file_settings
from .trial import Estimate, try_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataFiles:
    """A COCO file and its image folder."""

    json_file: Path
    images: Path


@dataclass(frozen=True)
class Request:
    """The data and options for a new config.

    Attributes:
        train: training data.
        val: validation data; None to split the training data.
        output: path of the config.
        split_share: share of the images to use for validation if ``val`` is None.
        seed: seed of the split.
        device: ``cpu`` or ``cuda``; None for a GPU if there is one, otherwise the CPU.
        overwrite: whether to replace existing files.
    """

    train: DataFiles
    val: DataFiles | None
    output: Path
    split_share: float = 0.2
    seed: int = 0
    device: str | None = None
    overwrite: bool = False

    @property
    def part_files(self) -> dict[str, Path]:
        """The annotation files written if the training data are split."""
        return {part: self.output.with_suffix(f".{part}.json") for part in ("train", "val")}

    @property
    def outputs(self) -> list[Path]:
        """All files that may be written."""
        return [self.output, *(self.part_files.values() if self.val is None else ())]


@dataclass(frozen=True)
class NewConfig:
    """A written config, and facts about it.

    Attributes:
        files: the config and, if the data were split, the annotation files.
        train: facts about the training data.
        val: facts about the validation data, if there are any.
        backbone: the model's backbone.
        device: the device to train on.
        schedule: the length of training.
        warnings: warnings from the data set check.
        estimate: measured cost; None if this machine lacks the device.
    """

    files: list[Path]
    train: DataFacts
    val: DataFacts | None
    backbone: Backbone
    device: Device
    schedule: Schedule
    warnings: list[Finding]
    estimate: Estimate | None


def write_new_config(request: Request) -> NewConfig:
    """Writes a config and, if there are no validation data, splits the training data.

    Before any file is written, the config is loaded and checked as in train_net.py, and a few
    iterations are trained.

    Args:
        request: the data and options.

    Raises:
        ConfigError: if a path is wrong, a data set has errors, or no config can be fitted to it.
        OSError: if a file cannot be written.
    """
    _refuse_wrong_paths(request)
    _check_files(request)
    device = find_device(request.device)
    backbone = choose_backbone(device)
    parts = _split(request) if request.val is None else {}
    train, val = _facts(request, parts)
    settings, schedule = choose_settings(train, val, backbone, device)
    name = re.sub(r"[^\w+-]+", "_", request.output.stem)
    header = (
        f"Written by tools/new_config.py for {describe(train)}.\n"
        f"Model: {backbone.name}, on {device}.\n"
        "The comments explain the values. They are only a starting point; change any value if you "
        "know a better one."
    )

    def text(folder: Path, base: str) -> str:
        """Returns the config's text; ``folder`` contains the annotation files of a split."""
        files = _data_sets(request, parts, folder, name)
        named = file_settings(files, f"./output/{name}", _split_words(request, parts))
        return render(header, base, [*settings, *named])

    with tempfile.TemporaryDirectory() as folder:
        _write_parts(request, parts, Path(folder))
        trial = Path(folder) / request.output.name
        write_durably(trial, text(Path(folder), str(CONFIGS / backbone.base)))
        cfg, warnings = _checked(trial, device)
        written = str(request.output.parent)
        warnings = [replace(x, file=x.file.replace(folder, written)) for x in warnings]
        estimate = _tried(cfg, device) if device.is_here else None
    output = request.output.absolute()
    files = _write_parts(request, parts, output.parent)
    write_durably(output, text(output.parent, _base(output, backbone)))
    files = [request.output, *files]
    return NewConfig(files, train, val, backbone, device, schedule, warnings, estimate)


def _refuse_wrong_paths(request: Request) -> None:
    for flag, data in (("train", request.train), ("val", request.val)):
        if data is None:
            continue
        if not data.json_file.is_file():
            raise ConfigError(f"--{flag} {data.json_file}: the file does not exist")
        if not data.images.is_dir():
            kind = (
                "this is a file; name its folder"
                if data.images.is_file()
                else "the folder does not exist"
            )
            raise ConfigError(f"--{flag}-images {data.images}: {kind}")
    output = request.output
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {output}: name a file that ends in .yaml, such as cells.yaml")
    inputs = [x.json_file.resolve() for x in (request.train, request.val) if x]
    for path in request.outputs:
        if path.resolve() in inputs:
            raise ConfigError(f"--output: {path} is one of the input files; use another name")
        if path.is_dir():
            raise ConfigError(f"--output: {path} is a folder; name a file")
        if os.path.lexists(path) and not request.overwrite:
            raise ConfigError(f"--output: {path} exists; use another name, or add --overwrite")


def _check_files(request: Request) -> None:
    """Runs the data set check. Training will then use its cached result.

    Raises:
        ConfigError: if the check finds errors.
    """
    data = [x for x in (request.train, request.val) if x is not None]
    sources = [
        CocoSource(
            x.json_file.name, str(x.json_file.absolute()), str(x.images.absolute()), False, True
        )
        for x in data
    ]
    found = [finding for source in sources for finding in check_with_cache(source).findings]
    if errors := errors_of(found):
        raise ConfigError(describe_errors(errors, sources))


def _split(request: Request) -> dict[str, dict[str, Any]]:
    """Splits the training data; returns no parts if one of them would contain no objects."""
    content = json.loads(request.train.json_file.read_text(encoding="utf-8"))
    root = str(request.train.images)
    names = [image["file_name"] for image in content["images"]]
    if len(set(photographs(names, [os.path.join(root, name) for name in names]))) < 2:  # noqa: PTH118  # as detectron2
        return {}
    both = dict(
        zip(("train", "val"), split(content, root, request.split_share, request.seed), strict=True)
    )
    with_objects = [
        any(not x.get("iscrowd") for x in part["annotations"]) for part in both.values()
    ]
    return both if all(with_objects) else {}


def _facts(
    request: Request, parts: Mapping[str, dict[str, Any]]
) -> tuple[DataFacts, DataFacts | None]:
    if parts:
        train, val = (facts_of(part, str(request.train.json_file)) for part in parts.values())
        return train, val
    train = read_facts(str(request.train.json_file))
    return train, None if request.val is None else read_facts(str(request.val.json_file))


def _data_sets(
    request: Request, parts: Mapping[str, Any], folder: Path, name: str
) -> list[tuple[str, Path, Path]]:
    """Returns name, annotation file and image folder of each data set, with absolute paths."""
    if parts:
        files = {
            part: DataFiles(folder / path.name, request.train.images)
            for part, path in request.part_files.items()
        }
    else:
        files = {"train": request.train, **({"val": request.val} if request.val else {})}
    return [
        (_free_name(f"{name}_{part}"), data.json_file.absolute(), data.images.absolute())
        for part, data in files.items()
    ]


def _free_name(name: str) -> str:
    """Returns ``name``, with a prefix if a data set of detectron2 or the plugin has this name."""
    taken = name in DatasetCatalog.list() and not MetadataCatalog.get(name).get(
        "from_coco_files", False
    )
    return f"own_{name}" if taken else name


def _split_words(request: Request, parts: Mapping[str, Any]) -> str:
    if not parts:
        return ""
    train, val = (len(part["images"]) for part in parts.values())
    return (
        f"{request.train.json_file.name} was split into {train} images for training and {val} for "
        f"validation (--seed {request.seed}). Copies, tiles and versions of one photograph are in "
        "the same part, as far as names and contents reveal them."
    )


def _write_parts(request: Request, parts: Mapping[str, Any], folder: Path) -> list[Path]:
    files = []
    for part, content in parts.items():
        files.append(folder / request.part_files[part].name)
        write_durably(files[-1], json.dumps(content))
    return files


def _base(output: Path, backbone: Backbone) -> str:
    """Returns ``_BASE_``: a relative path if the output is in ``configs/``, otherwise absolute."""
    base = CONFIGS / backbone.base
    if output.resolve().is_relative_to(CONFIGS):
        return os.path.relpath(base, output.resolve().parent)
    return str(base)


def _tried(cfg: CfgNode, device: Device) -> Estimate:
    try:
        return try_config(cfg)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"a batch of {cfg.SOLVER.IMS_PER_BATCH} images does not fit into the free memory of "
            f"{device}; end other programs that use this memory, or choose another --device"
        ) from error


def _checked(config_file: Path, device: Device) -> tuple[CfgNode, list[Finding]]:
    """Runs all checks of train_net.py; returns the config and the warnings about its data sets.

    Raises:
        ConfigError: if a check fails.
    """
    cfg: CfgNode = read_config(str(config_file))
    cfg.OUTPUT_DIR = str(config_file.parent / "output")
    cfg.MODEL.DEVICE = device.kind if device.is_here else "cpu"
    check_and_register(cfg, train=True, own=own_keys(str(config_file)))
    sources = sources_of((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    found = find_faults(cfg, sources)
    if errors := errors_of(found):
        raise ConfigError(describe_errors(errors, sources))
    return cfg, [finding for finding in found if finding.severity == WARNING]
