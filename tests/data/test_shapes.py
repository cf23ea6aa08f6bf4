"""The embedded data set: identical bytes on every machine, and the properties of its objects."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mask_head_plugin.data import shapes

# SHA-256 of the first 8 images of val and their annotations when they were first generated.
DIGEST = "2b16a8e187b9cb010bb30e88105b3f1d711ce4fb5843465bf83b9fe21ef8f9ee"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "val", 8)
    return folder, json.loads((folder / "annotations" / "val.json").read_text())


def test_every_byte_is_the_same_on_every_machine(split):
    folder, _ = split
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == DIGEST


def test_pillow_reads_the_png_files(split):
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (97, 301, 3)).astype(np.uint8)  # needs several stored blocks
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shapes.encode_png(image)))), image)


def test_annotations_agree_with_their_masks(split):
    _, content = split
    assert len(content["images"]) == 8 and len(content["annotations"]) > 8
    for annotation in content["annotations"]:
        mask = mask_util.decode(annotation["segmentation"])
        assert mask.shape == shapes.IMAGE_HW
        assert mask.sum() == annotation["area"] >= shapes.MIN_VISIBLE_PIXELS
        assert mask_util.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_objects_of_an_image_do_not_overlap():
    rng = np.random.RandomState(5)
    for _ in range(5):
        _, instances = shapes.draw_image(rng)
        assert (
            sum((mask.astype(int) for _, mask in instances), np.zeros(shapes.IMAGE_HW)).max() <= 1
        )


def test_rings_have_holes_and_all_outlines_fill_their_square():
    for name in shapes.CLASS_NAMES:
        contours = shapes.place(shapes.outline(name), 40 * 64, 100, 0, np.array([48 * 64, 48 * 64]))
        inside = shapes.rasterize(contours, (96, 96)) > 8
        # The crescent's centre lies 0.35 radii inside its bite.
        assert inside[48, 48] == (name not in ("ring", "crescent"))
        columns = np.flatnonzero(inside.any(axis=0))
        assert columns[0] <= 16 and columns[-1] >= (60 if name == "crescent" else 84), name


def even_odd(x: int, y: int, contours) -> bool:
    """Tests one point by the even-odd rule, in exact integers."""
    inside = False
    for points in contours:
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            if (y0 <= y) != (y1 <= y):
                side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
                # Each edge that contains the point or lies to its left flips the result.
                inside ^= side >= 0 if y1 > y0 else side <= 0
    return inside


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(-99, 600), st.integers(-99, 600)), min_size=3, max_size=7),
        min_size=1,
        max_size=2,
    )
)
def test_rasterisation_equals_testing_every_sample_point(polygons):
    coverage = shapes.rasterize([np.array(p) for p in polygons], (7, 8))
    pitch = 64 // shapes.S
    expected = np.zeros((7, 8), int)
    for row in range(7 * shapes.S):
        for column in range(8 * shapes.S):
            point = (column * pitch + pitch // 2, row * pitch + pitch // 2)
            expected[row // shapes.S, column // shapes.S] += even_odd(*point, polygons)
    assert np.array_equal(coverage, expected)


def test_all_classes_occur():
    rng = np.random.RandomState(1)
    drawn = [shapes.draw_image(rng)[1] for _ in range(40)]
    classes = {index for instances in drawn for index, _ in instances}
    assert classes == set(range(len(shapes.CLASS_NAMES)))


def test_an_interrupted_run_leaves_no_files_that_look_finished(tmp_path, monkeypatch):
    folder = tmp_path / "shapes_v9"
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"val": 3, "train": 3})
    file = folder / "annotations" / "val.json"

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(shapes, "coco_annotation", fail)
        with pytest.raises(KeyboardInterrupt):
            shapes.ensure_shapes(folder, "val")
    assert [p.name for p in tmp_path.rglob("*")] == ["shapes_v9", "annotations"]
    with monkeypatch.context() as broken:  # stops after the images, before the annotations
        broken.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            shapes.ensure_shapes(folder, "val")
    assert not file.exists()
    shapes.ensure_shapes(folder, "val")
    before = file.stat().st_mtime_ns
    shapes.ensure_shapes(folder, "val")
    assert file.stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["shapes_v9"]


def test_only_the_used_split_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"val": 2, "train": 1})
    assert len(shapes.load_shapes(tmp_path / "shapes", "val")) == 2
    assert {x.name for x in (tmp_path / "shapes").iterdir()} == {"annotations", "val"}
    assert len(shapes.load_shapes(tmp_path / "shapes", "train")) == 1
