"""Check, training, evaluation and demo get the same pixels from every kind of image file."""

from __future__ import annotations

import copy
import itertools
import json
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, small_config
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image, features

from mask_head_plugin import ConfigError
from mask_head_plugin.dataset_check import CheckOptions, check_coco_file
from mask_head_plugin.demo import demo
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.predictor import BGRPredictor
from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.image_files import ImageFileError, read_image

HW = (40, 60)
EXIF_ORIENTATION = 274
FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")

rng = np.random.default_rng(0)
GREY = rng.integers(40, 161, HW).astype(np.uint8)
GREY[0, 0] = 255
COLOUR = np.dstack([GREY, np.roll(GREY, 7), 255 - GREY])  # RGB
SMOOTH = np.dstack([np.tile(np.linspace(k, 160 + k, HW[1]), (HW[0], 1)) for k in (0, 40, 80)])
SMOOTH = SMOOTH.astype(np.uint8)
AS_STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}
"""Maps an EXIF orientation to a function that turns upright pixels into the stored ones."""


def cv_image(values):
    """Returns a function that saves an image with OpenCV, which can write 16 bits and floats."""
    values = values[..., [2, 1, 0, *range(3, values.shape[2])]] if values.ndim == 3 else values

    def save(path):
        assert cv2.imwrite(str(path), values)

    return save


def pil_image(values, mode=None, **options):
    def save(path):
        image = values if isinstance(values, Image.Image) else Image.fromarray(values)
        (image.convert(mode) if mode else image).save(path, **options)

    return save


def turned(orientation, **options):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](SMOOTH))
    return pil_image(stored, exif=exif, **options)


def raw(content):
    return lambda path: path.write_bytes(content)


def damaged_png(path):
    pil_image(COLOUR)(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)


def png_with_exif_last(orientation):
    """Returns a function that writes a PNG with its EXIF data after the pixels, as PNG allows."""

    def save(path):
        pil_image(np.ascontiguousarray(AS_STORED[orientation](SMOOTH)))(path)
        body = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 3, 1, orientation) + bytes(4)
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body
        chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
        data = path.read_bytes()
        path.write_bytes(data[:-12] + chunk + data[-12:])

    return save


