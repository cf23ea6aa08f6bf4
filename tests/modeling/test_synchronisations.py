"""Counts operators that make a training step or inference wait for the GPU, by calling file.

These tests count on the CPU. They replace the two operators that exist only on CUDA: RoI pooling in
one kernel and torchvision's crop of bit masks. Neither of these waits. ``make gpu`` counts on a
GPU.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_twins, copy_instances, small_config
from detectron2.utils.events import EventStorage
from made_training import make_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.modeling.pooler import boxes_to_rois
from mask_head_plugin.ops import mask_target

WAITING_OPERATORS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
WAITING_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu}

ON_CPU_ALONE = {"detectron2/layers/mask_ops.py"}
"""Files of detectron2 that are not counted, because they wait more often on the CPU than on CUDA.

Masks are pasted one by one on the CPU, but in chunks on CUDA.
"""


MASK_TARGET = "mask_head_plugin/ops/mask_target.py"
RUN_LENGTHS = "mask_head_plugin/ops/mask_rle.py"


class Waits(TorchDispatchMode):
    """Counts synchronising calls by file."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: collections.Counter[str] = collections.Counter()
        self.methods = WaitingMethods(self)

    def __enter__(self):
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _waits(func.overloadpacket.__name__, args, kwargs or {}):
            self.note()
        return func(*args, **kwargs or {})

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            parts = Path(frame.f_code.co_filename).parts
            for package in ("mask_head_plugin", "detectron2", "torchvision"):
                if package in parts:
                    start = len(parts) - 1 - parts[::-1].index(package)
                    self.by_file["/".join(parts[start:])] += 1
                    return
            frame = frame.f_back
        self.by_file["elsewhere"] += 1


class WaitingMethods(TorchFunctionMode):
    """Counts calls of methods that read a tensor's memory without running an operator."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITING_METHODS:
            self.waits.note()
        return func(*args, **kwargs or {})


def _waits(name, args, kwargs) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in WAITING_OPERATORS


@pytest.fixture
def as_on_cuda(monkeypatch):
    def forward(self, features, box_lists):
        rois, levels = boxes_to_rois(box_lists), self._assign_levels(box_lists)
        rois, _ = self._quantize(rois, levels)
        zeros = sum(x.sum() for x in features) * 0 + rois.sum() * 0
        return zeros.expand(len(rois), features[0].shape[1], *self.output_size)

    monkeypatch.setattr(MultiLevelRoIPooler, "forward", forward)
    # Coordinates are checked only on the CPU. The check is not replaced and is counted below.
    monkeypatch.setattr(mask_target, "_crop_by_sums", mask_target._crop_with_operator)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("base", ["Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml"])
def test_the_plugin_synchronises_no_more_often_than_detectron2(base):
    limits = "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"
    plugin, stock = build_twins(small_config(base, *limits))
    batch = make_batch(mask_format="bitmask")
    counts = {}
    for name, model in (("plugin", plugin), ("stock", stock)):
        copies = [{**x, "instances": copy_instances([x["instances"]])[0]} for x in batch]
        with EventStorage(1), Waits() as training:
            sum(model.train()(copies).values()).backward()
        with torch.no_grad(), Waits() as inference:
            model.eval()(batch)
        counts[name] = training.by_file, inference.by_file

    for ours, stocks in zip(counts["plugin"], counts["stock"], strict=True):
        theirs = sum(n for file, n in stocks.items() if file not in ON_CPU_ALONE)
        # Run lengths are copied to the CPU, whereas detectron2's masks stay on the device.
        assert sum(ours.values()) - ours[RUN_LENGTHS] <= theirs, (ours, stocks)
    training, inference = (
        {file: n for file, n in count.items() if file.startswith("mask_head_plugin")}
        for count in counts["plugin"]
    )
    assert training == {MASK_TARGET: len(batch)}  # the check of coordinates, only on the CPU
    # Three reads per image: the number of pixel columns, the number of crossings, the crossings.
    assert inference == {RUN_LENGTHS: 3 * len(batch)}


def test_a_synchronising_operator_is_attributed_to_its_caller():
    with Waits() as waits:
        torch.ones(3)[torch.ones(3) > 0].tolist()
    assert waits.by_file == {"elsewhere": 2}
