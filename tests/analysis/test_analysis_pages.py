"""The analysis tool as a user runs it: its pages for different runs, and its errors."""

from __future__ import annotations

import json
import math
import re
import sys

import cv2
import numpy as np
import pytest
from conftest import load_script
from made_scene import (
    HW,
    crowded_content,
    decode,
    detection,
    encode,
    objects_of,
    perfect,
    rectangle,
)

from mask_head_plugin.pages import paper_plots

pytest.importorskip("plotly", reason="analysis.html needs the extra 'report'")


def write_run(folder, content, results, name="run"):
    """Writes a run as train_net.py would, with images next to the annotations."""
    (folder / "images").mkdir(exist_ok=True)
    for image in content["images"]:
        picture = np.full((*HW, 3), 90, np.uint8)
        cv2.imwrite(str(folder / "images" / image["file_name"]), picture)
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(content))
    inference = folder / name / "inference"
    inference.mkdir(parents=True)
    (inference / "coco_instances_results.json").write_text(json.dumps(results))
    metrics = {"dataset": "made", "annotations": str(annotations), "max_detections": 100}
    (inference / "metrics.json").write_text(json.dumps(metrics))
    return folder / name


def worse(result):
    """In every second image, removes the middle of each mask and turns cats into birds."""
    if result["image_id"] % 2:
        mask = decode(result)
        x, y, w, h = (int(v) for v in result["bbox"])
        mask[y + 4 : y + h - 4, x + 4 : x + w - 4] = 0
        result["segmentation"] = encode(mask)
        result["category_id"] = {1: 1, 2: 3, 3: 3}[result["category_id"]]


