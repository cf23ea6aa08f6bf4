"""Saves failed training steps, and repeats them to find the layer that causes the failure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from ..checkpoint.checkpointer import write_checkpoint
from ..class_names import class_names_of
from ..config import ConfigError
from ..data import seed_generators
from ..weight_files import read_checkpoint
from .distributed import undistributed

Sample = dict[str, Any]

TENSOR_FIELDS = {each.__name__: each for each in (Boxes, BitMasks, Keypoints)}


def save_step(
    path: Path,
    model: nn.Module,
    batch: list[Sample],
    losses: dict[str, float],
    seeds: tuple[int, ...],
) -> None:
    """Writes everything needed to repeat a training step: batch, weights and seeds.

    The file contains only tensors and plain values, so ``torch.load`` can read it with
    ``weights_only=True``.

    Args:
        path: the file to write; its folder is created if it does not exist.
        model: the model being trained; may be wrapped in DistributedDataParallel.
        batch: the input of the model.
        losses: losses of the step.
        seeds: the values that seeded the random number generators before the step: seed, iteration,
            rank and, if the batch has parts, the part.
    """
    content = {
        "model": undistributed(model).state_dict(),
        "batch": [{key: _plain(value) for key, value in x.items()} for x in batch],
        "losses": losses,
        "seeds": list(seeds),
        "class_names": class_names_of(model),  # as in every checkpoint
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, content)


@dataclass(frozen=True)
class Replay:
    """Result of repeating a training step: the places where values are not finite."""

    batch: list[Sample]
    losses: dict[str, float]
    """Losses of the repeated step."""
    saved_losses: dict[str, float]
    bad_weights: list[str]
    """Names of weights that were not finite before the step."""
    bad_outputs: list[str]
    """Names of modules whose output is not finite, in the order in which they ran."""
    bad_gradients: list[str]
    """Names of parameters whose gradient is not finite, last layers first."""


def replay_step(model: nn.Module, path: Path) -> Replay:
    """Repeats the forward and backward pass of a saved step, and checks each module's output.

    Args:
        model: the model that the trainer builds from the run's config; its weights are replaced.
        path: a file written by save_step.

    Raises:
        ConfigError: if save_step did not write the file, or its weights do not fit the model.
    """
    try:
        content = read_checkpoint(path)
        batch = [{key: _restored(value) for key, value in x.items()} for x in content["batch"]]
        losses, seeds, weights = content["losses"], content["seeds"], content["model"]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a failed step; use a file from OUTPUT_DIR/failed_steps: {error}"
        ) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights in {path} do not fit the config's model; pass the config of the run as "
            "--config-file"
        ) from error
    model.train()
    bad_weights = [name for name, x in model.state_dict().items() if not _is_finite(x)]
    bad_outputs: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(_note_bad_output(name or "(the model)", bad_outputs))
    seed_generators(*seeds)
    terms: dict[str, torch.Tensor] = {}
    with EventStorage(seeds[1]), contextlib.suppress(FloatingPointError):  # raised by the RPN
        terms = model(batch)
        torch.stack(list(terms.values())).sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    bad_gradients = [name for name, x in gradients.items() if not _is_finite(x)][::-1]
    found = {name: term.item() for name, term in terms.items()}
    return Replay(batch, found, losses, bad_weights, bad_outputs, bad_gradients)


def _note_bad_output(name: str, bad_outputs: list[str]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not _is_finite(output):
            bad_outputs.append(name)

    return hook


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(_is_finite(x) for x in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(x) for x in value)
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = {name: _plain(field) for name, field in value.get_fields().items()}
        return {"Instances": list(value.image_size), "fields": fields}
    if type(value).__name__ in TENSOR_FIELDS:
        return {type(value).__name__: value.tensor}
    if isinstance(value, PolygonMasks):
        return {"PolygonMasks": [[torch.as_tensor(y) for y in x] for x in value.polygons]}
    is_plain = value is None or isinstance(value, torch.Tensor | int | float | str)
    return value if is_plain else repr(value)


def _restored(value: Any) -> Any:
    match value:
        case {"Instances": [height, width], "fields": fields}:
            result = Instances((height, width))
            for name, field in fields.items():
                result.set(name, _restored(field))
            return result
        case {"PolygonMasks": polygons}:
            return PolygonMasks([[y.numpy() for y in x] for x in polygons])
        case dict():
            ((kind, tensor),) = value.items()
            return TENSOR_FIELDS[kind](tensor)
    return value
