"""Exports a trained model to a file that runs without the model's code, and compares the two.

Models that cannot be exported are refused before anything is converted. The file gets its final
name only after it has been run and its results agree with those of the trained model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from .. import __version__
from ..checkpoint.download import local_copy
from ..class_names import class_names_of
from ..config import ConfigError
from ..config_check import check_config
from ..data import register_found_coco_files
from ..demo.demo import model_categories
from ..engine.predictor import load_predictor
from ..messages import first_line, listed
from ..model_input import IMAGE_FORMATS
from ..user_code import load_config_and_code
from .accuracy import Accuracy, compare_accuracy
from .exportable import ExportableMaskRCNN, last_predictor
from .formats import DEFAULT_OPSET, OPSETS, Inputs, converted, model_inputs, runner
from .int8 import NUM_CALIBRATION_IMAGES, quantise
from .model_folder import (
    FORMAT_VERSION,
    MODEL_FILES,
    MaskRule,
    ModelDescription,
    ModelFile,
    ModelInput,
    Weights,
    sha256_of,
)
from .output_folder import check_output, sole_export, write_model
from .parity import TOLERANCES, Parity, Run, compare
from .refusals import check_architecture, check_exportable, check_traces
from .samples import (
    Sample,
    images_of_dataset,
    made_images,
    read_sample,
    sample_images,
    usable_dataset,
)

logger = logging.getLogger(__name__)

PASTE = (
    "bilinear, pixel centres at +0.5, zero outside of the mask, as detectron2's "
    "paste_masks_in_image"
)

PRECISIONS = (*TOLERANCES, "int8")

LARGEST_TOO_SMALL = 64
"""If an image side has at most this many pixels, torch.export treats the size of the map of stride
32 as a constant.
"""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        file_format: a key of MODEL_FILES.
        size: height and width to which every image is padded; None if images can have any size.
        opset: the ONNX opset; None means DEFAULT_OPSET.
        precision: one of PRECISIONS.
        calibration_images: files for the calibration of int8. If empty, images of DATASETS.TRAIN
            are used.
    """

    file_format: str
    size: tuple[int, int] | None = None
    opset: int | None = None
    precision: str = "fp32"
    calibration_images: Sequence[str] = ()


def export_model(
    config_file: str,
    opts: Sequence[str],
    output: Path,
    options: ExportOptions,
    images: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> Parity | Accuracy:
    """Writes a folder with an exported model and its ``model.json``.

    Args:
        config_file: a YAML file.
        opts: "KEY VALUE" pairs in one flat list, including MODEL.WEIGHTS.
        output: the folder to write; created if it does not exist.
        options: options of the export.
        images: image files on which the two models are compared. If empty, images of DATASETS.TEST
            are used.
        overwrite: whether to replace a model that is already in the folder.

    Returns:
        The differences between the exported and the trained model.

    Raises:
        ConfigError: if a setting, a file or the folder cannot be used, a part of the model cannot
            be exported, or the exported model differs from the trained one. In these cases, no file
            is left behind.
        OSError: if a file cannot be written.
    """
    check_options(options)
    with sole_export(output), tempfile.TemporaryDirectory() as folder:
        check_output(output, overwrite=overwrite)
        description, compared = _made(config_file, opts, options, images, Path(folder))
        write_model(output, Path(folder), description)
    if not any(compared.counts):
        logger.warning(
            "the model found nothing in any image, so boxes, scores and masks could not be "
            "compared; pass images of objects as --images, or lower "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
        )
    return compared


def _made(
    config_file: str,
    opts: Sequence[str],
    options: ExportOptions,
    images: Sequence[str],
    folder: Path,
) -> tuple[ModelDescription, Parity | Accuracy]:
    """Writes a model to a folder. Returns its description and the result of the comparison.

    Args and Raises: see export_model.
    """
    tell = _progress()
    cfg = _checked_config(config_file, opts)
    needed = [*cfg.DATASETS.TEST, *(cfg.DATASETS.TRAIN if options.precision == "int8" else ())]
    register_found_coco_files(cfg, needed)
    calibration = _calibration_images(cfg, options)
    tell("loading the model")
    model = load_predictor(cfg).model.eval()
    check_exportable(model)
    check_traces(ExportableMaskRCNN(model))
    samples = _samples(cfg, options, images)
    made = list(made_images(cfg, options.size, model.backbone.size_divisibility))
    _check_sizes([*samples, *made], options)
    with _named_errors(options):
        exportable = _exportable(model, options)
        tell(f"converting it to {options.file_format}")
        path = _converted(exportable, [*samples, *made], options, folder)
        if calibration:
            tell(f"calibrating 8 bits on {len(calibration)} images")
            _quantise(path, exportable, cfg, options, calibration)
        tell("running both models")
        run = runner(path, options.file_format, exportable.output_names, options.size)
        compared = _compared(cfg, model, run, samples, made, options)
    if compared.unlike:
        more = f" (and {len(compared.unlike) - 1} more differences)" if compared.unlike[1:] else ""
        raise ConfigError(
            f"--format {options.file_format}: nothing was written, because the exported model "
            f"differs from the trained one: {compared.unlike[0]}{more}"
        )
    tell(f"done, {sum(x.stat().st_size for x in folder.iterdir()) / 1e6:.1f} MB")
    return _describe(cfg, model, options, path, compared), compared


def _checked_config(config_file: str, opts: Sequence[str]) -> CfgNode:
    cfg = load_config_and_code(config_file, ["MODEL.DEVICE", "cpu", *opts])
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("no weights: pass --weights FILE, or MODEL.WEIGHTS in --opts")
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, train=False, evaluate=False)
    if cfg.INPUT.FORMAT not in IMAGE_FORMATS:
        raise ConfigError(
            f"INPUT.FORMAT {cfg.INPUT.FORMAT!r} cannot be exported; the runtime of exported models "
            f"supports only {listed(IMAGE_FORMATS)}"
        )
    if cfg.INPUT.MAX_SIZE_TEST < 1:
        raise ConfigError(f"INPUT.MAX_SIZE_TEST is {cfg.INPUT.MAX_SIZE_TEST}; it must be above 0")
    check_architecture(cfg)
    return cfg


