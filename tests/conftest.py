"""Fixtures and functions shared by the tests: small models, their stock twins, random inputs.

Shape alphabet: N images, R RoIs, K classes.
"""

from __future__ import annotations

import collections
import copy
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mask_head_plugin import load_config
from mask_head_plugin.data import shapes
from mask_head_plugin.machine import full_float32

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # tools import each other from their folder
CONFIGS = ROOT / "configs"
CONFIG_FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "ablations")
CHECKPOINT = ROOT / "checkpoints" / "mask_rcnn_shapes.safetensors"
SHARED_DATA = ROOT.parent / "shared" / "data"

EMBEDDED_IMAGES = {"train": 20, "val": 60}
"""Number of images of the embedded data set that the tests use, by split."""

STOCK_NAMES = {
    "PerClassMaskROIHeads": "StandardROIHeads",
    "PerClassMaskRes5ROIHeads": "Res5ROIHeads",
    "FCNMaskHead": "MaskRCNNConvUpsampleHead",
    "MaskRCNN": "GeneralizedRCNN",
}

SMALL_RESNET = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "5"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"),
    *("INPUT.MASK_FORMAT", "bitmask", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="session")
def _run_from_the_root() -> None:
    """Changes to the project's root, because tests name configs and tools relative to it."""
    os.chdir(ROOT)


@pytest.fixture(autouse=True, scope="session")
def _embedded_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Draws only part of the embedded data set, because drawing all of it takes 20 s.

    Child processes find the images in DETECTRON2_DATASETS.
    """
    os.environ["DETECTRON2_DATASETS"] = str(tmp_path_factory.mktemp("datasets"))
    for split, count in EMBEDDED_IMAGES.items():
        shapes.NUM_IMAGES[split] = count
        DatasetCatalog.remove(f"shapes_{split}")
        MetadataCatalog.remove(f"shapes_{split}")
    shapes.register_shapes()
    for split in EMBEDDED_IMAGES:
        shapes.ensure_shapes(shapes.datasets_root() / shapes.FOLDER, split)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Uses one thread: tensors are small, and on a busy machine, a second thread only waits."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes


@pytest.fixture(autouse=True, scope="session")
def _yaml_is_parsed_once() -> Iterator[None]:
    """Caches parsed YAML: tests load the same files hundreds of times, which takes 20 ms each."""

    def remembered(parse: Callable[..., Any], copied: Callable[[Any], Any]) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def parse_once(stream: Any, *args: Any) -> Any:
            content = stream if isinstance(stream, str | bytes) else stream.read()
            if content not in known:
                if stream is not content:
                    stream.seek(0)
                known[content] = parse(stream, *args)
            return copied(known[content])

        return parse_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "safe_load", remembered(yaml.safe_load, copy.deepcopy))
        patch.setattr(yaml, "compose", remembered(yaml.compose, lambda nodes: nodes))
        yield


@pytest.fixture(autouse=True, scope="session")
def _float32_on_a_gpu() -> Iterator[None]:
    """Turns off TF32, because tests compare convolutions to more digits than TF32 has."""
    with full_float32():
        yield


@pytest.fixture(autouse=True)
def _logs_reach_pytest(monkeypatch) -> None:
    """Makes logs reach caplog, and removes handlers that write to closed outputs.

    detectron2's trainer calls setup_logger unless INFO is enabled, and setup_logger stops the
    propagation of logs. Benchmarks silence the plugin's log. setup_logger and the tools, which call
    basicConfig, add handlers to the output of the current test, which is closed afterwards.
    """
    logging.getLogger("detectron2").setLevel(logging.DEBUG)
    logging.getLogger("mask_head_plugin").setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for name in ("detectron2", "mask_head_plugin"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    for logger in (logging.root, *map(logging.getLogger, ("detectron2", "mask_head_plugin"))):
        for handler in list(logger.handlers):
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # without a GPU, torch.manual_seed slowly records the stack
        torch.default_generator.manual_seed(0)


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes kernels that a test loads run on the CPU; undoes what Triton before 3.3 changes."""
    triton = pytest.importorskip("triton")
    importlib.import_module("mask_head_plugin.ops.roi_pooling_triton")  # its kernels stay compiled
    language = triton.language
    changed = (language, language.core, language.math, language.tensor)
    before = [dict(vars(owner)) for owner in changed]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # tl.sum is itself written in Triton and was compiled when Triton was imported.
    add = language.standard._sum_combine
    language.sum = lambda x, axis: language.reduce(x, axis, add)
    yield
    for owner, values in zip(changed, before, strict=True):
        for name in set(vars(owner)) - set(values):
            delattr(owner, name)
        for name, value in values.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@pytest.fixture
