"""Puts the plugin's modules and image mapper into detectron2's LazyConfigs.

A YAML config chooses modules by their names in registries, a LazyConfig by classes, its
``_target_``. The plugin's classes take detectron2's arguments, so only targets change.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import detectron2
from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import ConfigError
from .image_file_mapper import ImageFileMapper
from .messages import nearest_name, one_line
from .modeling import FCNMaskHead, MaskRCNN, MultiLevelRoIPooler
from .modeling.fast_rcnn import ClassSelectiveOutputLayers

with warnings.catch_warnings():
    # It finds its files by pkg_resources, which warns of its own age.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    from detectron2 import model_zoo as model_zoo

PLUGIN_TARGETS = {
    GeneralizedRCNN: MaskRCNN,
    ROIPooler: MultiLevelRoIPooler,
    FastRCNNOutputLayers: ClassSelectiveOutputLayers,
    MaskRCNNConvUpsampleHead: FCNMaskHead,
}
"""detectron2's classes and their replacements; a user's subclasses stay."""

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
"""Names that detectron2's lazyconfig_train_net.py reads in a config file."""

SETTINGS = {
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "INPUT.FORMAT": "model.input_format",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
}
"""Keys of a YAML config and their places in a LazyConfig."""

READ_BY_DETECTRON2 = ("train.seed", "train.cudnn_benchmark")
"""Keys that detectron2's default_setup reads if they are set."""

SOURCE_VARIABLE = "DETECTRON2_SOURCE"
PROJECTS = "projects/"


def use_plugin_modules(model: DictConfig) -> DictConfig:
    """Puts the plugin's modules into a LazyConfig model, in place.

    It replaces RoI pooling, box regression (if it is by class), mask head and the model around
    them, in any ROI heads: FPN, C4, cascade. All other nodes and the names of parameters stay.

    Args:
        model: such as ``model_zoo.get_config("common/models/mask_rcnn_fpn.py").model``.

    Returns:
        The same.

    Raises:
        ConfigError: if it has no mask head of detectron2's.
    """
    found = set(map(target_of, calls(model)))
    if not {MaskRCNNConvUpsampleHead, FCNMaskHead} & found:
        raise ConfigError(
            "the model has no MaskRCNNConvUpsampleHead (detectron2's mask head) that the plugin's "
            "could replace"
        )
    for node in calls(model):
        target = target_of(node)
        if target is FastRCNNOutputLayers and node.get("cls_agnostic_bbox_reg", False):
            continue  # nothing to select
        node._target_ = PLUGIN_TARGETS.get(target, node._target_)
    return model


def use_plugin_mapper(dataloader: DictConfig) -> DictConfig:
    """Replaces detectron2's mapper by ImageFileMapper in the loaders of a LazyConfig, in place.

    detectron2's fails on polygons under large-scale jitter without the package shapely, and on run
    lengths without ``bitmask``, with which its masks reach into padding.

    Args:
        dataloader: such as ``model_zoo.get_config("common/data/coco.py").dataloader``.

    Returns:
        The same.
    """
    for node in calls(dataloader):
        if target_of(node) is DatasetMapper:
            node._target_ = ImageFileMapper
    return dataloader


def use_stock_modules(model: DictConfig) -> DictConfig:
    """Replaces the plugin's modules in a LazyConfig model by detectron2's, in place.

    Arguments that only the plugin's know are dropped; those that change results stay, so that
    detectron2's refuse them.
    """
    stock = {plugin: stock for stock, plugin in PLUGIN_TARGETS.items()}
    for node in calls(model):
        if target_of(node) is MaskRCNN:
            node.pop("mask_output", None)
        node._target_ = stock.get(target_of(node), node._target_)
    return model


def calls(node: Any) -> Iterator[DictConfig]:
    """Yields each node that is instantiated, also in lists; interpolations are skipped."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        keys = list(node)
    else:
        keys = list(range(len(node))) if isinstance(node, ListConfig) else []
    for key in keys:
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            yield from calls(node[key])


def target_of(node: DictConfig) -> Any:
    """Returns the class; a config that was saved as YAML has its name."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def counterpart(name: str) -> tuple[DictConfig, ...]:
    """Returns the parts of a LazyConfig of detectron2's with the plugin's modules and mapper.

    Args:
        name: in detectron2's configs/, such as ``new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py``,
            or in its source tree, such as ``projects/ViTDet/configs/COCO/...``.

    Returns:
        In the order of PARTS.

    Raises:
        ConfigError: if this detectron2 does not have it.
    """
    stock = LazyConfig.load(str(find_stock_config(name)))
    use_plugin_modules(stock.model)
    use_plugin_mapper(stock.dataloader)
    return tuple(stock[part] for part in PARTS)


