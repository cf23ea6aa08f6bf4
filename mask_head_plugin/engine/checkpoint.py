"""Checkpoints: detectron2's formats, and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file, save_file


class MaskHeadCheckpointer(DetectionCheckpointer):  # type: ignore[misc]
    """DetectionCheckpointer that also reads ``.safetensors``, which hold tensors and no code.

    ``.pth`` files are read with ``weights_only=True``, whatever torch's default is.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": load_file(filename)}
        loaded: dict[str, Any] = super()._load_file(filename)
        return loaded

    def _torch_load(self, filename: str) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(filename, map_location="cpu", weights_only=True)
        return loaded


def export_safetensors(checkpoint: Path, output: Path) -> None:
    """Writes the model weights of a ``.pth`` checkpoint as ``.safetensors``, nothing else.

    Args:
        checkpoint: written by detectron2's or this project's trainer.
        output: the file to write; its folder is made if missing.
    """
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, output)
