"""Prepares pictures for pages: data URIs, resized masks and CSS colours.

Shape alphabet: H, W height and width of a picture in pixels.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from ..evaluation.drawing import ByteArray

JPEG_QUALITY = 88
MOST_BYTES = 2_300_000
"""Largest total size of the data URIs in an ablation's report.

Keeps the report, which includes plotly.js (4.8 MB), below 8 MB.
"""


@dataclass(frozen=True)
class Picture:
    """A drawn image: its title, a note below the title, and the JPEG as a data URI."""

    title: str
    note: str
    uri: str


def data_uri(picture: ByteArray) -> str:
    """Returns an (H, W, 3) RGB picture as the data URI of a JPEG.

    Raises:
        OSError: if OpenCV cannot encode it.
    """
    bgr = np.ascontiguousarray(picture[:, :, ::-1])
    written, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not written:
        raise OSError(f"could not encode a picture of {picture.shape}")
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def resized_mask(rle: Mapping[str, Any], size: tuple[int, int]) -> Any:
    """Returns the run lengths of a mask resized to ``size``, (W, H)."""
    mask = cv2.resize(coco_mask.decode(rle), size, interpolation=cv2.INTER_NEAREST)
    return coco_mask.encode(np.asfortranarray(mask))


def css_colour(colour: npt.NDArray[Any]) -> str:
    return "#" + "".join(f"{int(x):02x}" for x in colour)
