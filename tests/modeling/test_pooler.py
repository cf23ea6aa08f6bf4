"""Compares MultiLevelRoIPooler with detectron2's ROIPooler."""

from __future__ import annotations

import functools
import logging
import math
import sys

import numpy as np
import pytest
import torch
from conftest import CountOperators, fake_gpu, random_instances, relative_error
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from mask_head_plugin import ops
from mask_head_plugin.modeling import MultiLevelRoIPooler, pooler
from mask_head_plugin.modeling.pooler import POOLER_TYPES

STOCK_TYPES = ("ROIPool", "ROIAlign", "ROIAlignV2")

OPERATORS = {
    ("ROIPool", "mean"): ops.roi_pool,
    ("ROIPool", "max"): ops.roi_pool,
    ("ROIWarp", "mean"): functools.partial(ops.roi_warp, sampling_ratio=2),
    ("ROIWarp", "max"): functools.partial(ops.roi_warp, sampling_ratio=2, reduction="max"),
    ("ROIAlign", "mean"): functools.partial(ops.roi_align, sampling_ratio=2, aligned=False),
    ("ROIAlignV2", "mean"): functools.partial(ops.roi_align, sampling_ratio=2),
    ("ROIAlignV2", "max"): functools.partial(ops.roi_align, sampling_ratio=2, reduction="max"),
    ("PrROIPool", "mean"): ops.precise_roi_pool,
}

IMAGE_HW = (128, 192)
SCALES = (1 / 4, 1 / 8, 1 / 16)


def make_input(scales, num_images=2, dtype=torch.float32):
    features = [
        torch.randn(num_images, 3, int(IMAGE_HW[0] * s), int(IMAGE_HW[1] * s), dtype=dtype)
        for s in scales
    ]
    rng = np.random.default_rng(0)
    boxes = [
        random_instances(9, IMAGE_HW, 2, rng, "polygon", dtype).gt_boxes for _ in range(num_images)
    ]
    return features, boxes


