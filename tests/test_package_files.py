"""Contents of the package's wheel, and how an installed package finds its files."""

from __future__ import annotations

import configparser
import re

import pytest
from conftest import CONFIGS, ROOT

import mask_head_plugin
from mask_head_plugin import ConfigError, load_config

PACKAGE = ROOT / "mask_head_plugin"
NAME = "coco/mask_rcnn_R_50_FPN_1x.yaml"


def declared_files() -> set[str]:
    """Returns the files that setup.cfg declares as package data, relative to the package."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    patterns = parser["options.package_data"]["mask_head_plugin"].split()
    return {str(x.relative_to(PACKAGE)) for p in patterns for x in PACKAGE.glob(p)}


def test_a_wheel_contains_configs_templates_and_checkpoint():
    shipped = {f"configs/{x.relative_to(CONFIGS)}" for x in CONFIGS.rglob("*") if x.suffix != ".md"}
    files = {x for x in shipped if (PACKAGE / x).is_file() and "__pycache__" not in x}
    assert len(files) > 50
    templates = {str(x.relative_to(PACKAGE)) for x in PACKAGE.rglob("*.j2")}
    assert len(templates) > 2
    checkpoint = {"checkpoints/mask_rcnn_shapes.safetensors"}
    assert files | templates | checkpoint <= declared_files()


@pytest.mark.parametrize("name", [NAME, f"configs/{NAME}"])
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).SOLVER.MAX_ITER == load_config(str(CONFIGS / NAME)).SOLVER.MAX_ITER


def test_a_local_file_takes_precedence_over_the_packages(tmp_path, monkeypatch):
    (tmp_path / "coco").mkdir()
    (tmp_path / NAME).write_text("SEED: 7")
    monkeypatch.chdir(tmp_path)
    assert load_config(NAME).SEED == 7


def test_the_error_for_a_misspelt_config_suggests_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"did you mean {re.escape(NAME)}\?"):
        load_config(NAME.replace("R_50", "R50"))


def test_the_changelog_has_a_dated_entry_for_this_version():
    headings = re.findall(
        r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert mask_head_plugin.__version__ == headings[0]
