"""Checks whether image files can be used and have the sizes recorded in the annotation file.

Files are not decoded if their structure shows that they are complete: a JPEG must end with its end
marker, and the chunks of a PNG must reach IEND with correct checksums. All other files are decoded.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from typing import IO, Any, NamedTuple

from PIL import Image

from ..image_files import JPEG_END, QUARTER_TURNS, ImageFileError, open_image, orientation_of
from ..progress import progress
from .findings import Findings, Place, quote_path

TEXT_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
THREADS = 8

Problem = tuple[str, str]
"""Kind and message of a finding."""


class ListedImage(NamedTuple):
    """An image in the annotation file.

    Attributes:
        number: index of the record.
        image_id: id of the image.
        path: path of the file.
        image_hw: size in the record; None if it has none.
    """

    number: int
    image_id: Any
    path: str
    image_hw: tuple[int, int] | None


class ImageFacts(NamedTuple):
    """Facts about an image file.

    Attributes:
        problem: the fault that makes the file unusable; None if it can be used.
        stored_hw: size of the stored pixels, before the EXIF orientation is applied.
        orientation: EXIF orientation; 1 if there is none.
        animated: whether the file has several frames.
    """

    problem: Problem | None = None
    stored_hw: tuple[int, int] = (0, 0)
    orientation: int = 1
    animated: bool = False

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the image as training, evaluation and the demo read it."""
        height, width = self.stored_hw
        return (width, height) if self.orientation in QUARTER_TURNS else (height, width)


def inspect_image(path: str, *, decode: bool = False) -> ImageFacts:
    """Reads a file in the same way as training, and returns facts about it.

    Args:
        path: path of the file.
        decode: whether to read all pixels, which also finds damage in the middle of a JPEG.
    """
    try:
        with open_image(path) as opened:
            image, is_png = opened.image, opened.image.format == "PNG"
            stored_hw, animated = opened.stored_hw, opened.is_animated
            # Must be read before Pillow rotates a TIFF and removes the tag.
            orientation = 1 if is_png else orientation_of(image.getexif)
            if decode or opened.needs_decoding or not _looks_whole(image, opened.file):
                opened.pixels()
            if is_png:  # image.getexif() would decode the file to find text after the pixels
                orientation = orientation_of(lambda: Image.Image.getexif(image))
    except ImageFileError as error:
        return ImageFacts((error.kind, error.reason))
    return ImageFacts(None, stored_hw, orientation, animated)


def _looks_whole(image: Image.Image, file: IO[bytes]) -> bool:
    """Returns whether a file ends as its format requires; False if this is unknown.

    Returns False for a PNG with text after its pixels, because the text may be EXIF data.
    """
    if image.format == "JPEG":
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - 64, 0))
        return file.read().rstrip(b"\0\r\n ").endswith(JPEG_END)
    if image.format != "PNG":
        return False
    kinds = list(_png_chunks(file))
    if not {b"IDAT", b"IEND"} <= set(kinds):
        return False
    return not any(kind in TEXT_CHUNKS for kind in kinds[kinds.index(b"IDAT") :])


def _png_chunks(file: IO[bytes]) -> Iterable[bytes]:
    """Yields the types of a PNG's chunks, up to the first truncated or damaged chunk."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body, checksum = file.read(length), file.read(4)
        if len(checksum) < 4 or zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(
            checksum, "big"
        ):
            return
        yield kind


def check_image_files(
    images: Sequence[ListedImage],
    found: Findings,
    *,
    decode: bool = False,
    known: dict[str, ImageFacts] | None = None,
) -> None:
    """Adds findings for files that cannot be used, or whose size differs from that in the record.

    Args:
        images: images in the annotation file.
        found: list to which findings are added.
        decode: whether to decode all files.
        known: facts by path. Its files are not read again; facts about other files are added.
    """
    known = {} if known is None else known
    missing = [image.path for image in images if image.path not in known]
    with ThreadPool(THREADS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and unusual EXIF data
        results = pool.imap(lambda path: inspect_image(path, decode=decode), missing, chunksize=16)
        told = progress(results, "reading image files", "file", len(missing))
        known.update(zip(missing, told, strict=True))
    honoured = _orientation_is_honoured(images, known)
    for image in images:
        for kind, message in _problems(image, known[image.path], honoured):
            message = f"its file {quote_path(image.path)} {message}"
            found.add(kind, message, Place("images", image.number, image.image_id))


def _orientation_is_honoured(images: Iterable[ListedImage], facts: dict[str, ImageFacts]) -> bool:
    """Returns whether the annotation tool displayed images according to their EXIF orientation.

    The recorded sizes of images rotated by 90 degrees reveal this; those of images rotated by 180
    degrees or mirrored do not.
    """
    honoured = [
        image.image_hw == facts[image.path].image_hw
        for image in images
        if image.image_hw is not None
        and facts[image.path].problem is None
        and facts[image.path].orientation in QUARTER_TURNS
        and facts[image.path].stored_hw[0] != facts[image.path].stored_hw[1]
    ]
    return bool(honoured) and all(honoured)


def _problems(image: ListedImage, facts: ImageFacts, honoured: bool) -> Iterable[Problem]:
    if facts.problem is not None:
        yield facts.problem
        return
    if facts.animated:
        yield "image-animated", "has several pages or frames; only the first is read"
    if image.image_hw is None:
        return
    turned = f"EXIF orientation {facts.orientation}"
    stored, seen = (f"{width} x {height}" for height, width in (facts.stored_hw, facts.image_hw))
    listed = f"{image.image_hw[1]} x {image.image_hw[0]}"
    if image.image_hw != facts.image_hw:
        if image.image_hw == facts.stored_hw:
            yield (
                "exif-size",
                f"has {turned}: it is read as {seen}, but the record has {listed}",
            )
        elif image.image_hw == facts.image_hw[::-1]:
            yield "image-transposed", f"is {seen}, but the record has {listed}"
        else:
            yield "image-size-mismatch", f"is {seen}, but the record has {listed}"
    elif facts.orientation != 1 and facts.stored_hw == facts.image_hw and not honoured:
        # An error, not a warning: if the orientation is wrong, the model is trained on wrong pixels
        # for all objects of the image, and nothing else would reveal it. If images rotated by 90
        # degrees show that the annotation tool respects the tag, this image is right as well.
        yield (
            "exif-undecidable",
            f"of {stored} has {turned}: it is read with this orientation, but its size does not "
            "show whether the annotations were made on the rotated image",
        )