def tool(capsys, *args, plots=None):
    """Runs tools/analyze.py in this process; returns the exit code, stdout and stderr.

    Does not save the figures for papers, which would take seconds. If ``plots`` is a dict, the
    figures are added to it by name.
    """

    def draw(figures, folder):
        assert folder.name == "analysis_figures" and folder.is_dir()
        if plots is not None:
            plots.update({x.name: paper_plots.paper_plot(x) for x in figures})

    module = load_script("tools/analyze.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
        patch.setattr(paper_plots, "save_figures", draw)
        code = module.main()
    return code, *capsys.readouterr()


def without_library(page):
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def test_the_json_markdown_and_html_of_a_run_agree(tmp_path, capsys):
    content = crowded_content(12)
    content["categories"][0]["name"] = "dog <b>|x|</b>"
    run = write_run(tmp_path, content, perfect(content, worse))
    code, out, _ = tool(capsys, run)
    folder = run / "inference"
    assert code == 0 and str(folder / "analysis.html") in out
    found = json.loads((folder / "analysis.json").read_text())
    text = (folder / "analysis.md").read_text()
    page = without_library((folder / "analysis.html").read_text())
    for sentence in found["diagnosis"]:
        assert sentence.replace("<", "&lt;")[:40] in page.replace("&#39;", "'")
    ap = f"{found['tasks']['segm']['AP']:.1f}"
    assert f"| masks | {ap} |" in text and f">{ap}</td>" in page
    flag = re.search(r"```text\n(--class-thresholds .*)\n```", text).group(1)
    assert " bird=" in flag and "--class-thresholds 'dog <b>|x|</b>=" in flag
    # The page embeds its pictures, fetches nothing, and escapes names.
    assert page.count('src="data:image/jpeg') >= 6 and not re.search(r'(src|href)="http', page)
    assert "<b>|x|" not in page and "dog <b>" not in text.replace(flag, "")
    assert found["tasks"]["bbox"]["errors"]["0.5"]["class"]["count"] > 0
    assert found["num_objects"] == 48
    for_papers = {x.name for x in (folder / "analysis_tables").iterdir()}
    assert {"classes.csv", "classes.tex"} <= for_papers
    assert "dog \\textless{}b" in (folder / "analysis_tables" / "classes.tex").read_text()


def test_a_comparison_with_another_run_gives_every_difference_an_interval(tmp_path, capsys):
    content = crowded_content(12)
    good = write_run(tmp_path, content, perfect(content), "good")
    bad = write_run(tmp_path, content, perfect(content, worse), "bad")
    args = ("--draws", 10, "--output", tmp_path / "out")
    plots = {}
    code, _, _ = tool(capsys, bad, "--compare", good, *args, plots=plots)
    assert code == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["comparison"]
    assert found["results"] == str(good / "inference" / "coco_instances_results.json")
    by_key = {(x["task"], x["group"], x["name"], x["threshold"]): x for x in found["differences"]}
    ap = by_key["segm", "AP", "AP", 0]
    assert ap["other"] == 100 and ap["difference"] == pytest.approx(ap["value"] - 100)
    assert ap["low"] <= ap["difference"] <= ap["high"] < 0 and ap["finding"] == "worse"
    # The figure of an error is the AP that it costs, so a larger figure is worse.
    assert by_key["bbox", "error", "class", 0.5]["finding"] == "worse"
    assert by_key["bbox", "error", "class", 0.5]["difference"] > 0
    assert by_key["segm", "class AP", "cat", 0]["difference"] < -40
    for name in ("compared-sizes", "compared-by-class", "errors", "confusion", "error-maps"):
        assert plots[name].axes, f"{name} is not drawn for papers"
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert "Images that changed most" in page and "this run: F1" in page
    same = tool(capsys, good, "--compare", good, *args)
    assert same[0] == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["comparison"]
    assert {x["difference"] for x in found["differences"]} <= {0.0, None}


def test_a_run_with_boxes_only_is_analysed(tmp_path, capsys):
    content = crowded_content(12)
    results = [{k: v for k, v in x.items() if k != "segmentation"} for x in perfect(content)]
    run = write_run(tmp_path, content, results)
    code, _, _ = tool(capsys, run)
    text = (run / "inference" / "analysis.md").read_text()
    assert code == 0 and "The run has no masks" in text and "| boxes | 100.0" in text
    assert "Mask quality" not in text


def test_a_run_without_detections_or_readable_images_still_gets_pages(tmp_path, capsys):
    run = write_run(tmp_path, crowded_content(12), [])
    (tmp_path / "images" / "1.png").write_text("no image")
    assert tool(capsys, run)[0] == 0
    assert "Nothing was detected" in (run / "inference" / "analysis.md").read_text()


def test_a_results_file_from_any_tool_needs_only_annotations(tmp_path, capsys):
    content = crowded_content(12)
    (tmp_path / "ann.json").write_text(json.dumps(content))
    file = tmp_path / "results.json"
    file.write_text(json.dumps(perfect(content)))
    code, _, err = tool(capsys, file)
    assert code == 2 and "--annotations FILE" in err
    assert tool(capsys, file, "--annotations", tmp_path / "ann.json")[0] == 0
    assert "name their folder with --images" in (tmp_path / "analysis.html").read_text()


CONTENT = objects_of([(1, 1, rectangle(10, 10, 40, 40))])
RIGHT = detection(1, 1, rectangle(10, 10, 40, 40))
MISFITS = {
    "image_id": ([{**RIGHT, "image_id": 7}], "images that .* lacks: image_id 7"),
    "category_id": ([{**RIGHT, "category_id": 0}], "categories that .* category_id 0"),
    "size": (
        [{**RIGHT, "segmentation": {"size": [5, 5], "counts": "0"}}],
        r"entry 0 \(image 1\): its segmentation cannot be read: an RLE has the size",
    ),
    "some without": ([RIGHT, {**RIGHT, "segmentation": None}], "1 of 2 detections has no segm"),
    "score": ([{**RIGHT, "score": float("nan")}], "score is nan"),
    "text as score": ([RIGHT, {**RIGHT, "score": "0.9"}], "entry 1: score is '0.9', not a finite"),
    "true as score": ([RIGHT, {**RIGHT, "score": True}], "entry 1: score is True, not a finite"),
    "text in a box": ([{**RIGHT, "bbox": [1, 2, 3, "4"]}], "entry 0: bbox is .*'4'"),
    "box": ([{**RIGHT, "bbox": [1, 2, 3]}], r"bbox is \[1, 2, 3\]"),
    "no list": ({"x": 1}, "not a results file"),
    "text as id": ([{**RIGHT, "image_id": "1"}], r"image_id '1' \(it has 1"),
    "list as id": ([{**RIGHT, "image_id": [1]}], r"entry 0: image_id is \[1\], not a number or t"),
    "no id": ([RIGHT, {"score": 0.5}], "entry 1: has no image_id"),
    "two corners": ([{**RIGHT, "segmentation": [[1, 1, 5, 5]]}], "entry 0 .* three corners"),
    "not finite": ([{**RIGHT, "segmentation": [[1, 1, 9, 1, 9, math.nan]]}], "entry 0 .*not finit"),
    "far": ([{**RIGHT, "segmentation": [[1, 1, 9, 1, 9, 1e7]]}], "entry 0 .*exceed a million"),
    "no polygon": ([{**RIGHT, "segmentation": [None]}], "entry 0: .* not a list of polygons"),
    "no mask": ([{**RIGHT, "segmentation": "x"}], "entry 0: .* 'x', neither polygons nor an RLE"),
    "broken counts": (
        [{**RIGHT, "segmentation": {**RIGHT["segmentation"], "counts": "zzzz!!!"}}],
        r"entry 0 \(image 1\): the counts of its mask do not add up to an image",
    ),
    "percent": ([{**RIGHT, "score": 99.2}], "entry 0: score is 99.2, not 0 to 1; if scores are in"),
    "corners": ([{**RIGHT, "bbox": [5, 5, -2, 3]}], "entry 0: bbox .* has a negative size"),
    "huge": ([{**RIGHT, "score": 10**400}], "entry 0: score is 1000"),
}


def with_first(**changed):
    """Returns CONTENT with some values of its first annotation changed."""
    first, *others = CONTENT["annotations"]
    return {**CONTENT, "annotations": [{**first, **changed}, *others]}


BAD_ANNOTATIONS = {
    "a list": ([], "is not a COCO annotation file"),
    "no object": ({**CONTENT, "annotations": [1]}, "annotations is not a list of objects"),
    "twice": ({**CONTENT, "images": CONTENT["images"] * 2}, "has image 1 twice"),
    "names": ({**CONTENT, "categories": CONTENT["categories"] * 2}, "has category 'dog' twice"),
    "none": ({**CONTENT, "annotations": []}, "has no annotations: there is nothing to compare"),
    "crowds": (
        {**CONTENT, "annotations": [{**x, "iscrowd": 1} for x in CONTENT["annotations"]]},
        "has only crowds",
    ),
    "counts": (
        with_first(segmentation={**RIGHT["segmentation"], "counts": "0"}),
        "annotation 1: the counts of its mask",
    ),
    "box": (with_first(bbox=[1, 2, 3]), "annotations: entry 0: bbox is [1, 2, 3], not [x, y,"),
    "area": (with_first(area="large"), "annotations: entry 0: area is 'large', not a finite"),
    "negative box": (with_first(bbox=[1, 2, -3, 4]), "entry 0: bbox [1, 2, -3, 4] has a negative"),
    "negative area": (with_first(area=-1), "annotations: entry 0: area is -1, which is negative"),
    "crowd": (with_first(iscrowd="yes"), "annotations: entry 0: iscrowd is 'yes', not 0 or 1"),
    "text as mask": (with_first(segmentation="x"), "entry 0: its segmentation is 'x', neither"),
    "flat polygon": (with_first(segmentation=[1, 1, 9, 1, 9, 9]), "is not a list of polygons"),
    "no counts": (with_first(segmentation={"size": HW}), "entry 0: its segmentation is an RLE wi"),
    "null counts": (
        with_first(segmentation={"size": HW, "counts": None}),
        "entry 0: its segmentation is an RLE without size [height, width] and counts",
    ),
    "category twice": (
        {**CONTENT, "categories": [*CONTENT["categories"], {"id": 1, "name": "x"}]},
        "has category 1 twice",
    ),
    "surrogate": (
        {**CONTENT, "categories": [*CONTENT["categories"], {"id": 9, "name": "\ud800"}]},
        "categories: entry 3: name is '\\ud800', which is not valid Unicode",
    ),
    "lvis": (
        {**CONTENT, "images": [{**CONTENT["images"][0], "neg_category_ids": None}]},
        "images: entry 0: neg_category_ids is None, not a list",
    ),
    "object of": (with_first(image_id=[1]), "annotations: entry 0: image_id is [1], not a number"),
    "unknown": (with_first(image_id=7), "annotation 1 names image 7"),
    "image id": (
        {**CONTENT, "images": [*CONTENT["images"], {"file_name": "x.png"}]},
        "images: entry 1: id is None, not a number or text",
    ),
    "height": (
        {**CONTENT, "images": [{**CONTENT["images"][0], "height": "120"}]},
        "images: entry 0: height is '120', not a whole number",
    ),
    "category id": (
        {**CONTENT, "categories": [*CONTENT["categories"], {"name": "x", "id": None}]},
        "categories: entry 3: id is None, not a number or text",
    ),
    "polygon": (with_first(segmentation=[[*"abcdef"]]), "entry 0: its segmentation cannot be read"),
    "nan": (
        with_first(segmentation=[[1, 1, 5, 5, math.nan, 9]]),
        "coordinates that are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_an_error_names_annotations_that_cannot_be_used(tmp_path, capsys, case):
    content, message = BAD_ANNOTATIONS[case]
    run = write_run(tmp_path, CONTENT, [RIGHT])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    code, out, err = tool(capsys, run)
    assert code == 2 and not out and err.count("\n") == 1
    assert message in err and err.count("annotations.json") == 1


@pytest.mark.parametrize("case", MISFITS)
def test_an_error_names_results_that_do_not_fit(tmp_path, capsys, case):
    results, message = MISFITS[case]
    run = write_run(tmp_path, CONTENT, results)
    code, out, err = tool(capsys, run)
    assert code == 2 and not out and err.count("\n") == 1
    assert re.search(message, err) and "coco_instances_results.json" in err


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"max_detections": "many"}, "max_detections is 'many', not a number of detections"),
        ({"max_detections": [1]}, r"max_detections is \[1\], not"),
        ({"max_detections": 0}, "max_detections is 0, not"),
        ({"max_detections": True}, "max_detections is True, not"),
        ({"annotations": 5}, "annotations is 5, not a path"),
        ({"annotations": ["x"]}, r"annotations is \['x'\], not a path"),
        ({"dataset": 7}, "dataset is 7, not a name"),
    ],
)
def test_a_wrong_entry_of_metrics_json_is_refused(tmp_path, capsys, entry, told):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    path = run / "inference" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    code, out, err = tool(capsys, run)
    assert code == 2 and not out and err.count("\n") == 1
    assert re.search(f"{path}: {told}.*; correct it, or evaluate the run again", err)


