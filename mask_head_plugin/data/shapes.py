"""The embedded data set: shapes that boxes cannot distinguish, generated on first use.

Its five classes have thin parts, holes and notches, and overlap each other on a textured
background: ring (a hole), star (spikes), cross (thin arms), crescent (a concave side) and arrow (a
thin shaft). Occluded objects keep only their visible pixels, so masks may have several parts.

The data are the same on every machine, byte for byte. Geometry, textures and rasterisation use only
integers. Random numbers come from ``numpy.random.RandomState``, which NumPy's compatibility policy
keeps unchanged. Masks are COCO RLE. PNGs contain stored (uncompressed) blocks, because compressors
differ between zlib builds.

Layout under ``$DETECTRON2_DATASETS`` (default ``datasets/``)::

    shapes_v1/annotations/{train,val}.json      COCO instances format, RLE masks
    shapes_v1/{train,val}/000001.png ...        128 x 96 RGB, 8 bit

Shape alphabet: H, W image height and width in pixels; E polygon edges; S = 4 subsamples per side.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from detectron2.data.datasets import load_coco_json

from ..progress import progress
from ..shared_names import register_dataset
from .coco_files import datasets_root

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

FOLDER = "shapes_v1"
"""Must be renamed whenever the data change, because an existing folder is used unchecked."""
IMAGE_HW = (96, 128)
NUM_IMAGES = {"train": 1600, "val": 200}
SPLIT_SEEDS = {"train": 1703, "val": 6870}
CLASS_NAMES = ("ring", "star", "cross", "crescent", "arrow")

S = 4
UNIT = 1 << 12
"""Outlines lie in the square [-UNIT, UNIT]."""
TURN = 720
"""Number of angle steps in a full turn; each is half a degree."""
# This coarse table is the same with every libm, because no sine is close to a rounding tie.
SINE = np.array([round(UNIT * math.sin(2 * math.pi * k / TURN)) for k in range(TURN)], np.int64)

MAX_TILT = 40
"""Largest rotation of a shape in either direction, in units of 1/TURN."""
MIN_VISIBLE_PIXELS = 60
MIN_VISIBLE_PERCENT = 50


def arc(radius: int, start: int, stop: int, step: int, centre_x: int = 0) -> IntArray:
    """Returns (n, 2) points on a circle from angle ``start`` to ``stop`` (inclusive), in 1/TURN."""
    angles = np.arange(start, stop + (1 if step > 0 else -1), step)
    x = centre_x + radius * SINE[(angles + TURN // 4) % TURN] // UNIT
    return np.stack([x, radius * SINE[angles % TURN] // UNIT], axis=1)


def outline(name: str) -> list[IntArray]:
    """Returns the contours of a class in [-UNIT, UNIT]; holes follow from the even-odd rule."""
    if name == "ring":
        return [arc(UNIT, 0, TURN - 1, 15), arc(UNIT * 56 // 100, 0, TURN - 1, 15)]
    if name == "star":
        tips = arc(UNIT, 0, TURN - 1, TURN // 5)
        notches = arc(UNIT * 40 // 100, TURN // 10, TURN + TURN // 10 - 1, TURN // 5)
        return [np.stack([tips, notches], axis=1).reshape(-1, 2)]
    if name == "cross":
        w, e = UNIT * 26 // 100, UNIT
        corners = [(e, -w), (e, w), (w, w), (w, e), (-w, e), (-w, w)]
        return [np.array(corners + [(-x, -y) for x, y in corners])]
    if name == "crescent":
        # A disk of radius 1 minus a disk of radius 0.8 centred at 0.45. The circles intersect at
        # 51.3 degrees on the outer circle and 77.4 degrees on the inner circle.
        outer = arc(UNIT, 103, 617, 15)
        inner = arc(UNIT * 80 // 100, 565, 155, -15, centre_x=UNIT * 45 // 100)
        return [np.concatenate([outer, inner])]
    if name == "arrow":
        w, neck, head = UNIT * 20 // 100, UNIT * 10 // 100, UNIT * 70 // 100
        half = [(-UNIT, w), (neck, w), (neck, head)]
        return [np.array([*half, (UNIT, 0), *[(x, -y) for x, y in reversed(half)]])]
    raise AssertionError(name)


def place(
    contours: list[IntArray], radius: int, squash: int, angle: int, centre: IntArray
) -> list[IntArray]:
    """Scales, squashes along y (in percent), rotates and moves contours, to units of 1/64 pixel."""
    sine, cosine = SINE[angle % TURN], SINE[(angle + TURN // 4) % TURN]
    placed = []
    for points in contours:
        x = points[:, 0] * radius // UNIT
        y = points[:, 1] * radius * squash // (UNIT * 100)
        turned = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1) // UNIT
        placed.append(turned + centre)
    return placed


def rasterize(contours: list[IntArray], image_hw: tuple[int, int]) -> IntArray:
    """Returns (H, W) coverage: how many of each pixel's S x S sample points lie inside.

    Uses the even-odd rule: in each row that an edge crosses, it toggles all samples to the right of
    the crossing. Contours are in units of 1/64 pixel. Sample k of an axis lies at
    (k + 1/2) * 64 / S.
    """
    height, width = image_hw[0] * S, image_hw[1] * S
    pitch = 64 // S
    toggles = np.zeros((height, width + 1), np.int8)
    rows = np.arange(height)
    y = rows * pitch + pitch // 2
    for points in contours:
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            crossed = (y >= y0) & (y < y1)
            # The exact first sample at or to the right of x0 + (y - y0) (x1 - x0) / (y1 - y0).
            rise = pitch * (y1 - y0)
            run = (x0 - pitch // 2) * (y1 - y0) + (y[crossed] - y0) * (x1 - x0)
            columns = np.clip(-(-run // max(rise, 1)), 0, width)
            toggles[rows[crossed], columns] ^= 1  # an edge crosses a row at most once
    inside = np.bitwise_xor.accumulate(toggles, axis=1)[:, :width]
    return inside.reshape(image_hw[0], S, image_hw[1], S).sum(axis=(1, 3), dtype=np.int64)


def texture(
    rng: np.random.RandomState, image_hw: tuple[int, int], cell: int, swing: int
) -> IntArray:
    """Returns (H, W, 3) noise in [-swing, swing]: a bilinearly interpolated random lattice."""
    height, width = image_hw
    lattice = rng.randint(-swing, swing + 1, size=(height // cell + 2, width // cell + 2, 3))
    y, x = np.divmod(np.arange(height), cell), np.divmod(np.arange(width), cell)
    top = lattice[y[0]] * (cell - y[1])[:, None, None] + lattice[y[0] + 1] * y[1][:, None, None]
    fx = x[1][None, :, None]
    return (top[:, x[0]] * (cell - fx) + top[:, x[0] + 1] * fx) // (cell * cell)


def draw_image(
    rng: np.random.RandomState,
) -> tuple[ByteArray, list[tuple[int, npt.NDArray[np.bool_]]]]:
    """Returns an (H, W, 3) RGB image and its objects: (class index, (H, W) visible mask)."""
    height, width = IMAGE_HW
    background = rng.randint(40, 216, size=3)
    image = background + texture(rng, IMAGE_HW, 16, 20) + texture(rng, IMAGE_HW, 4, 10)
    owner = np.full(IMAGE_HW, -1)
    classes: list[int] = []
    full_areas: list[int] = []
    for index in range(rng.randint(1, 4)):
        class_index = rng.randint(len(CLASS_NAMES))
        radius = rng.randint(16 * 64, 30 * 64)
        centre = np.array(
            [rng.randint(8 * 64, (width - 8) * 64), rng.randint(8 * 64, (height - 8) * 64)]
        )
        contours = outline(CLASS_NAMES[class_index])
        angle = rng.randint(-MAX_TILT, MAX_TILT + 1)
        contours = place(contours, radius, rng.randint(75, 101), angle, centre)
        coverage = rasterize(contours, IMAGE_HW)
        colour = rng.randint(20, 236, size=3)
        if np.abs(colour - background).sum() < 170:
            colour = (background + 128) % 256
        paint = colour + texture(rng, IMAGE_HW, 8, 20)
        alpha = coverage[:, :, None]
        image = (image * (S * S - alpha) + paint * alpha) // (S * S)
        inside = coverage * 2 >= S * S
        owner[inside] = index
        classes.append(class_index)
        full_areas.append(int(inside.sum()))
    image = np.clip(image + rng.randint(-6, 7, size=image.shape), 0, 255).astype(np.uint8)
    instances = []
    for index, class_index in enumerate(classes):
        visible = owner == index
        area = int(visible.sum())
        if area >= MIN_VISIBLE_PIXELS and area * 100 >= MIN_VISIBLE_PERCENT * full_areas[index]:
            instances.append((class_index, visible))
    return image, instances


def encode_png(image: ByteArray) -> bytes:
    """Encodes an (H, W, 3) RGB image as a PNG of stored blocks, without a compressor."""
    height, width, _ = image.shape
    raw = np.concatenate(
        [np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1
    ).tobytes()
    blocks = [raw[start : start + 65535] for start in range(0, len(raw), 65535)]
    stream = b"\x78\x01"  # zlib header of level 0; each stored block: last?, length, ~length, bytes
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        stream += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + checksum
    return png


def coco_annotation(
    annotation_id: int, image_id: int, class_index: int, mask: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Returns the COCO record of one object."""
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x0, y0 = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": class_index + 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x0, y0, int(columns[-1]) + 1 - x0, int(rows[-1]) + 1 - y0],
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }


def write_split(folder: Path, split: str, num_images: int) -> None:
    """Writes ``num_images`` images of a split and their annotations below ``folder``."""
    rng = np.random.RandomState(SPLIT_SEEDS[split])
    height, width = IMAGE_HW
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True)
    for image_id in progress(range(1, num_images + 1), f"drawing shapes_{split}", "image"):
        image, instances = draw_image(rng)
        name = f"{image_id:06d}.png"
        (folder / split / name).write_bytes(encode_png(image))
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for class_index, mask in instances:
            annotations.append(coco_annotation(len(annotations) + 1, image_id, class_index, mask))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    text = json.dumps(content, separators=(",", ":"))
    (folder / "annotations" / f"{split}.json").write_text(text)


def ensure_shapes(folder: Path, split: str) -> None:
    """Generates a split of the data set in ``folder`` unless it exists.

    The split is written under a temporary name and then renamed, annotations last, so that an
    interrupted run leaves nothing that looks complete. Several processes can do this at once,
    because they write the same bytes.
    """
    annotations = Path("annotations") / f"{split}.json"
    if (folder / annotations).is_file():
        return
    logger = logging.getLogger(__name__)
    logger.info("drawing the %d images of shapes_%s (once)", NUM_IMAGES[split], split)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        write_split(unfinished, split, NUM_IMAGES[split])
        try:
            (unfinished / split).rename(folder / split)
        except OSError:  # another process has already written the images
            if not (folder / split).is_dir():
                raise
        (unfinished / annotations).replace(folder / annotations)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("shapes_%s is in %s", split, folder)


def load_shapes(folder: Path, split: str) -> list[dict[str, Any]]:
    """Returns a split in detectron2's standard format; generates it on first use."""
    ensure_shapes(folder, split)
    annotations = str(folder / "annotations" / f"{split}.json")
    return load_coco_json(annotations, str(folder / split), f"shapes_{split}")


def register_shapes() -> None:
    """Registers ``shapes_train`` and ``shapes_val`` in detectron2's catalogs.

    A user's data set with one of these names takes precedence, whether it is registered earlier or
    later.
    """
    folder = datasets_root() / FOLDER
    for split in NUM_IMAGES:
        register_dataset(
            f"shapes_{split}",
            functools.partial(load_shapes, folder, split),
            json_file=str(folder / "annotations" / f"{split}.json"),
            image_root=str(folder / split),
            evaluator_type="coco",
            made_on_first_use=True,
            thing_classes=list(CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASS_NAMES))},
        )
