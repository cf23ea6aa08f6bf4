"""The weights fetched by tools/fetch_backbone.py recognise objects in photographs.

The test is skipped if the weights have not been fetched or the shared photographs are missing.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SHARED_DATA
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from mask_head_plugin.modeling.timm_model import pretrained_pixels

NAME = "tf_efficientnet_lite0"
WEIGHTS = ROOT / "backbones" / f"{NAME}.safetensors"
PHOTOS = SHARED_DATA / "coco_photos_train"
WORDS = {
    "banana": "banana",
    "broccoli": "broccoli",
    "laptop": "laptop",
    "microwave": "microwave",
    "parking meter": "parking meter",
    "pizza": "pizza",
    "refrigerator": "refrigerator",
    "teddy bear": "teddy",
    "toilet": "toilet",
}
"""For some categories of COCO, a word that ImageNet uses in its description of the class."""

LEAST_SIDE = 128  # pixels


def crops():
    """Yields categories and RGB crops (224, 224, 3) of large objects, with a margin."""
    content = json.loads((PHOTOS / "annotations.json").read_text())
    names = {x["id"]: x["name"] for x in content["categories"]}
    files = {x["id"]: x["file_name"] for x in content["images"]}
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        if names[record["category_id"]] in WORDS and min(width, height) >= LEAST_SIDE:
            half = max(width, height) * 0.55
            column, row = x + width / 2, y + height / 2
            box = (column - half, row - half, column + half, row + half)
            image = Image.open(PHOTOS / "images" / files[record["image_id"]]).convert("RGB")
            yield names[record["category_id"]], np.asarray(image.crop(box).resize((224, 224)))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs tools/fetch_backbone.py")
@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the shared photographs")
def test_the_fetched_weights_recognise_objects_in_photographs():
    model = timm.create_model(NAME).eval()
    model.load_state_dict(load_file(WEIGHTS))
    categories, images = zip(*crops(), strict=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in pretrained_pixels(NAME))
    batch = (torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2) - mean) / std
    with torch.no_grad():
        likeliest = model(batch).topk(5).indices.tolist()
    info = ImageNetInfo()
    named = [
        any(WORDS[category] in info.index_to_description(k).lower() for k in five)
        for category, five in zip(categories, likeliest, strict=True)
    ]
    assert len(named) >= 12 and np.mean(named) >= 0.75, list(zip(categories, named, strict=True))
