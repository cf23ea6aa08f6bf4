"""Tries a config: builds the parts of a run without using memory, data or weights.

Parts are built on PyTorch's "meta" device, which allocates nothing, and from a config that records
which keys are read. This happens in a child process, because users' modules may keep tensors or
draw random numbers. Files that such modules write to disk remain.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, detection_utils
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, BoxMode
from detectron2.utils.events import EventStorage
from torch import nn

from ..image_file_mapper import ImageFileMapper
from ..messages import one_line, silenced
from .child_process import ChildError, call_in_child

PACKAGE = __name__.partition(".")[0]
HOSTS = ("detectron2", PACKAGE)

LIBRARIES = {
    *sys.stdlib_module_names,
    *("torch", "torchvision", "fvcore", "iopath", "yacs", "numpy", "PIL", "cv2"),
}
"""Libraries whose errors are attributed to the code that calls them."""

NO_FAULT = re.compile(r"\bmeta\b|forked subprocess", re.IGNORECASE)
"""Matches PyTorch's errors about tensors without values and about CUDA in a child process."""

OBJECT = {
    "bbox": [0, 0, 2, 2],
    "bbox_mode": BoxMode.XYXY_ABS,
    "category_id": 0,
    "segmentation": [[0, 0, 2, 0, 2, 2]],
}
"""An annotation in the form that detectron2's mapper uses."""


class DryPart(NamedTuple):
    """The result of building one part of a run.

    Attributes:
        keys_read: full names of the keys that the part read.
        error: the error that stopped the build, on one line without memory addresses; None if the
            part was built.
        is_refusal: whether detectron2 or this package raised the error deliberately. Other errors
            come from a user's module, or from a module that needs the values of tensors, which
            "meta" tensors lack.
    """

    keys_read: frozenset[str]
    error: str | None
    is_refusal: bool = False


def dry_build(
    cfg: CfgNode, *, train: bool, trainer: type[DefaultTrainer] = DefaultTrainer
) -> list[DryPart]:
    """Builds the model and mapper of a run and, for training, its schedule and loader, one by one.

    Args:
        cfg: a complete config; it is not changed.
        train: whether the model will be trained.
        trainer: class that provides optimizer and schedule. If it has a custom
            ``build_train_loader``, the loader is not built, because that would read the data.
    """
    try:
        return call_in_child(partial(build_parts, cfg, train=train, trainer=trainer))
    except ChildError as error:
        return [DryPart(frozenset(), _told(error))]


def dry_backbone(cfg: CfgNode) -> tuple[dict[str, ShapeSpec], DryPart]:
    """Builds a backbone; returns its maps by name (empty if this fails), and the result."""
    shapes: dict[str, ShapeSpec] = {}

    def build(cfg: CfgNode) -> None:
        with torch.device("meta"):
            shapes.update(build_backbone(cfg).output_shape())

    def build_alone() -> tuple[dict[str, ShapeSpec], DryPart]:
        with silenced(logging.WARNING):
            part = _built(build, cfg)
        return shapes, part

    try:
        return call_in_child(build_alone)
    except ChildError as error:
        return {}, DryPart(frozenset(), _told(error))


def build_parts(
    cfg: CfgNode, *, train: bool, trainer: type[DefaultTrainer] = DefaultTrainer
) -> list[DryPart]:
    """Does the same as ``dry_build``, but in this process."""
    model: list[nn.Module] = []

    def build_model(cfg: CfgNode) -> None:
        with torch.device("meta"):
            model.append(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg))
        if train:
            _try_box_losses(model[0])

    def build_schedule(cfg: CfgNode) -> None:
        module = model[0] if model else nn.Linear(1, 1, device="meta")
        trainer.build_lr_scheduler(cfg, trainer.build_optimizer(cfg, module))

    builders: list[Callable[[CfgNode], object]] = [build_model]
    builders.append(lambda cfg: ImageFileMapper(cfg, is_train=False))
    if train:
        builders.append(build_schedule)
        if trainer.build_train_loader.__module__.partition(".")[0] in HOSTS:
            builders += [_build_train_mapper, _build_loader]
    with silenced(logging.WARNING):
        return [_built(build, cfg) for build in builders]


