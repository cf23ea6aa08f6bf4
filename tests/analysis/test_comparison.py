"""Comparison of two runs: resampled figures equal those of a data set with repeated images."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from made_scene import crowded_content, decode, encode, perfect

from mask_head_plugin.analysis.analysis import Analysis, analyze
from mask_head_plugin.analysis.compare import ONE_TRAINING, compare
from mask_head_plugin.analysis.comparison_sections import comparison_sections
from mask_head_plugin.analysis.measures import Measure
from mask_head_plugin.analysis.resampled import Key, resampled_figures
from mask_head_plugin.analysis.run_files import RunFiles
from mask_head_plugin.evaluation.bootstrap import image_weights
from mask_head_plugin.pages.tables import MINUS

NUM_IMAGES = 6


def spoilt(result):
    """Damages the masks of cats, confuses some classes and lowers some scores."""
    number = result["image_id"]
    if result["category_id"] == 2:
        mask = decode(result)
        x, y, w, h = (int(v) for v in result["bbox"])
        mask[y + 3 + number : y + h - 3, x + 3 + number : x + w - 3] = 0
        result["segmentation"] = encode(mask)
    if result["bbox"][0] < 30 and number % 2:
        result["category_id"] = result["category_id"] % 3 + 1
    if result["bbox"][0] > 80 and number % 3 == 0:
        result["score"] /= 3


def analysis_of(folder, content, results, name="run"):
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / f"{name}.json").write_text(json.dumps(results))
    files = (folder / f"{name}.json", folder / "annotations.json", (folder,), "made")
    return analyze(RunFiles(*files, max_detections=100, mask_side=28))


def repeated(content, results, weights):
    """Returns content and results in which each image occurs as many times as its weight says."""
    images, objects, detections = [], [], []
    for image, count in zip(content["images"], weights, strict=True):
        for _ in range(count):
            key = len(images) + 1
            images.append({**image, "id": key})
            for x in content["annotations"]:
                if x["image_id"] == image["id"]:
                    objects.append({**x, "image_id": key, "id": len(objects) + 1})
            detections += [{**x, "image_id": key} for x in results if x["image_id"] == image["id"]]
    return {**content, "images": images, "annotations": objects}, detections


def shown_figures(analysis: Analysis) -> dict[Key, float]:
    """Returns the figures that the pages show, in percent."""
    found = {Key(*x.key): x.value for x in analysis.findings.measures.values()}
    for task in analysis.findings.scene.tasks:
        for name, ap in zip(analysis.class_names, analysis.class_ap(task), strict=True):
            found[Key(task, "class AP", name)] = ap
    for row in analysis.quality_rows:
        group, name = ("class ", row.name) if row.group == "class" else ("", row.name)
        name = name if row.group in ("all", "class") else f"{row.group}: {name}"
        found[Key("segm", group + "mask IoU", name)] = 100 * row.iou
        found[Key("segm", group + "boundary IoU", name)] = 100 * row.boundary
    for x in analysis.thresholds:
        found[Key("segm", "class F1", x.class_name)] = 100 * x.f1
        found[Key("segm", "class F1 at 0.5", x.class_name)] = 100 * x.f1_at_half
    for group in ("F1", "F1 at 0.5"):
        of_classes = [v for key, v in found.items() if key.group == f"class {group}"]
        found[Key("segm", group, "mean")] = float(np.mean(of_classes))
    found[Key("segm", "calibration error", "all")] = 100 * analysis.reliability.error
    for x in analysis.densities:
        found[Key("segm", "density", x.name)] = x.ap
    return found


def test_resampled_figures_equal_those_of_repeated_images(tmp_path):
    content = crowded_content(NUM_IMAGES)
    # Images must differ in their number of objects.
    content["annotations"] = content["annotations"][:-3]
    results = perfect(content, spoilt)
    weights = np.array([[1] * NUM_IMAGES, [2, 0, 1, 0, 2, 1]], np.int32)
    drawn = resampled_figures(analysis_of(tmp_path, content, results), weights)
    for number, row in enumerate(weights.tolist()):
        expected = shown_figures(analysis_of(tmp_path, *repeated(content, results, row)))
        assert set(expected) <= set(drawn)
        values = {key: drawn[key][number] for key in expected}
        assert values == pytest.approx(expected, abs=1e-9, nan_ok=True)
        others = [drawn[key][number] for key in set(drawn) - set(expected)]
        assert np.isnan(others).all(), "classes and objects that were not drawn must be NaN"


def test_intervals_are_percentiles_of_paired_draws_and_exclude_training_noise(tmp_path):
    content = crowded_content(NUM_IMAGES)
    ours = analysis_of(tmp_path, content, perfect(content, spoilt), "ours")
    theirs = analysis_of(tmp_path, content, perfect(content), "theirs")
    made = compare(ours, theirs, 50)
    by_key = {x.key: x for x in made.differences}
    weights = image_weights(NUM_IMAGES, 50, 0)
    for key, sign in ((("segm", "mask IoU", "all"), 1), (("segm", "calibration error", "all"), -1)):
        found = by_key[Key(*key)]
        drawn = resampled_figures(ours, weights)[found.key]
        drawn = drawn - resampled_figures(theirs, weights)[found.key]
        assert [found.paired.low, found.paired.high] == pytest.approx(
            np.percentile(drawn, [2.5, 97.5])
        )
        assert sign * found.paired.difference < 0
    assert by_key["segm", "mask IoU", "all", 0].finding == "worse"
    sections = comparison_sections(made)
    assert ONE_TRAINING in made.sentences()[0] and ONE_TRAINING in sections[0].text
    assert [x.key for x in sections] == ["compared", "compared-masks", "compared-classes"]
    cat = next(row for row in sections[2].table.rows if row[0].text == "cat")
    labels = [x.label for x in sections[2].table.columns]
    assert cat[labels.index("mask IoU")].text.startswith(f"▼ {MINUS}")


def test_a_shared_base_figure_is_resampled_once(tmp_path, monkeypatch):
    content = crowded_content(NUM_IMAGES)
    analysis = analysis_of(tmp_path, content, perfect(content))
    asked = []
    aps = Measure.aps
    monkeypatch.setattr(Measure, "aps", lambda self, w: asked.append(self.key) or aps(self, w))
    resampled_figures(analysis, np.ones((1, NUM_IMAGES), np.int32))
    bases = {id(x.base) for x in analysis.findings.measures.values() if x.base is not None}
    assert len(asked) == len(analysis.findings.measures) + len(bases)


def test_the_figure_shows_the_differences_of_the_table(tmp_path):
    pytest.importorskip("plotly", reason="figures need the extra 'report'")
    from mask_head_plugin.analysis.comparison_figures import comparison_figures

    content = crowded_content(NUM_IMAGES)
    ours = analysis_of(tmp_path, content, perfect(content, spoilt), "ours")
    made = compare(ours, analysis_of(tmp_path, content, perfect(content), "theirs"), 20)
    shown = comparison_figures(made)
    sizes, classes = shown["compared"][0].figure, shown["compared-classes"][0].figure
    by_key = {x.key: x.paired.difference for x in made.differences}
    titles = [x.text for x in classes.layout.annotations]
    assert titles == ["AP of boxes", "AP of masks", "mask IoU", "F1"]
    assert list(sizes.layout.yaxis.ticktext) == ["all objects", "small", "medium"]
    for title, axis, key in (
        ("AP of masks", "x2", Key("segm", "class AP", "cat")),
        ("F1", "x4", Key("segm", "class F1", "cat")),
    ):
        dots = {
            row[0]: x
            for trace in classes.data
            if trace.xaxis == axis and trace.x[0] is not None
            for row, x in zip(trace.customdata, trace.x, strict=True)
        }
        assert dots["cat"] == pytest.approx(by_key[key]), title
    assert not any(math.isnan(x) for trace in classes.data for x in trace.x if x is not None)


def test_better_and_worse_stand_next_to_their_caveat_and_numbers_have_one_decimal(tmp_path):
    content = crowded_content(NUM_IMAGES)
    ours = analysis_of(tmp_path, content, perfect(content, spoilt), "ours")
    made = compare(ours, analysis_of(tmp_path, content, perfect(content), "theirs"), 20)
    first, *others = made.sentences()
    assert first.count("worse on these images (one training each)") == 2
    assert others[-1].startswith("Worse for masks on these images (one training each): ")
    table = comparison_sections(made)[0].table
    findings = {row[-1].text for row in table.rows}
    assert "▼ worse on these images (one training each)" in findings
    cells = [cell.text for row in table.rows for cell in row[2:5]]
    assert not [x for x in [first, *cells] if re.search(r"\d\.\d\d", x.split(": ", 1)[-1])]