def _compared(
    cfg: CfgNode,
    model: Any,
    run: Run,
    samples: Sequence[Sample],
    made: Sequence[Sample],
    options: ExportOptions,
) -> Parity | Accuracy:
    """Runs the trained and the exported model on the user's images and on synthetic ones."""
    if options.precision != "int8":
        tolerance = TOLERANCES[options.precision]
        return compare(model, run, [*samples, *made], tolerance, options.size)
    for sample in made:  # fails if the model cannot process other sizes or few detections
        run(sample.image)
    return compare_accuracy(cfg, model, run, samples, options.size)


def _progress() -> Callable[[str], None]:
    """Returns a function that logs a message with the seconds that have passed since this call."""
    start = time.perf_counter()
    return lambda text: logger.info("%4.0f s  %s", time.perf_counter() - start, text)


def _calibration_images(cfg: CfgNode, options: ExportOptions) -> list[str]:
    """Returns the calibration images for int8, or an empty list for other precisions."""
    for path in options.calibration_images:
        if not Path(path).is_file():
            raise ConfigError(f"--calibration-images: {path} is not a file")
    if options.precision != "int8" or options.calibration_images:
        return list(options.calibration_images)
    try:
        return images_of_dataset(usable_dataset(cfg, "TRAIN"), NUM_CALIBRATION_IMAGES)
    except ConfigError as error:
        raise ConfigError(
            f"--precision int8 needs calibration images; pass --calibration-images ({error})"
        ) from error


def _samples(cfg: CfgNode, options: ExportOptions, images: Sequence[str]) -> list[Sample]:
    """Returns the images on which the two models are compared, except for synthetic ones.

    Raises:
        ConfigError: if the precision is int8 and there are neither images nor a data set.
    """
    reason = "no image of DATASETS.TEST is on this machine"
    if options.precision == "int8" and not images:
        try:
            usable_dataset(cfg, "TEST")
        except ConfigError as error:
            reason = str(error)
        else:
            return []  # compare_accuracy uses many images of this data set
    samples = sample_images(cfg, images, options.size)
    if not samples and options.precision == "int8":
        raise ConfigError(f"--precision int8 needs images to compare on; pass --images ({reason})")
    if not samples:
        logger.warning("%s: comparing only on synthetic images; pass --images", reason)
    return samples


def _check_sizes(samples: Sequence[Sample], options: ExportOptions) -> None:
    """Raises a ConfigError if an image is too small for the programs of torch.export."""
    if options.file_format != "exported_program" or options.size is not None:
        return
    for sample in samples:
        height, width = sample.image.shape[1:]
        if min(height, width) <= LARGEST_TOO_SMALL:
            raise ConfigError(
                f"--format exported_program needs images with both sides above {LARGEST_TOO_SMALL} "
                f"pixels, but {sample.name} has {width} x {height} after resizing; leave it out, "
                "raise INPUT.MIN_SIZE_TEST, or add --size H W"
            )


