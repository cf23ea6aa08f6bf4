"""Image files: whether detectron2 will read each, and with the size that the annotations have.

Files are not decoded as long as their structure says that they are whole: a JPEG ends with its end
marker, the chunks of a PNG reach to IEND. What does not end so, and other formats, is decoded.
"""

from __future__ import annotations

import stat
import struct
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .findings import Findings, Place, quote, quote_path

EXIF_ORIENTATION = 274
TURNED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
# Pillow, as detectron2 calls it, cuts the values of these at 255.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
TEXT_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
THREADS = 8
FEW_FILES = 2000  # are looked at in a second

Problem = tuple[str, str]
"""Kind and message of a finding."""


class ListedImage(NamedTuple):
    """An image of the annotation file.

    Attributes:
        number: index of the record.
        image_id: its id.
        path: the file.
        image_hw: the record's size, None if it has none.
    """

    number: int
    image_id: Any
    path: str
    image_hw: tuple[int, int] | None


class ImageFacts(NamedTuple):
    """What a file says.

    Attributes:
        problem: why it cannot be used, if so.
        stored_hw: size of the stored pixels, before the EXIF orientation.
        orientation: EXIF's, 1 if there is none.
        animated: whether it has more frames.
    """

    problem: Problem | None = None
    stored_hw: tuple[int, int] = (0, 0)
    orientation: int = 1
    animated: bool = False

    @property
    def image_hw(self) -> tuple[int, int]:
        """The size that detectron2 will see."""
        height, width = self.stored_hw
        return (width, height) if self.orientation in TURNED else (height, width)


def inspect_image(path: str, *, decode: bool = False) -> ImageFacts:
    """Opens a file as detectron2 does.

    Args:
        path: of the file.
        decode: whether to read all pixels, which finds damage in the middle of a file, too.
    """
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            return ImageFacts(("image-file-is-folder", "is a folder"))
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            return ImageFacts(("image-unreadable", "is no regular file"))
        if status.st_size == 0:
            return ImageFacts(("image-file-empty", "has 0 bytes"))
        with Path(path).open("rb") as file:
            return _inspect(file, decode)
    except (FileNotFoundError, NotADirectoryError):
        return ImageFacts(("image-file-missing", "does not exist"))
    except Image.DecompressionBombError as error:
        return ImageFacts(("image-too-large", f"is refused by Pillow: {_one_line(error)}"))
    except UnidentifiedImageError:
        return ImageFacts(("image-unreadable", "is no image that Pillow knows"))
    except PermissionError:
        return ImageFacts(("image-unreadable", "may not be read by this user"))
    except Exception as error:  # Pillow's readers raise all sorts on damaged files
        return ImageFacts(("image-unreadable", f"cannot be opened: {_one_line(error)}"))


def _inspect(file: IO[bytes], decode: bool) -> ImageFacts:
    image = Image.open(file)
    width, height = image.size
    if image.mode in DEEP_MODES:
        return ImageFacts(("image-depth", f"has pixels of mode {image.mode}"))
    # MPO is what some cameras write: a JPEG with a preview behind it.
    animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    # Pillow turns a TIFF as it loads it; detectron2 asks before, and turns it once more.
    early = _orientation(image, file, decode) if image.format == "TIFF" else None
    whole = _looks_whole(image, file)
    if not whole and image.format == "JPEG" and _ends_in_zeros(file):
        return ImageFacts(("image-truncated", "ends in zeros in the middle of the pixels"))
    if decode or not whole:
        try:
            image.load()
        except Exception as error:  # as above
            return ImageFacts(("image-truncated", f"is damaged: {_one_line(error)}"))
    orientation = _orientation(image, file, decode) if early is None else early
    return ImageFacts(None, (height, width), orientation, animated)


def _orientation(image: Image.Image, file: IO[bytes], decode: bool) -> int:
    try:
        exif = image.getexif() if decode or image.format != "PNG" else _png_exif(image, file)
        orientation = exif.get(EXIF_ORIENTATION, 1)
    except Exception:  # detectron2 goes on without, too
        return 1
    return orientation if orientation in range(1, 9) else 1


def _looks_whole(image: Image.Image, file: IO[bytes]) -> bool:
    """Returns whether a file ends as its format says; False where that is not known."""
    if image.format == "JPEG":
        file.seek(0, 2)
        file.seek(max(file.tell() - 64, 0))
        return file.read().rstrip(b"\0\r\n ").endswith(JPEG_END)
    return image.format == "PNG" and {b"IDAT", b"IEND"} <= set(_png_chunks(file))


