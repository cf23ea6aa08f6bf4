"""Commands and code in README and docs are correct: flags, config keys, files and names.

Python blocks run, except those in NOT_RUN_PYTHON, which are only compiled. Shell commands are
parsed by their scripts, and their KEY VALUE options by the config. RUN lists the commands that also
run. For all other commands, NOT_RUN gives the reason why they do not run, and often the test that
replaces them.
"""

from __future__ import annotations

import argparse
import configparser
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import CONFIGS, ROOT
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from made_model_folder import write_model_folder

from mask_head_plugin import load_config
from mask_head_plugin.ablation import load_ablation
from mask_head_plugin.config_imports import import_options
from mask_head_plugin.lazy_config import load_lazy_config
from mask_head_plugin.modeling import MASK_LOSS_REGISTRY

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
YOURS = re.compile(r"(configs/mine/|my_|your_|output/|photos|all\.json|train\.json|coco/)")
"""Matches files that the reader has or that an earlier command writes."""

RUN = {
    "tools/check_dataset.py --json photos.json": (),
    "tools/show_training_images.py --config-file configs/shapes": ("--output", "sheet.png"),
}
"""Commands that run in these tests, by their first words, with flags that are added to them."""

NOT_RUN = {
    "train_net.py": "trains or evaluates; tests/engine/test_train_net.py runs two iterations",
    "torchrun": "trains in several processes; tests/engine/test_launch.py does so on the CPU",
    "srun": "needs Slurm",
    "tools/ablate.py": "trains many models; tests/tools/test_ablate.py runs two iterations",
    "tools/report.py": "needs a finished ablation; tests/ablation/report/test_pages.py has one",
    "tools/compare_zoo.py": "takes minutes, or downloads; tests/tools/test_compare_zoo.py runs it",
    "tools/check_dataset.py": "needs your files; tests/tools/test_check_dataset.py writes some",
    "tools/new_config.py": "needs your files; tests/new_config/test_new_config.py writes some",
    "tools/show_training_images.py": "needs your config; the command for the shapes runs here",
    "tools/demo.py": "takes too long; tests/demo/test_demo.py runs it on a few images",
    "tools/predict.py": "needs your model; tests/deploy/test_predict.py runs it on a synthetic one",
    "tools/analyze.py": "needs a run's results; tests/analysis/test_analysis_pages.py has some",
    "tools/explain.py": "takes a minute; tests/analysis/test_explain.py uses a small model",
    "tools/export_model.py": "takes a minute; tests/deploy/test_export.py exports small models",
    "tools/export_weights.py": "needs a run's weights; tests/checkpoint has some",
    "tools/replay_step.py": "needs a failed step; tests/engine/test_guards.py makes one",
    "tools/fetch_backbone.py": "downloads; tests/tools/test_fetch_backbone.py replaces it",
    "tools/install_detectron2.py": "installs; tests/tools/test_install_detectron2.py runs it",
    "tools/lazyconfig_train_net.py": "trains; tests/engine/test_lazy_run.py runs a few iterations",
    "benchmarks/": "measures for minutes; tests/benchmarks uses tiny sizes",
    "make": "installs, or runs for minutes; a test compares its targets with the Makefile",
    "pip": "installs; a test compares its extras and files with setup.cfg",
    "-m venv": "installs another tool",
    "datumaro-env/": "is another tool",
    "git clone": "downloads",
    "source": "activates an environment in your shell",
    "export": "sets a variable of your machine",
    ".ci/run": "runs these tests",
}
"""Commands that are only parsed, by their first words, with the reason why they do not run."""

NOT_RUN_PYTHON = {
    "import submitit": "needs Slurm",
    "import supervision": "supervision is not installed with requirements.txt",
    "inference_on_dataset(model": "needs your model; tests/evaluation has one",
}
"""Python blocks that are only compiled, by one of their lines, with the reason."""


class Block(NamedTuple):
    """A fenced block: the page, its first line, its language and its text."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    name = str(page.relative_to(ROOT))
    return [Block(name, text.count("\n", 0, x.start()) + 2, x[1], x[2]) for x in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    assert len(chosen) > 5
    return pytest.mark.parametrize("block", chosen, ids=lambda x: f"{x.page}:{x.line}")


def commands(block: Block) -> list[list[str]]:
    """Returns the words of each command in a shell block, without a leading ``python``."""
    text = block.text.replace("\\\n", " ").replace("$seed", "1")
    text = re.sub(r"^(for .*; do|done)$", "", text, flags=re.MULTILINE)
    lines = [line for part in text.splitlines() for line in part.split(" && ")]
    words = [shlex.split(line, comments=True) for line in lines]
    interpreters = ("python", ".venv/bin/python", "datumaro-env/bin/python")
    return [x[1:] if x[0] in interpreters else x for x in words if x]


ALL_COMMANDS = [
    " ".join(x) for block in BLOCKS if block.language == "bash" for x in commands(block)
]


class Parsed(BaseException):
    """Raised to end a script once its flags are parsed."""


@pytest.fixture(scope="module")
def parse() -> Any:
    """Returns a function that parses the words of a command with its script's parser."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(original(parser, args, namespace))

    def parsed(script: str, words: list[str]) -> argparse.Namespace:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
            patch.setattr(sys, "argv", [script, *words])
            patch.syspath_prepend(str((ROOT / script).parent))
            with pytest.raises(Parsed) as caught:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return caught.value.args[0]

    return parsed


