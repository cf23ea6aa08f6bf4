"""Reads image files in the same way for the data set check, training, evaluation and the demo.

Pillow decodes the files, and this module applies the rules in docs/image_files.md. Files that the
rules do not cover are refused with an ImageFileError that names the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from .messages import ConfigError, one_line
from .model_input import IMAGE_FORMATS, rgb_in_format

MOST_ELONGATED = 200
"""Largest accepted ratio of the longer to the shorter side. In more elongated images, scaling to
INPUT.MAX_SIZE_* could reduce the shorter side to less than one pixel.
"""

LOWEST_WHITE = 64
"""If the upper bytes of all 16-bit samples in an image are lower than this, the image uses 14 bits
or fewer, and the value of white is unknown.
"""

EXIF_ORIENTATION = 274
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations that swap width and height."""

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
LFS_POINTER = b"version https://git-lfs"
"""Start of the pointer file that Git LFS creates in place of a file until it is pulled."""

_REPLACE = "replace the file, or leave the image out"
WHAT_TO_DO = {
    "git-lfs-pointer": "run `git lfs pull` where you cloned the data set",
    "image-depth": "scale all images to 8 bits by one factor: 255 / 4095 if 12 bits are used",
    "image-elongated": "cut the image into pieces",
    "image-file-empty": _REPLACE,
    "image-file-is-folder": _REPLACE,
    "image-file-missing": _REPLACE,
    "image-too-large": "cut the image into tiles, or make it smaller",
    "image-truncated": _REPLACE,
    "image-unreadable": _REPLACE,
}
"""Advice for each kind of fault in an ImageFileError."""