def interpreted_operator(
    triton_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., torch.Tensor]:
    """Returns ops.roi_pooling_operator.multilevel_roi_align with its kernel interpreted."""
    from mask_head_plugin.ops import roi_pooling_operator

    monkeypatch.setattr(roi_pooling_operator, "kernels", load_triton_kernels("interpreted"))
    return roi_pooling_operator.multilevel_roi_align


def fake_gpu() -> FakeTensorMode:
    """Returns a mode in which tensors have no values and "cuda" needs no GPU."""
    mode = FakeTensorMode()
    try:
        with mode:
            torch.empty(2, device="cuda")[:1]
    except RuntimeError:
        pytest.skip("this PyTorch needs a GPU even for tensors without values")
    return mode


class CountOperators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **kwargs or {})


def small_config(name: str, *opts: str) -> CfgNode:
    """Returns a config from configs/ with a network so small that it trains almost instantly."""
    return load_config(str(CONFIGS / name), [*SMALL_RESNET, *opts])


def stock_config(cfg: CfgNode) -> CfgNode:
    """Returns the same config with detectron2's modules in place of the plugin's."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = STOCK_NAMES[cfg.MODEL.META_ARCHITECTURE]
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD):
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    return cfg


def build_twins(cfg: CfgNode) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns the plugin's model and the stock model with equal, untrained weights."""
    torch.manual_seed(1)
    plugin, stock = build_model(cfg), build_model(stock_config(cfg))
    # detectron2 initialises the predictors near zero; larger weights give distinct masks and
    # scores.
    with torch.no_grad():
        for name, parameter in plugin.named_parameters():
            if "predictor" in name:
                parameter.normal_(std=0.1)
    stock.load_state_dict(plugin.state_dict(), strict=True)
    return plugin, stock


def random_instances(
    num_instances: int,
    image_hw: tuple[int, int],
    num_classes: int,
    rng: np.random.Generator,
    mask_format: str,
    dtype: torch.dtype = torch.float32,
) -> Instances:
    """Returns ground truth: boxes with sides of at least 8 pixels, each with an octagonal mask."""
    height, width = image_hw
    size = rng.uniform(8, min(image_hw) * 0.7, (num_instances, 2))
    corner = rng.uniform(0, 1, (num_instances, 2)) * (np.array([width, height]) - size)
    boxes = np.concatenate([corner, corner + size], axis=1)
    angles = np.arange(8) * np.pi / 4 + 0.2
    octagon = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 0.5 + 0.5
    polygons = [[(octagon * s + c).reshape(-1)] for s, c in zip(size, corner, strict=True)]
    instances = Instances(image_hw)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=dtype))
    instances.gt_classes = torch.as_tensor(rng.integers(0, num_classes, num_instances))
    if mask_format == "polygon":
        instances.gt_masks = PolygonMasks(polygons)
    else:
        instances.gt_masks = BitMasks.from_polygon_masks(polygons, height, width)
    return instances


def random_proposals(
    targets: list[Instances], num_proposals: int, rng: np.random.Generator
) -> list[Instances]:
    """Returns proposals around the ground-truth boxes, some near and some far."""
    proposals = []
    for target in targets:
        boxes = target.gt_boxes.tensor
        if len(boxes) == 0:
            boxes = boxes.new_tensor([[0.0, 0.0, 20.0, 20.0]])
        chosen = boxes[torch.as_tensor(rng.integers(0, len(boxes), num_proposals))]
        sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
        spread = torch.as_tensor(rng.normal(0, 0.15, (num_proposals, 4)), dtype=boxes.dtype)
        instances = Instances(target.image_size)
        instances.proposal_boxes = Boxes(chosen + spread * sides)
        instances.proposal_boxes.clip(target.image_size)
        instances.objectness_logits = torch.zeros(num_proposals, dtype=boxes.dtype)
        proposals.append(instances)
    return proposals


def copy_instances(instances: list[Instances]) -> list[Instances]:
    """Returns deep copies, because detectron2's heads modify their arguments."""
    return copy.deepcopy(instances)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest absolute difference divided by the largest absolute expected value."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    difference = (actual - expected).abs().max().item() if expected.numel() else 0.0
    return difference / max(scale, torch.finfo(expected.dtype).tiny)


def load_script(path: str):
    """Imports a script of the project, such as one in benchmarks/."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_triton_kernels(name: str):
    """Imports ops/roi_pooling_triton.py again, under another name.

    This compiles its kernels again, for Triton's interpreter if TRITON_INTERPRET is 1.
    """
    path = ROOT / "mask_head_plugin" / "ops" / "roi_pooling_triton.py"
    spec = importlib.util.spec_from_file_location(f"mask_head_plugin.ops.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