@pytest.mark.parametrize("text", ['{"max_detections": 5', "[1]", "\0", ""])
def test_a_damaged_metrics_json_is_reported_and_the_records_of_a_run_are_not(
    tmp_path, capsys, caplog, text
):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    path, annotations = run / "inference" / "metrics.json", tmp_path / "annotations.json"
    path.write_text(text)
    assert tool(capsys, run, "--annotations", annotations)[0] == 0
    assert f"{path} is ignored, so 100 detections count per image and class: " in caplog.text
    caplog.clear()
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    assert tool(capsys, run, "--annotations", annotations)[0] == 0
    assert "is ignored" not in caplog.text


def test_a_config_that_cannot_be_used_is_reported(tmp_path, capsys, caplog):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    (run / "config.yaml").write_text("MODEL: {ROI_MASK_HEAD: {POOLER_RESOLUTION: 0}}")
    code, _, err = tool(capsys, run)
    assert code == 2 and f"{run / 'config.yaml'}: MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is 0" in err
    (run / "config.yaml").write_text("MODEL: [")
    assert tool(capsys, run)[0] == 0
    assert f"{run / 'config.yaml'} is ignored, so masks of 28 x 28 are assumed: " in caplog.text


def test_polygons_that_enclose_nothing_are_reported(tmp_path, capsys, caplog):
    run = write_run(tmp_path, with_first(segmentation=[[1, 1, 5, 5]]), [RIGHT])
    assert tool(capsys, run)[0] == 0
    assert "no mask can match 1 annotation whose polygons enclose no pixel, such as" in caplog.text


