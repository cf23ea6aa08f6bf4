"""Runs an exported model with NumPy, pycocotools and onnxruntime, without detectron2 or PyTorch.

    predictor = Predictor("output/exported")
    found = predictor(image)                     # (H, W, 3) uint8 in BGR, as from cv2.imread
    print(found.class_names, found.scores, found.masks)

Shape alphabet: R detections of an image; H, W image height and width in pixels; C channels of the
model's input, M side of its masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from ..messages import one_line
from ..model_input import IMAGE_FORMATS, ByteArray, model_hw, resized, rgb_in_format
from ..run_lengths import Rle
from .mask_paste import FloatArray, paste_masks
from .model_folder import ModelDescription, ModelFolderError, read_model_folder

MOST_THREADS = 1024
"""Upper limit for the number of threads. onnxruntime hangs or crashes if the machine allows fewer.
"""

INSTALL = 'pip install "mask_head_plugin[deploy]", or pip install onnxruntime'


@dataclass(frozen=True, eq=False)
class Prediction:
    """The detections in one image, best first.

    Attributes:
        boxes: (R, 4) float32, XYXY in pixels of the image.
        scores: (R,) float32.
        class_ids: (R,) int64, counted from 0.
        class_names: R names. If the model has no class names, these are numbers counted from 1.
        masks: R masks in COCO's run-length encoding, with counts as text; None if the model has no
            masks.
        mask_scores: (R,) float32 if the model has mask scoring; otherwise None.
        image_size: H, W.
    """

    boxes: FloatArray
    scores: FloatArray
    class_ids: npt.NDArray[np.int64]
    class_names: list[str]
    masks: list[Rle] | None
    mask_scores: FloatArray | None
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Returns the (H, W) pixels of a mask.

        Raises:
            ValueError: if the model has no masks.
        """
        if self.masks is None:
            raise ValueError("this model has no masks")
        decoded: npt.NDArray[np.bool_] = coco_mask.decode(self.masks[index]).astype(bool)
        return decoded


