"""Writes a trained model as a file that runs without its code, and makes sure that it is the same.

What cannot be exported is refused before anything is converted. The file gets its name only once it
has been run and found to agree with the trained model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
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
from ..demo.demo import model_categories
from ..durable_files import locked_folder, write_durably
from ..engine.predictor import load_predictor
from ..messages import first_line, listed
from ..model_input import IMAGE_FORMATS
from ..user_code import load_config_and_code
from .exportable import ExportableMaskRCNN, last_predictor
from .formats import DEFAULT_OPSET, OPSETS, converted, padded, runner
from .model_folder import (
    DESCRIPTION,
    FORMAT_VERSION,
    MODEL_FILES,
    MaskRule,
    ModelDescription,
    ModelFile,
    ModelInput,
    Weights,
    sha256_of,
)
from .parity import TOLERANCES, Parity, compare
from .refusals import check_architecture, check_exportable, check_traces
from .samples import Sample, sample_images

logger = logging.getLogger(__name__)

PASTE = (
    "bilinear, pixel centres at +0.5, zero outside of the mask, as detectron2's "
    "paste_masks_in_image"
)


LARGEST_TOO_SMALL = 64
"""Up to this side torch.export takes a map for one whose size is fixed, at a stride of 32."""


@dataclass(frozen=True)
class ExportOptions:
    """What is exported.

    Attributes:
        file_format: a key of MODEL_FILES.
        size: height and width of every image, padded; None for any size.
        opset: of ONNX; None for DEFAULT_OPSET.
        precision: a key of TOLERANCES.
    """

    file_format: str
    size: tuple[int, int] | None = None
    opset: int | None = None
    precision: str = "fp32"


def export_model(
    config_file: str,
    opts: Sequence[str],
    output: Path,
    options: ExportOptions,
    images: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> Parity:
    """Writes a folder with an exported model and its ``model.json``.

    Args:
        config_file: a YAML file.
        opts: "KEY VALUE" pairs in one flat list, MODEL.WEIGHTS among them.
        output: the folder, made if missing.
        options: of the export.
        images: files to compare both models on; those of DATASETS.TEST if there are none.
        overwrite: replace a model that is in the folder.

    Returns:
        How far the exported model is from the trained one.

    Raises:
        ConfigError: if a setting, a file or the folder cannot be used, if something of the model
            cannot be exported, or if what was exported is not the same. No file is left then.
        OSError: if a file cannot be written.
    """
    check_options(options)
    with _sole_export(output):
        _check_output(output, overwrite=overwrite)
        content, description, parity = _made(config_file, opts, options, images)
        _write(output, content, description)
    if not any(parity.counts):
        logger.warning(
            "the model found nothing in any image, so that boxes, scores and masks could not be "
            "compared; name --images with objects, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST"
        )
    return parity


def _made(
    config_file: str, opts: Sequence[str], options: ExportOptions, images: Sequence[str]
) -> tuple[bytes, ModelDescription, Parity]:
    """Returns what export_model writes; see there."""
    cfg = load_config_and_code(config_file, ["MODEL.DEVICE", "cpu", *opts])
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("no weights: name them with --weights FILE, or MODEL.WEIGHTS in --opts")
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, train=False, evaluate=False)
    if cfg.INPUT.FORMAT not in IMAGE_FORMATS:
        raise ConfigError(
            f"INPUT.FORMAT {cfg.INPUT.FORMAT!r} is none of {listed(IMAGE_FORMATS)}, and the "
            "runtime of exported models reads no other"
        )
    if cfg.INPUT.MAX_SIZE_TEST < 1:
        raise ConfigError(f"INPUT.MAX_SIZE_TEST is {cfg.INPUT.MAX_SIZE_TEST}; it must be above 0")
    check_architecture(cfg)
    model = load_predictor(cfg).model.eval()
    check_exportable(model)
    check_traces(ExportableMaskRCNN(model))
    samples = sample_images(cfg, images, options.size, model.backbone.size_divisibility)
    content, parity = _exported(model, samples, options)
    return content, _describe(cfg, model, options, content, parity), parity


@contextlib.contextmanager
def _sole_export(output: Path) -> Iterator[None]:
    """Makes the folder and keeps other exports from it; one that stays empty is removed again.

    Raises:
        ConfigError: if the folder cannot be written to, or another export does.
    """
    is_new = not output.exists()
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        except OSError as error:
            raise ConfigError(
                f"--output {output} is no folder that can be written to: {error.strerror}"
            ) from error
        try:
            stack.enter_context(locked_folder(output))
        except BlockingIOError as error:
            raise ConfigError(
                f"another export is writing to --output {output}; wait for it, or name another "
                "folder"
            ) from error
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    output.rmdir()


def _write(output: Path, content: bytes, description: ModelDescription) -> None:
    """Writes the files of a folder; those that it had are gone only once the new ones are whole."""
    described = output / DESCRIPTION

    def write_model() -> None:
        # The old description would speak of another file for a moment.
        write_durably(
            output / description.model.file,
            lambda file: file.write(content),
            before_rename=lambda: described.unlink(missing_ok=True),
        )

    write_durably(described, description.to_json(), before_rename=write_model)
    for name in set(MODEL_FILES.values()) - {description.model.file}:
        (output / name).unlink(missing_ok=True)


def check_options(options: ExportOptions) -> None:
    """Raises a ConfigError, naming the flag, if there is no such export."""
    for flag, value, choices in (
        ("--format", options.file_format, MODEL_FILES),
        ("--precision", options.precision, TOLERANCES),
    ):
        if value not in choices:
            raise ConfigError(f"{flag} {value!r} is none of {listed(list(choices))}")
    if options.opset is not None and options.file_format != "onnx":
        raise ConfigError(f"--opset is ONNX's, and --format is {options.file_format}")
    if options.opset is not None and options.opset not in OPSETS:
        raise ConfigError(f"--opset {options.opset} is not from {OPSETS[0]} to {OPSETS[-1]}")
    if options.size is not None and min(options.size) < 1:
        raise ConfigError(f"--size {options.size[0]} {options.size[1]}: both must be above 0")
    if options.file_format == "exported_program" and not hasattr(torch.compiler, "is_exporting"):
        raise ConfigError(
            "--format exported_program needs PyTorch 2.7 or later, whose torch.export follows "
            f"numbers of boxes that depend on the image; this is {torch.__version__}"
        )
    if options.file_format == "onnx":
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"--format onnx needs {package}: pip install {package}")


def _check_output(output: Path, *, overwrite: bool) -> None:
    taken = [name for name in (DESCRIPTION, *MODEL_FILES.values()) if (output / name).exists()]
    if taken and not overwrite:
        raise ConfigError(
            f"--output {output} has {taken[0]} already; name another folder, or add --overwrite"
        )


def _exported(
    model: Any, samples: Sequence[Sample], options: ExportOptions
) -> tuple[bytes, Parity]:
    """Returns the file of the model, which has been compared with it."""
    exportable = ExportableMaskRCNN(model)
    if options.precision == "fp16":
        exportable = ExportableMaskRCNN(copy.deepcopy(model))
        exportable.halve()
    exportable.eval()
    # Not a square: torch.export might take equal sides for one.
    image = next(
        (x.image for x in samples if x.image.shape[1] != x.image.shape[2]), samples[0].image
    )
    opset = options.opset or DEFAULT_OPSET
    try:
        inputs = (image,) if options.size is None else padded(image, options.size)
        content = converted(exportable, inputs, options.file_format, opset)
        run = runner(content, options.file_format, exportable.output_names, options.size)
        tolerance = TOLERANCES[options.precision]
        parity = compare(model, run, samples, tolerance, options.size)
    except Exception as error:  # whatever an exporter or a runtime may raise
        logger.debug("the export failed", exc_info=True)
        raise ConfigError(
            f"--format {options.file_format}: the export failed: {type(error).__name__}: "
            f"{first_line(error)}{_too_small(samples, options)}"
        ) from error
    if parity.unlike:
        more = f" (and {len(parity.unlike) - 1} more differences)" if parity.unlike[1:] else ""
        raise ConfigError(
            f"--format {options.file_format}: nothing was written, for the exported model differs "
            f"from the trained one. {parity.unlike[0]}{more}"
        )
    return content, parity


def _too_small(samples: Sequence[Sample], options: ExportOptions) -> str:
    """Returns what to do about images that torch.export's programs do not take, for an error."""
    small = [x for x in samples if min(x.image.shape[1:]) <= LARGEST_TOO_SMALL]
    if options.file_format != "exported_program" or options.size is not None or not small:
        return ""
    height, width = small[0].image.shape[1:]
    return (
        f". This format takes images with both sides above {LARGEST_TOO_SMALL} pixels, and "
        f"{small[0].name} has {width} x {height} once resized: leave it out, or add --size H W"
    )


