"""MaskEvaluator: inputs, results and output files, in one process and in two."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from made_data import HW, encode, make_coco
from pycocotools import mask as coco_mask
from quick_processes import fork_server

from mask_head_plugin.evaluation import MaskEvaluator, coco_evaluator, counted_detections
from mask_head_plugin.evaluation.matching import Matches
from mask_head_plugin.structures import RLEMasks


def register(name, path, content):
    """Registers a COCO file and returns its name."""
    ids = sorted(x["id"] for x in content["categories"])
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=[f"class {k}" for k in range(len(ids))],
        thing_dataset_id_to_contiguous_id={category: k for k, category in enumerate(ids)},
        evaluator_type="coco",
    )
    return name


@pytest.fixture
def made(tmp_path):
    """Yields a registered data set's name and content, and the results of a model on it."""
    content, results = make_coco(7, most_copies=9)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    name = register(f"made_{tmp_path.name}", path, content)
    yield name, content, results
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def outputs_of(name, content, results, *, dense=False, mask_scores=False):
    """Yields the inputs and outputs of a model with the given results."""
    classes = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    for image in content["images"]:
        found = by_image[image["id"]]
        instances = Instances(HW)
        boxes = np.array([x["bbox"] for x in found]).reshape(-1, 4)
        boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        instances.pred_boxes = Boxes(torch.from_numpy(boxes))
        instances.scores = torch.tensor([x["score"] for x in found], dtype=torch.float64)
        instances.pred_classes = torch.tensor([classes[x["category_id"]] for x in found]).long()
        rles = [x["segmentation"] for x in found]
        rles = [{**rle, "counts": rle["counts"].encode()} for rle in rles]
        masks = RLEMasks(rles, HW)
        instances.pred_masks = torch.from_numpy(masks.numpy()) if dense else masks
        if mask_scores:
            instances.mask_scores = 1 - instances.scores
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def evaluate(evaluator, pairs):
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def without_nan(metrics):
    return {key: value for key, value in metrics.items() if not np.isnan(value)}


def test_boxes_and_masks_equal_detectron2s_evaluator(made, tmp_path):
    ours = evaluate(MaskEvaluator(made[0], output_dir=str(tmp_path / "a")), outputs_of(*made))
    stock = COCOEvaluator(made[0], output_dir=str(tmp_path / "b"))
    expected = evaluate(stock, outputs_of(*made))
    assert list(ours) == ["bbox", "segm", "boundary"]
    for task in ("bbox", "segm"):
        assert ours[task] == pytest.approx(expected[task], nan_ok=True, abs=1e-6)
    assert ours["boundary"].keys() == ours["segm"].keys()
    assert 0 < ours["boundary"]["AP"] < ours["segm"]["AP"]


def test_dense_masks_and_run_lengths_give_the_same_metrics(made):
    results = [evaluate(MaskEvaluator(made[0]), outputs_of(*made, dense=d)) for d in (False, True)]
    assert without_nan(results[0]["boundary"]) == without_nan(results[1]["boundary"])


def test_the_results_file_has_cocos_format(made, tmp_path):
    evaluate(MaskEvaluator(made[0], output_dir=str(tmp_path)), outputs_of(*made))
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    keys = ("image_id", "category_id", "score")

    def order(results):
        return sorted((*(x[k] for k in keys), x["segmentation"]["counts"]) for x in results)

    assert order(written) == order(made[2])
    assert all(coco_mask.decode(x["segmentation"]).shape == HW for x in written)


def test_metrics_and_matches_are_written(made, tmp_path):
    results = evaluate(MaskEvaluator(made[0], output_dir=str(tmp_path)), outputs_of(*made))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.json").read_text()
    written = json.loads(text, parse_constant=refuse)
    assert written["num_images"] == 6 and written["max_detections"] == 100
    for task in ("bbox", "segm", "boundary"):
        assert written[task]["AP"] == results[task]["AP"] and written[task]["AR"] > 0
        by_class = written[task]["by_class"]
        names = MetadataCatalog.get(made[0]).thing_classes
        assert list(by_class) == names and "APs" in by_class[names[0]]
        assert Matches.load(tmp_path / f"matches_{task}.npz").dt_matched.any()
    assert not list(tmp_path.glob("predictions_*")), (
        "the prediction log must be removed after the evaluation"
    )


def test_mask_scores_affect_only_the_ranking_of_masks(made, tmp_path):
    plain = evaluate(MaskEvaluator(made[0]), outputs_of(*made))
    evaluator = MaskEvaluator(made[0], output_dir=str(tmp_path))
    scored = evaluate(evaluator, outputs_of(*made, mask_scores=True))
    assert without_nan(scored["bbox"]) == without_nan(plain["bbox"])
    assert abs(scored["segm"]["AP"] - plain["segm"]["AP"]) > 1
    for result in json.loads((tmp_path / "coco_instances_results.json").read_text()):
        assert result["mask_score"] == pytest.approx(1 - result["score"])


