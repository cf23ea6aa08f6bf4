"""Images and videos: found, told apart, read, and named so that results overwrite nothing.

Shape alphabet: H, W image height and width in pixels.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

from ..config import ConfigError
from ..evaluation.drawing import ByteArray

IMAGE_SUFFIXES = {
    *(".bmp", ".dib", ".gif", ".jpe", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
VIDEO_SUFFIXES = {
    *(".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm"),
    ".wmv",
}
# What OpenCV always writes. The overlay of another kind becomes a .png or an .mp4.
WRITTEN_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class Source:
    """An image or a video, and the name of its overlay in the output folder."""

    path: Path
    overlay: str
    is_video: bool


class UnreadableError(Exception):
    """An input that is damaged."""


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Returns the images and videos of --input, each once, with different names for overlays.

    Of a folder, files with an image's or a video's ending count, those of sub-folders not.

    Raises:
        ConfigError: if an input does not exist or holds nothing.
    """
    paths = {path.resolve(): path for given in inputs for path in _files_of(given)}
    sources, taken = [], set()
    for path in paths.values():
        is_video = _is_video(path)
        stem, number = path.stem, 1
        # Also of endings apart: semantic maps are all .png. And in small letters, for file systems
        # that do not tell them from large ones.
        while stem.lower() in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.lower())
        sources.append(Source(path, stem + _overlay_suffix(path, is_video), is_video))
    return sources


def read_bgr(path: Path) -> ByteArray:
    """Returns an image as (H, W, 3) BGR, turned as its EXIF says; grey and RGBA ones too.

    Raises:
        UnreadableError: if it cannot be decoded.
    """
    try:
        return np.ascontiguousarray(read_image(str(path), format="BGR"))
    except Exception as error:  # of a damaged file, decoders raise anything
        reason = " ".join(str(error).split())
        raise UnreadableError(f"cannot be read as an image or a video: {reason}") from error


def read_frames(path: Path) -> Iterator[tuple[ByteArray, float]]:
    """Yields the frames of a video as (H, W, 3) BGR, each with the frames per second.

    Raises:
        UnreadableError: if no frame can be decoded or, after those that can, if over a second is
            missing of what the header says: less may be the header's rounding.
    """
    video = _open_video(path)
    try:
        fps = video.get(cv2.CAP_PROP_FPS)
        fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else DEFAULT_FPS
        count, announced = 0, video.get(cv2.CAP_PROP_FRAME_COUNT)
        is_read, frame = video.read()
        while is_read:
            count += 1
            yield np.asarray(frame, np.uint8), fps
            is_read, frame = video.read()
    finally:
        video.release()
    if count == 0:
        raise UnreadableError("no frame of this video can be read")
    if count + fps < announced:
        raise UnreadableError(f"only {count} of about {announced:.0f} frames can be read")


def num_frames(source: Source) -> int:
    """Returns how many images a source has; of a video, what its header says."""
    if not source.is_video:
        return 1
    video = _open_video(source.path)
    try:
        return max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    finally:
        video.release()


def open_writer(path: Path, frame: ByteArray, fps: float) -> cv2.VideoWriter:
    """Opens a video for frames of the size of the given one.

    Raises:
        OSError: if OpenCV does not write such a video.
    """
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path), codec, fps, (frame.shape[1], frame.shape[0]))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}, a video of {frame.shape[1]} x {frame.shape[0]}")
    return writer


def _files_of(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        endings = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        files = sorted(x for x in path.iterdir() if x.suffix.lower() in endings and x.is_file())
        files = [x for x in files if not x.name.startswith(".")]
        if not files:
            raise ConfigError(
                f"--input: folder {path} holds no images or videos; of sub-folders give a pattern "
                f"such as '{path}/**/*.jpg'"
            )
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        raise ConfigError(f"--input: {given} does not exist (config keys go behind --opts)")
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # absolute patterns, too
    files = [x for x in map(Path, matches) if x.is_file()]
    if not files:
        raise ConfigError(f"--input: no file matches {given}")
    return files


def _is_video(path: Path) -> bool:
    """Returns whether OpenCV can open a file as a video, and it is no image."""
    if cv2.haveImageReader(str(path)) or path.suffix.lower() in IMAGE_SUFFIXES:
        return False
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return True
    video = _open_video(path)
    try:
        return bool(video.isOpened())
    finally:
        video.release()


def _overlay_suffix(path: Path, is_video: bool) -> str:
    """Returns the input's own ending where OpenCV writes such files, else .mp4 or .png."""
    suffix = path.suffix.lower()
    if is_video:
        return path.suffix if suffix in CODECS else ".mp4"
    return path.suffix if suffix in WRITTEN_IMAGES else ".png"


def _open_video(path: Path) -> cv2.VideoCapture:
    # What is wrong with a file is said once, by us.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    return cv2.VideoCapture(str(path))
