"""Defines the plugin's config keys, and reads config files with helpful error messages."""

from __future__ import annotations

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

from .config_imports import refuse_imports, resolve_imports, split_imports
from .messages import ConfigError as ConfigError
from .messages import nearest_name, one_line

DEFAULT_LOSSES = (("binary_cross_entropy", 1.0),)

PACKAGED = Path(__file__).parent / "configs"
"""Folder of the configs that are part of the package."""

_ADDRESS = re.compile(r"\w[\w+.-]*://.*")

_ZOO_PREFIXES = {"LVISv0.5-InstanceSegmentation": "v0.5_", "LVISv1-InstanceSegmentation": "v1_"}
"""Folders of detectron2's model zoo, and what the names of their configs start with here."""


def add_mask_head_config(cfg: CfgNode) -> None:
    """Adds the plugin's keys, with their defaults, to detectron2's config.

    Args:
        cfg: a config from ``detectron2.config.get_cfg()``; changed in place.
    """
    # Form of ``instances.pred_masks`` after inference. "bitmask" is detectron2's (N, H, W) tensor.
    # "rle" is an RLEMasks of run lengths; it requires MODEL.META_ARCHITECTURE MaskRCNN.
    cfg.MODEL.MASK_OUTPUT = "bitmask"

    # Whether a run stops if its weights do not fit the model. If False, the run loads the weights
    # that fit and lists the others in the log. With --resume, all weights must fit in any case.
    cfg.MODEL.WEIGHTS_STRICT = True

    # Options of build_timm_backbone and build_timm_fpn_backbone; see docs/backbones.md.
    timm = cfg.MODEL.TIMM = CfgNode()
    timm.NAME = "convnext_tiny"  # the model's name in timm
    # Initial weights of the backbone: a safetensors or torch file that uses timm's names. Read only
    # if MODEL.WEIGHTS is empty.
    timm.CHECKPOINT = ""
    # Whether the backbone starts from the weights in timm's hub instead of random ones. Has an
    # effect only if MODEL.WEIGHTS and MODEL.TIMM.CHECKPOINT are empty.
    timm.PRETRAINED = False
    timm.OUT_INDICES = []  # timm's map indices; [] uses the last map of each stride from 4 on
    timm.DROP_PATH_RATE = 0.0  # rate of stochastic depth (arXiv 1603.09382); not all models have it
    timm.NORM = ""  # "" keeps the model's batch norms; "FrozenBN" or "SyncBN" replaces them

    # How RoI pooling combines the samples in a bin: "mean", as in the Mask R-CNN paper, or "max",
    # which the paper compares with the mean in Table 2c.
    cfg.MODEL.ROI_BOX_HEAD.POOLER_REDUCTION = "mean"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_REDUCTION = "mean"

    # Terms of the mask loss. Each is [name, weight] or [name, weight, ramp_iters]; the names are
    # those in MASK_LOSS_REGISTRY, and the weight grows from 0 over ramp_iters iterations. The
    # default is the loss of Mask R-CNN, section 3: the average binary cross-entropy on the mask of
    # the ground-truth class.
    cfg.MODEL.ROI_MASK_HEAD.LOSSES = [list(term) for term in DEFAULT_LOSSES]
    cfg.MODEL.ROI_MASK_HEAD.LOSS_WEIGHT = 1.0  # factor that multiplies the sum of LOSSES

    # Parameters of the losses; see docs/mask_losses.md. You can add sections for your own losses.
    params = cfg.MODEL.ROI_MASK_HEAD.LOSS_PARAMS = CfgNode(new_allowed=True)
    params.DICE = CfgNode({"EPS": 1.0})  # smoothing of dice, in pixels
    focal = params.FOCAL = CfgNode()
    focal.GAMMA = 2.0  # how strongly focal down-weights well-classified pixels (arXiv 1708.02002)
    # Weight of the object's pixels in focal. All other pixels have the weight 1 - ALPHA. With -1,
    # all pixels have the weight 1.
    focal.ALPHA = 0.25
    tversky = params.TVERSKY = CfgNode()
    tversky.ALPHA = 0.3  # weight of false positive pixels in tversky (arXiv 1706.05721)
    tversky.BETA = 0.7  # weight of false negative pixels in tversky
    tversky.EPS = 1.0  # smoothing of tversky, in pixels
    params.SOFT_IOU = CfgNode({"EPS": 1.0})  # smoothing of soft_iou, in pixels

    # Number of hidden layers of MLPMaskHead (two or three in Table 2e of the Mask R-CNN paper).
    cfg.MODEL.ROI_MASK_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM = 1024  # units in each hidden layer of MLPMaskHead

    # Mask scoring (Mask Scoring R-CNN, arXiv 1903.00241): an additional small network predicts the
    # IoU of each mask, and masks are ranked by class score times IoU. Supported for data sets in
    # COCO or LVIS format, without test-time augmentation (TEST.AUG).
    scoring = cfg.MODEL.ROI_MASK_HEAD.SCORING = CfgNode()
    scoring.ENABLED = False
    scoring.LOSS_WEIGHT = 1.0  # weight of the mask scoring loss
    scoring.CONV_DIM = 256  # channels of the four convolutions that predict the IoU
    scoring.FC_DIM = 1024  # units in each of the two hidden linear layers that predict the IoU

    # The optimizer: "SGD" or "AdamW". docs/recipes.md explains which one to use.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The two betas of AdamW: the decay rates of its averages of gradients and squared gradients.
    cfg.SOLVER.BETAS = [0.9, 0.999]

    # [name, factor] pairs. Each multiplies the learning rate of the module or parameter with this
    # name. If several names match a parameter, the longest one applies.
    cfg.SOLVER.LR_FACTORS = []

    # Learning rate of the backbone's last layer, as a factor of the base rate. The layer before the
    # last uses the square of this factor, the one before that its cube, and so on (arXiv
    # 2106.08254). modeling/backbone_layers.py defines what a layer is.
    cfg.SOLVER.LAYER_DECAY = 1.0

    # Number of parts into which each process splits its share of a batch. The parts are computed
    # one after the other, and their gradients are added up for one update.
    cfg.SOLVER.ACCUMULATE_STEPS = 1

    # If above 0, a run also averages its weights over the iterations, and evaluates and saves this
    # exponential moving average instead of the latest weights. The value is the share of the
    # previous average in the new one.
    cfg.SOLVER.EMA_DECAY = 0.0

    # Large-scale jitter of training images (Simple Copy-Paste, arXiv 2012.07177, section 3). It
    # replaces INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and CROP.
    lsj = cfg.INPUT.LSJ = CfgNode()
    lsj.ENABLED = False
    # Side in pixels of the square images that large-scale jitter returns.
    lsj.IMAGE_SIZE = 1024
    # Smallest scale of large-scale jitter. At scale 1, the image just fits into the square.
    lsj.MIN_SCALE = 0.1
    # Largest scale of large-scale jitter. At scale 1, the image just fits into the square.
    lsj.MAX_SCALE = 2.0

    # Share of training images onto which objects from another image are pasted (arXiv 2012.07177);
    # see docs/recipes.md.
    cfg.INPUT.COPY_PASTE = CfgNode({"PROBABILITY": 0.0})

    # Number of model_<iteration>.pth files to keep. Older ones are deleted; 0 keeps all.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0

    # An evaluation metric, such as "segm/AP". The weights for which it is best are kept as
    # model_best.pth. Requires TEST.EVAL_PERIOD. For the losses of TEST.EVAL_LOSS, such as
    # "validation/total_loss", the lowest value is best. With "", no model_best.pth is written.
    cfg.SOLVER.CHECKPOINT_BEST_METRIC = ""

    stopping = cfg.SOLVER.EARLY_STOPPING = CfgNode()
    # Any metric that CHECKPOINT_BEST_METRIC accepts. A run ends early after PATIENCE evaluations in
    # a row without a new best value of it. With "", no run ends early.
    stopping.METRIC = ""
    # Number of evaluations in a row without a new best value of METRIC after which a run ends.
    stopping.PATIENCE = 5

    # Whether an evaluation also computes the training losses on DATASETS.TEST, averaged over
    # images: validation/total_loss, validation/loss_mask and so on. See engine/validation_loss.py.
    cfg.TEST.EVAL_LOSS = False

    # If above 0, an evaluation also draws the detections with at least this score into semantic
    # maps, and reports the metrics of semantic segmentation. See evaluation/semantic.py.
    cfg.TEST.SEMANTIC_THRESHOLD = 0.0

    # Your data sets in COCO instances format: ["name", "annotations.json", "images/"] for each.
    # Paths are relative to the current folder or, if nothing is found there, to
    # $DETECTRON2_DATASETS. DATASETS.TRAIN and DATASETS.TEST can then contain these names.
    cfg.DATASETS.COCO_FILES = []

    # Your modules and .py files to run before anything is built, for example to register the names
    # used in the config. A .py file is looked for in the config file's folder, then in the current
    # folder. docs/your_own_code.md explains which config files may import code.
    cfg.IMPORTS = []

    # What to do about errors in annotation files and images. "error" checks the data sets before
    # training and stops if it finds errors, "warn" leaves out the records that a run cannot use and
    # reports the other errors, and "off" skips the check.
    cfg.DATASETS.CHECK = "error"


