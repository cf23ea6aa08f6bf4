"""Mask losses: hand-worked examples, slow Python references, and properties of every loss."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from detectron2.config import get_cfg
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

from mask_head_plugin import add_mask_head_config
from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, mean_over_rois
from mask_head_plugin.modeling.mask_loss import (
    binary_cross_entropy,
    boundary_distance,
    dice,
    edge_agreement,
    focal,
    lovasz_hinge,
    signed_distance,
    soft_iou,
    softmax_cross_entropy,
    softmax_probs,
    tversky,
)
from mask_head_plugin.modeling.mask_loss_terms import parse_losses, weighted_mask_losses

NAMES = sorted(name for name, _ in MASK_LOSS_REGISTRY)
SIGMOID_NAMES = [name for name in NAMES if name != "softmax_cross_entropy"]


def call(name, mask_logits, gt_masks, weights=None, **parameters):
    """Calls a loss with (R, M, M) logits. For softmax, adds two classes with logits -1 and 0.5."""
    loss = MASK_LOSS_REGISTRY.get(name)
    if name != "softmax_cross_entropy":
        return loss(mask_logits, gt_masks, weights, **parameters)
    others = [torch.full_like(mask_logits, value) for value in (-1.0, 0.5)]
    class_logits = torch.stack([others[0], mask_logits, others[1]], dim=1)
    classes = torch.ones(len(mask_logits), dtype=torch.int64)
    return loss(class_logits, classes, gt_masks, weights, **parameters)


def random_masks(num_rois=3, side=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rois, side, side, generator=generator, dtype=dtype) * 2
    gt = torch.zeros(num_rois, side, side, dtype=dtype)
    gt[:, 1:4, 2:] = 1
    gt[1:, 0, 0] = 1
    return logits, gt


# Slow references: each computes the loss of a single RoI from nested lists.


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def flatten(rows):
    return list(itertools.chain.from_iterable(rows))


def pixels(z, g):
    return [(sigmoid(a), b) for a, b in zip(flatten(z), flatten(g), strict=True)]


def slow_bce(z, g):
    values = [-(b * math.log(p) + (1 - b) * math.log(1 - p)) for p, b in pixels(z, g)]
    return sum(values) / len(values)


def slow_softmax(z, g):
    total, count = 0.0, 0
    for row, gt_row in zip(z, g, strict=True):
        for a, b in zip(row, gt_row, strict=True):
            norm = 1 + math.exp(-1.0) + math.exp(a) + math.exp(0.5)
            total -= math.log((math.exp(a) if b else 1.0) / norm)
            count += 1
    return total / count


def slow_dice(z, g, eps=1.0):
    both = 2 * sum(p * b for p, b in pixels(z, g)) + eps
    return 1 - both / (sum(p * p + b * b for p, b in pixels(z, g)) + eps)


def slow_focal(z, g, gamma=2.0, alpha=0.25):
    total = 0.0
    for p, b in pixels(z, g):
        q, a = (p, alpha) if b else (1 - p, 1 - alpha)
        total -= a * (1 - q) ** gamma * math.log(q)
    return total / len(pixels(z, g))


def slow_tversky(z, g, alpha=0.3, beta=0.7, eps=1.0):
    true_positive = sum(p * b for p, b in pixels(z, g))
    false_positive = sum(p * (1 - b) for p, b in pixels(z, g))
    false_negative = sum((1 - p) * b for p, b in pixels(z, g))
    total = true_positive + alpha * false_positive + beta * false_negative
    return 1 - (true_positive + eps) / (total + eps)


def slow_soft_iou(z, g, eps=1.0):
    intersection = sum(p * b for p, b in pixels(z, g))
    return 1 - (intersection + eps) / (sum(p + b - p * b for p, b in pixels(z, g)) + eps)


def slow_lovasz(z, g):
    """Sums the errors in decreasing order, weighted by the IoU lost when the pixel is wrong."""
    flat = [(max(0.0, 1 - a * (2 * b - 1)), b) for a, b in zip(flatten(z), flatten(g), strict=True)]
    flat.sort(key=lambda pair: -pair[0])
    positives, lost, value = sum(b for _, b in flat), 0.0, 0.0
    missed = extra = 0.0
    for error, b in flat:
        missed, extra = missed + b, extra + (1 - b)
        now = 1 - (positives - missed) / (positives + extra)
        value += error * (now - lost)
        lost = now
    return value


def slow_distance(g):
    side = len(g)
    result = [[0.0] * side for _ in range(side)]
    for y in range(side):
        for x in range(side):
            others = [
                math.hypot(y - v, x - u)
                for v in range(side)
                for u in range(side)
                if g[v][u] != g[y][x]
            ]
            if others:
                result[y][x] = (min(others) - 0.5) * (-1 if g[y][x] else 1)
    return result


def slow_boundary(z, g):
    phi = flatten(slow_distance(g))
    return sum(p * d for (p, _), d in zip(pixels(z, g), phi, strict=True)) / len(phi)


def slow_edges(z, g):
    side, kernel = len(g), [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    difference = [[sigmoid(z[y][x]) - g[y][x] for x in range(side)] for y in range(side)]
    inside, total = range(side), 0.0
    for y in inside:
        for x in inside:
            for transposed in (False, True):
                edge = 0.0
                for a in (-1, 0, 1):
                    for b in (-1, 0, 1):
                        weight = kernel[b + 1][a + 1] if transposed else kernel[a + 1][b + 1]
                        v, u = (min(max(k, 0), side - 1) for k in (y + a, x + b))
                        edge += weight * difference[v][u]
                total += edge * edge
    return total / side / side / 2


SLOW = {
    "binary_cross_entropy": slow_bce,
    "softmax_cross_entropy": slow_softmax,
    "dice": slow_dice,
    "focal": slow_focal,
    "tversky": slow_tversky,
    "soft_iou": slow_soft_iou,
    "lovasz_hinge": slow_lovasz,
    "boundary_distance": slow_boundary,
    "edge_agreement": slow_edges,
}


def test_every_registered_loss_has_a_slow_reference():
    assert sorted(SLOW) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_the_slow_reference_with_and_without_weights(name):
    logits, gt = random_masks()
    values = [SLOW[name](z, g) for z, g in zip(logits.tolist(), gt.tolist(), strict=True)]
    assert float(call(name, logits, gt)) == pytest.approx(sum(values) / 3, rel=1e-9)
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    expected = (values[0] + 3 * values[2]) / 4
    assert float(call(name, logits, gt, weights)) == pytest.approx(expected, rel=1e-9)
    assert float(call(name, logits, gt, 0 * weights)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_correct(name):
    logits, gt = random_masks(2, 4)
    assert torch.autograd.gradcheck(lambda z: call(name, z, gt), logits.requires_grad_())


def test_gradient_of_softmax_with_respect_to_all_classes():
    class_logits = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    gt = torch.randint(0, 2, (2, 3, 3)).double()
    classes = torch.tensor([2, 0])
    loss = softmax_cross_entropy
    assert torch.autograd.gradcheck(lambda z: loss(z, classes, gt), class_logits)


@pytest.mark.parametrize("name", NAMES)
def test_moving_towards_the_target_lowers_the_loss_along_its_gradient(name):
    logits, gt = random_masks()
    target = (2 * gt - 1) * 4
    path = [(logits + (target - logits) * step).requires_grad_() for step in (0, 0.25, 0.5, 0.75)]
    values = [call(name, z, gt) for z in path]
    assert all(a > b for a, b in itertools.pairwise(values))
    (gradient,) = torch.autograd.grad(values[0], path[0])
    assert gradient.flatten(1).abs().amax(1).min() > 0, "every RoI must have a gradient"
    assert float(call(name, logits - 0.01 * gradient, gt)) < float(values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_at_extreme_logits_and_uniform_targets(name, level, fill, dtype):
    logits = torch.full((2, 4, 4), level, dtype=dtype, requires_grad=True)
    loss = call(name, logits, torch.full((2, 4, 4), fill, dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_without_rois_the_loss_is_zero_and_differentiable(name):
    logits = torch.zeros(0, 3, 3, requires_grad=True)
    loss = call(name, logits, torch.zeros(0, 3, 3))
    loss.backward()
    assert loss == 0 and logits.grad is not None


# Hand-worked examples.


def test_binary_cross_entropy_of_a_hand_worked_example():
    logits = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)  # p = 1/2, 3/4
    targets = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    expected = (math.log(2) + math.log(4)) / 2
    assert binary_cross_entropy(logits, targets).item() == pytest.approx(expected, abs=1e-12)


HALF = torch.zeros(1, 2, 2, dtype=torch.float64)  # p = 1/2 everywhere
CORNER = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "parameters", "expected"),
    [
        (dice, {"eps": 1.0}, 1 - (2 * 0.5 + 1) / (4 * 0.25 + 1 + 1)),
        (focal, {"gamma": 2.0, "alpha": 0.25}, (0.25 + 3 * 0.75) / 4 * 0.25 * math.log(2)),
        (tversky, {"eps": 1.0}, 1 - (0.5 + 1) / (0.5 + 0.3 * 1.5 + 0.7 * 0.5 + 1)),
        (soft_iou, {"eps": 1.0}, 1 - (0.5 + 1) / (2 + 1 - 0.5 + 1)),
        # All errors are 1 and their weights sum to 1, so the loss is 1.
        (lovasz_hinge, {}, 1.0),
        # Signed distances: -0.5 at the corner, 0.5 next to it, sqrt(2) - 0.5 diagonally.
        (boundary_distance, {}, 0.5 * (-0.5 + 0.5 + 0.5 + math.sqrt(2) - 0.5) / 4),
        # p - g is -1/2 at the corner and 1/2 elsewhere. Borders are replicated, so each Sobel edge
        # has the absolute value 3 or 1.
        (edge_agreement, {}, (4 * 3**2 + 4 * 1**2) / 8),
    ],
)
def test_hand_worked_example(loss, parameters, expected):
    assert float(loss(HALF, CORNER, **parameters)) == pytest.approx(expected, abs=1e-12)


def test_softmax_of_a_hand_worked_example():
    class_logits = (
        torch.tensor([math.log(2), math.log(5)]).view(1, 2, 1, 1).double()
    )  # exponentials: 2, 5, and 1 for the background
    one, classes = torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([0])
    assert float(softmax_probs(class_logits, classes)) == pytest.approx(2 / 8)
    loss = softmax_cross_entropy
    assert float(loss(class_logits, classes, one)) == pytest.approx(-math.log(2 / 8))
    assert float(loss(class_logits, classes, 0 * one)) == pytest.approx(-math.log(1 / 8))


def test_signed_distance_of_two_pixels():
    gt = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]).expand(1, 4, 4)
    assert signed_distance(gt)[0, 2].tolist() == [0.5, -0.5, 0.5, 1.5]


def test_signed_distance_equals_the_slow_reference():
    gt = (torch.rand(6, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.7).double()
    expected = torch.tensor([slow_distance(g) for g in gt.tolist()], dtype=torch.float64)
    torch.testing.assert_close(signed_distance(gt), expected)


# Relations between the losses.


def test_softmax_of_one_class_equals_binary_cross_entropy():
    logits, gt = random_masks()
    classes = torch.zeros(3, dtype=torch.int64)
    actual = softmax_cross_entropy(logits[:, None], classes, gt)
    torch.testing.assert_close(actual, binary_cross_entropy(logits, gt))
    torch.testing.assert_close(softmax_probs(logits[:, None], classes), logits.sigmoid())


def test_softmax_equals_torchs_cross_entropy_with_a_background_channel():
    class_logits, gt = torch.randn(2, 4, 3, 3), torch.randint(0, 2, (2, 3, 3))
    classes = torch.tensor([3, 1])
    labels = (classes[:, None, None] + 1) * gt  # 0 is the background
    with_background = torch.cat([torch.zeros(2, 1, 3, 3), class_logits], dim=1)
    expected = F.cross_entropy(with_background, labels)
    torch.testing.assert_close(softmax_cross_entropy(class_logits, classes, gt.float()), expected)


def test_focal_with_zero_gamma_equals_bce_and_with_defaults_fvcore():
    logits, gt = random_masks()
    torch.testing.assert_close(
        focal(logits, gt, gamma=0.0, alpha=-1.0), binary_cross_entropy(logits, gt)
    )
    torch.testing.assert_close(
        focal(logits, gt).float(), sigmoid_focal_loss(logits, gt, 0.25, 2, "mean")
    )


def test_tversky_with_halves_is_unsquared_dice_and_with_ones_soft_iou():
    logits, gt = random_masks()
    p, g = logits.sigmoid().flatten(1), gt.flatten(1)
    expected = 1 - ((2 * (p * g).sum(1) + 2) / (p.sum(1) + g.sum(1) + 2)).mean()
    torch.testing.assert_close(tversky(logits, gt, alpha=0.5, beta=0.5), expected)
    torch.testing.assert_close(tversky(logits, gt, alpha=1.0, beta=1.0), soft_iou(logits, gt))


def test_lovasz_of_confident_predictions_is_the_lost_iou():
    gt = torch.zeros(1, 4, 4)
    gt[0, :2] = 1
    predicted = gt.clone()
    predicted[0, 0, 0], predicted[0, 3, :2] = 0, 1  # intersection 7, union 10
    # The logits of correct pixels are beyond the margin. Those of wrong pixels are 0: error 1.
    logits = torch.where(predicted == gt, 2.0 * (2 * gt - 1), 0.0)
    assert float(lovasz_hinge(logits, gt)) == pytest.approx(1 - 7 / 10)


def test_the_border_of_the_mask_is_not_an_edge():
    gt = torch.ones(1, 5, 5)
    assert float(edge_agreement(torch.full_like(gt, -1e4), gt)) == 0


# Configuration.


def test_default_parameters_in_the_config_equal_those_of_the_functions():
    cfg = get_cfg()
    add_mask_head_config(cfg)
    in_functions = {}
    for name in NAMES:
        signature = inspect.signature(MASK_LOSS_REGISTRY.get(name)).parameters.values()
        keywords = {p.name.upper(): p.default for p in signature if p.kind is p.KEYWORD_ONLY}
        if keywords:
            in_functions[name.upper()] = keywords
    assert {k: dict(v) for k, v in cfg.MODEL.ROI_MASK_HEAD.LOSS_PARAMS.items()} == in_functions


def test_terms_are_weighted_ramped_up_and_named():
    logits, gt = random_masks(dtype=torch.float32)
    classes = torch.zeros(3, dtype=torch.int64)
    terms = parse_losses([["dice", 2.0], ["boundary_distance", 0.5, 10]], {"DICE": {"EPS": 3.0}})
    losses = weighted_mask_losses(terms, logits, classes, gt, 4)
    assert set(losses) == {"loss_mask_dice", "loss_mask_boundary_distance"}
    torch.testing.assert_close(losses["loss_mask_dice"], 2 * dice(logits, gt, eps=3.0))
    boundary = boundary_distance(logits, gt)
    torch.testing.assert_close(losses["loss_mask_boundary_distance"], 0.5 * 0.4 * boundary)
    late = weighted_mask_losses(terms, logits, classes, gt, 10)["loss_mask_boundary_distance"]
    torch.testing.assert_close(late, 0.5 * boundary)
    single = weighted_mask_losses(parse_losses([["dice", 1.0]], {}), logits, classes, gt, 0)
    assert set(single) == {"loss_mask"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_losses_of_half_precision_logits_are_computed_in_float32(name, dtype):
    logits, gt = random_masks(dtype=torch.float32)
    logits = logits.to(dtype)
    terms, classes = parse_losses([[name, 1.0]], {}), torch.zeros(3, dtype=torch.int64)
    if name == "softmax_cross_entropy":
        logits = logits[:, None]
    half, single = (
        weighted_mask_losses(terms, z, classes, gt, 0) for z in (logits, logits.float())
    )
    assert half["loss_mask"].dtype == torch.float32 and half == single


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_losses_in_float32(name, dtype):
    """edge_agreement convolves, and autocast would run convolutions in half precision."""
    logits, gt = random_masks(dtype=torch.float32)
    logits = logits[:, None] if name == "softmax_cross_entropy" else logits
    terms, classes = parse_losses([[name, 1.0]], {}), torch.zeros(3, dtype=torch.int64)
    results = []
    for enabled in (True, False):
        inputs = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = weighted_mask_losses(terms, inputs, classes, gt, 0)["loss_mask"]
        loss.backward()
        results.append((loss, inputs.grad))
    (actual, actual_grad), (expected, expected_grad) = results
    assert actual.dtype == torch.float32
    assert actual == expected and torch.equal(actual_grad, expected_grad)


@pytest.mark.parametrize(
    ("losses", "parameters", "message"),
    [
        ([], {}, "LOSSES.*at least one"),
        ([["dise", 1.0]], {}, "LOSSES.*no loss 'dise'; choose from .*binary_cross_entropy"),
        (["dice"], {}, r"LOSSES.*entry 'dice' must have the form \[name, "),
        ([["dice", "1"]], {}, "LOSSES.*weight '1' of 'dice'"),
        ([["dice", float("nan")]], {}, "LOSSES.*weight nan of 'dice'"),
        ([["dice", -1]], {}, "LOSSES.*weight -1 of 'dice'"),
        ([5], {}, r"LOSSES.*entry 5 must have the form \[name"),
        ([["dice", 1.0, 0.5]], {}, "LOSSES.*ramp 0.5 of 'dice'"),
        ([["dice", 1.0], ["dice", 2.0]], {}, "LOSSES.*twice"),
        ([["dice", 1.0], ["softmax_cross_entropy", 1.0]], {}, "LOSSES.*cannot be combined"),
        ([["dice", 1.0]], {"DISE": {}}, "LOSS_PARAMS.DISE does not exist.*choose from .*DICE"),
        ([["dice", 1.0]], {"DICE": {"EPSS": 1}}, r"LOSS_PARAMS.DICE.EPSS.*choose from \['EPS'\]"),
        ([["dice", 1.0]], {"DICE": {"EPS": "1"}}, "LOSS_PARAMS.DICE.EPS must be a .*, not '1'"),
        ([["dice", 1.0]], {"DICE": {"EPS": 0}}, "LOSS_PARAMS.DICE: eps is 0; it must be above 0"),
        ([["dice", 1.0]], {"FOCAL": {"GAMMA": 0.5}}, "LOSS_PARAMS.FOCAL: gamma is 0.5; it must"),
        ([["dice", 1.0]], {"FOCAL": {"ALPHA": 2}}, "LOSS_PARAMS.FOCAL: alpha is 2; it must"),
        ([["dice", 1.0]], {"TVERSKY": {"BETA": -1}}, "LOSS_PARAMS.TVERSKY: beta is -1; it must"),
        (
            [["dice", 1.0]],
            {"TVERSKY": {"ALPHA": 0, "BETA": 0}},
            r"LOSS_PARAMS.TVERSKY: alpha \+ beta is 0; it must",
        ),
        ([["dice", 1.0]], {"DICE": None}, "LOSS_PARAMS.DICE must be a section .*not None"),
        ([["dice", 1.0]], {"dice": {}}, "LOSS_PARAMS.dice does not exist"),
        ([["dice", 10**400]], {}, "LOSSES.*weight 1000.* of 'dice'"),
    ],
)
def test_invalid_losses_and_parameters_are_refused_by_key(losses, parameters, message):
    with pytest.raises(ValueError, match=f"MODEL.ROI_MASK_HEAD.{message}"):
        parse_losses(losses, parameters)


def mean_of_nothing(mask_logits, gt_masks, weights=None):
    return (mask_logits.sigmoid() - gt_masks).square().mean()


def values_per_roi(mask_logits, gt_masks, weights=None):
    return (mask_logits.sigmoid() - gt_masks).flatten(1).sum(1)


def maximum_of_nothing(mask_logits, gt_masks, weights=None):
    return mask_logits.flatten(1).amax()


def scale_is_missing(mask_logits, gt_masks, weights=None, *, scale):
    return scale * mask_logits.sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (mean_of_nothing, "MEAN_OF_NOTHING: for a batch .* returns .*nan.*mean_over_rois"),
        (values_per_roi, "VALUES_PER_ROI: for a batch .*, the loss '.*' returns tensor"),
        (
            maximum_of_nothing,
            "MAXIMUM_OF_NOTHING: the loss .* fails on a batch without RoIs: .*amax",
        ),
        (scale_is_missing, "SCALE_IS_MISSING.SCALE has no default, so you must"),
    ],
)
def test_a_registered_loss_that_would_fail_in_training_is_refused(loss, message, monkeypatch):
    monkeypatch.setitem(MASK_LOSS_REGISTRY._obj_map, loss.__name__, loss)
    with pytest.raises(ValueError, match=f"LOSS_PARAMS.{message}"):
        parse_losses([[loss.__name__, 1.0]], {})


def test_parameters_of_a_registered_loss_may_contain_capitals(monkeypatch):
    def capital_loss(mask_logits, gt_masks, weights=None, *, Scale=1.0):  # noqa: N803
        return Scale * mean_over_rois(mask_logits.flatten(1).mean(1), weights)

    monkeypatch.setitem(MASK_LOSS_REGISTRY._obj_map, "MyLoss", capital_loss)
    (term,) = parse_losses([["MyLoss", 1.0]], {"MYLOSS": {"SCALE": 3.0}})
    assert term.parameters == {"Scale": 3.0}
