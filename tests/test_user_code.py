"""IMPORTS: which code may run, how files and modules are found, and which errors are reported."""

from __future__ import annotations

import multiprocessing
import re
import runpy
import sys

import pytest
import yaml
from conftest import CONFIGS, ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from quick_processes import fork_server

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.ablation import load_ablation
from mask_head_plugin.config_check import check_config
from mask_head_plugin.modeling import MASK_LOSS_REGISTRY
from mask_head_plugin.user_code import import_modules

SHAPES = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
ABLATION = {
    "TITLE": "x",
    "METRIC": "segm/AP",
    "SEEDS": [1],
    "BASELINE": "a",
    "VARIANTS": {"a": {}},
    "SIZES": {"shapes": {"CONFIG": "theirs.yaml"}},
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Changes to an empty folder. Afterwards, unloads the modules that the test imported."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def write_code(path, text="", name="theirs.yaml"):
    """Writes a module and, in the same folder, a config that imports it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import builtins\nbuiltins.{path.stem}_runs = globals()\n{text}")
    config = {"_BASE_": SHAPES, "IMPORTS": [path.name]}
    (path.parent / name).write_text(yaml.safe_dump(config))


def test_imports_of_the_config_file_and_the_options_are_combined(place):
    for stem in ("code_a", "code_b", "code_c"):
        write_code(place / "configs" / f"{stem}.py")
    write_code(place / "code_d.py")
    opts = ["IMPORTS", "['configs/code_a.py', code_d]", "SEED", "3", "IMPORTS", "json"]
    cfg = load_config("configs/theirs.yaml", opts)
    files = [str(place / "configs" / f"code_{x}.py") for x in "ca"] + [str(place / "code_d.py")]
    assert cfg.IMPORTS == [*files, "json"] and cfg.SEED == 3
    assert "code_c" not in sys.modules, "reading a config must not run code"
    assert load_config("configs/theirs.yaml").IMPORTS == files[:1]
    (place / "config.yaml").write_text(cfg.dump())
    assert load_config(str(place / "config.yaml")).IMPORTS == cfg.IMPORTS


def test_a_base_config_may_only_import_what_the_user_names(place):
    write_code(place / "stranger" / "payload.py")
    for own in ({}, {"IMPORTS": ["json"]}):
        (place / "mine.yaml").write_text(yaml.safe_dump({"_BASE_": "stranger/theirs.yaml", **own}))
        with pytest.raises(ConfigError) as found:
            load_config("mine.yaml")
        message = str(found.value)
        assert message.startswith(f"stranger/theirs.yaml would run {place}/stranger/payload.py")
        assert f"add --import {place}/stranger/payload.py" in message and "\n" not in message
    vouched = [str(place / "stranger" / "payload.py")]
    assert load_config("mine.yaml", ["IMPORTS", vouched[0]]).IMPORTS == ["json", *vouched]
    (place / "mine.yaml").write_text(
        yaml.safe_dump({"_BASE_": "stranger/theirs.yaml", "IMPORTS": ["stranger/payload.py"]})
    )
    assert load_config("mine.yaml").IMPORTS == vouched
    with pytest.raises(ConfigError, match="would run"):
        load_config("stranger/theirs.yaml", is_named=False)
    assert "payload" not in sys.modules


def test_an_ablation_imports_what_its_file_names(place):
    write_code(place / "payload.py")
    path = place / "ablation.yaml"
    path.write_text(yaml.safe_dump(ABLATION))
    with pytest.raises(ConfigError, match=r"theirs\.yaml would run"):
        load_ablation(path, "shapes")
    wanted = [str(place / "payload.py")]
    cfg = load_ablation(path, "shapes", ["IMPORTS", "payload.py"]).configs["a"]
    assert cfg.IMPORTS == wanted
    path.write_text(yaml.safe_dump({**ABLATION, "IMPORTS": ["payload.py"]}))
    assert load_ablation(path, "shapes").configs["a"].IMPORTS == wanted
    path.write_text(yaml.safe_dump({**ABLATION, "VARIANTS": {"a": {"IMPORTS": ["payload.py"]}}}))
    with pytest.raises(ConfigError, match="variant 'a': IMPORTS belongs at the top level of"):
        load_ablation(path, "shapes", ["IMPORTS", "payload.py"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fails_deeper.py", "{}/fails_deeper.py, line 5: ZeroDivisionError: division by zero$"),
        ("not_python.py", "{}/not_python.py, line 3: SyntaxError: "),
        ("exits.py", "{}/exits.py, line 3: SystemExit: 3$"),
        ("needs_another.py", "{}/needs_another.py, line 3: ModuleNotFoundError: .*nowhere_at_all"),
        ("folder/json.py", "json.py: another module, .*, is also called json; rename the file$"),
        ("with.dot.py", "with.dot.py: the name of a module cannot contain a dot; rename the file$"),
        ("nowhere.py", "option IMPORTS: IMPORTS names nowhere.py, which is not a file in {}$"),
        ("nowhere_at_all", "No module named 'nowhere_at_all'; to import a file, give its path"),
        ("[3]", r"IMPORTS takes a list of modules and .py files, not \[3\]$"),
        ("{", "No module named '{{'"),
    ],
)
def test_an_import_error_is_one_line_with_place_and_reason(entry, message, place):
    write_code(place / "fails_deeper.py", "def f(x):\n    # a comment\n    1 / x\n\n\nf(0)\n")
    write_code(place / "not_python.py", "def f(:\n")
    write_code(place / "exits.py", "raise SystemExit(3)\n")
    write_code(place / "needs_another.py", "import nowhere_at_all\n")
    write_code(place / "folder" / "json.py")
    write_code(place / "with.dot.py")
    message = message.format(re.escape(str(place)))
    with pytest.raises(ConfigError, match=message) as found:
        import_modules(load_config(SHAPES, ["IMPORTS", entry]).IMPORTS)
    assert "\n" not in str(found.value)


def test_code_runs_once_per_process_and_is_logged(place, caplog):
    write_code(
        place / "counted.py", "import sys\nsys.counted_runs = getattr(sys, 'counted_runs', 0) + 1"
    )
    for _ in range(2):
        import_modules(load_config("theirs.yaml").IMPORTS)
    assert sys.counted_runs == 1
    assert caplog.text.count(f"IMPORTS runs your code: {place}/counted.py") == 1


def test_child_processes_can_use_functions_from_an_imported_file(place):
    write_code(place / "folder" / "sent_along.py", "def answer(pipe):\n    pipe.send(42)\n")
    import_modules(load_config("folder/theirs.yaml").IMPORTS)
    here, there = multiprocessing.Pipe()
    answer = sys.modules["sent_along"].answer
    process = fork_server().Process(target=answer, args=(there,))
    process.start()
    assert here.poll(60) and here.recv() == 42
    process.join()


TOOLS = {
    "train_net": ["--config-file", SHAPES],
    "ablate": ["--config-file", str(CONFIGS / "ablations" / "mask_loss.yaml"), "--output", "out"],
    "compare_zoo": ["--config", SHAPES, "--weights", "w.pth", "--output", "out"],
    "demo": ["--config-file", SHAPES, "--output", "out", "--input", "x.png"],
    "export_weights": ["w.pth", "w.safetensors"],
    "replay_step": ["run/failed_steps/step.pth", "--config-file", SHAPES],
    "report": ["out"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_reports_import_errors(tool, place, monkeypatch, capsys):
    (place / "x.png").touch()
    write_code(place / "broken.py", "raise ValueError('my own')")
    path = ROOT / ("" if tool == "train_net" else "tools") / f"{tool}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *TOOLS[tool], "--import", "broken.py"])
    with pytest.raises(SystemExit) as end:
        sys.exit(runpy.run_path(str(path))["main"]())
    assert end.value.code in (1, 2)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{tool}.py: ") and last.endswith(
        "broken.py, line 3: ValueError: my own"
    )


def test_replaying_a_step_runs_no_code_of_its_config(place, monkeypatch, capsys):
    write_code(place / "payload.py", name="config.yaml")
    monkeypatch.setattr(sys, "argv", ["replay_step.py", "failed_steps/step.pth"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "replay_step.py"))["main"]()
    assert "config.yaml would run" in capsys.readouterr().err and "payload" not in sys.modules


def test_the_documented_example_works(place):
    """Checks the config file; test_launch runs the command in two processes."""
    page = (ROOT / "docs" / "your_own_code.md").read_text()
    (place / "configs").symlink_to(CONFIGS)
    for name, language in (("my_code.py", "python"), ("mine.yaml", "yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        (place / name).write_text(block)
    cfg = load_config("mine.yaml", ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(place)])
    try:
        import_modules(cfg.IMPORTS)
        check_config(cfg, train=True)
        assert cfg.DATASETS.TRAIN == ("my_train",) and "my_train" in DatasetCatalog.list()
    finally:
        MASK_LOSS_REGISTRY._obj_map.pop("squared_error", None)
        BACKBONE_REGISTRY._obj_map.pop("build_my_backbone", None)
        DatasetCatalog.pop("my_train", None)
        MetadataCatalog.pop("my_train", None)