def load_config(
    config_file: str = "", opts: Sequence[str] = (), *, is_named: bool = True
) -> CfgNode:
    """Reads a config as ``read_config`` does, and adapts it to this machine.

    If MODEL.DEVICE is a CUDA device but none is available, changes it to ``cpu`` and logs a
    warning.
    """
    cfg = read_config(config_file, opts, is_named=is_named)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no CUDA device: MODEL.DEVICE is now cpu")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def find_config_file(name: str) -> str:
    """Returns ``name`` if this file exists, or else the path of the package's file of this name.

    Args:
        name: a path, or the name of a file below ``configs/`` such as
            ``coco/mask_rcnn_R_50_FPN_1x.yaml``, with or without the leading ``configs/``. A name
            that matches no file, such as "", is returned unchanged.
    """
    packaged = PACKAGED / name.removeprefix("configs/")
    return name if Path(name).is_file() or not packaged.is_file() else str(packaged)


def read_config(
    config_file: str = "", opts: Sequence[str] = (), *, is_named: bool = True
) -> CfgNode:
    """Returns detectron2's and the plugin's defaults, overridden by a file and then by options.

    This function runs no code: ``user_code.import_modules`` later imports the IMPORTS. The IMPORTS
    of the file and of the options are combined, and paths of files become absolute. A ``_BASE_``
    may come from someone else, so its IMPORTS are an error unless the file or the options also list
    them.

    Args:
        config_file: a path or name, see ``find_config_file``. The file may have a ``_BASE_`` on
            this machine. Unsafe YAML tags are refused.
        opts: "KEY VALUE" pairs in one flat list, as after the flags of ``train_net.py``.
        is_named: whether the user named this file. If not, its IMPORTS are treated like those of a
            ``_BASE_``.

    Returns:
        A config that is not frozen.

    Raises:
        ConfigError: if the file does not exist or is not YAML, or if a key does not exist or has a
            value of the wrong type. For an unknown key, the message suggests the nearest one.
    """
    config_file = find_config_file(config_file)
    cfg = get_cfg()
    add_mask_head_config(cfg)
    wanted = _merge_file(cfg, config_file) if config_file else {}
    own = wanted.pop(config_file, []) if is_named else []
    imports, others = split_imports(opts)
    cfg.IMPORTS = list(dict.fromkeys([*own, *imports]))
    for file, entries in wanted.items():
        refuse_imports(cfg.IMPORTS, entries, file)
    merge_opts(cfg, others)
    _check_values(cfg, config_file or "options")
    return cfg