def _built(build: Callable[[CfgNode], object], cfg: CfgNode) -> DryPart:
    keys_read = _Keys()
    try:
        build(_Recording.of(cfg, "", keys_read))
    except Exception as error:  # users' registered code may raise anything
        return DryPart(frozenset(keys_read), _told(error), _is_refusal(error))
    return DryPart(frozenset(keys_read), None)


def _is_refusal(error: Exception) -> bool:
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError | ImportError | MemoryError):
            return False
        # Errors of other types may quote "meta" from the config.
        may_lack_values = isinstance(cause, RuntimeError | TypeError)
        if may_lack_values and NO_FAULT.search(str(cause)):
            return False
        cause = cause.__cause__ or cause.__context__
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    return [x for x in packages if x not in LIBRARIES][-1] in HOSTS


def _try_box_losses(model: nn.Module) -> None:
    """Calls detectron2's box losses without boxes, because only a call checks the loss type."""
    none, boxes = torch.zeros(0, device="cpu"), torch.zeros(0, 4, device="cpu")
    for module in model.modules():
        if isinstance(module, FastRCNNOutputLayers):
            module.box_reg_loss(boxes, boxes, boxes, none.long())
        elif isinstance(module, RPN):
            with EventStorage():
                labels, deltas = [none], [boxes[None]]
                module.losses([Boxes(boxes)], [none[None]], labels, deltas, [boxes])


def _build_train_mapper(cfg: CfgNode) -> None:
    mapper = ImageFileMapper(cfg, is_train=True)
    if mapper.use_instance_mask:
        masks = {"mask_format": mapper.instance_mask_format}
        detection_utils.annotations_to_instances([OBJECT], (4, 4), **masks)


def _build_loader(cfg: CfgNode) -> None:
    records: list[dict[str, Any]] = [{"annotations": []}]
    build_detection_train_loader.from_config(cfg, mapper=len, dataset=records)


def _told(error: Exception) -> str:
    text = re.sub(r"\b0x[0-9a-fA-F]+", "0x...", one_line(error))
    return f"{type(error).__name__}: {text[:200]}"


class _Keys(set[str]):
    """A set that all copies of the config share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Keys:
        return self


class _Recording(CfgNode):
    """A config that records the full names of the keys read from it or its copies."""

    @classmethod
    def of(cls, node: CfgNode, prefix: str, keys_read: _Keys) -> _Recording:
        new = cls()
        new.__dict__.update(prefix=prefix, keys_read=keys_read)
        for key, value in dict.items(node):
            is_section = isinstance(value, CfgNode)
            copied = cls.of(value, f"{prefix}{key}.", keys_read) if is_section else deepcopy(value)
            dict.__setitem__(new, key, copied)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recording:
        return self.of(self, vars(self)["prefix"], vars(self)["keys_read"])

    def __getitem__(self, key: str) -> Any:
        vars(self)["keys_read"].add(vars(self)["prefix"] + key)
        return dict.__getitem__(self, key)

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self)  # makes Python call __getitem__ for dict(x), **x, x | {}

    def get(self, key: str, default: Any = None) -> Any:
        with contextlib.suppress(KeyError):
            return self[key]
        return default

    def pop(self, key: str, *default: Any) -> Any:
        self.get(key)
        return dict.pop(self, key, *default)

    def items(self) -> ItemsView[str, Any]:
        for key in self:
            self[key]
        return dict.items(self)

    def values(self) -> ValuesView[Any]:
        self.items()
        return dict.values(self)

    def _immutable(self, is_immutable: bool) -> None:
        """Called by freeze() and defrost(); yacs's version would call values() and record keys."""
        self.__dict__[CfgNode.IMMUTABLE] = is_immutable
        values: ValuesView[Any] = dict.values(self)
        for value in values:
            if isinstance(value, CfgNode):
                value._immutable(is_immutable)
