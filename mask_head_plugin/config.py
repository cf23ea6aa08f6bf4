"""The plugin's config keys, and config files read with errors that a person can act on."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

_ADDRESS = re.compile(r"\w[\w+.-]*://.*")


class ConfigError(ValueError):
    """A config that cannot be used, said in one line that names the key, the file and the fix."""


def add_mask_head_config(cfg: CfgNode) -> None:
    """Adds the plugin's keys, with their defaults, to detectron2's config.

    Args:
        cfg: a config from ``detectron2.config.get_cfg()``; changed in place.
    """
    # What ``instances.pred_masks`` is after inference: "bitmask", detectron2's (N, H, W) tensor, or
    # "rle", run lengths, for which META_ARCHITECTURE must be MaskRCNN.
    cfg.MODEL.MASK_OUTPUT = "bitmask"

    # Whether weights that do not fit the model are an error. If not, what fits is loaded and the
    # rest is logged; a run is never resumed so.
    cfg.MODEL.WEIGHTS_STRICT = True

    # What a bin makes of its samples: "mean" (the paper's) or "max" (Mask R-CNN Table 2c).
    cfg.MODEL.ROI_BOX_HEAD.POOLER_REDUCTION = "mean"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_REDUCTION = "mean"

    # Terms of the mask loss: [name in MASK_LOSS_REGISTRY, weight], or [name, weight, iterations
    # over which the weight grows from 0]. The default is the paper's (Mask R-CNN section 3: average
    # binary cross-entropy on the ground-truth class's mask).
    cfg.MODEL.ROI_MASK_HEAD.LOSSES = [["binary_cross_entropy", 1.0]]
    cfg.MODEL.ROI_MASK_HEAD.LOSS_WEIGHT = 1.0  # of their sum, beside box and class losses

    # Parameters of the losses, explained in modeling/mask_loss.py. Losses of your own may have
    # sections here, too.
    params = cfg.MODEL.ROI_MASK_HEAD.LOSS_PARAMS = CfgNode(new_allowed=True)
    params.DICE = CfgNode({"EPS": 1.0})  # pixels, as the other EPS
    params.FOCAL = CfgNode({"GAMMA": 2.0, "ALPHA": 0.25})  # arXiv 1708.02002
    params.TVERSKY = CfgNode({"ALPHA": 0.3, "BETA": 0.7, "EPS": 1.0})  # arXiv 1706.05721
    params.SOFT_IOU = CfgNode({"EPS": 1.0})

    # Hidden layers of MLPMaskHead and their units (Table 2e has two or three of 1024).
    cfg.MODEL.ROI_MASK_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM = 1024

    # Mask scoring (Mask Scoring R-CNN, arXiv 1903.00241): a network beside the mask head predicts
    # the IoU of each mask, and masks are ranked by class score times IoU.
    scoring = cfg.MODEL.ROI_MASK_HEAD.SCORING = CfgNode()
    scoring.ENABLED = False
    scoring.LOSS_WEIGHT = 1.0
    scoring.CONV_DIM = 256  # channels of its four convolutions
    scoring.FC_DIM = 1024  # units of its two hidden linear layers

    # Of model_<iteration>.pth keep only the newest so many; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0

    # A metric of the evaluation, such as "segm/AP": the weights of the best one are kept as
    # model_best.pth; needs TEST.EVAL_PERIOD. "" keeps none.
    cfg.SOLVER.CHECKPOINT_BEST_METRIC = ""

    # Above 0: evaluation adds the metrics of semantic segmentation, of maps made from detections
    # with at least this score (see evaluation/semantic.py). 0 leaves them out.
    cfg.TEST.SEMANTIC_THRESHOLD = 0.0

    # The user's own data sets in COCO instances format: ["name", "annotations.json", "images/"].
    # Paths start at the current folder or, where nothing is there, at $DETECTRON2_DATASETS. The
    # names can then stand in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_FILES = []

    # Faults of the data sets' files and images, looked for before training (see data/findings.py):
    # "error" stops at them, "warn" goes on, "off" does not look.
    cfg.DATASETS.CHECK = "error"


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Returns what ``read_config`` does, for a model on this machine.

    Where MODEL.DEVICE asks for CUDA and there is none it becomes ``cpu``, with a log line.
    """
    cfg = read_config(config_file, opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no CUDA device: MODEL.DEVICE is now cpu")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def read_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Returns detectron2's and the plugin's defaults, overridden by a file and then by options.

    Args:
        config_file: a YAML file, with ``_BASE_`` if it likes. Unsafe YAML tags are refused, and
            so is a ``_BASE_`` on another machine.
        opts: "KEY VALUE" pairs in one flat list, as after the flags of ``train_net.py``.

    Returns:
        A config that is not frozen.

    Raises:
        ConfigError: if the file does not exist or is not YAML, or a key does not exist or has the
            wrong type; the nearest existing key is named.
    """
    cfg = get_cfg()
    add_mask_head_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    merge_opts(cfg, opts)
    _check_values(cfg, config_file or "options")
    return cfg


def merge_overrides(cfg: CfgNode, overrides: dict[str, Any], source: str) -> None:
    """Merges nested values, such as ``{"MODEL": {"MASK_ON": False}}``, into a config.

    Args:
        cfg: changed in place.
        overrides: what a section of a YAML file holds; None counts as empty.
        source: where they come from, for errors.

    Raises:
        ConfigError: if a key does not exist or has the wrong type.
    """
    try:
        cfg.merge_from_other_cfg(CfgNode(overrides or {}))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{source}: {_explain(cfg, error)}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{source} does not hold 'KEY: value' sections") from error
    _check_values(cfg, source)


def _check_values(cfg: CfgNode, source: str) -> None:
    """Refuses keys that stand without a value, where a file has ``KEY:`` and nothing behind."""
    defaults = get_cfg()
    add_mask_head_config(defaults)
    known = set(_keys(defaults))
    for key in _keys(cfg):
        if _value(cfg, key) is None and key in known and _value(defaults, key) is not None:
            default = _value(defaults, key)
            raise ConfigError(f"{source}: {key} has no value; default {default!r}")


def _refuse_what_is_no_file(config_file: str) -> None:
    if _ADDRESS.search(config_file):
        raise ConfigError(
            f"config file {config_file} is on another machine; download it, look at it, and name "
            "your copy"
        )
    if config_file.endswith(".py"):
        raise ConfigError(
            f"config file {config_file} is Python, which would run: LazyConfig files are for "
            "detectron2's lazyconfig_train_net.py; name a YAML file"
        )


MOST_VALUES = 100_000


class _LocalBases(CfgNode):
    """Opens a config file and what ``_BASE_`` names, from file to file, on this machine only."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        address = _ADDRESS.search(filename)  # behind the folder, where fvcore took it for a path
        if address:
            raise OSError(
                f"{address[0]} is on another machine; download it, look at it, and name your copy"
            )
        if (
            _written_out(yaml.compose(Path(filename).read_bytes(), yaml.SafeLoader), {})
            > MOST_VALUES
        ):
            raise OSError(
                f"written out, its aliases (*name) are over {MOST_VALUES} values, with which few "
                "lines can fill the memory; write values out"
            )
        return Path(filename).open(encoding="utf-8")


def _written_out(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Returns how many values a YAML node has, those behind aliases counted at each."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # if it holds itself
        parts = itertools.chain.from_iterable(
            part if isinstance(part, tuple) else (part,) for part in node.value
        )
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    try:
        _refuse_what_is_no_file(config_file)
        if not Path(config_file).is_file():
            raise ConfigError(
                f"config file {config_file} does not exist{_similar_file(config_file)}"
            )
        _LocalBases.load_yaml_with_base(config_file, allow_unsafe=False)
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{config_file}: its _BASE_ {error.filename} does not exist") from error
    except OSError as error:
        raise ConfigError(f"{config_file} or a _BASE_ of it: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{config_file} is its own _BASE_, or nested too deeply") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{config_file} is not plain YAML: {_one_line(error)}") from error
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{config_file}: {_explain(cfg, error)}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{config_file} does not hold 'KEY: value' sections") from error


def merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merges "KEY VALUE" pairs in one flat list into a config.

    Raises:
        ConfigError: if a key does not exist or has the wrong type, or a pair is not complete.
    """
    flags = [text for text in opts if text.startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} stands behind KEY VALUE pairs; flags go before them")
    if len(opts) % 2:
        raise ConfigError(f"options are pairs 'KEY VALUE', but {opts[-1]!r} has no partner")
    keys = set(_keys(cfg))
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key in set(_sections(cfg)):
            raise ConfigError(f"option {key} is a section; set one of its keys")
        if key not in keys:
            raise ConfigError(f"option {key}: {_unknown(cfg, key)}")
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"option {key}: {_explain(cfg, error)}") from error


def _explain(cfg: CfgNode, error: Exception) -> str:
    """Rephrases an error of yacs."""
    message = _one_line(error)
    unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
    if unknown:
        return _unknown(cfg, unknown[1].rstrip("'\""))
    mismatch = re.search(
        r"Type mismatch \((.*?) vs\. (.*?)\) with values .* for config key: (\S+)", message
    )
    if mismatch:
        expected, found = (
            re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", x) for x in mismatch.groups()[:2]
        )
        key = mismatch[3].rstrip("'\"")
        full_keys = [k for k in _keys(cfg) if k == key or k.endswith("." + key)]
        default = f" such as {_value(cfg, full_keys[0])!r}" if full_keys else ""
        return f"{key} takes a value of type {expected}{default}, not of type {found}"
    return message


def _unknown(cfg: CfgNode, key: str) -> str:
    nearest = nearest_name(key, [*_sections(cfg), *_keys(cfg)])
    return f"there is no config key {key!r}" + (f"; did you mean {nearest}?" if nearest else "")


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Returns the values of a config by their full keys, such as ``MODEL.MASK_ON``."""
    return {key: _value(cfg, key) for key in _keys(cfg)}


def nearest_name(name: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that ``name`` most likely meant, or None if none is near.

    A dotted name whose last part exists elsewhere is matched by that part first.
    """
    leaf = name.rpartition(".")[2]
    same_leaf = [choice for choice in choices if choice.rpartition(".")[2] == leaf]
    for candidates, cutoff in ((same_leaf, 0.0), (choices, 0.6)):
        matches = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if matches:
            return matches[0]
    return None


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _sections(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield prefix + key
            yield from _sections(value, f"{prefix}{key}.")


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _similar_file(path: str) -> str:
    folder = Path(path).parent
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    nearest = nearest_name(Path(path).name, names)
    return f"; did you mean {folder / nearest}?" if nearest else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