def merge_overrides(cfg: CfgNode, overrides: dict[str, Any], source: str) -> None:
    """Merges nested values, such as ``{"MODEL": {"MASK_ON": False}}``, into a config.

    Args:
        cfg: changed in place.
        overrides: the content of a YAML section; an empty section may be None.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: if a key does not exist or its value has the wrong type.
    """
    if "IMPORTS" in (overrides or {}):
        raise ConfigError(
            f"{source}: IMPORTS belongs at the top level of the file and applies to all variants"
        )
    try:
        cfg.merge_from_other_cfg(CfgNode(overrides or {}))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{source}: {_explain(cfg, error)}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{source} does not contain 'KEY: value' sections") from error
    _check_values(cfg, source)


def _check_values(cfg: CfgNode, source: str) -> None:
    """Refuses keys without a value, such as a lone ``KEY:``."""
    defaults = get_cfg()
    add_mask_head_config(defaults)
    known = set(_keys(defaults))
    for key in _keys(cfg):
        if _value(cfg, key) is None and key in known and _value(defaults, key) is not None:
            default = _value(defaults, key)
            raise ConfigError(f"{source}: {key} has no value; its default is {default!r}")


def _refuse_what_is_no_file(config_file: str) -> None:
    if _ADDRESS.search(config_file):
        raise ConfigError(
            f"config file {config_file} is on another machine; download it, review it, and pass "
            "the path of your copy"
        )
    if config_file.endswith(".py"):
        raise ConfigError(
            f"config file {config_file} is Python code, and reading it would run it; use a YAML "
            "file (tools/lazyconfig_train_net.py reads LazyConfig files)"
        )


