"""Draws instances into pictures: tinted masks, outlines and labels.

This module does not use detectron2's Visualizer, which fills holes and thereby hides outlines.
Colours have the channel order of the caller's picture.

Shape alphabet: H, W height and width of the picture in pixels; N instances.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

ByteArray = npt.NDArray[np.uint8]
Colour = npt.NDArray[Any]
"""Three numbers from 0 to 255."""
Rectangle = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels; x1 and y1 are exclusive."""

MASK_OPACITY = 0.45
FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN_RATIO = 0.618034
CLASS_COLOURS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
"""Okabe and Ito's colours in RGB, which colour-blind readers can tell apart."""
MOST_HIDDEN = 0.1
"""Largest share of an instance's box that a label may cover."""


@dataclass(frozen=True)
class LabelStyle:
    """Style of a label: font scale, line width (also the unit of margins) and text colour."""

    scale: float
    thickness: int = 1
    ink: Sequence[float] = (255, 255, 255)

    def extent(self, text: str) -> tuple[int, int, int]:
        """Returns the label's width, and its heights above and below the baseline of the text."""
        (width, height), _ = cv2.getTextSize(text, FONT, self.scale, self.thickness)
        return width + 4 * self.thickness, height + 4 * self.thickness, 3 * self.thickness


def in_grey(image: ByteArray) -> ByteArray:
    """Returns an (H, W, 3) RGB image in grey, so that only the drawings are coloured."""
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def scaled(image: ByteArray, scale: float) -> ByteArray:
    """Returns an (H, W, 3) image resized by ``scale``, with sides of at least one pixel."""
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)


def tint_mask(
    canvas: ByteArray,
    image: ByteArray,
    mask: ByteArray,
    colour: Colour,
    outline: Sequence[float],
    thickness: int = 1,
) -> None:
    """Tints and outlines the pixels of a mask in place. Holes are not tinted.

    Mixes the tint with the original image instead of the canvas. Otherwise, the mixed colours of
    overlapping masks could look like the colours of other classes.

    Args:
        canvas: (H, W, 3) picture to draw into.
        image: (H, W, 3) original image without masks.
        mask: (H, W) with values 0 and 1.
        colour: colour of the tint.
        outline: colour of the outline.
        thickness: width of the outline in pixels.
    """
    inside = mask > 0
    tinted = image[inside] * (1 - MASK_OPACITY) + colour * MASK_OPACITY
    canvas[inside] = tinted.astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, outline, thickness, cv2.LINE_AA)


def write_label(canvas: ByteArray, text: str, x: int, y: int, style: LabelStyle) -> None:
    """Writes text on a black background, in place. Moves it if it would not fit on the canvas.

    Args:
        canvas: (H, W, 3) picture to draw into.
        text: text of the label. OpenCV draws non-ASCII characters as question marks.
        x: left edge of the label.
        y: baseline of the text.
        style: style of the label.
    """
    width, above, below = style.extent(text)
    unit = style.thickness
    x, y = min(x, max(canvas.shape[1] - width, 0)), max(y, above)
    cv2.rectangle(canvas, (x, y - above), (x + width, y + below), (0, 0, 0), cv2.FILLED)
    place = (x + 2 * unit, y)
    cv2.putText(canvas, text, place, FONT, style.scale, style.ink, unit, cv2.LINE_AA)


def instance_colour(number: int) -> Colour:
    """Returns a bright colour for a number. Nearby numbers get very different colours."""
    hue = (0.45 + number * GOLDEN_RATIO) % 1
    # More than eight hues look similar, so saturation or brightness changes every eight numbers.
    saturation, value = ((0.8, 1.0), (0.45, 1.0), (0.95, 0.75))[number // 8 % 3]
    return np.array([round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value)])


def class_colour(class_index: int) -> Colour:
    """Returns an RGB colour for a class, different from the colours of nearby classes."""
    if class_index < len(CLASS_COLOURS):
        return np.array(CLASS_COLOURS[class_index])
    return instance_colour(class_index)


def draw_instances(
    image: ByteArray,
    labels: Sequence[str],
    colours: Sequence[Colour],
    boxes: npt.NDArray[Any],
    rles: Sequence[Mapping[str, Any]] | None,
) -> ByteArray:
    """Returns a copy of an image with instances drawn into it. Decodes one mask at a time.

    Lines and letters are larger on larger images. Large instances are drawn first, so they do not
    hide small ones. A label is placed above, inside or below its instance. If it would hide an
    earlier label or much of an instance in all of these places, it is left out, because hundreds of
    labels would cover small instances.

    Args:
        image: (H, W, 3) image.
        labels: N labels, starting with the most important instance.
        colours: N colours.
        boxes: (N, 4) XYXY in pixels.
        rles: run lengths of N masks of the image's size; if None, boxes are drawn instead.
    """
    canvas = np.ascontiguousarray(image).copy()
    scale, thickness = _line_size(image.shape[0], image.shape[1])
    places = [_pixels_of(box, rle) for box, rle in _pairs(boxes, rles)]
    areas = [_shared(place, place) for place in places]
    for i in sorted(range(len(labels)), key=lambda i: -areas[i]):
        outline = [float(x) for x in colours[i]]
        if rles is not None:
            _tint_rle(canvas, image, rles[i], places[i], colours[i], thickness)
        else:
            x0, y0, x1, y1 = places[i]
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), outline, 2 * thickness)
    styles = [LabelStyle(scale, thickness, _light(colour)) for colour in colours]
    write_labels(canvas, labels, places, styles)  # last, so that no mask covers a label
    return canvas