def _describe(
    cfg: CfgNode, model: Any, options: ExportOptions, content: bytes, parity: Parity
) -> ModelDescription:
    predictor = last_predictor(model)
    exportable = ExportableMaskRCNN(model)
    names = class_names_of(model)
    is_onnx = options.file_format == "onnx"
    weights = Path(local_copy(cfg.MODEL.WEIGHTS.partition("?")[0]))
    packages = ["mask_head_plugin", "torch", "torchvision", *(["onnx"] if is_onnx else [])]
    return ModelDescription(
        format_version=FORMAT_VERSION,
        model=ModelFile(
            file=MODEL_FILES[options.file_format],
            format=options.file_format,
            sha256=hashlib.sha256(content).hexdigest(),
            opset=(options.opset or DEFAULT_OPSET) if is_onnx else None,
            precision=options.precision,
        ),
        num_classes=model.roi_heads.num_classes,
        class_names=names,
        category_ids=None if names is None else list(model_categories(cfg, names).ids),
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
        mask=MaskRule(0.5, parity.mask_side, PASTE) if exportable.has_masks else None,
        mask_scoring=exportable.has_mask_scores,
        versions={name: _version(name) for name in packages},
        weights=Weights(weights.name, sha256_of(weights)),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    if package == "mask_head_plugin":
        return __version__
    return importlib.metadata.version(package)