class Predictor:
    """Runs a model from a folder written by ``tools/export_model.py``.

    Attributes:
        description: the content of ``model.json``.
        class_names: names of all classes. If the model has none, these are numbers counted from 1.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """
        Args:
            folder: folder of a model exported with ``--format onnx``.
            threads: number of threads for onnxruntime; None uses as many as the machine has cores.
            providers: onnxruntime's execution providers, in order of preference.

        Raises:
            ModelFolderError: if the folder has no model that onnxruntime can run. The message names
                the file.
            ImportError: if onnxruntime is not installed.
            ValueError: if ``threads`` is below 1 or above MOST_THREADS.
        """
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads is {threads}; it must be from 1 to {MOST_THREADS}")
        self.description = read_model_folder(Path(folder))
        self._path = Path(folder) / self.description.model.file
        self._session = _session(Path(folder), self.description, threads, providers)
        names = self.description.class_names
        self.class_names = names or [str(k + 1) for k in range(self.description.num_classes)]

    @overload
    def __call__(self, images: ByteArray) -> Prediction: ...

    @overload
    def __call__(self, images: Sequence[ByteArray]) -> list[Prediction]: ...

    def __call__(self, images: ByteArray | Sequence[ByteArray]) -> Prediction | list[Prediction]:
        """Returns the detections in an image, or in each of several images of any size.

        Images are processed one after the other, each with all threads.

        Args:
            images: (H, W, 3) uint8 in BGR, as from cv2.imread, regardless of the model's format.

        Raises:
            ModelFolderError: if the model's output contradicts ``model.json``.
            ValueError: if an image cannot be used; the message names its position in the list.
        """
        if isinstance(images, np.ndarray):
            return self._predict(_checked(images, "the image"))
        checked = [_checked(image, f"image {k}") for k, image in enumerate(images)]
        return [self._predict(image) for image in checked]

    def _predict(self, image: ByteArray) -> Prediction:
        given = self.description.input
        image_hw = image.shape[0], image.shape[1]
        seen = rgb_in_format(image[:, :, ::-1], given.format)
        seen_hw = model_hw(image_hw, given.min_size, given.max_size, given.size)
        seen = np.ascontiguousarray(resized(seen, seen_hw).transpose(2, 0, 1), np.float32)
        inputs: dict[str, Any] = {"image": seen}
        if given.size is not None:
            sides = zip(given.size, seen_hw, strict=True)
            padding = [(0, 0), *((0, fixed - own) for fixed, own in sides)]
            inputs = {"image": np.pad(seen, padding), "image_hw": np.array(seen_hw, np.int64)}
        names = self.description.outputs
        found = dict(zip(names, self._session.run(names, inputs), strict=True))
        self._check_outputs(found)
        return self._in_image(found, seen_hw, image_hw)

    def _check_outputs(self, found: dict[str, Any]) -> None:
        """Raises a ModelFolderError unless the outputs have valid shapes and classes."""
        count, num_classes = len(found["scores"]), len(self.class_names)
        side = self.description.mask.side if self.description.mask is not None else 0
        shapes = {"boxes": (count, 4), "mask_probs": (count, side, side)}
        for name, values in found.items():
            if values.shape != shapes.get(name, (count,)):
                raise ModelFolderError(
                    f"{self._path} returns {name} of shape {values.shape} for {count} detections, "
                    f"but must return {shapes.get(name, (count,))}; export the model again"
                )
        classes = found["classes"]
        is_class = (classes >= 0) & (classes < num_classes)
        if classes.dtype.kind not in "iu" or not is_class.all():
            raise ModelFolderError(
                f"{self._path} returns classes that are not numbers from 0 to {num_classes - 1}, "
                "as described by model.json; export the model again"
            )

    def _in_image(
        self, found: dict[str, Any], seen_hw: tuple[int, int], image_hw: tuple[int, int]
    ) -> Prediction:
        """Converts detections to pixels of the image, and drops those whose box becomes empty.

        Args:
            found: outputs of the model by name.
            seen_hw: size of the model's input image.
            image_hw: H, W.
        """
        (height, width), (seen_height, seen_width) = image_hw, seen_hw
        scale_x, scale_y = width / seen_width, height / seen_height
        boxes = found["boxes"] * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, found = boxes[kept], {name: values[kept] for name, values in found.items()}
        rule, masks = self.description.mask, None
        if rule is not None:
            masks = paste_masks(found["mask_probs"], boxes, image_hw, rule.threshold)
        class_names = [self.class_names[k] for k in found["classes"]]
        return Prediction(
            boxes,
            found["scores"],
            found["classes"],
            class_names,
            masks,
            found.get("mask_scores"),
            image_hw,
        )


def _checked(image: ByteArray, which: str) -> ByteArray:
    if image is None:
        raise ValueError(f"{which} is None, which cv2.imread returns for a file it cannot read")
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(
            f"{which} is an array {image.shape} of {image.dtype}, but must be (H, W, 3) of uint8 "
            "in BGR"
        )
    return image


def _session(
    folder: Path, description: ModelDescription, threads: int | None, providers: Sequence[str]
) -> Any:
    """Returns onnxruntime's session of a model."""
    path = folder / description.model.file
    if description.model.format != "onnx":
        raise ModelFolderError(
            f"{path} is a {description.model.format} model, which needs PyTorch; to run it without "
            "PyTorch, export it with --format onnx"
        )
    if description.input.format not in IMAGE_FORMATS:
        raise ModelFolderError(
            f"{path} needs images in the format {description.input.format!r}, but this runtime "
            f"supports {IMAGE_FORMATS}"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime: {INSTALL} ({one_line(error)})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors; warnings concern the export, not its users
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's error classes have no common base class
        raise ModelFolderError(
            f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: "
            f"{one_line(error, 600)}"
        ) from error
    inputs = ["image", *(["image_hw"] if description.input.size else [])]
    for kind, expected, puts in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", description.outputs, session.get_outputs()),
    ):
        if (names := [x.name for x in puts]) != expected:
            raise ModelFolderError(f"{path} has the {kind} {names}, but model.json says {expected}")
    given = description.input
    shape = [given.channels, *(given.size or ("H", "W"))]
    found = session.get_inputs()[0]
    if found.type != "tensor(float)" or not _fits(found.shape, shape):
        raise ModelFolderError(
            f"{path} takes a {found.type} {found.shape} as the image, but model.json says "
            f"tensor(float) {shape}"
        )
    return session


def _fits(shape: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Returns whether an input's shape has the expected numbers, and names for variable sizes."""
    return len(shape) == len(expected) and all(
        (a == b) if isinstance(b, int) else not isinstance(a, int)
        for a, b in zip(shape, expected, strict=True)
    )