@contextlib.contextmanager
def _named_errors(options: ExportOptions) -> Iterator[None]:
    """Turns any error from an exporter or a runtime into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        logger.debug("the export failed", exc_info=True)
        raise ConfigError(
            f"--format {options.file_format}: the export failed: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _exportable(model: Any, options: ExportOptions) -> ExportableMaskRCNN:
    """Returns the module to convert."""
    if options.precision != "fp16":
        return ExportableMaskRCNN(model).eval()
    exportable = ExportableMaskRCNN(copy.deepcopy(model))
    exportable.halve()
    return exportable.eval()


def _converted(
    exportable: ExportableMaskRCNN, samples: Sequence[Sample], options: ExportOptions, folder: Path
) -> Path:
    # Prefers an image that is not square, because torch.export might treat equal sides as one
    # variable.
    image = next(
        (x.image for x in samples if x.image.shape[1] != x.image.shape[2]), samples[0].image
    )
    inputs, opset = model_inputs(image, options.size), options.opset or DEFAULT_OPSET
    return converted(exportable, inputs, options.file_format, opset, folder)


def _quantise(
    path: Path,
    exportable: ExportableMaskRCNN,
    cfg: CfgNode,
    options: ExportOptions,
    images: Sequence[str],
) -> None:
    """Quantises a converted model to 8 bits.

    Raises:
        ConfigError: if the model finds nothing in any of the images.
    """
    run: Run = runner(path, "onnx", exportable.output_names, options.size)
    if not any(len(run(read_sample(cfg, x, options.size))["scores"]) for x in images):
        raise ConfigError(
            "--precision int8: the model finds nothing in any calibration image, so its mask head "
            "cannot be calibrated; pass images of objects as --calibration-images"
        )

    def read(image: str) -> Inputs:
        return model_inputs(read_sample(cfg, image, options.size), options.size)

    quantise(path, images, read)


def check_options(options: ExportOptions) -> None:
    """Raises a ConfigError, which names the flag, if the options cannot be used together."""
    for flag, value, choices in (
        ("--format", options.file_format, MODEL_FILES),
        ("--precision", options.precision, PRECISIONS),
    ):
        if value not in choices:
            raise ConfigError(f"{flag} {value!r} is not one of {listed(list(choices))}")
    if options.precision == "int8" and options.file_format != "onnx":
        raise ConfigError(
            f"--precision int8 works only with ONNX, but --format is {options.file_format}"
        )
    if options.calibration_images and options.precision != "int8":
        raise ConfigError(
            f"--calibration-images needs --precision int8, but the precision is {options.precision}"
        )
    if options.opset is not None and options.file_format != "onnx":
        raise ConfigError(f"--opset works only with ONNX, but --format is {options.file_format}")
    if options.opset is not None and options.opset not in OPSETS:
        raise ConfigError(f"--opset {options.opset} is not between {OPSETS[0]} and {OPSETS[-1]}")
    if options.size is not None and min(options.size) < 1:
        raise ConfigError(f"--size {options.size[0]} {options.size[1]}: both sides must be above 0")
    if options.file_format == "exported_program" and not hasattr(torch.compiler, "is_exporting"):
        raise ConfigError(
            "--format exported_program needs PyTorch 2.7 or later, because the number of boxes "
            f"depends on the image; this is {torch.__version__}"
        )
    if options.file_format == "onnx":
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"--format onnx needs {package}: pip install {package}")


def _describe(
    cfg: CfgNode, model: Any, options: ExportOptions, path: Path, compared: Parity | Accuracy
) -> ModelDescription:
    predictor = last_predictor(model)
    exportable = ExportableMaskRCNN(model)
    names = class_names_of(model)
    categories = model_categories(cfg, names)  # also logs which names or ids are unknown
    is_onnx = options.file_format == "onnx"
    weights = Path(local_copy(cfg.MODEL.WEIGHTS.partition("?")[0]))
    packages = ["mask_head_plugin", "torch", "torchvision", *(["onnx"] if is_onnx else [])]
    return ModelDescription(
        format_version=FORMAT_VERSION,
        model=ModelFile(
            file=path.name,
            format=options.file_format,
            sha256=sha256_of(path),
            opset=(options.opset or DEFAULT_OPSET) if is_onnx else None,
            precision=options.precision,
            data={x.name: sha256_of(x) for x in path.parent.iterdir() if x != path},
        ),
        num_classes=model.roi_heads.num_classes,
        class_names=names,
        category_ids=None if names is None else list(categories.ids),
        input=ModelInput(
            format=cfg.INPUT.FORMAT,
            channels=len(cfg.MODEL.PIXEL_MEAN),
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
            size=options.size,
            interpolation="bilinear (Pillow)",
        ),
        outputs=exportable.output_names,
        score_threshold=float(predictor.test_score_thresh),
        nms_threshold=float(predictor.test_nms_thresh),
        detections_per_image=predictor.test_topk_per_image,
        mask=MaskRule(0.5, compared.mask_side, PASTE) if exportable.has_masks else None,
        mask_scoring=exportable.has_mask_scores,
        versions={name: _version(name) for name in packages},
        weights=Weights(weights.name, sha256_of(weights)),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    if package == "mask_head_plugin":
        return __version__
    return importlib.metadata.version(package)
