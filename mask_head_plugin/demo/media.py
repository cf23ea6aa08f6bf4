"""Finds, identifies and reads images and videos, and chooses unique names for their results.

Shape alphabet: H, W image height and width in pixels.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from ..evaluation.drawing import ByteArray
from ..image_files import WHAT_TO_DO, ImageFileError, read_image
from ..messages import ConfigError

logger = logging.getLogger(__name__)

Kind = Literal["image", "video"]

# Includes formats that this module cannot read, so that such files are reported, not skipped.
IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".cr2", ".cr3", ".arw", ".dcm", ".dib", ".dng", ".exr", ".gif"),
    *(".hdr", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"),
    *(".jxl", ".nef", ".orf", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi"),
    *(".rw2", ".tga", ".tif", ".tiff", ".webp"),
}
VIDEO_SUFFIXES = {
    *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".m2ts"),
    *(".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogg"),
    *(".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
}
# First bytes of files. The suffix of a file decides only if its first bytes match neither pattern.
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0{4}|P[1-6]\s+[\d#]|II[*+]\0|MM\0[*+]"
    rb"|RIFF.{4}WEBP|.{4}ftyp(avi[fs]|he[iv][cxms]|mif1|msf1)|\0{3}\x0c(jP  |JXL )"
    rb"|\xff\x4f\xff\x51|\xff\x0a|8BPS|qoif|v/1\x01|.{128}DICM",
    re.DOTALL,
)
VIDEO_START = re.compile(
    rb"RIFF.{4}AVI |.{4}(ftyp|moov)|\x1aE\xdf\xa3|FLV\x01|\0\0\x01\xba|OggS|0&\xb2u|G.{187}G",
    re.DOTALL,
)
START_LENGTH = 189
# Formats that OpenCV can always write. Overlays of inputs in other formats are .png, .mp4 or .avi.
WRITTEN_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
DEFAULT_FPS = 25.0
STEADY = 1.5
"""Frames count as steady if the longest interval between them is at most this many times the
shortest one. The limit is above 1 because timestamps are rounded.
"""


@dataclass(frozen=True)
class Source:
    """An image or a video, and the name of its overlay in the output folder."""

    path: Path
    overlay: str
    is_video: bool


class LeftOutError(Exception):
    """An input has no result or only a partial one. The message is the reason."""


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Returns the images and videos of --input, without repetitions and with unique overlay names.

    In a folder, images and videos are recognised by their suffix or their first bytes. Subfolders
    are not searched.

    Raises:
        ConfigError: if an input does not exist or contains no images or videos.
    """
    paths = {path.resolve(): path for given in inputs for path in _files_of(given)}
    sources, taken = [], set()
    for path in paths.values():
        # An unrecognised file is treated as an image, so that reading it reports what is wrong.
        is_video = kind_of(path) == "video"
        stem, number = path.stem, 1
        # Names must be unique even without suffixes, because all semantic maps are .png, and in
        # lower case, because some file systems ignore case.
        while stem.lower() in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.lower())
        sources.append(Source(path, stem + _overlay_suffix(path, is_video), is_video))
    return sources


def kind_of(path: Path) -> Kind | None:
    """Returns the kind of a file according to its first bytes or, failing that, its suffix.

    Returns None if the kind is unknown.
    """
    with contextlib.suppress(OSError):
        if path.is_file():  # reading a pipe might never end
            with path.open("rb") as file:
                head = file.read(START_LENGTH)
            if IMAGE_START.match(head):
                return "image"
            if VIDEO_START.match(head):
                return "video"
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else None


def read_bgr(path: Path) -> ByteArray:
    """Reads an image with ``image_files`` and returns it as (H, W, 3) BGR.

    Raises:
        LeftOutError: if the image cannot be used; the message includes the advice of the data set
            check.
    """
    try:
        return np.ascontiguousarray(read_image(str(path), "BGR"))
    except ImageFileError as error:
        raise LeftOutError(f"{error.reason}; {WHAT_TO_DO[error.kind]}") from error