def test_a_file_name_that_no_disk_can_have_leaves_out_the_picture(tmp_path, capsys):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    images = [{**x, "file_name": "x" * 300} for x in CONTENT["images"]]
    (tmp_path / "annotations.json").write_text(json.dumps({**CONTENT, "images": images}))
    assert tool(capsys, run)[0] == 0
    assert "The images were not found" in (run / "inference" / "analysis.html").read_text()


@pytest.mark.parametrize("flag", ["--output", "--compare", "--annotations", "--images"])
def test_an_empty_path_is_not_the_current_folder(tmp_path, capsys, flag):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    with pytest.raises(SystemExit, match="2"):
        tool(capsys, run, flag, "")
    assert f"argument {flag}: the path is empty; name one" in capsys.readouterr().err


def test_draws_without_a_comparison_are_refused(tmp_path, capsys):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    for value in (0, 300):
        with pytest.raises(SystemExit, match="2"):
            tool(capsys, run, "--draws", value)
        assert "--draws has no effect without --compare OTHER_RUN" in capsys.readouterr().err


def test_folders_with_no_or_several_results_are_refused_with_advice(tmp_path, capsys):
    code, _, err = tool(capsys, tmp_path)
    assert code == 2 and "--eval-only" in err
    run = write_run(tmp_path, CONTENT, [RIGHT])
    for name in ("one", "two", "keypoints"):
        (run / "inference" / name).mkdir()
        for file in ("coco_instances_results.json", "metrics.json"):
            content = (run / "inference" / file).read_text()
            (run / "inference" / name / file).write_text(content)
    (run / "inference" / "coco_instances_results.json").unlink()
    code, _, err = tool(capsys, run)
    assert code == 2 and "one, two" in err and "--dataset" in err
    assert tool(capsys, run, "--dataset", "two")[0] == 0
    code, _, err = tool(capsys, run / "inference" / "two", "--dataset", "other")
    assert code == 2 and "--dataset other does not" in err and "has the results of made" in err
    assert (run / "inference" / "two" / "analysis.html").is_file()
    (tmp_path / "annotations.json").unlink()
    code, _, err = tool(capsys, run, "--dataset", "one")
    assert code == 2 and "annotations.json does not exist" in err


