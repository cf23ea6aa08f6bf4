"""The study of independent masks: its synthetic objects, its variants, and its mask readouts."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script


@pytest.fixture(scope="module", autouse=True)
def _scripts_import_each_other():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def study():
    return load_script("benchmarks/mask_competition.py")


@pytest.fixture(scope="module")
def readouts():
    return load_script("benchmarks/mask_readouts.py")


@pytest.mark.parametrize("num_classes", [1, 7, 40])
def test_the_class_determines_the_colour_but_not_the_mask(num_classes):
    from made_objects import make_objects

    few, many = make_objects(5, 60, 1, 0.0), make_objects(5, 60, num_classes, 0.0)
    np.testing.assert_array_equal(few.masks, many.masks)
    np.testing.assert_array_equal(many.posterior, 1)
    assert set(many.classes) <= set(range(num_classes))
    assert many.images.shape == (60, 3, 28, 28) and many.images.dtype == np.float32


def test_outlines_fill_their_box():
    from made_objects import outlines

    masks = outlines(np.random.default_rng(0), 200)
    sides = [masks.any(axis)[:, place] for axis in (1, 2) for place in ((0, 1), (-2, -1))]
    assert np.mean([side.any(1) for side in sides]) > 0.99


def test_confusion_limits_how_sure_the_best_classifier_is():
    from made_objects import make_objects

    sure = [np.mean(make_objects(1, 300, 10, c).posterior > 0.5) for c in (0, 0.3, 1)]
    assert sure[0] == 1 > sure[1] > sure[2] > 0.05


def test_the_posterior_is_bayes_rule_with_equal_priors():
    from made_objects import true_class_probability

    colours = np.array([[0.0, 0, 0], [1, 0, 0]])
    found = true_class_probability(np.array([[0.25, 0, 0]] * 2), np.array([0, 1]), colours, 0.5)
    near, far = np.exp(-(0.25**2) / 0.5), np.exp(-(0.75**2) / 0.5)
    np.testing.assert_allclose(found, [near / (near + far), far / (near + far)])


def test_the_sigmoids_of_all_other_classes_are_trained_to_be_empty(study):
    """Compares the loss with one binary cross-entropy per class."""
    from every_class import every_class_cross_entropy

    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=rng)
    masks, classes = (torch.rand(2, 4, 4, generator=rng) > 0.5).float(), torch.tensor([2, 0])
    expected = torch.zeros(())
    for roi, own in enumerate(classes):
        for k in range(3):
            target = masks[roi] if k == own else torch.zeros(4, 4)
            expected += study.binary_cross_entropy(logits[roi, k][None], target[None]) / 2
    torch.testing.assert_close(every_class_cross_entropy(logits, classes, masks), expected)


def test_with_one_class_softmax_and_sigmoid_train_identically(study):
    """Validates the study: without competing classes, the gap must be 0."""
    from made_objects import make_objects

    objects, tests = make_objects(1, 64, 1, 0.0), study.Tests(1, 0.0, 8)
    found = [
        study.train(study.Training(arm, 1, 0.0, 0.05, 6, seed=1), objects, tests)
        for arm in ("sigmoid", "softmax", "sigmoid of every class")
    ]
    for name, expected in found[0]["ious"].items():
        for other in found[1:]:
            assert other["ious"][name] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("num_classes", [3, 8])
def test_an_even_start_gives_the_background_a_probability_of_one_half(study, num_classes):
    torch.manual_seed(0)
    model = study.MaskBranch(study.ARMS["softmax, even start"], num_classes)
    with torch.no_grad():
        logits = model(torch.randn(4, 3, 28, 28))
    background = 1 / (1 + logits.exp().sum(1))
    assert background.mean() == pytest.approx(0.5, abs=0.01)


def test_a_learned_background_is_the_last_output(study):
    torch.manual_seed(0)
    model = study.MaskBranch(study.ARMS["softmax, learned background"], 3).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        raw = model.head.class_logits(model.stem(images))
        found = model(images)
    expected = raw.softmax(1)[:, :3]
    torch.testing.assert_close(found.exp() / (1 + found.exp().sum(1, keepdim=True)), expected)


def test_each_readout_computes_what_its_name_states(readouts):
    """Uses one pixel per RoI and three classes; the background's logit is 0."""
    logits = torch.tensor([[2.0, 1.9, 0.1], [0.5, 3.0, 0.0], [-0.2, -1.0, -3.0]])[..., None, None]
    classes = torch.tensor([0, 0, 0])
    exp = logits[..., 0, 0].exp()
    softmax = exp[:, 0] / (1 + exp.sum(1))
    read = {name: reading(logits, classes).flatten() for name, reading in readouts.READINGS.items()}
    torch.testing.assert_close(read["own class against background"], exp[:, 0] / (1 + exp[:, 0]))
    torch.testing.assert_close(read["softmax at 0.5"], softmax)
    assert (read["largest"] > 0.5).tolist() == [True, False, False]
    for threshold in readouts.THRESHOLDS:
        found = read[f"softmax at {threshold}"] >= 0.5
        assert found.tolist() == (softmax >= threshold).tolist()


def test_the_summary_compares_the_trained_variants(study, tmp_path, monkeypatch, capsys):
    plan = [
        study.Training(arm, 10, 0.0, study.RATE, iterations, seed)
        for arm, iterations in (
            ("sigmoid", 3),
            ("softmax", 3),
            ("sigmoid of every class", 3),
            ("sigmoid", 4),
            ("softmax", 4),
        )
        for seed in (1, 2)
    ]
    plan += [dataclasses.replace(x, rate=0.4) for x in plan if x.iterations == 3]
    plan += [dataclasses.replace(x, confusion=0.5) for x in plan if x.rate == study.RATE]
    monkeypatch.setattr(study, "plan", lambda *_: plan)
    flags = ["--short", "3", "--long", "4", "--objects", "32", "--tests", "8"]
    path = tmp_path / "found.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--output", str(tmp_path / "w"), "--json", str(path), *flags]
    )
    study.main()
    found = json.loads(path.read_text())
    assert {row["arm"] for row in found["arms"]} == {"softmax", "sigmoid of every class"}
    assert {row["rate"] for row in found["rates"]} == {study.RATE, 0.4}
    for name in ("gap", "arms", "readings", "ends", "causes", "rates"):
        assert all(row["low"] <= row["difference"] <= row["high"] for row in found[name]), name
    for row in found["gap"]:
        assert row["iou"] == pytest.approx(np.mean(row["seeds"]), abs=0.011)
    share = {row["objects"]: row["share"] for row in found["certainty"] if row["arm"] == "softmax"}
    assert share["sure"] + share["unsure"] == 100
    assert "gap" in capsys.readouterr().out
    figures = load_script("benchmarks/mask_figures.py")
    for draw, part in (
        (figures.draw_gap, "gap"),
        (figures.draw_arms, "arms"),
        (figures.draw_curves, "curves"),
    ):
        draw(found[part]).savefig(tmp_path / f"{part}.png")
    gaps = [{"difference": -1.0, "interval": [-2.0, 0.5]} for _ in figures.GAPS]
    curves = [
        {"way": x, "iterations": [1, 2], "segm/AP": [10.0, 20.0]} for x in ("sigmoid", "softmax")
    ]
    figures.draw_whole(curves, {2600: gaps, 8000: gaps}).savefig(tmp_path / "whole.png")
