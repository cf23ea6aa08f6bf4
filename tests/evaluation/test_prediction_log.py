"""The prediction log: predictions survive a crash, and are not reused for other weights."""

from __future__ import annotations

import json

from mask_head_plugin.evaluation.prediction_log import PredictionLog, merge_lines


def results_of(image_id):
    return [{"image_id": image_id, "score": 0.1}]


def write(folder, fingerprint, image_ids, *, name="val", rank=0):
    log = PredictionLog(folder, name, fingerprint, rank)
    log.start()
    for image_id in image_ids:
        log.append(image_id, results_of(image_id))
    return log


def test_each_prediction_is_on_disk_before_the_log_is_closed(tmp_path):
    write(tmp_path, "abc", [1, "x/2"])
    (path,) = tmp_path.glob("predictions_val.abc.rank0.jsonl")
    assert [json.loads(line)["image_id"] for line in path.read_text().splitlines()] == [1, "x/2"]


def test_an_interrupted_evaluation_resumes(tmp_path):
    write(tmp_path, "abc", [1, 2])
    write(tmp_path, "abc", [3], rank=1)
    log = PredictionLog(tmp_path, "val", "abc", 0)
    assert log.finished == {1, 2, 3}
    log.start()
    log.append(4, results_of(4))
    assert [x["image_id"] for x in merge_lines(log.lines())] == [1, 2, 3, 4]
    assert PredictionLog(tmp_path, "val", "abc", 0).finished == {1, 2, 3, 4}
    assert PredictionLog(tmp_path, "val", "abc", 1).lines() == [], (
        "only the first process may return the old predictions"
    )


def test_an_image_with_a_truncated_line_is_predicted_again(tmp_path):
    write(tmp_path, "abc", [1, 2]).close()
    path = tmp_path / "predictions_val.abc.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    log = PredictionLog(tmp_path, "val", "abc", 0)
    assert log.finished == {1}
    log.start()
    log.append(2, results_of(2))
    log.close()
    assert PredictionLog(tmp_path, "val", "abc", 0).finished == {1, 2}


def test_logs_with_other_fingerprints_are_deleted_and_other_data_sets_kept(tmp_path):
    write(tmp_path, "old", [1])
    write(tmp_path, "old", [1], name="val_2")
    log = PredictionLog(tmp_path, "val", "new", 0)
    assert log.finished == set()
    log.start()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"predictions_val.new.rank0.jsonl", "predictions_val_2.old.rank0.jsonl"}


def test_a_log_that_another_process_has_open_is_kept(tmp_path):
    for fingerprint in ("", "abc"):
        second = write(tmp_path, fingerprint, [2], rank=1)
        first = PredictionLog(tmp_path, "val", fingerprint, 0)
        first.start()
        second.append(3, results_of(3))
        (path,) = tmp_path.glob(f"predictions_val.{fingerprint or 'new'}.rank1.jsonl")
        assert len(path.read_text().splitlines()) == 2


def test_without_a_fingerprint_every_start_is_from_scratch(tmp_path):
    log = write(tmp_path, "", [1, 2])
    log.start()
    log.append(3, results_of(3))
    assert [x["image_id"] for x in merge_lines(log.lines())] == [3]
    assert PredictionLog(tmp_path, "val", "", 0).finished == set()
    log.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_occurs_twice_counts_once():
    lines = [json.dumps({"image_id": k, "results": results_of(k)}) for k in (1, 2, 1)]
    assert [x["image_id"] for x in merge_lines(lines)] == [1, 2]


def test_without_a_folder_predictions_are_kept_in_memory():
    log = write(None, "abc", [1])
    assert len(log.lines()) == 1 and log.finished == set()
    log.remove()