def zero_ended_jpeg(path):
    pil_image(COLOUR)(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def rgb(grey):
    return np.dstack([grey] * 3)


def deep(values, factor):
    return values.astype(np.uint16) * factor


OPAQUE = np.full((*HW, 1), 65535, np.uint16)
BITS = np.where(GREY > 100, 255, 0).astype(np.uint8)
PALETTE = Image.fromarray(SMOOTH).quantize(16)
FLOATS = Image.fromarray(GREY.astype(np.float32) / 255)

# Maps a file name to the function that writes the file and to the file's RGB pixels. For a file
# that cannot be read, the kind of finding replaces the pixels.
FILES = {
    "8 bits.png": (pil_image(COLOUR), COLOUR),
    "8 bits grey.png": (pil_image(GREY), rgb(GREY)),
    "8 bits.jpg": (pil_image(SMOOTH, quality=95), SMOOTH),
    "8 bits grey.jpg": (pil_image(SMOOTH[..., 0], quality=95), rgb(SMOOTH[..., 0])),
    "8 bits.bmp": (pil_image(COLOUR), COLOUR),
    "8 bits.webp": (pil_image(COLOUR, lossless=True), COLOUR),
    "8 bits.tif": (pil_image(COLOUR), COLOUR),
    "white is zero.tif": (pil_image(255 - GREY, tiffinfo={262: 0}), rgb(255 - GREY)),
    "16 bits grey.png": (cv_image(deep(GREY, 257)), rgb(GREY)),
    "16 bits grey.tif": (cv_image(deep(GREY, 257)), rgb(GREY)),
    "16 bits grey.pgm": (cv_image(deep(GREY, 257)), rgb(GREY)),
    "16 bits grey.jp2": (cv_image(deep(SMOOTH[..., 0], 257)), rgb(SMOOTH[..., 0])),
    "16 bits.jp2": (cv_image(deep(SMOOTH, 257)), SMOOTH),
    "16 bits.png": (cv_image(deep(COLOUR, 257)), COLOUR),
    "16 bits.tif": (cv_image(deep(COLOUR, 257)), COLOUR),
    "16 bits.ppm": (cv_image(deep(COLOUR, 257)), COLOUR),
    "16 bits alpha.png": (cv_image(np.dstack([deep(COLOUR, 257), OPAQUE])), COLOUR),
    "16 bits white is zero.tif": (
        pil_image(deep(GREY, 257), tiffinfo={262: 0}),
        rgb(255 - GREY),
    ),
    "12 of 16 bits grey.png": (cv_image(deep(GREY, 16)), "image-depth"),
    "12 of 16 bits grey.tif": (cv_image(deep(GREY, 16)), "image-depth"),
    "12 of 16 bits grey.pgm": (cv_image(deep(GREY, 16)), "image-depth"),
    "12 of 16 bits grey.jp2": (cv_image(deep(GREY, 16)), "image-depth"),
    "12 of 16 bits.png": (cv_image(deep(COLOUR, 16)), "image-depth"),
    "12 of 16 bits.tif": (cv_image(deep(COLOUR, 16)), "image-depth"),
    "12 of 16 bits.ppm": (cv_image(deep(COLOUR, 16)), "image-depth"),
    "12 of 16 bits.jp2": (cv_image(deep(COLOUR, 16)), "image-depth"),
    "12 of 16 bits alpha.png": (cv_image(np.dstack([deep(COLOUR, 16), OPAQUE])), "image-depth"),
    "12 of 16 bits alpha.tif": (cv_image(np.dstack([deep(COLOUR, 16), OPAQUE])), "image-depth"),
    "14 of 16 bits grey.png": (cv_image(deep(GREY, 64)), "image-depth"),
    "12 bits of 4095.pgm": (
        raw(b"P5 60 40 4095\n" + (deep(GREY, 16) + GREY // 16).astype(">u2").tobytes()),
        rgb(GREY),
    ),
    "float.tif": (pil_image(FLOATS), "image-depth"),
    "float colour.tif": (cv_image(COLOUR.astype(np.float32) / 255), "image-unreadable"),
    "double.tif": (cv_image(GREY.astype(np.float64)), "image-unreadable"),
    "32 bits.tif": (pil_image(GREY.astype(np.int32)), "image-depth"),
    "1 bit.png": (pil_image(BITS, "1"), rgb(BITS)),
    "1 bit.tif": (pil_image(BITS, "1", compression="group4"), rgb(BITS)),
    "palette.png": (pil_image(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette 4 bits.png": (pil_image(PALETTE, bits=4), np.asarray(PALETTE.convert("RGB"))),
    "palette transparent.png": (
        pil_image(PALETTE, transparency=3),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "palette.gif": (pil_image(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette.tif": (pil_image(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "alpha.png": (pil_image(np.dstack([COLOUR, 255 - GREY])), COLOUR),
    "alpha grey.png": (pil_image(np.dstack([GREY, 255 - GREY])), rgb(GREY)),
    "cmyk.jpg": (pil_image(SMOOTH, "CMYK", quality=95), SMOOTH),
    "cmyk.tif": (pil_image(COLOUR, "CMYK"), COLOUR),
    "pages.tif": (
        pil_image(COLOUR, save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        COLOUR,
    ),
    "frames.gif": (
        pil_image(GREY, save_all=True, append_images=[Image.fromarray(255 - GREY)]),
        rgb(GREY),
    ),
    "frames.png": (
        pil_image(COLOUR, save_all=True, append_images=[Image.fromarray(255 - COLOUR)]),
        COLOUR,
    ),
    **{f"turn {k}.{end}": (turned(k, **how), SMOOTH) for k, (end, how) in itertools.product(
        range(2, 9),
        (("jpg", {"quality": 95}), ("png", {}), ("tif", {}), ("webp", {"lossless": True})),
    )},
    "turn 6 deflated.tif": (turned(6, compression="tiff_adobe_deflate"), SMOOTH),
    "turn 8 exif last.png": (png_with_exif_last(8), SMOOTH),
    "200 to 1.png": (pil_image(np.full((200, 1), 9, np.uint8)), np.full((200, 1, 3), 9, np.uint8)),
    "1 x 3000.png": (pil_image(np.full((3000, 1), 9, np.uint8)), "image-elongated"),
    "3000 x 1.jpg": (pil_image(np.full((1, 3000), 9, np.uint8)), "image-elongated"),
    "1 x 1.png": (pil_image(np.full((1, 1), 9, np.uint8)), np.full((1, 1, 3), 9, np.uint8)),
    "damaged.png": (damaged_png, "image-truncated"),
    "zeros.jpg": (zero_ended_jpeg, "image-truncated"),
    "text.png": (raw(b"no image"), "image-unreadable"),
    "pointer.jpg": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs-pointer"),
    "no bytes.jpg": (raw(b""), "image-file-empty"),
    "photo.heic": (raw(b"\0\0\0\x18ftypheic" + bytes(40)), "image-unreadable"),
}  # fmt: skip
if int(PIL.__version__.split(".")[0]) >= 13:  # Pillow 12 cannot read such files
    FILES["ycbcr.tif"] = (pil_image(SMOOTH, "YCbCr"), SMOOTH)
if features.check("avif"):
    FILES["8 bits.avif"] = (pil_image(SMOOTH, quality=95), SMOOTH)
    FILES["turn 6.avif"] = (turned(6, quality=95), SMOOTH)
GOOD = {name: pixels for name, (_, pixels) in FILES.items() if not isinstance(pixels, str)}
BAD = {name: kind for name, (_, kind) in FILES.items() if isinstance(kind, str)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes all FILES, and ``all.json``, which lists each image with its upright size."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "images").mkdir()
    images, annotations = [], []
    for i, (name, (save, pixels)) in enumerate(FILES.items(), 1):
        save(folder / "images" / name)
        height, width = HW if isinstance(pixels, str) else pixels.shape[:2]
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        box = [0, 0, width, height]
        corners = [0, 0, width, 0, width, height, 0, height]
        annotations.append({
            "id": i, "image_id": i, "category_id": 1, "bbox": box, "segmentation": [corners],
            "area": width * height, "iscrowd": 0,
        })  # fmt: skip
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "all.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def check_kinds(folder):
    """Returns the kinds of the errors that the check reports, by file name."""
    names = list(FILES)
    found = check_coco_file(str(folder / "all.json"), str(folder / "images"), CheckOptions())
    kinds = {name: set() for name in names}
    for finding in found:
        if finding.image_id is not None and finding.severity == "error":
            kinds[names[finding.image_id - 1]].add(finding.kind)
            assert "\n" not in str(finding) and names[finding.image_id - 1] in str(finding)
    return kinds


def records(folder, names):
    images = {x["file_name"]: x for x in json.loads((folder / "all.json").read_text())["images"]}
    return [
        {
            "file_name": str(folder / "images" / name),
            "image_id": images[name]["id"],
            **{key: images[name][key] for key in ("height", "width")},
            "annotations": [],
        }
        for name in names
    ]


def of_channels(image_format):
    ones = repr([1.0] * (1 if image_format == "L" else 3))
    return ["INPUT.FORMAT", image_format, "MODEL.PIXEL_MEAN", ones, "MODEL.PIXEL_STD", ones]


@pytest.fixture
def loaders(folder):
    """Yields a function that builds the Trainer's two loaders for some files, without resizing."""
    name = "kinds_of_image"

    def make(names, image_format):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        DatasetCatalog.register(name, lambda: records(folder, names))
        cfg = small_config(
            "Base-Small.yaml",
            "DATASETS.TRAIN",
            repr((name,)),
            "SOLVER.IMS_PER_BATCH",
            "1",
            "INPUT.MIN_SIZE_TRAIN",
            "(0,)",
            "INPUT.MIN_SIZE_TEST",
            "0",
            "INPUT.RANDOM_FLIP",
            "none",
            "DATALOADER.ASPECT_RATIO_GROUPING",
            "False",
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
            "False",
            *of_channels(image_format),
        )
        return Trainer.build_train_loader(cfg), Trainer.build_test_loader(cfg, name)

    yield make
    DatasetCatalog.remove(name)


def by_name(batches):
    return {Path(x["file_name"]).name: x["image"].numpy() for (x,) in batches}


def expected(name, image_format):
    """Computes the (C, H, W) image independently of the package."""
    pixels = GOOD[name]
    if image_format == "YUV-BT.601":
        weights = [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
        return np.einsum("hwc,kc->khw", pixels / 255, np.array(weights))
    if image_format == "L":
        return (pixels @ np.array([0.299, 0.587, 0.114]))[None]
    return (pixels[..., ::-1] if image_format == "BGR" else pixels).transpose(2, 0, 1)


def assert_right(name, image, image_format):
    right = expected(name, image_format).astype(float)
    assert image.shape == right.shape, name
    unit = 1 / 255 if image_format.startswith("YUV") else 1
    lossy = name.endswith((".jpg", ".avif", ".jp2")) or name.startswith("ycbcr")
    most = 8 if lossy else 0 if image_format in ("BGR", "RGB") else 1
    assert np.abs(image - right).max() <= most * unit + 1e-6, name


def seen_by_demo(folder, image_format, monkeypatch, output):
    """Returns the images that the demo passes to the model, by file name, and the demo's errors."""
    seen = []

    def model(inputs):
        seen.append(inputs[0]["image"].numpy())
        instances = Instances((inputs[0]["height"], inputs[0]["width"]))
        instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        instances.pred_classes = torch.zeros(0, dtype=torch.long)
        return [{"instances": instances}]

    def stub(cfg):
        cfg.MODEL.WEIGHTS = ""
        predictor = BGRPredictor(cfg)
        predictor.metadata, predictor.model = Metadata(), model
        return predictor

    monkeypatch.setattr(demo, "load_predictor", stub)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(CHECKPOINT), *of_channels(image_format)]
    problems = demo.run_demo(
        str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"), opts, [str(folder / "images")], output
    )
    content = json.loads((output / "predictions.json").read_text())
    names = [Path(x["file_name"]).name for x in content["images"]]
    return dict(zip(names, seen, strict=True)), problems


def test_the_check_accepts_readable_files_and_reports_the_others(check_kinds):
    turned_by_180 = {name for name in GOOD if name.startswith(("turn 2", "turn 3", "turn 4"))}
    undecided = {name: kinds for name, kinds in check_kinds.items() if name in turned_by_180}
    assert all(kinds <= {"exif-undecidable"} for kinds in undecided.values())
    others = {name: kinds for name, kinds in check_kinds.items() if name not in turned_by_180}
    assert others == {name: {BAD[name]} if name in BAD else set() for name in others}


@pytest.mark.parametrize("image_format", FORMATS)
def test_training_evaluation_and_demo_see_the_same_pixels(
    folder, loaders, image_format, monkeypatch, tmp_path
):
    train, test = loaders(list(GOOD), image_format)
    in_training = by_name(itertools.islice(train, len(GOOD)))
    in_evaluation = by_name(test)
    in_demo, problems = seen_by_demo(folder, image_format, monkeypatch, tmp_path)
    assert set(in_training) == set(in_evaluation) == set(in_demo) == set(GOOD)
    for name in GOOD:
        assert_right(name, in_training[name], image_format)
        assert np.array_equal(in_training[name], in_evaluation[name]), name
        assert np.array_equal(in_training[name], in_demo[name]), name
    assert len(problems) == len(BAD) and all("\n" not in line for line in problems)
    assert {Path(line.partition(": ")[0]).name for line in problems} == set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_training_and_evaluation_name_an_unreadable_file(folder, loaders, name):
    for loader in loaders([name], "BGR"):
        with pytest.raises(ConfigError, match=re.escape(str(folder / "images" / name))) as caught:
            next(iter(loader))
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageFileError) as refused:
        read_image(str(folder / "images" / name), "BGR")
    assert refused.value.kind == BAD[name] and refused.value.reason in str(caught.value)


def test_the_error_names_a_missing_file():
    with pytest.raises(ImageFileError, match=r"nowhere\.png does not exist"):
        read_image("nowhere.png", "RGB")


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("image_format", FORMATS)
def test_plain_files_give_the_same_samples_as_detectron2s_mapper(folder, is_train, image_format):
    cfg = small_config("Base-MaskRCNN-FPN.yaml", *of_channels(image_format))
    (record,) = records(folder, ["8 bits.png"])
    corners = [5.0, 5, 50, 5, 50, 30, 5, 30]
    record["annotations"] = [
        {"bbox": [5, 5, 50, 30], "bbox_mode": 0, "category_id": 0, "segmentation": [corners]}
    ]
    record["sem_seg_file_name"] = str(folder / "images" / "8 bits grey.png")
    record["proposal_boxes"] = np.array([[1.0, 2, 30, 20]])
    record["proposal_objectness_logits"] = np.array([0.5])
    record["proposal_bbox_mode"] = 0
    given = copy.deepcopy(record)
    results = []
    for kind in (DatasetMapper, ImageFileMapper):
        mapper = kind(cfg, is_train)
        mapper.proposal_topk = 5
        np.random.seed(7)
        results.append(mapper(record))
    assert repr(record) == repr(given)
    stock, ours = results
    assert stock.keys() == ours.keys()
    is_float = image_format == "YUV-BT.601"
    assert ours["image"].dtype == (torch.float32 if is_float else torch.uint8)
    # detectron2 returns float64, which its models cannot process.
    torch.testing.assert_close(
        ours["image"], stock["image"], check_dtype=False, rtol=0, atol=1e-5 if is_float else 0
    )
    assert torch.equal(stock["sem_seg"], ours["sem_seg"])
    assert torch.equal(
        stock["proposals"].proposal_boxes.tensor, ours["proposals"].proposal_boxes.tensor
    )
    if is_train:
        assert torch.equal(stock["instances"].gt_boxes.tensor, ours["instances"].gt_boxes.tensor)
        assert torch.equal(stock["instances"].gt_masks.tensor, ours["instances"].gt_masks.tensor)