def test_category_ids_that_detectron2_registers_late_are_used(made, tmp_path):
    """register_coco_instances fills in the metadata only when the data set is loaded."""
    name = made[0]
    late = f"late_{name}"
    register_coco_instances(late, {}, str(tmp_path / "truth.json"), "")
    expected = evaluate(MaskEvaluator(name), outputs_of(*made))
    evaluator = MaskEvaluator(late)
    DatasetCatalog.get(late)
    found = evaluate(evaluator, outputs_of(*made))
    assert found["segm"]["AP"] == pytest.approx(expected["segm"]["AP"])
    assert found["segm"]["AP"] > 5, "AP must be well above 0"
    DatasetCatalog.remove(late)
    MetadataCatalog.remove(late)


def test_without_mask_annotations_only_boxes_are_evaluated(made, tmp_path, caplog):
    content = {**made[1], "annotations": [dict(x) for x in made[1]["annotations"]]}
    for x in content["annotations"]:
        del x["segmentation"]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    results = evaluate(MaskEvaluator(made[0], semantic_threshold=0.5), outputs_of(*made))
    assert list(results) == ["bbox"] and "only boxes are evaluated" in caplog.text


def test_a_class_called_background_is_refused_before_evaluation(made, tmp_path):
    content = {**made[1], "categories": [dict(x) for x in made[1]["categories"]]}
    content["categories"][0]["name"] = "background"
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be unique and must not include 'background'"):
        MaskEvaluator(made[0], semantic_threshold=0.5)


@pytest.mark.parametrize("tasks", [("segm",), ("boundary",), ("bbox", "boundary")])
def test_only_the_requested_tasks_are_evaluated(made, tasks):
    assert tuple(evaluate(MaskEvaluator(made[0], tasks), outputs_of(*made))) == tasks


def test_semantic_metrics_are_computed_on_request(made):
    results = evaluate(MaskEvaluator(made[0], semantic_threshold=0.5), outputs_of(*made))
    assert 0 < results["semantic"]["mIoU"] < results["semantic"]["pACC"] <= 100


def test_predictions_without_masks_are_evaluated_on_boxes(made):
    pairs = list(outputs_of(*made))
    for _, outputs in pairs:
        outputs[0]["instances"].remove("pred_masks")
    assert list(evaluate(MaskEvaluator(made[0]), pairs)) == ["bbox"]


def test_ap_is_zero_without_detections_and_missing_without_predictions(made, caplog):
    results = evaluate(MaskEvaluator(made[0]), outputs_of(made[0], made[1], []))
    assert {task: results[task]["AP"] for task in results} == dict.fromkeys(results, 0)
    assert evaluate(MaskEvaluator(made[0]), []) == {}
    assert "no predictions were made for" in caplog.text


def test_a_file_without_annotations_gives_results_but_no_metrics(made, tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({k: v for k, v in made[1].items() if k != "annotations"}))
    assert evaluate(MaskEvaluator(made[0], output_dir=str(tmp_path)), outputs_of(*made)) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == len(made[2])


def test_without_any_objects_metrics_are_nan_as_in_detectron2(made, tmp_path):
    name, content, _ = made
    (tmp_path / "truth.json").write_text(json.dumps({**content, "annotations": []}))
    ours = MaskEvaluator(name, output_dir=str(tmp_path), semantic_threshold=0.5)
    actual = evaluate(ours, outputs_of(*made))
    expected = evaluate(COCOEvaluator(name, use_fast_impl=False), outputs_of(*made))
    for task in ("bbox", "segm"):
        assert actual[task].keys() == expected[task].keys()
        assert np.isnan([*actual[task].values(), *expected[task].values()]).all()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["segm"]["AP"] is None and len(written["segm"]["by_class"]) == 3


def test_resuming_after_a_crash_gives_the_same_metrics(made, tmp_path):
    pairs = list(outputs_of(*made))
    expected = evaluate(MaskEvaluator(made[0]), pairs)
    crashed = MaskEvaluator(made[0], output_dir=str(tmp_path))
    crashed.resume("weights 1")
    crashed.reset()
    for pair in pairs[:3]:
        crashed.process(*pair)
    resumed = MaskEvaluator(made[0], output_dir=str(tmp_path))
    resumed.resume("weights 1")
    finished = resumed.finished_image_ids
    assert finished == {inputs[0]["image_id"] for inputs, _ in pairs[:3]}
    left = [pair for pair in pairs if pair[0][0]["image_id"] not in finished]
    results = evaluate(resumed, left)
    for task, metrics in expected.items():
        assert without_nan(results[task]) == without_nan(metrics)


