"""Uses the plugin's modules and image mapper in detectron2's LazyConfigs.

A YAML config selects modules by their registered names, whereas a LazyConfig refers to classes by
``_target_``. The plugin's classes accept the arguments of detectron2's classes, so only the targets
change.
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
    # model_zoo finds its files with pkg_resources, which warns that it is deprecated.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    from detectron2 import model_zoo as model_zoo

PLUGIN_TARGETS = {
    GeneralizedRCNN: MaskRCNN,
    ROIPooler: MultiLevelRoIPooler,
    FastRCNNOutputLayers: ClassSelectiveOutputLayers,
    MaskRCNNConvUpsampleHead: FCNMaskHead,
}
"""Classes of detectron2 and their replacements. A user's subclasses are not replaced."""

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
"""Names that detectron2's lazyconfig_train_net.py reads from a config file."""

SETTINGS = {
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "INPUT.FORMAT": "model.input_format",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
}
"""Keys of a YAML config and the corresponding keys of a LazyConfig."""

READ_BY_DETECTRON2 = ("train.seed", "train.cudnn_benchmark")
"""Keys that detectron2's default_setup reads if they are set."""

SOURCE_VARIABLE = "DETECTRON2_SOURCE"
PROJECTS = "projects/"


def use_plugin_modules(model: DictConfig) -> DictConfig:
    """Replaces detectron2's modules in the model of a LazyConfig with the plugin's, in place.

    Replaces RoI pooling, class-specific box regression, the mask head and the model class, in any
    kind of ROI heads: FPN, C4, cascade. All other nodes and the names of parameters stay the same.

    Args:
        model: for example ``model_zoo.get_config("common/models/mask_rcnn_fpn.py").model``.

    Returns:
        The given object.

    Raises:
        ConfigError: if the model does not use detectron2's mask head.
    """
    found = set(map(target_of, calls(model)))
    if not {MaskRCNNConvUpsampleHead, FCNMaskHead} & found:
        raise ConfigError(
            "the model has no MaskRCNNConvUpsampleHead, the mask head of detectron2 that the "
            "plugin replaces"
        )
    for node in calls(model):
        target = target_of(node)
        if target is FastRCNNOutputLayers and node.get("cls_agnostic_bbox_reg", False):
            continue  # there is only one box per RoI, so there is nothing to select
        node._target_ = PLUGIN_TARGETS.get(target, node._target_)
    return model


def use_plugin_mapper(dataloader: DictConfig) -> DictConfig:
    """Replaces detectron2's mapper with ImageFileMapper in the loaders of a LazyConfig, in place.

    With large-scale jitter, detectron2's mapper needs the package shapely for polygons. For run
    lengths, it needs the mask format ``bitmask``, but then masks extend into padding.

    Args:
        dataloader: for example ``model_zoo.get_config("common/data/coco.py").dataloader``.

    Returns:
        The given object.
    """
    for node in calls(dataloader):
        if target_of(node) is DatasetMapper:
            node._target_ = ImageFileMapper
    return dataloader


def use_stock_modules(model: DictConfig) -> DictConfig:
    """Replaces the plugin's modules in the model of a LazyConfig with detectron2's, in place.

    Drops ``mask_output``, which detectron2 does not have. Arguments that change results are kept,
    so that detectron2's classes refuse them.
    """
    stock = {plugin: stock for stock, plugin in PLUGIN_TARGETS.items()}
    for node in calls(model):
        if target_of(node) is MaskRCNN:
            node.pop("mask_output", None)
        node._target_ = stock.get(target_of(node), node._target_)
    return model


def calls(node: Any) -> Iterator[DictConfig]:
    """Yields each node that is instantiated, including nodes in lists. Skips interpolations."""
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
    """Returns the class of a node. In a config that was saved as YAML, it is stored as a name."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def counterpart(name: str) -> tuple[DictConfig, ...]:
    """Returns the parts of a detectron2 LazyConfig, with the plugin's modules and mapper.

    Args:
        name: a file in detectron2's configs/, such as
            ``new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py``, or in its source tree, such as
            ``projects/ViTDet/configs/COCO/...``.

    Returns:
        The parts in the order of PARTS.

    Raises:
        ConfigError: if this version of detectron2 does not have the config.
    """
    stock = LazyConfig.load(str(find_stock_config(name)))
    use_plugin_modules(stock.model)
    use_plugin_mapper(stock.dataloader)
    return tuple(stock[part] for part in PARTS)


def find_stock_config(name: str) -> Path:
    """Finds one of detectron2's config files.

    The installed package includes the files in configs/. Projects are only in the source tree,
    which is $DETECTRON2_SOURCE or the folder from which detectron2 was installed with
    ``pip install -e``.

    Args:
        name: see ``counterpart``.

    Raises:
        ConfigError: if the file does not exist.
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
    """Runs a LazyConfig file and returns its config.

    Args:
        file: a ``.py`` file that the user named.
        overrides: ``key=value``, as in detectron2. A key that is not in the config must be an
            argument of a class or function that is instantiated. detectron2 would also add other
            keys, which have no effect.

    Raises:
        ConfigError: if the file or an override cannot be used, or one of PARTS is missing.
    """
    if not file.endswith(".py") or not Path(file).is_file():
        raise ConfigError(
            f"config file {file} is not a .py file; use a LazyConfig such as those in configs/lazy/"
        )
    try:
        cfg = LazyConfig.load(file)
    except (SyntaxError, ImportError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {file}: {one_line(error)}") from error
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise ConfigError(f"config file {file} must also set {' and '.join(missing)}")
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
        raise ConfigError(
            f"option {override} has no '='; write key=value, such as train.max_iter=1000"
        )
    names = key.split(".")
    for k, name in enumerate(names):
        node = OmegaConf.select(cfg, ".".join(names[:k])) if k else cfg
        if not isinstance(node, DictConfig) or key in READ_BY_DETECTRON2:
            return  # if a list or a value is wrong, apply_overrides reports it
        is_argument = "_target_" in node and k == len(names) - 1  # see _check_arguments
        if name not in list(node) and not is_argument:
            nearest = nearest_name(name, list(node))
            meant = ".".join([*names[:k], nearest or "", *names[k + 1 :]])
            raise ConfigError(
                f"option {override}: the config has no {'.'.join(names[: k + 1])}"
                + (f"; did you mean {meant}?" if nearest else "")
            )


def _check_arguments(cfg: DictConfig) -> None:
    """Refuses arguments that a class does not accept, before anything is instantiated."""
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
                f"{node._get_full_key(unknown[0])}: {getattr(target, '__name__', target)} has no "
                f"argument {unknown[0]}"
                + (f"; did you mean {node._get_full_key(nearest)}?" if nearest else "")
            )


def _argument_names(target: Any) -> list[str]:
    """Returns the argument names of a class or function, or an empty list if it accepts any name.

    If a class accepts ``**kwargs``, the arguments of its base class are added.
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
    """Returns the values of SETTINGS in a LazyConfig as "KEY VALUE" pairs of a YAML config."""
    pairs: list[str] = []
    for key, path in SETTINGS.items():
        value = OmegaConf.select(cfg, path)
        if key.startswith("DATASETS."):
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if value is not None:
            pairs += [key, str(value)]
    return pairs