def check_flags(script: str, flags: argparse.Namespace) -> None:
    """Checks the files, keys and names in the flags of a script."""
    file = getattr(flags, "config_file", None) or ""
    opts = list(getattr(flags, "opts", []))
    assert not file or YOURS.match(file) or (ROOT / file).is_file(), f"{file} does not exist"
    known = file if not YOURS.match(file) else ""
    for weights in (getattr(flags, "weights", ""), *opts[1::2]):
        text = str(weights)
        assert not text.startswith(("checkpoints/", "configs/")) or (ROOT / text).exists(), text
    if script == "tools/lazyconfig_train_net.py":
        load_lazy_config(str(ROOT / file), opts)
    elif script == "tools/ablate.py" and known:
        load_ablation(ROOT / file, flags.size, opts, flags.variant, flags.seed)
    elif opts or known:
        named = [x for x in getattr(flags, "imports", []) if not YOURS.match(x)]
        load_config(str(ROOT / known) if known else "", [*import_options(named), *opts])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert f"$({name})" in makefile if is_variable else word in targets, word


def check_pip(words: list[str]) -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for word in words:
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        assert not extra or extra[1] in parser["options.extras_require"], word
        assert not word.endswith(".txt") or (ROOT / word).is_file(), word


@of("bash")
def test_commands_are_accepted_by_their_scripts(block, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        scripts = [k for k, word in enumerate(words) if word.endswith(".py")]
        if words[0] in ("make", "pip"):
            {"make": check_make, "pip": check_pip}[words[0]](words[1:])
        elif words[0] in ("torchrun", "srun") or words[0].endswith(".py"):
            script = words[scripts[0]]
            if not script.startswith("tests/"):
                check_flags(script, parse(script, words[scripts[0] + 1 :]))


def test_every_command_runs_or_has_a_reason_not_to_run():
    reasons = [*RUN, *NOT_RUN]
    assert [x for x in ALL_COMMANDS if not x.startswith(tuple(reasons))] == []
    assert [x for x in reasons if not any(y.startswith(x) for y in ALL_COMMANDS)] == []


def test_commands_appear_only_in_fenced_blocks():
    pattern = re.compile(r"^    (python|make|pip|torchrun|git) ", re.MULTILINE)
    for page in PAGES:
        outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not pattern.search(outside), page


def test_the_readme_is_short_and_no_row_of_measurements_appears_twice():
    assert len(PAGES[0].read_text().splitlines()) <= 150
    figures = [
        set(re.findall(r"\d+\.?\d* (?:ms|MB)|[1-9]\d\.\d\d+", line))
        for page in PAGES
        for line in set(page.read_text().splitlines())
        if line.startswith("| ")
    ]
    measured = [frozenset(x) for x in figures if len(x) >= 2]
    assert len(measured) > 20 and len(measured) == len(set(measured))


MEASURED = re.compile(
    r"(?<![\w./-])(\d[\d,.]*[ -](?:ms|s|seconds|minutes|hours|MB|GB|AP)\b"
    r"|(?!0\.0*\d(?!\d))\d+\.\d\d+(?![\d.])|\d+\.\d+%)"
)
"""Matches times, sizes, AP, percentages with decimals, and numbers with two or more decimals.

Decimals with a single digit after leading zeros, such as 0.01, do not match.
"""

TWICE = {
    "0.16": "a time, in gpu_kernel; a bound of an interval, in roi_align_sampling",
    "0.24": "percent of a step, in README; a bound of an interval, in roi_align_sampling",
    "0.25": "an alpha, in compatibility; a difference of IoUs, in roi_align_sampling",
    "0.64": "0.8 times 0.8, in recipes; a bound of an interval, in real_images",
    "0.75": "an IoU, in analysis; a bound of an interval, in roi_align_sampling",
    "1.21": "a speed, in deploy; a bound of an interval, in roi_align_sampling",
    "3.89": "an AP, in real_images; a ratio, in roi_align_sampling",
}
"""Figures that appear on two pages by chance, with their two meanings."""


def measured_figures(text: str) -> tuple[set[str], set[str]]:
    """Returns the figures in a page's sentences, and those in its tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|Python 3\.\d+ to 3\.\d+", "", text)
    rows = "\n".join(re.findall(r"^\|.*$", text, re.MULTILINE))
    sentences = " ".join(re.sub(r"^\|.*$", "", text, flags=re.MULTILINE).split())
    return set(MEASURED.findall(sentences)), set(MEASURED.findall(rows))


def figures_on_two_pages(pages: dict[str, str]) -> set[tuple[str, frozenset[str]]]:
    """Returns the figures in a sentence of one page that also appear on another page."""
    known = {name: measured_figures(text) for name, text in pages.items()}
    return {
        (figure, frozenset((one, other)))
        for one, (sentences, _) in known.items()
        for other, figures in known.items()
        for figure in sentences & (figures[0] | figures[1])
        if one != other
    }


def test_a_measured_figure_appears_on_one_page_only():
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    assert sum(len(measured_figures(text)[0]) for text in pages.values()) > 40
    repeated = figures_on_two_pages(pages)
    assert [x for x in repeated if x[0] not in TWICE] == []
    assert set(TWICE) == {x[0] for x in repeated}, "some exceptions are no longer needed"


def test_a_measured_figure_that_appears_on_two_pages_is_found():
    made = {
        "a": "It took 4.9 ms\nand 0.01.",
        "b": "| 4.9 ms |",
        "c": "Took 4.9\nms; 0.01; `4.9 ms`.",
    }
    assert figures_on_two_pages(made) == {
        ("4.9 ms", frozenset(pair)) for pair in ("ab", "ac", "bc")
    }


@pytest.mark.parametrize("start", RUN)
def test_command_runs(start, tmp_path, monkeypatch, embedded_photos):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "photos.json"):
        (tmp_path / name).symlink_to(embedded_photos / name)
    (tmp_path / "configs").symlink_to(CONFIGS)
    for words in [shlex.split(x) for x in dict.fromkeys(ALL_COMMANDS) if x.startswith(start)]:
        monkeypatch.setattr(sys, "argv", [words[0], *RUN[start], *words[1:]])
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), words


@pytest.fixture
def embedded_photos(tmp_path) -> Path:
    """Returns a folder with the tutorial's ``photos/`` and ``photos.json``."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    DatasetCatalog.get("shapes_val")
    shapes = MetadataCatalog.get("shapes_val")
    (folder / "photos").symlink_to(Path(shapes.image_root).resolve())
    shutil.copy(shapes.json_file, folder / "photos.json")
    return folder


@pytest.fixture
def given(tmp_path, monkeypatch) -> dict[str, Any]:
    """Prepares the files and names that a reader has at the start of a Python block."""
    monkeypatch.chdir(tmp_path)
    for folder in ("output/onnx", "output/photos_onnx"):
        write_model_folder(tmp_path / folder)
    (tmp_path / "your_mask_rcnn.yaml").write_text("MODEL: {MASK_ON: True}")
    images = Path(MetadataCatalog.get("shapes_val").image_root)
    shutil.copy(min(images.glob("*.png")), tmp_path / "street.jpg")
    for registry in (MASK_LOSS_REGISTRY, BACKBONE_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    cfg = load_config("shapes/mask_rcnn_shapes.yaml", ["DATASETS.CHECK", "off"])
    return {"cfg": cfg, "optimizer": model_zoo.get_config("common/optim.py").SGD}


@of("python")
def test_python_block_runs(block, given):
    code = compile(block.text, f"{block.page}:{block.line}", "exec")
    if any(line in block.text for line in NOT_RUN_PYTHON):
        return
    if "photos/" in block.text:
        shutil.copytree(MetadataCatalog.get("shapes_val").image_root, "photos")
    exec(code, given)


def test_every_reason_not_to_run_a_python_block_is_used():
    texts = [block.text for block in BLOCKS if block.language == "python"]
    assert [x for x in NOT_RUN_PYTHON if not any(x in text for text in texts)] == []


@of("yaml")
def test_yaml_block_is_a_valid_config(block, tmp_path, monkeypatch):
    (tmp_path / "configs" / "mine").mkdir(parents=True)
    for path in CONFIGS.iterdir():
        (tmp_path / "configs" / path.name).symlink_to(path)
    content = yaml.safe_load(block.text)
    folder = tmp_path
    if content.get("_BASE_", "").startswith("../"):
        folder = tmp_path / "configs" / "mine"
    for name in content.get("IMPORTS", []):
        (folder / name).write_text("")
    (folder / "block.yaml").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    if "VARIANTS" in content:
        load_ablation(folder / "block.yaml", next(iter(content["SIZES"])))
    else:
        load_config(str(folder / "block.yaml"))