class Frames:
    """The frames of a video.

    Attributes:
        fps: frames per second according to the header, or DEFAULT_FPS if that is not valid.
        is_steady: whether all intervals between frames are about the same; True until all frames
            have been read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fps, self.is_steady = DEFAULT_FPS, True

    def __iter__(self) -> Iterator[ByteArray]:
        """Yields (H, W, 3) BGR frames.

        Raises:
            LeftOutError: if no frame can be decoded. Also after the last frame if the video is more
                than a second shorter than its header says; a smaller difference can be rounding.
        """
        video = _open_video(self._path)
        try:
            fps = video.get(cv2.CAP_PROP_FPS)
            self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else DEFAULT_FPS
            announced = video.get(cv2.CAP_PROP_FRAME_COUNT)
            times: list[float] = []
            is_read, frame = video.read()
            while is_read:
                times.append(video.get(cv2.CAP_PROP_POS_MSEC))
                yield np.asarray(frame, np.uint8)
                is_read, frame = video.read()
        finally:
            video.release()
        intervals = np.diff(times)
        self.is_steady = len(intervals) == 0 or intervals.max() <= STEADY * intervals.min()
        if not times:
            raise LeftOutError("no frame of this video can be read")
        if len(times) + self.fps < announced:
            raise LeftOutError(f"only {len(times)} of about {announced:.0f} frames can be read")


def num_frames(source: Source) -> int:
    """Returns the number of images in a source. For a video, this is the number in its header."""
    if not source.is_video:
        return 1
    video = _open_video(source.path)
    try:
        return max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    finally:
        video.release()


def open_writer(path: Path, frame: ByteArray, fps: float) -> cv2.VideoWriter:
    """Opens a video file for frames with the size of the given one.

    Raises:
        OSError: if OpenCV cannot write such a video.
    """
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
    height, width = frame.shape[:2]
    # FFmpeg, which OpenCV tries first, crops odd sizes.
    backend = cv2.CAP_OPENCV_MJPEG if _is_odd(width, height) else cv2.CAP_ANY
    writer = cv2.VideoWriter(str(path), backend, codec, fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}, a video of {width} x {height} pixels")
    return writer


def _files_of(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        visible = sorted(x for x in path.iterdir() if not x.name.startswith("."))
        # A broken link counts as a file, so that it is reported as unreadable.
        files = [x for x in visible if not x.is_dir() and kind_of(x) is not None]
        if not files:
            raise ConfigError(
                f"--input: folder {path} contains no images or videos; for subfolders, use a "
                f"pattern such as '{path}/**/*.jpg'"
            )
        if any(x.is_dir() for x in visible):
            logger.warning(
                "--input: subfolders of %s are skipped; to include them, use a pattern such as "
                "'%s/**/*.jpg'",
                path,
                path,
            )
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        raise ConfigError(
            f"--input: {given} does not exist; check the path (--input takes all arguments up to "
            "the next flag)"
        )
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # also absolute patterns
    files = [x for x in map(Path, matches) if x.is_file()]
    if not files:
        raise ConfigError(f"--input: no file matches {given}")
    return files


def _overlay_suffix(path: Path, is_video: bool) -> str:
    """Returns the input's suffix if OpenCV can write this format and size, or else another one."""
    suffix = path.suffix.lower()
    if not is_video:
        return path.suffix if suffix in WRITTEN_IMAGES else ".png"
    fitting = ".avi" if _has_odd_frames(path) else ".mp4"
    return path.suffix if suffix in (".avi", fitting) else fitting


def _has_odd_frames(path: Path) -> bool:
    video = _open_video(path)
    try:
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        return _is_odd(*(int(video.get(side)) for side in sides))
    finally:
        video.release()


def _is_odd(width: int, height: int) -> bool:
    return bool(width % 2 or height % 2)


def _open_video(path: Path) -> cv2.VideoCapture:
    # Silenced because this module reports problems with a file.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    # OpenCV 4.8 has one of these functions, OpenCV 5 the other.
    set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
    set_log_level(2)  # LOG_LEVEL_ERROR
    return cv2.VideoCapture(str(path))
