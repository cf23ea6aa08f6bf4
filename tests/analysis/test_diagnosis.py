"""The diagnosis of a model with one known fault names that fault and nothing else."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_scene import HW, crowded_content, decode, encode, perfect, rectangle

from mask_head_plugin.analysis.analysis import analyze
from mask_head_plugin.analysis.diagnosis import _grid
from mask_head_plugin.analysis.run_files import find_run_files
from mask_head_plugin.ops import crop_masks, encode_masks


@pytest.fixture
def analysis_of(tmp_path):
    """Returns a function that analyses detections of crowded_content."""

    def analysis(results):
        (tmp_path / "annotations.json").write_text(json.dumps(crowded_content()))
        (tmp_path / "results.json").write_text(json.dumps(results))
        return analyze(find_run_files(tmp_path / "results.json", tmp_path / "annotations.json"))

    return analysis


def sentences_starting(sentences, *starts):
    """Returns, for each of `starts`, the only sentence that begins with it."""
    found = [[x for x in sentences if x.startswith(start)] for start in starts]
    assert [len(x) for x in found] == [1] * len(starts), sentences
    return [x[0] for x in found]


def no_sentence_starts(sentences, *starts):
    assert not [x for x in sentences if x.startswith(starts)], sentences


MASKS = "Among groups of at least 20 found objects, masks are worst"
SHIFT, AREA = "Boxes lie", "Masks are too"
LOST = ("Boxes at IoU 0.5 lose", "Masks at IoU 0.5 lose")
CLASSES, SCORES = "Classes are confused", "Scores of some"
GRID_28, GRID_56 = "28 x 28 grid only", "56 x 56 grid only"


def test_a_perfect_model_gets_its_ap_and_no_findings(analysis_of):
    sentences = analysis_of(perfect(crowded_content())).diagnosis
    sentences_starting(sentences, "AP is 100.0 for boxes (AP50 100.0) and 100.0 for masks")
    no_sentence_starts(sentences, SHIFT, AREA, CLASSES, SCORES, *LOST, "By branch")


def test_lowered_mask_logits_are_diagnosed_as_masks_that_are_too_small(analysis_of):
    """Subtracts a constant from the logits of good masks, which shrinks the masks."""

    def shrink(result):
        x, y, w, h = result["bbox"]
        box = torch.tensor([[x, y, x + w, y + h]])
        bits = torch.from_numpy(decode(result)[None])
        soft = torch.nn.functional.avg_pool2d(
            crop_masks(bits, box, 28).float()[None], 9, 1, 4, count_include_pad=True
        )
        logits = 8 * (soft[0] - 0.5) - 2.5
        result["segmentation"] = _text(encode_masks(logits.sigmoid(), box, HW)[0])

    analysis = analysis_of(perfect(crowded_content(), shrink))
    sentences = analysis.diagnosis
    area, branch = sentences_starting(sentences, AREA, "By branch")
    assert "too small" in area and branch.endswith("The mask branch has the most to gain.")
    assert "perfect boxes would add 0.0" in branch
    no_sentence_starts(sentences, SHIFT, CLASSES, SCORES, "Boxes at IoU")
    missing, extra = analysis.quality.missing.sum(), analysis.quality.extra.sum()
    assert missing > 10 * extra


def test_shifted_boxes_are_diagnosed_with_distance_and_direction(analysis_of):
    def shift(result):
        x, y, w, h = result["bbox"]
        result["bbox"] = [x + 3, y, w, h]
        mask = np.roll(decode(result), 3, 1)
        mask[:, :3] = 0
        result["segmentation"] = encode(mask)

    analysis = analysis_of(perfect(crowded_content(), shift))
    (sentence,) = sentences_starting(analysis.diagnosis, SHIFT)
    assert sentence.startswith("Boxes lie 3.0 px too far right")
    no_sentence_starts(analysis.diagnosis, AREA, CLASSES, SCORES)
    oracles = {x.name: x.value for x in analysis.findings.measures.values() if x.task == "bbox"}
    base = analysis.findings.value("bbox", "AP", "AP")
    assert oracles["perfect boxes"] == pytest.approx(100 - base)
    assert oracles["perfect classes"] == 0 and base < 80


def test_the_most_costly_errors_are_named_in_a_sentence(analysis_of):
    content = crowded_content()

    def exchange(result):
        if result["image_id"] % 3 == 0:
            result["category_id"] = result["category_id"] % 3 + 1

    results = [x for k, x in enumerate(perfect(content, exchange)) if k % 8]
    sentences = analysis_of(results).diagnosis
    for sentence in sentences_starting(sentences, *LOST):
        assert re.search(
            r"lose most to wrong classes: \d+\.\d AP50 \(\d+ detections\), then to missed objects "
            r"\(\d+\.\d\)\.$",
            sentence,
        ), sentence


def test_the_finding_about_masks_names_the_smallest_size_of_a_group(analysis_of):
    """Otherwise, a smaller group with worse masks in the table would contradict it."""

    def spoil(result):
        _, y, _, h = (int(v) for v in result["bbox"])
        if result["category_id"] == 1:
            mask = decode(result)
            mask[y : y + h // 3] = 0
            result["segmentation"] = encode(mask)

    (sentence,) = sentences_starting(
        analysis_of(perfect(crowded_content(), spoil)).diagnosis, MASKS
    )
    assert "masks are worst on objects with holes (mean IoU" in sentence


def test_two_swapped_classes_are_diagnosed_as_confused(analysis_of):
    def exchange(result):
        result["category_id"] = {1: 1, 2: 3, 3: 2}[result["category_id"]]

    analysis = analysis_of(perfect(crowded_content(), exchange))
    sentence, branch = sentences_starting(analysis.diagnosis, CLASSES, "By branch")
    assert "100% of the objects of class “cat” are taken for “bird”" in sentence
    assert "100% of the objects of class “bird” are taken for “cat”" in sentence
    assert "dog" not in sentence and "The classifier has the most" in branch
    no_sentence_starts(analysis.diagnosis, SHIFT, AREA)
    assert analysis.findings.value("segm", "error", "class", 0.5) == pytest.approx(200 / 3)


def test_halved_scores_of_a_class_are_found_and_halve_its_threshold(analysis_of):
    """AP cannot show this, because it depends only on the order of detections within a class."""

    def halve(result):
        if result["category_id"] == 2:
            result["score"] /= 2

    def with_background(results):
        corner = {"bbox": [150, 110, 8, 8], "segmentation": encode(rectangle(150, 110, 8, 8))}
        return [*results, *({**x, **corner, "score": 0.3 * x["score"]} for x in results)]

    usual = analysis_of(with_background(perfect(crowded_content())))
    no_sentence_starts(usual.diagnosis, SCORES)
    halved = analysis_of(with_background(perfect(crowded_content(), halve)))
    assert halved.findings.value("segm", "AP", "AP") == pytest.approx(100)
    (sentence,) = sentences_starting(halved.diagnosis, SCORES)
    assert "cat (too low" in sentence and "dog" not in sentence and "bird" not in sentence
    before, after = ({x.class_name: x.score for x in a.thresholds} for a in (usual, halved))
    assert after["cat"] == pytest.approx(before["cat"] / 2, abs=0.02)
    assert after["dog"] == before["dog"] and after["bird"] == before["bird"]


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        (  # AP 75.3: the grid allows 20.9 more than the model reaches
            {"perfect masks": 21.6, "perfect boxes": 3.3, GRID_28: 20.9, GRID_56: 24.2},
            "The 28 x 28 grid would allow 96.2, so the grid is not the limit yet: improve the mask "
            "branch first.",
        ),
        (
            {"perfect masks": 9.0, "perfect boxes": 12.0, GRID_28: 24.6, GRID_56: 24.7},
            "The 28 x 28 grid would allow 99.9, so the grid is not the limit yet: improve the box "
            "branch first.",
        ),
        (
            {"perfect masks": 12.0, "perfect boxes": 3.3, GRID_28: 5.0, GRID_56: 15.0},
            "The 28 x 28 grid would allow 80.3, and a 56 x 56 grid 90.3: this model is close to "
            "that limit, so a finer grid (MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION) is worth a try.",
        ),
        (
            {"perfect masks": 2.0, GRID_28: 5.0, GRID_56: 5.5},
            "The 28 x 28 grid would allow 80.3, and a 56 x 56 grid 80.8: a finer grid would gain "
            "little.",
        ),
    ],
)
def test_a_finer_grid_is_recommended_only_close_to_the_limit_of_the_grid(gains, sentence):
    values = {("AP", "AP"): 75.3, **{("oracle", name): gain for name, gain in gains.items()}}
    findings = SimpleNamespace(
        main_task="segm",
        measures={("segm", *key, 0.0) for key in values},
        oracles=lambda task: list(gains),
        value=lambda task, *key: values[key],
    )
    assert list(_grid(findings, 28)) == [sentence]


def test_a_run_without_detections_gets_a_single_sentence(analysis_of):
    sentences = analysis_of([]).diagnosis
    assert sentences[0] == "Nothing was detected: AP is 0, and every object is missed."
    no_sentence_starts(sentences, SHIFT, AREA, CLASSES, SCORES, *LOST)


def _text(rle):
    return {"size": rle["size"], "counts": rle["counts"].decode()}
