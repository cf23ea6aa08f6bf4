"""If weights cannot be downloaded, a one-line error says what to fetch and what else to try."""

from __future__ import annotations

from pathlib import Path
from urllib import request
from urllib.error import URLError

import pytest
import torch
from iopath.common.file_io import PathHandler, PathManager

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint import MaskHeadCheckpointer
from mask_head_plugin.checkpoint.download import local_copy

R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.fixture(autouse=True)
def _without_network(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(request, "urlretrieve", fail)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))


def test_a_failed_download_of_a_configs_weights_is_one_line(caplog):
    with pytest.raises(ConfigError) as error:
        MaskHeadCheckpointer(torch.nn.Linear(2, 2)).load(f"{R50}?matching_heuristics=True")
    assert str(error.value) == (
        "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl could not be "
        "downloaded (<urlopen error Temporary failure in name resolution>); fetch R-50.pkl on "
        "another machine and set MODEL.WEIGHTS to it, or start from random weights, as "
        "configs/Base-Small.yaml and configs/misc/scratch_*.yaml do"
    )
    assert not [x for x in caplog.records if x.levelname == "ERROR"]


def test_weights_in_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = local_copy("mask_head_plugin://mask_rcnn_shapes.safetensors")
    assert Path(file).stat().st_size > 1e6
    with pytest.raises(ConfigError, match=r"the package includes mask_rcnn_shapes\.safetensors$"):
        local_copy("mask_head_plugin://mask_rcnn_circles.safetensors")


@pytest.mark.parametrize(
    "address", ["https://there.is.nothing/x.pth", "catalog://Nobody/knows", "catalog://ImageNetP/x"]
)
def test_a_failed_download_from_any_address_is_reported(address):
    with pytest.raises(ConfigError, match=r"could not be downloaded .* name it with --weights"):
        local_copy(address, "name it with --weights PATH")


def test_a_local_file_is_used_directly(tmp_path):
    assert local_copy(str(tmp_path / "x.pth")) == str(tmp_path / "x.pth")


class FolderHandler(PathHandler):
    """Resolves ``stored://x`` to the file x in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["stored://"]

    def _get_local_path(self, path, **_):
        return str(self.folder / path.removeprefix("stored://"))


def test_a_users_path_manager_finds_weights_but_an_output_folder_must_be_local(tmp_path):
    path_manager = PathManager()
    path_manager.register_handler(FolderHandler(tmp_path))
    kept = torch.nn.Linear(2, 3)
    torch.save({"model": kept.state_dict()}, tmp_path / "a.pth")
    ends = {name: value + 1 for name, value in kept.state_dict().items()}
    torch.save({"model": ends}, tmp_path / "ends.pth")
    nested = torch.nn.ModuleDict({"inner": torch.nn.Linear(2, 3)})
    for model, address, expected in (
        (torch.nn.Linear(2, 3), "stored://a.pth", kept.weight),
        (nested, "stored://ends.pth?matching_heuristics=True", kept.weight + 1),
    ):
        checkpointer = MaskHeadCheckpointer(model, "stored://runs")
        checkpointer.path_manager = path_manager
        checkpointer.load(address)
        assert torch.equal(next(model.parameters()), expected)
        with pytest.raises(ConfigError, match="stored://runs is not a local folder"):
            checkpointer.save("model_final")
