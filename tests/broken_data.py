"""A small valid data set and the ways to break it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from hypothesis import strategies as st
from PIL import Image

HW = (60, 80)
EXIF_ORIENTATION = 274
NAN, INFINITY = float("nan"), float("inf")

Content = dict[str, Any]

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@dataclass
class DataSet:
    """A data set on disk; ``write`` saves ``content`` as its annotation file."""

    folder: Path
    content: Content

    @property
    def json_file(self) -> Path:
        return self.folder / "annotations.json"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def write(self, text: str | bytes | None = None) -> DataSet:
        text = json.dumps(self.content) if text is None else text
        self.json_file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def image(self, image_id: int) -> dict[str, Any]:
        return next(x for x in self.content["images"] if x["id"] == image_id)

    def annotation(self, annotation_id: int) -> dict[str, Any]:
        return next(x for x in self.content["annotations"] if x["id"] == annotation_id)

    def path(self, image_id: int) -> Path:
        return self.images / self.image(image_id)["file_name"]


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def encode(x0: int, y0: int, x1: int, y1: int, hw: tuple[int, int] = HW) -> dict[str, Any]:
    mask = np.zeros(hw, np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return {"size": list(hw), "counts": mask_util.encode(mask)["counts"].decode()}


def make_good(folder: Path, seed: int = 0) -> DataSet:
    """Writes two JPEGs and two PNGs with five objects and one crowd, in two categories."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    content: Content = {"images": [], "annotations": [], "categories": []}
    for i, suffix in enumerate(("jpg", "png", "jpg", "png"), start=1):
        name = f"{i}.{suffix}"
        Image.fromarray(rng.integers(0, 255, (*HW, 3), np.uint8)).save(images / name)
        content["images"].append({"id": i, "file_name": name, "height": HW[0], "width": HW[1]})
    content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    for i, image_id, category_id, polygons, box, area in (
        (11, 1, 3, [rectangle(10, 10, 40, 30)], [10, 10, 30, 20], 600),
        (12, 1, 7, [rectangle(50, 5, 60, 15), rectangle(60, 20, 70, 35)], [50, 5, 20, 30], 250),
        (13, 2, 3, [rectangle(0, 0, 20.5, 30.25)], [0, 0, 20.5, 30.25], 620.125),
        (14, 3, 7, [[10.5, 10, 50, 20, 30, 50.75]], [10.5, 10, 39.5, 40.75], 707.3125),
        (15, 4, 3, [rectangle(60, 40, 80, 60)], [60, 40, 20, 20], 400),
    ):
        annotation = {"id": i, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
        annotation |= {"bbox": box, "area": area, "segmentation": polygons}
        content["annotations"].append(annotation)
    crowd = {"id": 16, "image_id": 2, "category_id": 7, "iscrowd": 1, "area": 1200}
    crowd |= {"bbox": [30, 20, 40, 30], "segmentation": encode(30, 20, 70, 50)}
    content["annotations"].append(crowd)
    return DataSet(folder, content).write()


Break = Callable[[DataSet], str | bytes | None]


@dataclass(frozen=True)
class Case:
    """A way to break the valid data set.

    Attributes:
        name: name of the case.
        kind: kind of the finding that must be reported.
        break_it: function that changes the data set; returns the text of the annotation file, or
            None to write the changed content as JSON.
        image_id: image id that the finding must name.
        annotation_id: annotation id that the finding must name.
        after_fix: "kept" or "left out", depending on whether a corrected copy still contains the
            record; "none" if no corrected copy can be made.
    """

    name: str
    kind: str
    break_it: Break
    image_id: Any = None
    annotation_id: Any = None
    after_fix: str = "kept"


CASES: list[Case] = []


def case(kind: str, *ids: Any, name: str = "", after_fix: str = "kept") -> Callable[[Break], Break]:
    """Registers the decorated function as a case.

    ``ids`` are the image id and the annotation id that the finding must name, if any.
    """

    def add(break_it: Break) -> Break:
        label = name or break_it.__name__.strip("_")
        CASES.append(Case(label, kind, break_it, *(*ids, None, None)[:2], after_fix))
        return break_it

    return add


def set_in_annotation(name: str, kind: str, key: str, value: Any, after_fix: str = "kept") -> None:
    """Registers a case in which annotation 13 of image 2 has an invalid value."""

    def break_it(data: DataSet) -> None:
        data.annotation(13)[key] = copy.deepcopy(value)

    ids = (value if key == "image_id" else 2, value if key == "id" else 13)
    CASES.append(Case(name, kind, break_it, *ids, after_fix))


def set_in_image(name: str, kind: str, key: str, value: Any, after_fix: str = "kept") -> None:
    """Registers a case in which image 2 has an invalid value."""

    def break_it(data: DataSet) -> None:
        data.image(2)[key] = value

    CASES.append(Case(name, kind, break_it, 2, None, after_fix))


def change_image_file(name: str, kind: str, change: Callable[[Path], Any], i: int = 1) -> None:
    """Registers a case in which an image file is changed."""

    def break_it(data: DataSet) -> None:
        change(data.path(i))

    CASES.append(Case(name, kind, break_it, i, None, "left out"))


# The file.


@case("json-empty", after_fix="none")
def file_is_empty(data):
    return b""


@case("json-empty", after_fix="none")
def file_is_blank(data):
    return "\n  \n"


@case("json-truncated", after_fix="none")
def file_is_truncated(data):
    text = json.dumps(data.content)
    return text[: len(text) // 2]


@case("json-truncated", after_fix="none")
def file_lacks_its_last_bracket(data):
    return json.dumps(data.content)[:-1]


@case("json-syntax", after_fix="none")
def file_has_an_extra_comma(data):
    return json.dumps(data.content, indent=1).replace('"images": [', '"images": [,')


@case("json-syntax", after_fix="none")
def file_is_nested_endlessly(data):
    return "[" * 200_000 + "}"


@case("json-syntax", after_fix="none")
def file_has_a_number_with_thousands_of_digits(data):
    return '{"images": ' + "9" * 5000 + "}"


@case("json-encoding")
def file_is_utf_16(data):
    return json.dumps(data.content).encode("utf-16")


@case("json-encoding")
def file_has_a_byte_order_mark(data):
    return json.dumps(data.content).encode("utf-8-sig")


@case("json-encoding", after_fix="none")
def file_is_latin_1(data):
    data.content["categories"][0]["name"] = "Tür"
    return json.dumps(data.content, ensure_ascii=False).encode("latin-1")


@case("json-not-object", after_fix="none")
def file_contains_a_list(data):
    return json.dumps(data.content["categories"])


@case("not-a-coco-file", after_fix="none")
def file_contains_only_annotations(data):
    return json.dumps(data.content["annotations"])


@case("git-lfs-pointer", after_fix="none")
def file_is_a_git_lfs_pointer(data):
    return LFS_POINTER


@case("missing-section", after_fix="none")
def section_is_missing(data):
    del data.content["annotations"]


@case("missing-section", after_fix="none")
def section_is_an_object(data):
    data.content["images"] = {str(x["id"]): x for x in data.content["images"]}


@case("no-images", after_fix="none")
def no_images(data):
    data.content |= {"images": [], "annotations": []}


@case("no-annotations", after_fix="none")
def no_annotations(data):
    data.content["annotations"] = []


@case("only-crowds", after_fix="none")
def all_annotations_are_crowds(data):
    data.content["annotations"] = [data.annotation(16)]


@case("no-categories", after_fix="none")
def no_categories(data):
    data.content["categories"] = []


# Categories.


@case("category-not-object")
def category_is_text(data):
    data.content["categories"].append("fox")


@case("category-missing-key", after_fix="none")
def category_has_no_name(data):
    del data.content["categories"][0]["name"]


@case("category-name", after_fix="none")
def category_name_is_empty(data):
    data.content["categories"][0]["name"] = " "


@case("category-name", after_fix="none")
def category_name_is_a_number(data):
    data.content["categories"][0]["name"] = 5


@case("category-name", after_fix="none")
def category_name_is_a_lone_surrogate(data):
    data.content["categories"][0]["name"] = "\ud800"


@case("duplicate-category-id", after_fix="none")
def two_categories_have_the_same_id(data):
    data.content["categories"].append({"id": 3, "name": "fox"})


@case("duplicate-category-id")
def category_is_listed_twice(data):
    data.content["categories"].append({"id": 3, "name": "cat"})


@case("duplicate-category-name")
def two_categories_have_the_same_name(data):
    data.content["categories"].append({"id": 9, "name": "cat"})
    data.annotation(13)["category_id"] = 9


@case("id-not-integer")
def category_ids_are_text(data):
    for category in data.content["categories"]:
        category["id"] = str(category["id"])
    for annotation in data.content["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])


# Images.


@case("image-not-object")
def image_is_null(data):
    data.content["images"].append(None)


@case("image-missing-key", after_fix="left out")
def image_has_no_id(data):
    del data.image(2)["id"]


@case("image-missing-key", 2)
def image_has_no_height(data):
    del data.image(2)["height"]


@case("image-missing-key", 2, after_fix="left out")
def image_has_no_file_name(data):
    del data.image(2)["file_name"]


@case("duplicate-image-id", 2, after_fix="left out")
def two_images_have_the_same_id(data):
    data.image(4)["id"] = 2


@case("duplicate-image-id", 2)
def image_is_listed_twice(data):
    data.content["images"].append(dict(data.image(2)))


def _image_id(data: DataSet, new: Any) -> None:
    for annotation in data.content["annotations"]:
        if annotation["image_id"] == 2:
            annotation["image_id"] = new
    data.image(2)["id"] = new


@case("id-not-integer", "'two'")
def image_id_is_text(data):
    _image_id(data, "two")


@case("id-not-integer", "2.0")
def image_id_is_a_float(data):
    _image_id(data, 2.0)


@case("id-not-integer", "True", after_fix="left out")
def image_id_is_a_bool(data):
    data.image(1)["id"] = 100
    data.image(2)["id"] = True


@case("id-too-large", 1 << 60)
def image_id_is_beyond_float64(data):
    _image_id(data, 1 << 60)


set_in_image("height is text", "image-size-invalid", "height", "60")
set_in_image("height is a float", "image-size-invalid", "height", 60.0)
set_in_image("height is zero", "image-size-invalid", "height", 0)
set_in_image("width is negative", "image-size-invalid", "width", -80)
set_in_image("width is NaN", "image-size-invalid", "width", NAN)
set_in_image("image beyond the pixel limit", "image-too-large", "width", 10**9, "left out")
set_in_image("height differs from the file's", "image-size-mismatch", "height", 61, "left out")
set_in_image("file name is a number", "file-name-invalid", "file_name", 2, "left out")
set_in_image("file name is empty", "file-name-invalid", "file_name", "", "left out")
set_in_image("file name has a null byte", "file-name-invalid", "file_name", "a\0b", "left out")
set_in_image(
    "file name is a lone surrogate", "file-name-invalid", "file_name", "\ud800", "left out"
)
set_in_image("file name is absolute", "file-name-outside", "file_name", "/etc/passwd", "left out")
set_in_image(
    "file name leads out of the folder",
    "file-name-outside",
    "file_name",
    "a/../../20.png",
    "left out",
)
set_in_image("file name leads back to a file", "image-file-elsewhere", "file_name", "a/../../2.png")
set_in_image("file name has an extra folder", "image-file-elsewhere", "file_name", "images/2.png")
set_in_image(
    "file name is a Windows path", "image-file-elsewhere", "file_name", "C:\\images\\2.png"
)
set_in_image("file name is in capitals", "image-file-elsewhere", "file_name", "2.PNG")
set_in_image("file is missing", "image-file-missing", "file_name", "20.png", "left out")


@case("image-file-elsewhere", 2)
def file_name_is_absolute_but_within(data):
    data.image(2)["file_name"] = str(data.path(2).absolute())


@case("image-transposed", 2, after_fix="left out")
def height_and_width_are_swapped(data):
    data.image(2).update(height=HW[1], width=HW[0])


@case("duplicate-file-name", 4)
def two_images_have_the_same_file(data):
    data.image(4)["file_name"] = "./2.png"


# Image files.


def _truncate(path: Path, bytes_left: int | None = None) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if bytes_left is None else bytes_left])


def _zero_end(path: Path) -> None:
    """Imitates an interrupted download into a file of the full size."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def _exif(orientation: int, hw: tuple[int, int] = HW) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        Image.new("RGB", hw[::-1], (9, 99, 200)).save(path, exif=exif)

    return change


def _without_pixels(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") - 4] + data[-12:])


def _deep(path: Path) -> None:
    Image.fromarray(np.full(HW, 4_000, np.uint16)).save(path, format="PNG")


def _line(path: Path) -> None:
    Image.new("RGB", (3000, 1)).save(path)


def _animate(path: Path) -> None:
    frames = [Image.new("RGB", HW[::-1], (k, 9, 9)) for k in (0, 200)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _bmp(path: Path) -> None:
    Image.new("RGB", HW[::-1]).save(path, format="BMP")
    _truncate(path)


change_image_file("jpeg is truncated", "image-truncated", _truncate)
change_image_file("jpeg ends in zeros", "image-truncated", _zero_end)
change_image_file("png is truncated", "image-truncated", _truncate, 2)
change_image_file("png lacks its last chunk", "image-truncated", lambda p: _truncate(p, 2000), 2)
change_image_file("png has no pixels", "image-truncated", _without_pixels, 2)
change_image_file("bmp is truncated", "image-truncated", _bmp)
change_image_file("image file has no bytes", "image-file-empty", lambda p: p.write_bytes(b""))
change_image_file(
    "image is a git lfs pointer", "git-lfs-pointer", lambda p: p.write_text(LFS_POINTER)
)
change_image_file("image is a text file", "image-unreadable", lambda p: p.write_text("<html>"))
change_image_file("image is a folder", "image-file-is-folder", _folder)
change_image_file("image has 12 of 16 bits", "image-depth", _deep)
change_image_file("image is a line", "image-elongated", _line)
change_image_file("exif turns by 90 degrees", "exif-size", _exif(6))
change_image_file("exif of a png turns by 90 degrees", "exif-size", _exif(6), 2)
change_image_file("exif turns by 180 degrees", "exif-undecidable", _exif(3))
change_image_file("exif of a png turns by 180 degrees", "exif-undecidable", _exif(3), 2)
change_image_file("exif mirrors", "exif-undecidable", _exif(2))


@case("image-animated", 1)
def image_is_animated(data):
    _animate(data.path(1))


@case("image-folder-missing", after_fix="none")
def image_folder_is_missing(data):
    data.images.rename(data.folder / "pictures")


# Annotations.


@case("annotation-not-object")
def annotation_is_a_number(data):
    data.content["annotations"].append(5)


for _key in ("image_id", "category_id", "segmentation"):
    set_in_annotation(f"no {_key}", "annotation-missing-key", _key, None, "left out")
for _key in ("id", "bbox", "area", "iscrowd"):
    set_in_annotation(f"no {_key}", "annotation-missing-key", _key, None)
set_in_annotation("two annotations have the same id", "duplicate-annotation-id", "id", 12)
set_in_annotation("annotation id is zero", "annotation-id-not-positive", "id", 0)
set_in_annotation("annotation id is negative", "annotation-id-not-positive", "id", -4)
CASES.append(
    Case(
        "annotation id is text",
        "id-not-integer",
        lambda data: data.annotation(13).update(id="13"),
        2,
        "'13'",
    )
)
set_in_annotation("annotation id is beyond float64", "id-too-large", "id", 1 << 53)
set_in_annotation("image is not listed", "unknown-image", "image_id", 99, "left out")
CASES.append(
    Case(
        "only this image id is text",
        "id-as-text",
        lambda data: data.annotation(13).update(image_id="2"),
        "'2'",
        13,
    )
)
set_in_annotation("category is not listed", "unknown-category", "category_id", 5, "left out")
set_in_annotation("only this category id is text", "id-as-text", "category_id", "3")
set_in_annotation("category id is a float", "id-not-integer", "category_id", 3.0)
set_in_annotation("iscrowd is 2", "iscrowd-invalid", "iscrowd", 2, "left out")
set_in_annotation("iscrowd is false", "iscrowd-invalid", "iscrowd", False)
set_in_annotation("iscrowd is text", "iscrowd-invalid", "iscrowd", "0")
set_in_annotation("area is NaN", "area-invalid", "area", NAN)
set_in_annotation("area is negative", "area-invalid", "area", -1)
set_in_annotation("area is text", "area-invalid", "area", "620")
set_in_annotation("annotation is marked ignored", "ignore-flag", "ignore", 1, "left out")

set_in_annotation("keypoints are text", "keypoints-invalid", "keypoints", "nose")
set_in_annotation("keypoints are null", "keypoints-invalid", "keypoints", [None] * 51)
set_in_annotation("keypoints lack a number", "keypoints-invalid", "keypoints", [5, 5])
set_in_annotation("keypoints are NaN", "keypoints-invalid", "keypoints", [NAN, 5, 2])
set_in_annotation("area is that of the unscaled image", "area-invalid", "area", 10 * HW[0] * HW[1])

# Boxes.
set_in_annotation("box is empty", "box-malformed", "bbox", [])
set_in_annotation("box has three numbers", "box-malformed", "bbox", [0, 0, 20])
set_in_annotation("box contains text", "box-malformed", "bbox", [0, 0, "20", 30])
set_in_annotation("box is NaN", "box-not-finite", "bbox", [0, 0, NAN, 30])
set_in_annotation("box is infinite", "box-not-finite", "bbox", [0, 0, INFINITY, 30])
set_in_annotation("box is a huge integer", "box-not-finite", "bbox", [0, 0, 10**400, 30])
set_in_annotation("box is negative", "box-negative", "bbox", [20, 30, -20, -30])
set_in_annotation("box is zero", "box-without-area", "bbox", [0, 0, 0, 30])
set_in_annotation("box leaves the image", "box-outside", "bbox", [0, 0, 20, 90])
set_in_annotation("box is in another place", "box-mismatch", "bbox", [40, 20, 20, 30])
set_in_annotation("box is larger by two pixels", "box-loose", "bbox", [0, 0, 22, 32])

# Masks.
set_in_annotation("mask is text", "segmentation-type", "segmentation", "mask.png", "left out")
set_in_annotation("mask is a number", "segmentation-type", "segmentation", 5, "left out")
set_in_annotation("mask is an empty list", "segmentation-empty", "segmentation", [], "left out")
set_in_annotation("mask is an empty object", "segmentation-empty", "segmentation", {}, "left out")
set_in_annotation(
    "polygon is not in a list", "polygons-not-nested", "segmentation", rectangle(0, 0, 20, 30)
)
set_in_annotation(
    "polygon of points", "polygon-of-points", "segmentation", [[[0, 0], [20, 0], [20, 30]]]
)
set_in_annotation("polygon is empty", "polygon-empty", "segmentation", [[]], "left out")
set_in_annotation(
    "one polygon is empty", "polygon-empty", "segmentation", [[], rectangle(0, 0, 20, 30)]
)
set_in_annotation(
    "polygon is odd", "polygon-odd", "segmentation", [[0, 0, 20, 0, 20, 30, 0]], "left out"
)
set_in_annotation(
    "one polygon is short",
    "polygon-short",
    "segmentation",
    [rectangle(0, 0, 20, 30), [1, 1, 2, 2]],
)
set_in_annotation(
    "polygon has text",
    "polygon-not-numbers",
    "segmentation",
    [["0", "0", "20", "0", "20", "30"]],
    "left out",
)
set_in_annotation(
    "polygon has null",
    "polygon-not-numbers",
    "segmentation",
    [[None, 0, 20, 0, 20, 30]],
    "left out",
)
set_in_annotation(
    "polygon is an object", "polygon-not-numbers", "segmentation", [{"x": 1}], "left out"
)
set_in_annotation(
    "polygon has NaN",
    "polygon-not-finite",
    "segmentation",
    [[NAN, 0, 20, 0, 20, 30]],
    "left out",
)
set_in_annotation(
    "polygon is infinite",
    "polygon-not-finite",
    "segmentation",
    [[0, 0, INFINITY, 0, 20, 30]],
    "left out",
)
set_in_annotation(
    "polygon leaves the image",
    "polygon-outside",
    "segmentation",
    [rectangle(-30, -40, 20.5, 30.25)],
)
set_in_annotation(
    "polygon is outside",
    "polygon-outside",
    "segmentation",
    [rectangle(100, 100, 120, 130)],
    "left out",
)
set_in_annotation(
    "polygon leaves the image by less than a pixel",
    "polygon-over-edge",
    "segmentation",
    [rectangle(-0.5, 0, 20.5, 30.25)],
)
set_in_annotation(
    "polygon is a line",
    "polygon-without-area",
    "segmentation",
    [[0, 0, 10, 15, 20, 30]],
    "left out",
)
set_in_annotation(
    "polygon is a horizontal line",
    "polygon-without-area",
    "segmentation",
    [[0, 5, 10, 5, 20, 5]],
    "left out",
)


@case("flat-object", 2, 13)
def box_and_polygon_are_flat(data):  # as in COCO 2017
    annotation = data.annotation(13)
    annotation.update(bbox=[10, 8, 1.03, 0.0], segmentation=[[10, 8, 11.03, 8, 11.03, 8]], area=0.0)


@case("mask-below-a-pixel", 2, 13)
def mask_is_below_a_pixel(data):
    speck = [10.1, 8.1, 10.3, 8.1, 10.3, 8.3]
    data.annotation(13).update(bbox=[10.1, 8.1, 0.2, 0.2], segmentation=[speck], area=0.02)


def _runs(name: str, kind: str, mask: Any, after_fix: str = "left out") -> None:
    """Registers a case in which annotation 13 has this mask and the box [0, 0, 20, 30]."""

    def break_it(data: DataSet) -> None:
        data.annotation(13).update(bbox=[0, 0, 20, 30], segmentation=copy.deepcopy(mask))

    CASES.append(Case(name, kind, break_it, 2, 13, after_fix))


_GOOD = encode(0, 0, 20, 30)
_COUNTS = _GOOD["counts"]
_PIXELS = HW[0] * HW[1]
_runs("run lengths without size", "rle-malformed", {"counts": _COUNTS})
_runs("run lengths without counts", "rle-malformed", {"size": list(HW)})
_runs("run lengths with three sizes", "rle-malformed", {**_GOOD, "size": [60, 80, 3]})
_runs("run lengths with float sizes", "rle-malformed", {**_GOOD, "size": [60.0, 80.0]})
_runs("run lengths are a number", "rle-malformed", {**_GOOD, "counts": 5})
_runs("run lengths of the transposed image", "rle-size", encode(0, 0, 20, 30, HW[::-1]))
_runs("run lengths of another image", "rle-size", encode(0, 0, 20, 30, (120, 160)))
_runs("a run is negative", "rle-counts", {**_GOOD, "counts": [10, -5, _PIXELS - 5]})
_runs("a run is a float", "rle-counts", {**_GOOD, "counts": [10.5, 5, _PIXELS - 15.5]})
_runs("a run is text", "rle-counts", {**_GOOD, "counts": ["10", 5, _PIXELS - 15]})
_runs("runs do not reach the end", "rle-sum", {**_GOOD, "counts": [10, 5]})
_runs("runs go beyond the end", "rle-sum", {**_GOOD, "counts": [10, 5, _PIXELS]})
_runs("the list of runs is empty", "rle-sum", {**_GOOD, "counts": []})
_runs("encoded runs are truncated", "rle-sum", {**_GOOD, "counts": _COUNTS[:3]})
_runs("encoded runs are truncated within a number", "rle-corrupt", {**_GOOD, "counts": _COUNTS[:4]})
_runs("encoded runs have a foreign character", "rle-corrupt", {**_GOOD, "counts": _COUNTS + "~"})
_runs("encoded runs have a non-ascii letter", "rle-corrupt", {**_GOOD, "counts": "ä" * 9})
_runs("encoded runs are empty", "rle-corrupt", {**_GOOD, "counts": ""})
_runs("encoded runs end in a number", "rle-corrupt", {**_GOOD, "counts": _COUNTS + "o"})
_runs("encoded runs have an endless number", "rle-corrupt", {**_GOOD, "counts": "o" * 5000 + "0"})
_runs("mask has no pixels", "empty-mask", {**_GOOD, "counts": [_PIXELS]})
_runs("encoded mask has no pixels", "empty-mask", encode(0, 0, 0, 0))
_runs("box does not fit the run lengths", "box-mismatch", encode(40, 30, 60, 55), "kept")


@case("mixed-formats")
def masks_have_both_formats(data):
    data.annotation(13).update(bbox=[0, 0, 20, 30], segmentation=_GOOD)


@case("crowd-polygon", 2, 13)
def crowd_is_a_polygon(data):
    data.annotation(13)["iscrowd"] = 1


# Faults of the whole file.


def many_objects(data):
    """Replaces all objects of the data set with twelve new ones; returns the new ones."""
    for number in range(12):
        x0, y0 = 5 + number, 5 + number
        annotation = {"id": 100 + number, "image_id": 1, "category_id": 3 + 4 * (number % 2)}
        annotation |= {"iscrowd": 0, "bbox": [x0, y0, 20, 20], "area": 400}
        annotation["segmentation"] = [rectangle(x0, y0, x0 + 20, y0 + 20)]
        data.content["annotations"].append(annotation)
    data.content["annotations"] = data.content["annotations"][-12:]
    return data.content["annotations"]


@case("normalised-coordinates", after_fix="none")
def boxes_and_polygons_are_fractions_of_the_image(data):
    for annotation in many_objects(data):
        annotation["bbox"] = [x / 80 for x in annotation["bbox"]]
        annotation["segmentation"] = [[x / 80 for x in annotation["segmentation"][0]]]


@case("normalised-coordinates", after_fix="none")
def only_polygons_are_fractions_of_the_image(data):
    for annotation in many_objects(data):
        annotation["segmentation"] = [[x / 80 for x in annotation["segmentation"][0]]]


@case("normalised-coordinates")
def only_boxes_are_fractions_of_the_image(data):
    for annotation in many_objects(data):
        annotation["bbox"] = [x / 80 for x in annotation["bbox"]]


@case("category-ids-shifted", after_fix="none")
def annotations_count_categories_from_0(data):
    for category, i in zip(data.content["categories"], (1, 2), strict=True):
        category["id"] = i
    for annotation in data.content["annotations"]:
        annotation["category_id"] = {3: 0, 7: 1}[annotation["category_id"]]


@case("repeated-annotation")
def objects_were_exported_twice(data):
    data.content["annotations"] += [{**x, "id": x["id"] + 100} for x in data.content["annotations"]]


@case("background-category")
def background_is_annotated(data):
    data.content["categories"][1]["name"] = "__background__"


@case("unused-category")
def category_is_not_used(data):
    data.content["categories"].append({"id": 0, "name": "_background_"})


# Mutations.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([NAN, INFINITY, -INFINITY, 1e308, -1e308, 10**400, 1 << 53, 0.0, -0.0]),
    st.floats(-200, 200),
    st.text(max_size=4),
    st.sampled_from(["1.jpg", "2.png", "0", "11", "3"]),
    st.lists(st.integers(-5, 90), max_size=8),
    st.lists(st.lists(st.floats(-100, 200), max_size=8), max_size=3),
    st.sampled_from([encode(0, 0, 20, 30), encode(0, 0, 0, 0), {}, {"size": [60, 80]}]),
    st.builds(lambda x: {"size": list(HW), "counts": x}, st.text(max_size=8)),
    st.builds(
        lambda x: {"size": list(HW), "counts": x}, st.lists(st.integers(-1, 5000), max_size=4)
    ),
)


def containers(value):
    """Returns ``value``, parsed from JSON, and all objects and lists nested in it."""
    children = value.values() if isinstance(value, dict) else value
    below = [x for child in children if isinstance(child, dict | list) for x in containers(child)]
    return [value, *below]


def mutate(content: Content, draw: Callable[[Any], Any]) -> Content:
    """Returns a copy with one to three values at random places replaced or removed.

    Args:
        content: content of an annotation file.
        draw: the ``draw`` method of hypothesis' ``data()``.
    """
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(containers(content)))
        if not place:
            continue
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if draw(st.integers(0, 3)) == 0:
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(VALUES))
    return content
