"""Images in both splits: the same file, the same bytes, or, by name, parts of one photograph."""

from __future__ import annotations

import json

from mask_head_plugin.dataset_check import photographs
from mask_head_plugin.dataset_check.train_test_overlap import shared_images


def write(folder, **contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [(str(folder), str(folder / name)) for name in contents]


def test_each_image_is_reported_once_with_the_strongest_evidence(tmp_path):
    train = write(
        tmp_path / "train",
        **{"a.png": b"a" * 9000, "b.png": b"b" * 9000, "c_0_0.png": b"c", "d.png": b"d" * 7000},
    )
    test = write(
        tmp_path / "test",
        **{"copy of b.png": b"b" * 9000, "c_0_64.png": b"C" * 3, "d.png": b"D" * 7000, "e": b""},
    )
    (tmp_path / "test" / "link.png").symlink_to(tmp_path / "train" / "a.png")
    test.append((str(tmp_path / "test"), str(tmp_path / "test" / "link.png")))
    test.append((str(tmp_path / "test"), str(tmp_path / "test" / "missing.png")))
    found = [(words, [path for path, _ in pairs]) for words, pairs in shared_images(train, test)]
    folder = tmp_path / "test"
    assert found == [
        ("the same file", [str(folder / "link.png")]),
        ("the same content in another file", [str(folder / "copy of b.png")]),
        ("parts or versions of one photograph, by name", [str(folder / "c_0_64.png")]),
    ]


def test_the_same_name_in_two_folders_is_not_one_photograph(tmp_path):
    train, test = (
        write(tmp_path / folder, **{"0001.png": folder.encode(), "scene_01_0001.png": b"s" * 2})
        for folder in ("train", "test")
    )
    (tmp_path / "test" / "scene_01_0001.png").write_bytes(b"another frame")
    assert shared_images(train, test) == []


def test_files_are_sampled_only_if_sizes_agree_and_read_completely_only_if_samples_agree(
    tmp_path, monkeypatch
):
    train = write(
        tmp_path / "train", a=b"1" * 100, b=b"2" * 20_000, c=bytes(20_000) + b"4", d=b"5" * 7
    )
    test = write(tmp_path / "test", a=b"1" * 99, b=b"3" * 20_000, c=b"\1" + bytes(20_000))
    read = {"_probe": [], "_whole": []}
    for name, paths in read.items():
        original = getattr(photographs, name)
        monkeypatch.setattr(
            photographs,
            name,
            lambda path, paths=paths, original=original: paths.append(path[-1]) or original(path),
        )
    assert shared_images(train, test) == []
    assert sorted(read["_probe"]) == ["b", "b", "c", "c"] and sorted(read["_whole"]) == ["c", "c"]


def test_a_run_logs_the_number_of_shared_images(tmp_path, monkeypatch, caplog):
    from broken_data import make_good
    from test_config_datasets import configure, run

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {split: make_good(tmp_path / split) for split in ("train", "val")}
    for _ in range(2):  # first checked, then read from the cache
        caplog.clear()
        with caplog.at_level("WARNING"):
            run(configure(tmp_path, data))
        assert (
            "4 of 4 (100.0%) images of 'checked_val' are also in the training data" in caplog.text
        )
    report = json.loads((tmp_path / "output" / "dataset_check.json").read_text())
    assert [x["kind"] for x in report["findings"]] == ["image-in-both-splits"]
    assert report["findings"][0]["file"] == str(data["val"].json_file)
