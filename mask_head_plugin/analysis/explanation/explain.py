"""Draws what Mask R-CNN does with a user's image, for ``tools/explain.py``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from matplotlib import rc_context
from torch import Tensor

from ...config import ConfigError, read_config
from ...config_check import check_config
from ...data import shapes
from ...durable_files import make_output_folder
from ...engine.predictor import BGRPredictor, load_predictor
from ...image_files import read_image
from ...messages import counted
from ...user_code import load_config_and_code
from ..run_files import CONFIG
from . import competition_figure, pooling_figure, stages_figure
from .model_stages import ByteArray, Stages, class_probs, features_of_box, run_stages
from .style import FONTS, save

MOST_BINS = 14
"""Largest number of bins along each side: the number of bins in the paper's mask branch."""

COMPETING = [["softmax_cross_entropy", 1.0]]

logger = logging.getLogger(__name__)

EMBEDDED_IMAGE = 22
"""Number of the validation image, counted from 1, that is used if the user names no image."""


def explain(
    config_file: str,
    weights: str,
    image_file: str,
    output: Path,
    *,
    opts: Sequence[str] = (),
    detection: int = 1,
    num_bins: int = 0,
    softmax_weights: str = "",
) -> list[Path]:
    """Writes the pictures as PNG and SVG.

    Args:
        config_file: config of a model with a mask branch.
        weights: weights of that model.
        image_file: image to run the model on; "" for an image of the embedded data set.
        output: output folder, created if missing. Earlier pictures are replaced.
        opts: "KEY VALUE" pairs in one flat list.
        detection: number of the detection whose RoI is shown; 1 has the best score.
        num_bins: bins along each side in the picture of RoI pooling; 0 for bins of about two cells,
            as in the paper's figure.
        softmax_weights: weights of a second model with the same config except that its mask loss is
            softmax_cross_entropy. If empty, the picture of competing classes is left out.

    Returns:
        The written files.

    Raises:
        ConfigError: if a setting or file cannot be used, or the detection does not exist.
        OSError: if a picture cannot be written.
    """
    if not 0 <= num_bins <= MOST_BINS:
        raise ConfigError(
            f"--bins {num_bins} cannot be drawn: use 1 to {MOST_BINS}, or 0 to choose the number "
            "automatically"
        )
    cfg = _config(config_file, weights, opts)
    make_output_folder(output)
    image = read_image(image_file, "RGB") if image_file else embedded_image()
    predictor = load_predictor(cfg)
    stages = run_stages(predictor, image)
    if not 1 <= detection <= len(stages.boxes):
        raise ConfigError(
            f"--detection {detection}: the model finds {counted(len(stages.boxes), 'object')}; "
            "choose one, counted from 1"
        )
    number = detection - 1
    probs = class_probs(
        predictor.model.roi_heads.mask_head, stages.region_features[number : number + 1]
    )
    competing = None
    if softmax_weights:
        if stages.classes_compete or len(probs) == 1:
            raise ConfigError(
                f"--softmax-weights: the masks of {config_file} already compete, or all classes "
                "share one mask (MODEL.ROI_MASK_HEAD.LOSSES, CLS_AGNOSTIC_MASK); give a model with "
                "independent masks to --config-file and --weights"
            )
        competing = _competing_probs(cfg, softmax_weights, image, stages, number)
    with rc_context(FONTS):
        figure = stages_figure.stages_figure(stages, number, probs)
        written = save(figure, output, "stages", stages_figure.told_in_words(stages, number))
        figure = pooling_figure.pooling_figure(stages, number, num_bins)
        told = pooling_figure.told_in_words(stages, number)
        written += save(figure, output, "roi_pooling", told)
        if competing is not None:
            figure = competition_figure.competition_figure(stages, number, probs, competing)
            told = competition_figure.told_in_words(stages, number)
            written += save(figure, output, "competition", told)
    return written


def _warn_of_other_losses(weights: str) -> None:
    """Warns if the config next to the weights shows that they were trained without a softmax."""
    saved = Path(weights).with_name(CONFIG)
    if not saved.is_file():
        return
    try:
        losses = read_config(str(saved), is_named=False).MODEL.ROI_MASK_HEAD.LOSSES
    except (ConfigError, OSError, KeyError, AssertionError):  # written by another program
        return
    if COMPETING[0][0] not in [name for name, *_ in losses]:
        logger.warning(
            "--softmax-weights %s: according to %s, they were trained with "
            "MODEL.ROI_MASK_HEAD.LOSSES %s; the picture shows them as if their classes competed",
            *(weights, saved, losses),
        )


def embedded_image() -> ByteArray:
    """Returns an (H, W, 3) RGB validation image of the embedded data set."""
    rng = np.random.RandomState(shapes.SPLIT_SEEDS["val"])
    for _ in range(EMBEDDED_IMAGE):
        image, _ = shapes.draw_image(rng)
    return image


def _config(config_file: str, weights: str, opts: Sequence[str]) -> CfgNode:
    cfg = load_config_and_code(config_file, ["MODEL.WEIGHTS", weights, *opts])
    check_config(cfg, train=False, evaluate=False)
    return cfg


def _competing_probs(
    cfg: CfgNode, weights: str, image: ByteArray, stages: Stages, number: int
) -> Tensor:
    """Returns the second model's (K, M, M) masks for the same box."""
    if Path(weights).resolve() == Path(cfg.MODEL.WEIGHTS).resolve():
        raise ConfigError(
            f"--softmax-weights {weights}: the first model uses the same weights; name weights "
            "trained with MODEL.ROI_MASK_HEAD.LOSSES [['softmax_cross_entropy', 1.0]]"
        )
    _warn_of_other_losses(weights)
    other = cfg.clone()
    other.defrost()
    other.MODEL.ROI_MASK_HEAD.LOSSES = COMPETING
    other.MODEL.WEIGHTS = weights
    check_config(other, train=False, evaluate=False)
    predictor: BGRPredictor = load_predictor(other)
    k = int(stages.classes[number])
    features = features_of_box(predictor, image, stages.rois[number], k)
    return class_probs(predictor.model.roi_heads.mask_head, features)