MOST_VALUES = 100_000
"""Largest number of values in a config file after its aliases are expanded."""


class _LocalBases(CfgNode):
    """Opens a config file and, recursively, its ``_BASE_``, but only files on this machine."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # search(), not match(): fvcore takes an address for a relative path and prepends a folder.
        address = _ADDRESS.search(filename)
        if address:
            raise OSError(
                f"{address[0]} is on another machine; download it, review it, and use your copy"
            )
        if (
            _written_out(yaml.compose(Path(filename).read_bytes(), yaml.SafeLoader), {})
            > MOST_VALUES
        ):
            raise OSError(
                f"its YAML aliases (*name) expand to more than {MOST_VALUES} values, which could "
                "exhaust memory; use fewer aliases"
            )
        return Path(filename).open(encoding="utf-8")


def _written_out(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Returns the number of values in a YAML node, counting an alias each time it is used."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # the size of a node that contains itself
        parts = itertools.chain.from_iterable(
            part if isinstance(part, tuple) else (part,) for part in node.value
        )
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


def _merge_file(cfg: CfgNode, config_file: str) -> dict[str, list[str]]:
    """Merges a config file and its bases into a config; returns the IMPORTS of each file."""
    wanted: dict[str, list[str]] = {}

    class Reader(_LocalBases):
        @classmethod
        def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
            content: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe)
            # The bases were read first, by a recursive call that removed their IMPORTS.
            entries = content.pop("IMPORTS", None) or []
            wanted[filename] = resolve_imports(entries, filename, Path(filename).parent)
            return content

    try:
        _refuse_what_is_no_file(config_file)
        if not Path(config_file).is_file():
            raise ConfigError(
                f"config file {config_file} does not exist{_similar_file(config_file)}"
            )
        Reader.load_yaml_with_base(config_file, allow_unsafe=False)
        cfg.merge_from_file(config_file, allow_unsafe=False)
        return wanted
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{config_file}: its _BASE_ {error.filename} does not exist") from error
    except OSError as error:
        raise ConfigError(f"{config_file} or its _BASE_: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{config_file} is its own _BASE_, or is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{config_file} is not plain YAML: {one_line(error)}") from error
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{config_file}: {_explain(cfg, error)}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{config_file} does not contain 'KEY: value' sections") from error


def merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merges "KEY VALUE" pairs in one flat list into a config.

    Raises:
        ConfigError: if a key does not exist, a value has the wrong type, or a value is missing.
    """
    flags = [text for text in opts if text.startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} must come before the KEY VALUE options")
    if len(opts) % 2:
        raise ConfigError(f"options are KEY VALUE pairs, but {opts[-1]!r} has no value")
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
    """Rephrases an error message from yacs for users."""
    message = one_line(error)
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
    return f"config key {key!r} does not exist" + (f"; did you mean {nearest}?" if nearest else "")


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Returns the values of a config by full key, such as ``MODEL.MASK_ON``."""
    return {key: _value(cfg, key) for key in _keys(cfg)}


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
    """Returns a hint naming a file of the same or a similar name, in its folder or in the package.

    The same name comes first: configs of detectron2's model zoo are in other folders here.
    """
    name = Path(path)
    packaged = {file.stem: file.relative_to(PACKAGED) for file in PACKAGED.rglob("*.yaml")}
    beside = {file.stem: file for file in name.parent.glob("*.yaml")}
    known = packaged | beside
    # Without the extension, which would make all names similar.
    stem = _ZOO_PREFIXES.get(name.parent.name, "") + name.stem
    nearest = stem if stem in known else nearest_name(stem, sorted(known), 0.8)
    return f"; did you mean {known[nearest]}?" if nearest else ""
