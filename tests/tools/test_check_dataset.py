"""The command line of tools/check_dataset.py, and train_net.py with a broken data set."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import ROOT
from quick_processes import run_script

sys.path.insert(0, str(ROOT / "tests" / "data"))
from broken_data import make_good


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    data = make_good(tmp_path_factory.mktemp("tool"))
    data.annotation(13)["bbox"] = [0, 0, -1, 5]
    data.annotation(14)["area"] = -1
    return data.write()


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Returns a function that runs main() and returns its exit code, stdout and stderr."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "check_dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, args)])
        code = tool.main()
        return code, *capsys.readouterr()

    return run


def test_errors_are_printed_written_as_json_and_give_exit_code_1(broken, tmp_path, run_tool):
    output = tmp_path / "report.json"
    code, out, _ = run_tool(
        "--json", broken.json_file, "--images", broken.images, "--output", output
    )
    assert code == 1
    assert "box-negative" in out and "2 errors, 0 warnings" in out
    assert f"error: {broken.json_file}: image 2, annotation 13: the box is" in out
    report = json.loads(output.read_text())
    assert report["errors"] == 2
    (finding,) = [x for x in report["findings"] if x["kind"] == "area-invalid"]
    assert (finding["image_id"], finding["annotation_id"], finding["severity"]) == (3, 14, "error")
    assert finding["file"] == str(broken.json_file) and finding["fix"] and finding["message"]


def test_a_corrected_copy_is_written_and_passes(broken, tmp_path, run_tool):
    output = tmp_path / "fixed.json"
    code, out, _ = run_tool("--json", broken.json_file, "--images", broken.images, "--fix", output)
    assert code == 0 and "2 changes, 0 records left out" in out
    assert len(json.loads((tmp_path / "fixed.json.changes.json").read_text())) == 2
    flags = ("--num-classes", 2, "--decode")
    code, out, _ = run_tool("--json", output, "--images", broken.images, *flags)
    assert code == 0 and "0 errors, 0 warnings" in out


def test_records_left_out_of_a_copy_are_counted_by_section(tmp_path, run_tool):
    data = make_good(tmp_path)
    data.content["categories"].append(data.content["categories"][0])  # no annotation is lost
    data.write()
    flags = ("--json", data.json_file, "--images", data.images, "--fix", tmp_path / "fixed.json")
    code, out, _ = run_tool(*flags)
    assert code == 0 and "0 changes, 1 record left out (categories: 1)" in out


@pytest.mark.parametrize("flags", [("--output", "good.json"), ("--output", "x", "--fix", "x")])
def test_a_report_never_overwrites_annotations(tmp_path, run_tool, flags, monkeypatch):
    data = make_good(tmp_path).write()
    monkeypatch.chdir(tmp_path)
    data.json_file.rename("good.json")
    before = (tmp_path / "good.json").read_bytes()
    code, _, err = run_tool("--json", "./good.json", "--images", data.images, *flags)
    assert code == 2 and "--output" in err and err.count("\n") == 1
    assert (tmp_path / "good.json").read_bytes() == before and not (tmp_path / "x").exists()


def test_a_data_set_in_several_folders_is_checked_fixed_and_split(tmp_path, run_tool):
    data = make_good(tmp_path / "data").write()
    (data.folder / "night" / "2").mkdir(parents=True)
    data.path(2).rename(data.folder / "night" / "2.png")
    flags = ("--json", data.json_file, "--images", data.images, data.folder / "night")
    code, out, _ = run_tool(*flags)
    assert code == 0 and "0 errors" in out
    data.annotation(13)["area"] = -1
    data.write()
    output = tmp_path / "fixed.json"
    parts = ("--fix", output, "--write", tmp_path / "parts.json", "--split", "0.25")
    code, out, _ = run_tool(*flags, *parts)
    assert code == 0 and f"1 image, 1 annotation, image folder {data.folder}" in out
    names = [x["file_name"] for x in json.loads(output.read_text())["images"]]
    assert names == ["images/1.jpg", "night/2.png", "images/3.jpg", "images/4.png"]
    for file in (output, tmp_path / "parts.train.json", tmp_path / "parts.val.json"):
        code, out, _ = run_tool("--json", file, "--images", data.folder)
        assert code == 0 and "0 errors" in out
    # A second run overwrites nothing.
    code, _, err = run_tool(*flags, *parts)
    assert code == 2 and f"{output} already exists" in err
    code, _, err = run_tool("--json", output, "--images", data.folder, *parts[2:])
    assert code == 2 and "parts.train.json already exists" in err


def test_different_images_with_the_same_name_are_refused(tmp_path, run_tool):
    data = make_good(tmp_path / "data").write()
    (data.folder / "night").mkdir()
    flags = ("--json", data.json_file, "--images", data.images, data.folder / "night")
    (data.folder / "night" / "2.png").write_bytes(data.path(2).read_bytes())
    assert run_tool(*flags)[0] == 0  # the same image in both folders
    (data.folder / "night" / "2.png").write_bytes(data.path(4).read_bytes())
    code, _, err = run_tool(*flags)
    assert code == 2 and "different images with the same name" in err and err.count("\n") == 1


def test_a_filter_keeps_only_the_requested_categories(tmp_path, run_tool):
    data = make_good(tmp_path / "data").write()
    output = tmp_path / "dogs.json"
    flags = ("--json", data.json_file, "--images", data.images, "--write", output)
    code, out, _ = run_tool(*flags, "--categories", "dog")
    assert code == 0 and f"{output}: 4 images, 3 annotations" in out
    assert [x["id"] for x in json.loads(output.read_text())["annotations"]] == [12, 14, 16]


def test_a_file_with_errors_is_not_split(broken, tmp_path, run_tool):
    flags = ("--json", broken.json_file, "--images", broken.images)
    code, out, _ = run_tool(*flags, "--write", tmp_path / "parts.json", "--split", "0.5")
    assert code == 1 and "correct the errors first, or add --fix" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--split", "0.2"),
        ("--write", "x.json"),
        ("--accept", "empty-mask"),
        ("--crowds-are-objects",),
        ("--lvis", "--split", "0.2", "--write", "x.json"),
    ],
)
def test_flags_that_need_another_flag_are_refused(broken, run_tool, flags):
    with pytest.raises(SystemExit) as info:
        run_tool("--json", broken.json_file, "--images", broken.images, *flags)
    assert info.value.code == 2


def test_a_file_that_cannot_be_fixed_gives_exit_code_2_and_one_line(broken, tmp_path, run_tool):
    half = tmp_path / "half.json"
    half.write_bytes(broken.json_file.read_bytes()[:300])
    code, _, err = run_tool(
        "--json", half, "--images", broken.images, "--fix", tmp_path / "fixed.json"
    )
    assert code == 2
    (line,) = [x for x in err.splitlines() if x.startswith("check_dataset.py: ")]
    assert "json-truncated" in line


def test_missing_paths_give_exit_code_2(broken, run_tool):
    for flags, named in (
        (("--json", "nowhere.json", "--images", broken.images), "--json nowhere.json"),
        (("--json", broken.json_file, "--images", "nowhere"), "--images nowhere"),
        (("--json", broken.json_file, "--images", broken.json_file), "this is a file"),
    ):
        code, _, err = run_tool(*flags)
        assert code == 2 and "check_dataset.py: --" in err and named in err


def test_train_net_stops_before_anything_is_built(broken, tmp_path):
    files = [["broken_train", str(broken.json_file), str(broken.images)]]
    opts = [
        *("DATASETS.COCO_FILES", repr(files), "DATASETS.TRAIN", "('broken_train',)"),
        *("DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]
    config = "configs/shapes/mask_rcnn_shapes.yaml"
    result = run_script("train_net.py", "--config-file", config, *opts)
    assert result.returncode == 2 and "the data sets have 2 errors" in result.stderr
    assert "annotation 13" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "output" / "config.yaml").exists()