def find_stock_config(name: str) -> Path:
    """Finds one of detectron2's config files.

    The installed package has those of its configs/. Projects are in the source tree only: in
    $DETECTRON2_SOURCE, or where the package was installed from with ``pip install -e``.

    Args:
        name: see ``counterpart``.

    Raises:
        ConfigError: if it is not there.
    """
    if not name.startswith(PROJECTS):
        try:
            return Path(model_zoo.get_config_file(name))
        except RuntimeError as error:
            raise ConfigError(
                f"detectron2 in {Path(detectron2.__file__).parent} has no config {name}"
            ) from error
    source = Path(os.environ.get(SOURCE_VARIABLE) or Path(detectron2.__file__).parents[1])
    if not (source / name).is_file():
        raise ConfigError(
            f"{source / name} does not exist: {name} is in detectron2's source tree, not in its "
            "package; git clone https://github.com/facebookresearch/detectron2 and set "
            f"{SOURCE_VARIABLE} to that folder"
        )
    return source / name


def load_lazy_config(file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Runs a LazyConfig file and returns what it configures.

    Args:
        file: a ``.py`` file that the user has named.
        overrides: ``key=value`` as detectron2 takes them. A new key must be an argument of
            something that is instantiated; detectron2 would add any other key, which nothing reads.

    Raises:
        ConfigError: if the file or an override cannot be used, or a part is missing.
    """
    if not file.endswith(".py") or not Path(file).is_file():
        raise ConfigError(f"config file {file} is not a .py file; name one, e.g. of configs/lazy/")
    try:
        cfg = LazyConfig.load(file)
    except (SyntaxError, ImportError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {file}: {one_line(error)}") from error
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise ConfigError(f"config file {file} sets no {' and no '.join(missing)}")
    try:
        for override in overrides:
            _check_override(cfg, override)
        LazyConfig.apply_overrides(cfg, list(overrides))
    except ConfigError:
        raise
    except Exception as error:  # from hydra if it is installed, omegaconf, or detectron2
        raise ConfigError(f"options {' '.join(overrides)}: {one_line(error)}") from error
    _check_arguments(cfg)
    return cfg


def _check_override(cfg: DictConfig, override: str) -> None:
    key, mark, _ = override.partition("=")
    if not mark:
        raise ConfigError(f"option {override} has no '='; write key=value: train.max_iter=1000")
    names = key.split(".")
    for k, name in enumerate(names):
        node = OmegaConf.select(cfg, ".".join(names[:k])) if k else cfg
        if not isinstance(node, DictConfig) or key in READ_BY_DETECTRON2:
            return  # apply_overrides says what is wrong with a list or a value
        is_argument = "_target_" in node and k == len(names) - 1  # see _check_arguments
        if name not in list(node) and not is_argument:
            nearest = nearest_name(name, list(node))
            meant = ".".join([*names[:k], nearest or "", *names[k + 1 :]])
            raise ConfigError(
                f"option {override}: the config has no {'.'.join(names[: k + 1])}"
                + (f"; did you mean {meant}?" if nearest else "")
            )


def _check_arguments(cfg: DictConfig) -> None:
    """Refuses arguments that a class does not take, before anything is instantiated."""
    for node in calls(cfg):
        try:
            target = target_of(node)
        except Exception as error:  # from pydoc, hydra, or the imported module
            place = f"{node._get_full_key('_target_')}: {node._target_}"
            raise ConfigError(f"{place} cannot be imported: {one_line(error)}") from error
        accepted = _argument_names(target)
        unknown = [str(x) for x in node if x not in (*accepted, "_target_")]
        if accepted and unknown:
            nearest = nearest_name(unknown[0], accepted)
            raise ConfigError(
                f"{node._get_full_key(unknown[0])}: {getattr(target, '__name__', target)} takes no "
                f"argument {unknown[0]}"
                + (f"; did you mean {node._get_full_key(nearest)}?" if nearest else "")
            )


def _argument_names(target: Any) -> list[str]:
    """Returns the argument names of a class or function; none if it takes any.

    ``**kwargs`` of a class are those of its base class.
    """
    names: list[str] = []
    classes = target.__mro__ if isinstance(target, type) else ()
    for function in [vars(x)["__init__"] for x in classes if "__init__" in vars(x)] or [target]:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # not written in Python
            return []
        names += [x.name for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
        if not any(x.kind is x.VAR_KEYWORD for x in parameters):
            return names
    return []


def settings_of(cfg: DictConfig) -> list[str]:
    """Returns the SETTINGS of a LazyConfig as "KEY VALUE" pairs of a YAML config."""
    pairs: list[str] = []
    for key, path in SETTINGS.items():
        value = OmegaConf.select(cfg, path)
        if key.startswith("DATASETS."):
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if value is not None:
            pairs += [key, str(value)]
    return pairs
