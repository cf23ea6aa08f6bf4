"""A warning is logged if the colour order of the config differs from that of the weights."""

from __future__ import annotations

import pickle

import pytest
import torch

from mask_head_plugin.checkpoint import MaskHeadCheckpointer, WeightsPolicy


@pytest.mark.parametrize(
    ("author", "input_format", "is_told"),
    [
        ("torchvision", "BGR", True),
        ("torchvision", "RGB", False),
        ("Caffe2", "RGB", True),
        ("Caffe2", "BGR", False),
        ("torchvision", "L", False),
        ("torchvision", "", False),
        ("somebody", "RGB", False),
    ],
)
def test_the_colour_order_of_a_file_follows_from_its_author(
    tmp_path, caplog, author, input_format, is_told
):
    model = torch.nn.Linear(2, 2)
    arrays = {name: x.detach().numpy() for name, x in model.named_parameters()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": author}))
    policy = WeightsPolicy(strict=False, input_format=input_format)
    MaskHeadCheckpointer(model, policy=policy).load(str(path))
    order = "RGB" if author == "torchvision" else "BGR"
    told = (
        f"{path} comes from {author} and was trained on {order}, but INPUT.FORMAT is {input_format}"
    )
    assert (told in caplog.text) == is_told