@pytest.mark.parametrize("scales", [SCALES, SCALES[-1:]], ids=["FPN", "single level"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("pooler_type", STOCK_TYPES)
def test_equals_detectron2s_pooler(pooler_type, sampling_ratio, scales):
    # The boxes measure 8 to 90 pixels. With a canonical size of 32, every level gets some of them.
    arguments = (7, scales, sampling_ratio, pooler_type, 32, 3)
    features, boxes = make_input(scales)
    plugin_features = [x.clone().requires_grad_() for x in features]
    stock_features = [x.clone().requires_grad_() for x in features]
    actual = MultiLevelRoIPooler(*arguments)(plugin_features, boxes)
    expected = ROIPooler(*arguments)(stock_features, boxes)
    assert actual.shape == (18, 3, 7, 7)
    assert relative_error(actual, expected) <= 1e-6
    weights = torch.randn_like(expected)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(plugin_features, stock_features, strict=True):
        assert y.grad.abs().max() > 0, "every level must have boxes"
        assert relative_error(x.grad, y.grad) <= 1e-6


@pytest.mark.parametrize(("pooler_type", "reduction"), OPERATORS)
def test_each_box_is_pooled_from_the_level_of_equation_1_by_the_chosen_operator(
    pooler_type, reduction
):
    features, boxes = make_input(SCALES)
    arguments = (7, SCALES, 2, pooler_type, 32, 3, reduction)
    actual = MultiLevelRoIPooler(*arguments)(features, boxes)
    operator, seen = OPERATORS[pooler_type, reduction], set()
    for r, (image, box) in enumerate((n, box) for n, b in enumerate(boxes) for box in b.tensor):
        side = float((box[2:] - box[:2]).prod().sqrt())
        level = min(max(math.floor(3 + math.log2(side / 32)), 2), 4) - 2
        roi = torch.cat([torch.tensor([float(image)]), box])[None]
        expected = operator(features[level], roi, 7, SCALES[level])
        assert relative_error(actual[r : r + 1], expected) <= 1e-6
        seen.add(level)
    assert seen == {0, 1, 2}


def test_without_boxes_the_result_is_empty_and_differentiable():
    features, _ = make_input(SCALES)
    features = [x.requires_grad_() for x in features]
    pooled = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")(
        features, [Boxes(torch.zeros(0, 4))] * 2
    )
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()


def test_unknown_options_and_irregular_pyramids_are_refused_by_name():
    with pytest.raises(ValueError, match=r"POOLER_TYPE 'RoiAlign'.*ROIAlignV2"):
        MultiLevelRoIPooler(7, SCALES, 0, "RoiAlign")
    with pytest.raises(ValueError, match=r"POOLER_REDUCTION 'sum'.*'mean', 'max'"):
        MultiLevelRoIPooler(7, SCALES, 0, "ROIAlign", reduction="sum")
    with pytest.raises(ValueError, match="PrROIPool integrates"):
        MultiLevelRoIPooler(7, SCALES, 0, "PrROIPool", reduction="max")
    with pytest.raises(ValueError, match="must be powers of 2, each half"):
        MultiLevelRoIPooler(7, (1 / 4, 1 / 16), 0, "ROIAlign")


def test_boxes_that_are_not_finite_are_refused():
    features, boxes = make_input(SCALES)
    boxes[1].tensor[2, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 18 boxes have NaN"):
        MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")(features, boxes)


def test_without_images_the_result_is_empty():
    features = [torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 4, 4)]
    assert MultiLevelRoIPooler(7, SCALES[:2], 0, "ROIAlignV2")(features, []).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("scales", [[], [0.0], [-0.5]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ValueError, match="scales"):
        MultiLevelRoIPooler(7, scales, 0, "ROIAlignV2")


def test_a_map_may_be_larger_than_the_image():
    """Scripted models use detectron2's pooler, which does not support such maps."""
    feature, boxes = torch.randn(1, 2, 16, 20), Boxes(torch.tensor([[1.0, 2, 7, 5]]))
    fine = MultiLevelRoIPooler(3, [2.0], 2, "ROIAlignV2")
    expected = ops.roi_align(feature, torch.tensor([[0.0, 1, 2, 7, 5]]), 3, 2.0, 2)
    assert relative_error(fine([feature], [boxes]), expected) <= 1e-5
    with pytest.raises(ValueError, match="cannot be scripted"):
        torch.jit.script(fine)


def test_wrong_number_of_maps_or_images_is_refused():
    features, boxes = make_input(SCALES)
    pooler = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="2 feature maps for 3"):
        pooler(features[:2], boxes)
    with pytest.raises(ValueError, match="1 images, but maps of 2"):
        pooler(features, boxes[:1])


@pytest.mark.parametrize("pooler_type", ["ROIPool", "ROIWarp", "ROIAlign", "ROIAlignV2"])
def test_a_trace_works_for_other_boxes(pooler_type):
    features, boxes = make_input(SCALES)
    pooler = MultiLevelRoIPooler(7, SCALES, 0, pooler_type, 32, 3)

    def pool(x0, x1, x2, first, second):
        return pooler([x0, x1, x2], [Boxes(first), Boxes(second)])

    example = (*features, *(b.tensor for b in boxes))
    traced = torch.jit.trace(pool, example, check_trace=False)
    _, others = make_input(SCALES)
    others = [b.tensor[:4] * 0.9 for b in others]
    expected = pooler(features, [Boxes(b) for b in others])
    assert relative_error(traced(*features, *others), expected) <= 1e-5


def test_the_error_for_untraceable_options_names_them():
    features, boxes = make_input(SCALES)
    pooler = MultiLevelRoIPooler(7, SCALES, 0, "PrROIPool")
    with pytest.raises(ValueError, match="PrROIPool with POOLER_REDUCTION mean cannot be traced"):
        torch.jit.trace(lambda *maps: pooler(list(maps), boxes), features, check_trace=False)


@pytest.fixture
def untried():
    """Clears the cached results of trying kernels, before and after a test."""
    for function in (pooler._try_kernel, pooler._operator):
        function.cache_clear()
    yield
    for function in (pooler._try_kernel, pooler._operator):
        function.cache_clear()


def at_once(module, features, boxes):
    """Pools on the CPU with the method that is used on CUDA."""
    rois, levels = pooler.boxes_to_rois(boxes), module._assign_levels(boxes)
    return module._pool_at_once(features, rois, levels)


@pytest.mark.usefixtures("interpreted_operator", "untried")
@pytest.mark.parametrize("pooler_type", ["ROIWarp", "ROIAlign", "ROIAlignV2"])
def test_the_multilevel_kernel_accepts_the_inputs_it_gets_on_cuda(pooler_type):
    """Makes the same call as on CUDA. The kernel is interpreted on the CPU."""
    features, boxes = make_input(SCALES)
    module = MultiLevelRoIPooler(2, SCALES, 1, pooler_type, 32, 3)
    actual = at_once(module, features, boxes)
    assert relative_error(actual, module(features, boxes)) <= 1e-6


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_fails_is_reported_once_and_replaced(caplog):
    """The kernel fails here because Triton does not support the CPU."""
    features, boxes = make_input(SCALES)
    module = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2", 32, 3)
    with caplog.at_level(logging.WARNING, logger="mask_head_plugin"):
        for _ in range(2):
            actual = at_once(module, features, boxes)
    assert relative_error(actual, module(features, boxes)) <= 1e-6
    assert [r.message[:40] for r in caplog.records] == ["RoI pooling in one kernel is not availab"]


@pytest.mark.usefixtures("untried")
def test_without_triton_torchvision_replaces_the_kernel_with_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mask_head_plugin.ops.roi_pooling_operator", None)
    features, boxes = make_input(SCALES)
    with caplog.at_level(logging.WARNING, logger="mask_head_plugin"):
        for size in (7, 14):
            at_once(MultiLevelRoIPooler(size, SCALES, 0, "ROIAlignV2", 32, 3), features, boxes)
    (record,) = caplog.records
    assert "operator instead: Triton: ModuleNotFoundError" in record.message


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_fails_for_another_dtype_is_reported_once_and_replaced(
    interpreted_operator, monkeypatch, caplog
):
    kernels = sys.modules[interpreted_operator.__module__].kernels
    add_gradients = kernels.add_gradients

    def not_in_half(maps, pooled, *rest):
        if pooled.dtype == torch.float16:
            raise RuntimeError("PassManager::run failed")
        add_gradients(maps, pooled, *rest)

    monkeypatch.setattr(kernels, "add_gradients", not_in_half)
    single, boxes = make_input(SCALES)
    module = MultiLevelRoIPooler(2, SCALES, 1, "ROIAlignV2", 32, 3)
    half = [x.half().requires_grad_() for x in single]
    with caplog.at_level(logging.WARNING, logger="mask_head_plugin"):
        at_once(module, single, boxes)
        assert not caplog.records
        for _ in range(2):
            pooled = at_once(module, half, boxes)
    pooled.sum().backward()
    (record,) = caplog.records
    assert "2 x 2 bins, torch.float16, 3 channels" in record.message
    assert "PassManager::run failed" in record.message


@pytest.mark.usefixtures("interpreted_operator", "untried")
def test_the_trial_run_of_a_kernel_enables_gradients():
    """If the first call is an inference, its cached result must be valid for training."""
    arguments = torch.device("cpu"), torch.float32, 1, 1, (1, 1), 0, True
    with torch.inference_mode():
        assert pooler.can_pool_at_once(*arguments)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_cuda_maps_become_channels_last_without_synchronisation(layout, monkeypatch):
    """Uses fake tensors, which need no GPU and whose values cannot be read."""
    pytest.importorskip("triton")
    monkeypatch.setattr(pooler, "can_pool_at_once", lambda *kernel: True)
    with fake_gpu(), CountOperators() as count:
        features, boxes = make_fake_input(layout)
        count.calls.clear()
        pooled = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2", 32, 3)(features, boxes)
    assert pooled.is_cuda and pooled.shape == (18, 16, 7, 7)
    assert count.calls["mask_head_plugin.multilevel_roi_align.default"] == 1
    copies = len(SCALES) if layout == torch.contiguous_format else 0
    assert count.calls["aten.clone.default"] == copies


def test_on_cuda_torch_export_captures_one_operator(monkeypatch):
    """Strict export traces like torch.compile, and fails at a graph break."""
    pytest.importorskip("triton")
    monkeypatch.setattr(pooler, "_try_kernel", lambda *kernel: True)

    class OnTensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pooler = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2", 32, 3)

        def forward(self, features, box_tensors):
            return self.pooler(features, [Boxes(x) for x in box_tensors])

    with fake_gpu():
        features, boxes = make_fake_input(torch.channels_last)
    inputs = features, [x.tensor for x in boxes]
    nodes = torch.export.export(OnTensors(), inputs, strict=True).graph.nodes
    operators = [str(node.target) for node in nodes if node.op == "call_function"]
    assert operators[-1] == "mask_head_plugin.multilevel_roi_align.default"
    assert not [x for x in operators if "nonzero" in x or "item" in x]


def make_fake_input(layout):
    features = [
        torch.empty(2, 16, 128 // stride, 192 // stride, device="cuda").to(memory_format=layout)
        for stride in (4, 8, 16)
    ]
    return features, [Boxes(torch.empty(9, 4, device="cuda")) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooler_type", ["ROIPool", "ROIWarp", "ROIAlign", "ROIAlignV2"])
def test_torchvision_pools_half_precision_maps_without_shifting_boxes(pooler_type, dtype):
    features, boxes = make_input(SCALES)
    module = MultiLevelRoIPooler(7, SCALES, 0, pooler_type, 32, 3)
    rois, levels = pooler.boxes_to_rois(boxes), module._assign_levels(boxes)
    halves = [x.to(dtype) for x in features]
    actual = module._pool_by_level(halves, rois, levels)
    assert actual.dtype == dtype
    expected = module([x.float() for x in halves], boxes)
    assert relative_error(actual.float(), expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_half_precision_maps_give_the_results_of_single_precision(pooler_type, dtype):
    features, boxes = make_input(SCALES)
    module = MultiLevelRoIPooler(7, SCALES, 0, pooler_type, 32, 3)
    actual = module([x.to(dtype) for x in features], boxes)
    assert actual.dtype == dtype
    expected = module([x.to(dtype).float() for x in features], boxes)
    assert relative_error(actual.float(), expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_degenerate_boxes_are_pooled_to_finite_values(pooler_type):
    features, _ = make_input(SCALES)
    strange = torch.tensor([[9.0, 7, 3, 2], [5, 5, 5, 5], [-1e9, -1e9, 1e9, 1e9], [3e38, 0, 9, 9]])
    boxes = [Boxes(strange), Boxes(torch.zeros(0, 4))]
    assert torch.isfinite(MultiLevelRoIPooler(7, SCALES, 0, pooler_type)(features, boxes)).all()


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("pooler_type", "reduction"), OPERATORS)
def test_cuda_equals_the_cpu(pooler_type, reduction, deterministic, monkeypatch):
    module = MultiLevelRoIPooler(7, SCALES, 2, pooler_type, 32, 3, reduction)
    features, boxes = make_input(SCALES)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.detach().to(device).requires_grad_() for x in features]
        torch.use_deterministic_algorithms(deterministic)
        try:
            pooled = module(inputs, [Boxes(b.tensor.to(device)) for b in boxes])
            pooled.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([pooled.cpu(), *(x.grad.cpu() for x in inputs)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("pooler_type", ["ROIWarp", "ROIAlignV2"])
def test_the_multilevel_kernel_does_not_wait_for_the_device(pooler_type):
    module = MultiLevelRoIPooler(7, SCALES, 2, pooler_type, 32, 3)
    features, boxes = make_input(SCALES)
    inputs = [x.cuda().requires_grad_() for x in features]
    boxes = [Boxes(b.tensor.cuda()) for b in boxes]
    module(inputs, boxes).sum().backward()  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(inputs, boxes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