def write_labels(
    canvas: ByteArray,
    labels: Sequence[str],
    places: Sequence[Rectangle],
    styles: Sequence[LabelStyle],
) -> None:
    """Writes the labels that fit into a picture, in place; see draw_instances.

    Args:
        canvas: (H, W, 3) picture to draw into.
        labels: N labels, starting with the most important instance.
        places: bounding rectangles of the N instances; an empty rectangle gets no label.
        styles: N styles; a label that would be larger than the canvas gets smaller letters.
    """
    labelled: list[Rectangle] = []
    for text, place, style in zip(labels, places, styles, strict=True):
        fitting = _fitting_style(text, style, canvas)
        for spot in _label_spots(text, place, fitting, canvas) if _shared(place, place) else ():
            if not any(_shared(spot, x) for x in labelled) and not _hides_any(spot, places):
                write_label(canvas, text, spot[0], spot[1] + fitting.extent(text)[1], fitting)
                labelled.append(spot)
                break


def _pairs(
    boxes: npt.NDArray[Any], rles: Sequence[Mapping[str, Any]] | None
) -> Iterator[tuple[Any, Mapping[str, Any] | None]]:
    return zip(boxes, rles if rles is not None else [None] * len(boxes), strict=True)


def _line_size(height: int, width: int) -> tuple[float, int]:
    """Returns the font scale and the line thickness for an image."""
    scale = max((height * width) ** 0.5 / 1500, 0.35)
    return scale, max(round(1.5 * scale), 1)


def _pixels_of(box: npt.NDArray[Any], rle: Mapping[str, Any] | None) -> Rectangle:
    """Returns the rectangle around a mask or, if there is no mask, around a box.

    The rectangle is empty if the mask is empty.
    """
    if rle is not None:
        x, y, width, height = (int(v) for v in coco_mask.toBbox(rle))
        return x, y, x + width, y + height
    low, high = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _tint_rle(
    canvas: ByteArray,
    image: ByteArray,
    rle: Mapping[str, Any],
    place: Rectangle,
    colour: Colour,
    thickness: int,
) -> None:
    x0, y0, x1, y1 = place
    # Processes only the part of the picture around the mask, with room for the outline.
    x0, y0 = max(x0 - thickness, 0), max(y0 - thickness, 0)
    part = np.s_[y0 : y1 + thickness, x0 : x1 + thickness]
    mask = np.ascontiguousarray(coco_mask.decode(rle)[part])
    outline = [float(x) for x in colour]
    tint_mask(canvas[part], image[part], mask, colour, outline, thickness)


def _light(colour: Colour) -> list[float]:
    return [float(x) for x in colour * 0.6 + 255 * 0.4]


def _fitting_style(text: str, style: LabelStyle, canvas: ByteArray) -> LabelStyle:
    """Returns the style, with smaller letters if the label would be larger than the canvas."""
    width, above, below = style.extent(text)
    room = min(canvas.shape[1] / (width + 1), canvas.shape[0] / (above + below + 1))
    return style if room >= 1 else LabelStyle(style.scale * room * 0.9, 1, style.ink)


def _label_spots(
    text: str, place: Rectangle, style: LabelStyle, canvas: ByteArray
) -> Iterator[Rectangle]:
    """Yields places for a label, best first: above the instance, inside at its top, below it.

    Yields nothing if the canvas is too small for the label.
    """
    width, above, below = style.extent(text)
    if width >= canvas.shape[1] or above + below >= canvas.shape[0]:
        return
    for y in (place[1] - below - 1, place[1] + above, place[3] + above):
        middle = (place[0] + place[2] - width) // 2
        left = max(min(middle, canvas.shape[1] - 1 - width), 0)
        line = max(min(y, canvas.shape[0] - 1 - below), above)
        yield left, line - above, left + width + 1, line + below + 1


def _hides_any(spot: Rectangle, places: Sequence[Rectangle]) -> bool:
    """Returns whether a label covers much of an instance's box."""
    return any(_shared(spot, place) > MOST_HIDDEN * _shared(place, place) for place in places)


def _shared(a: Rectangle, b: Rectangle) -> int:
    """Returns the number of pixels that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