def _ends_in_zeros(file: IO[bytes]) -> bool:
    """Returns whether zeros took the place of a JPEG's last pixels, which decode to grey.

    Broken downloads look so. Zeros behind the end marker are padding that some cameras write; the
    marker of a preview stands before the pixels start.
    """
    file.seek(0)
    data = file.read()
    return data.endswith(bytes(64)) and JPEG_END not in data[data.rfind(JPEG_SCAN) :]


def _png_chunks(file: IO[bytes]) -> Iterable[bytes]:
    """Yields the kinds of a PNG's chunks that are there to their last byte."""
    size = file.seek(0, 2)
    position = 8
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        position += 12 + length
        if position <= size:
            yield kind


def _png_exif(image: Image.Image, file: IO[bytes]) -> Any:
    """Returns what ``image.getexif()`` does, which decodes each PNG to look behind its pixels."""
    kinds = list(_png_chunks(file))
    if any(kind in TEXT_CHUNKS for kind in kinds[kinds.index(b"IDAT") :]):
        file.seek(0)
        return Image.open(file).getexif()
    return Image.Image.getexif(image)


def _one_line(error: Exception) -> str:
    return quote(" ".join(str(error).split())).strip("'\"")


def check_image_files(
    images: Sequence[ListedImage],
    found: Findings,
    *,
    decode: bool = False,
    known: dict[str, ImageFacts] | None = None,
) -> None:
    """Notes the files that cannot be used, or have another size than their records.

    Args:
        images: of the annotation file.
        found: gets the findings.
        decode: whether to decode all files.
        known: facts by path that need not be read again; those read are added.
    """
    known = {} if known is None else known
    missing = [image.path for image in images if image.path not in known]
    with ThreadPool(THREADS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large images and odd EXIF data
        results = pool.imap(lambda path: inspect_image(path, decode=decode), missing, chunksize=16)
        progress = tqdm(
            *(results, "image files"),
            total=len(missing),
            leave=False,
            disable=len(missing) < FEW_FILES,
        )
        known.update(zip(missing, progress, strict=True))
    honoured = _orientation_is_honoured(images, known)
    for image in images:
        for kind, message in _problems(image, known[image.path], honoured):
            message = f"its file {quote_path(image.path)} {message}"
            found.add(kind, message, Place("images", image.number, image.image_id))


def _orientation_is_honoured(images: Iterable[ListedImage], facts: dict[str, ImageFacts]) -> bool:
    """Returns whether the tool that wrote the file showed images turned as their EXIF data says.

    Images turned by 90 degrees tell, by the size in their records; those turned by 180 degrees or
    mirrored do not.
    """
    honoured = [
        image.image_hw == facts[image.path].image_hw
        for image in images
        if image.image_hw is not None
        and facts[image.path].problem is None
        and facts[image.path].orientation in TURNED
        and facts[image.path].stored_hw[0] != facts[image.path].stored_hw[1]
    ]
    return bool(honoured) and all(honoured)


def _problems(image: ListedImage, facts: ImageFacts, honoured: bool) -> Iterable[Problem]:
    if facts.problem is not None:
        yield facts.problem
        return
    if facts.animated:
        yield "image-animated", "has several frames, of which detectron2 reads the first"
    if image.image_hw is None:
        return
    turned = f"EXIF orientation {facts.orientation}"
    stored, seen = (f"{width} x {height}" for height, width in (facts.stored_hw, facts.image_hw))
    listed = f"{image.image_hw[1]} x {image.image_hw[0]}"
    if image.image_hw != facts.image_hw:
        if image.image_hw == facts.stored_hw:
            yield (
                "exif-size",
                f"has {turned}: detectron2 turns it to {seen}, the record has {listed}",
            )
        elif image.image_hw == facts.image_hw[::-1]:
            yield "image-transposed", f"is {seen}, the record has {listed}"
        else:
            yield "image-size-mismatch", f"is {seen}, the record has {listed}"
    elif facts.orientation != 1 and facts.stored_hw == facts.image_hw and not honoured:
        # An error, not a warning: the wrong way round, all objects are trained on other pixels, and
        # nothing else will ever say so. Where images turned by 90 degrees show that the annotation
        # tool minds the tag, this one is right, too.
        yield (
            "exif-undecidable",
            f"of {stored} has {turned}: detectron2 turns it, and the size does not "
            "tell whether the annotations were made on the turned image",
        )