def test_an_unusable_output_folder_is_refused_before_the_analysis(tmp_path, capsys):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    (run / "inference" / "coco_instances_results.json").write_text("would be refused")
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        code, out, err = tool(capsys, run, "--output", tmp_path / name)
        assert code == 2 and not out and err.count("\n") == 1
        assert f"--output {tmp_path / name} is not a folder that can be written to" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_cannot_be_compared_is_refused(tmp_path, capsys):
    run = write_run(tmp_path, CONTENT, [RIGHT])
    code, _, err = tool(capsys, run, "--compare", tmp_path / "none")
    assert code == 2 and "none" in err
    code, _, err = tool(capsys, run, "--compare", run, "--draws", 1)
    assert code == 2 and "--draws 1" in err


def test_runs_that_were_evaluated_on_different_objects_are_not_compared(tmp_path, capsys):
    content = crowded_content(4)
    (tmp_path / "other").mkdir()
    run = write_run(tmp_path, content, perfect(content))
    first = {**content, "annotations": content["annotations"][1:]}
    other = write_run(tmp_path / "other", first, perfect(first))
    code, out, err = tool(capsys, run, "--compare", other)
    assert code == 2 and not out and f"{tmp_path / 'other' / 'annotations.json'} differ in" in err
    flag = ("--annotations", tmp_path / "annotations.json", "--draws", 2)
    assert tool(capsys, run, "--compare", other, *flag)[0] == 0
    (other / "inference" / "metrics.json").unlink()
    assert tool(capsys, run, "--compare", other, "--draws", 2)[0] == 0


def test_a_comparison_says_if_the_runs_count_different_numbers_of_detections(tmp_path, capsys):
    content = crowded_content(4)
    runs = [write_run(tmp_path, content, perfect(content), name) for name in ("a", "b")]
    told = "different numbers of detections per image and class (here 100, there all)"
    for limit, is_told in ((100, False), (-1, True)):
        path = runs[1] / "inference" / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_detections": limit}))
        assert tool(capsys, runs[0], "--compare", runs[1], "--draws", 2)[0] == 0
        assert (told in (runs[0] / "inference" / "analysis.md").read_text()) is is_told


def test_a_grid_is_shown_as_a_limit_without_a_gain(tmp_path, capsys):
    content = crowded_content(12)
    run = write_run(tmp_path, content, perfect(content, worse))
    assert tool(capsys, run)[0] == 0
    text = (run / "inference" / "analysis.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| 28 x 28 grid only")]
    assert re.search(r"\| \d+\.\d \| +\|$", row) and "+" not in row