def test_predictions_of_other_weights_are_not_reused(made, tmp_path):
    crashed = MaskEvaluator(made[0], output_dir=str(tmp_path))
    crashed.resume("weights 1")
    crashed.reset()
    crashed.process(*next(outputs_of(*made)))
    other = MaskEvaluator(made[0], output_dir=str(tmp_path))
    other.resume("weights 2")
    assert other.finished_image_ids == set()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"proposals": None}, r"outputs have \['proposals'\], but no instances"),
        ("class", "image 5: predicted class 3, but the data set has 3 classes; is .*NUM_CLASSES"),
        ("nan", "image 5: the model returned scores that are NaN or infinite"),
    ],
)
def test_invalid_outputs_are_refused(made, output, message):
    if isinstance(output, str):
        instances = Instances(HW, pred_boxes=Boxes(torch.zeros(1, 4)))
        instances.scores = torch.tensor([float("nan") if output == "nan" else 0.5])
        instances.pred_classes = torch.tensor([3 if output == "class" else 0])
        output = {"instances": instances}
    evaluator = MaskEvaluator(made[0])
    evaluator.reset()
    with pytest.raises(ValueError, match=message):
        evaluator.process([{"image_id": 5}], [output])


def test_unknown_tasks_are_refused(made):
    with pytest.raises(ValueError, match=r"unknown tasks \['masks'\]; choose from"):
        MaskEvaluator(made[0], ["masks"])


def run_rank(rank, folder, queue):
    """Evaluates every second image in one of two processes."""
    init = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    content, results = make_coco(7, most_copies=9)
    name = register("two_processes", folder / "truth.json", content)
    evaluator = MaskEvaluator(name, output_dir=str(folder))
    pairs = list(outputs_of(name, content, results))[rank::2]
    queue.put((rank, dict(evaluate(evaluator, pairs))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_metrics_as_one(made, tmp_path):
    context = fork_server()
    queue = context.SimpleQueue()
    torch.multiprocessing.start_processes(
        run_rank, (tmp_path, queue), 2, start_method=context.get_start_method()
    )
    results = dict(queue.get() for _ in range(2))
    assert results[1] == {}
    for task, metrics in evaluate(MaskEvaluator(made[0]), outputs_of(*made)).items():
        assert without_nan(results[0][task]) == without_nan(metrics)


def test_all_of_300_perfect_detections_count_without_a_limit(tmp_path):
    masks = np.zeros((300, *HW), np.uint8)
    for k in range(300):
        masks[k, k // 20 * 4 : k // 20 * 4 + 3, k % 20 * 4 : k % 20 * 4 + 3] = 1
    rles = [encode(mask) for mask in masks]
    found = [
        {"image_id": 1, "category_id": 1, "bbox": coco_mask.toBbox(rle).tolist()} for rle in rles
    ]
    results = [{**x, "segmentation": rle, "score": 1.0} for x, rle in zip(found, rles, strict=True)]
    objects = [{**x, "id": k + 1, "iscrowd": 0, "area": 9.0} for k, x in enumerate(results)]
    content = {
        "images": [{"id": 1, "height": HW[0], "width": HW[1], "file_name": "x.png"}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": objects,
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    name = register("test_300_cells", path, content)
    try:
        for limit, least, most in ((None, 33, 34), (200, 66, 67), (-1, 100, 100)):
            evaluator = MaskEvaluator(name, max_dets_per_image=limit)
            found = evaluate(evaluator, outputs_of(name, content, results))
            for task in ("bbox", "segm", "boundary"):
                assert least <= round(found[task]["AP"], 6) <= most, (limit, task)
        with pytest.raises(ValueError, match="is 0, so no detection would count; -1 counts all"):
            MaskEvaluator(name, max_dets_per_image=0)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_the_limit_is_that_of_the_model_but_at_least_cocos():
    assert [counted_detections(k) for k in (-1, -5, 3, 100, 400)] == [-1, -1, 100, 100, 400]


def test_numpy_ids_are_accepted(made, tmp_path):
    name, content, results = made
    expected = evaluate(MaskEvaluator(name), outputs_of(name, content, results))
    pairs = [
        ([{"image_id": np.int64(inputs[0]["image_id"])}], outputs)
        for inputs, outputs in outputs_of(name, content, results)
    ]
    metadata = MetadataCatalog.get(name)
    mapping = metadata.thing_dataset_id_to_contiguous_id
    del metadata.thing_dataset_id_to_contiguous_id
    metadata.thing_dataset_id_to_contiguous_id = {np.int64(i): k for i, k in mapping.items()}
    found = evaluate(MaskEvaluator(name, output_dir=str(tmp_path / "out")), pairs)
    assert repr(found) == repr(expected)  # nan != nan, so compare as text


def test_an_invalid_id_is_reported_with_its_field(made):
    name, content, results = made
    inputs, outputs = next(iter(outputs_of(name, content, results)))
    evaluator = MaskEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"image_id 1\.5 is of type float; ids must be whole"):
        evaluator.process([{**inputs[0], "image_id": 1.5}], outputs)


def test_nested_nan_becomes_null_in_json():
    found = coco_evaluator.without_nan(
        {"segm": {"AP": float("nan"), "by_size": [1.0, float("nan"), ["x"]]}}
    )
    assert found == {"segm": {"AP": None, "by_size": [1.0, None, ["x"]]}}
