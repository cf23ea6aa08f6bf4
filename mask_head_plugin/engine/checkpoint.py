"""Checkpoints: detectron2's formats, and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file, save_file


class MaskHeadCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that also reads ``.safetensors``, which hold tensors and no code.

    ``.pth`` files are read with ``weights_only=True``, whatever torch's default is.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": load_file(filename)}
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)


def export_safetensors(checkpoint: Path, output: Path, *, half: bool = False) -> None:
    """Writes the model weights of a ``.pth`` checkpoint as ``.safetensors``, nothing else.

    Args:
        checkpoint: written by detectron2's or this project's trainer.
        output: the file to write; its folder is made if missing.
        half: store matrices and convolution kernels as float16, which halves the file. Vectors
            (biases, normalisation statistics) keep their type: their range matters.
    """
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    tensors = {
        name: (weight.half() if half and weight.dim() > 1 else weight).contiguous()
        for name, weight in weights.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output)