class ImageFileError(ConfigError):
    """A file whose pixels cannot be used.

    Attributes:
        kind: the kind of fault, which is a key of WHAT_TO_DO.
        reason: the message without the file's name.
    """

    def __init__(self, path: str, kind: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.kind, self.reason = kind, reason


class _RefusalError(Exception):
    """Carries the kind and reason of an ImageFileError."""


def read_image(path: str, image_format: str) -> npt.NDArray[Any]:
    """Returns the pixels of a file. Supports more kinds of file than detectron2's read_image.

    Args:
        path: anything that detectron2's PathManager can open.
        image_format: a value of INPUT.FORMAT: BGR, RGB, L or YUV-BT.601.

    Returns:
        (H, W, C) uint8 from 0 to 255. For YUV-BT.601, float32 with Y from 0 to 1.

    Raises:
        ImageFileError: if the pixels cannot be used.
    """
    with open_image(path) as opened:
        return in_format(opened.pixels(), image_format)


def in_format(image: Image.Image, image_format: str) -> npt.NDArray[Any]:
    """Converts an 8-bit image to the array that ``read_image`` returns.

    The format may also be one of Pillow's modes.

    Differs from detectron2's convert_PIL_to_numpy: YUV-BT.601 is float32, because detectron2's
    models fail on the float64 that convert_PIL_to_numpy returns.
    """
    if image_format in IMAGE_FORMATS:
        return rgb_in_format(np.asarray(image.convert("RGB")), image_format)
    return np.asarray(image.convert(image_format))


@contextlib.contextmanager
def open_image(path: str) -> Iterator[OpenedImage]:
    """Opens a file and reads its header.

    Args:
        path: as for read_image.

    Raises:
        ImageFileError: if the header shows that the pixels cannot be used, or if any error is
            raised while the file is open.
    """
    try:
        with _opened(path) as file:
            yield OpenedImage(file)
    except Exception as error:  # on damaged files, Pillow's readers raise errors of many types
        raise ImageFileError(path, *_explained(error)) from error


def _opened(path: str) -> IO[bytes]:
    if "://" in path:  # imported here, so that local files can be read without detectron2
        from detectron2.utils.file_io import PathManager

        return PathManager.open(path, "rb")
    _check_regular(path)
    return open(path, "rb")  # noqa: PTH123  # training calls this for each image


def _check_regular(path: str) -> None:
    status = os.stat(path)  # noqa: PTH116  # training calls this for each image
    if stat.S_ISDIR(status.st_mode):
        raise _RefusalError("image-file-is-folder", "is a folder")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe might never end
        raise _RefusalError("image-unreadable", "is not a regular file")
    if status.st_size == 0:
        raise _RefusalError("image-file-empty", "has 0 bytes")


def _explained(error: Exception) -> tuple[str, str]:
    """Returns the kind of fault and the reason, as in ImageFileError."""
    match error:
        case _RefusalError():
            return error.args[0], error.args[1]
        case FileNotFoundError() | NotADirectoryError():
            return "image-file-missing", "does not exist"
        case Image.DecompressionBombError():
            return "image-too-large", f"is refused by Pillow: {_told(error)}"
        case PermissionError():
            return "image-unreadable", "cannot be read: permission denied"
        case _:
            return "image-unreadable", f"cannot be read: {_told(error)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__} {one_line(error)}"[:200]


class OpenedImage:
    """An image file whose header has been read.

    Attributes:
        image: Pillow's image.
        file: the open file.
        stored_hw: size of the stored pixels, before they are rotated or flipped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.image = image = _identified(file)
        self.stored_hw = _stored_hw(image)
        self._is_deep = _is_deep(image, file)
        if max(self.stored_hw) > MOST_ELONGATED * min(self.stored_hw):
            sides = "{1} x {0}".format(*self.stored_hw)
            raise _RefusalError(
                "image-elongated",
                f"has {sides} pixels; its aspect ratio exceeds {MOST_ELONGATED} : 1",
            )
        if image.mode == "F":
            raise _RefusalError(
                "image-depth", "has floating-point samples, so the value of white is unknown"
            )
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise _RefusalError(
                "image-depth", "has 32-bit samples, so the value of white is unknown"
            )

    @property
    def is_animated(self) -> bool:
        """Whether the file has more than one page or frame."""
        # MPO is a JPEG followed by a preview, which some cameras write.
        return self.image.format != "MPO" and bool(getattr(self.image, "is_animated", False))

    @property
    def needs_decoding(self) -> bool:
        """Whether you must decode the pixels to find out if they can be used."""
        return self._is_deep or self.image.mode.startswith("I")

    def pixels(self) -> Image.Image:
        """Decodes the first page or frame.

        Returns:
            An 8-bit image in mode RGB or L, rotated and flipped according to EXIF or XMP data.
        """
        image: Image.Image = self.image
        if image.format == "JPEG" and _ends_in_zeros(self.file):
            raise _RefusalError("image-truncated", "ends in zeros before the pixels are complete")
        white_is_zero = image.format == "TIFF" and _tiff_tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
        try:
            image.load()
        except Exception as error:
            raise _RefusalError("image-truncated", f"is damaged: {_told(error)}") from error
        # Read after loading, because Pillow rotates a TIFF while loading and then removes the tag.
        turn = TURNS.get(orientation_of(image.getexif))
        if image.mode.startswith("I"):
            image = _upper_bytes(image, inverted=white_is_zero)
        elif self._is_deep:
            colours = (band for band in image.getbands() if band != "A")
            _check_white(max(np.asarray(image.getchannel(band)).max() for band in colours))
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def _identified(file: IO[bytes]) -> ImageFile.ImageFile:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            reason = "is a Git LFS pointer instead of the image, which `git lfs pull` downloads"
            raise _RefusalError("git-lfs-pointer", reason) from None
        reason = (
            "is not an image that Pillow can read: it is damaged, or must be converted, e.g. to PNG"
        )
        raise _RefusalError("image-unreadable", reason) from None


def _stored_hw(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # Pillow's height and width are those after rotation
        return _tiff_tag(image, IMAGE_LENGTH), _tiff_tag(image, IMAGE_WIDTH)
    return image.height, image.width


def _tiff_tag(image: Any, tag: int) -> Any:
    return image.tag_v2.get(tag)


def _is_deep(image: ImageFile.ImageFile, file: IO[bytes]) -> bool:
    """Returns whether the samples have 16 bits, of which Pillow keeps only the upper 8."""
    if image.format == "TIFF":
        return max(_tiff_tag(image, BITS_PER_SAMPLE) or (1,)) > 8
    if image.format == "JPEG2000":
        return _jpeg2000_bits(file) == 16  # Pillow scales samples of fewer bits
    if image.format == "PPM":
        return any(tile[3][1] == 65535 for tile in image.tile if isinstance(tile[3], tuple))
    return any(";16" in str(tile[3]) for tile in image.tile)  # such as RGB;16B


def _jpeg2000_bits(file: IO[bytes]) -> int:
    file.seek(0)
    head = file.read(1 << 20)
    start = head.find(b"\xff\x4f\xff\x51")  # start of the codestream and of its SIZ segment
    depth = head[start + 42 : start + 43]  # Ssiz of the first component
    return (depth[0] & 0x7F) + 1 if start >= 0 and depth else 8


def _ends_in_zeros(file: IO[bytes]) -> bool:
    """Returns whether zeros replace the end of a JPEG's pixels, as in an interrupted download.

    Pillow would decode these zeros to grey. Zeros after the end marker are harmless padding that
    some cameras write. The end marker of an embedded preview does not count, because it precedes
    the pixels.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 64, 0))
    if any(file.read()):
        return False
    file.seek(0)
    data = file.read()
    return JPEG_END not in data[data.rfind(JPEG_SCAN) :]


def orientation_of(get_exif: Callable[[], Any]) -> int:
    """Returns the orientation, from 1 to 8, in the EXIF data that a function returns.

    Returns 1 if the data is missing, damaged or has no valid orientation.
    """
    try:
        orientation = get_exif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data does not mean that the pixels are damaged
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upper_bytes(image: Image.Image, *, inverted: bool) -> Image.Image:
    """Reduces a 16-bit grey image to 8 bits."""
    upper = (np.asarray(image) >> 8).astype(np.uint8)
    _check_white(upper.max())
    return Image.fromarray(255 - upper if inverted else upper)


def _check_white(brightest: int) -> None:
    if brightest < LOWEST_WHITE:
        raise _RefusalError(
            "image-depth",
            f"has 16-bit samples, but none is above {LOWEST_WHITE * 256 - 1}: if only 10, 12 or 14 "
            "bits are used, the image would look almost black to the model",
        )
