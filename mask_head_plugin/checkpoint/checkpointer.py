"""Writes checkpoints that survive a kill or a full disk, and loads and exports weights.

A checkpoint ``model_0000999.pth`` gets its name only when it is complete and on the disk. Next to
it, ``model_0000999.pth.sha256`` contains its checksum in the format of ``sha256sum --check``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from safetensors.torch import save

from ..class_names import class_names_of, name_classes
from ..config import ConfigError
from ..config_check.colours import warn_of_colours
from ..durable_files import write_durably
from ..messages import listed
from ..weight_files import read_checkpoint
from .class_rows import class_tensors, file_classes, match_classes, num_classes_of
from .download import local_copy
from .run_folder import LAST_CHECKPOINT, checkpoint_files, newest_intact
from .weight_fit import WeightsPolicy, compare, matched_by_ends, refuse_or_tell, without_prefix

logger = logging.getLogger(__name__)

_CLASSIFIER = re.compile(r"(^|\.)box_predictor(\.\d+)?\.cls_score\.weight$")


class MaskHeadCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that also reads ``.safetensors`` and never runs code from a file.

    Weights that do not fit the model cause an error or are logged (see weight_fit.py). Rows of
    classes are matched by name (see class_rows.py), and the model keeps the names, so evaluation
    and drawing can match its predictions (see class_names.py).

    Checkpoints are written under a temporary name and renamed, so a kill or a full disk leaves the
    old ones untouched. A run resumes from the newest intact checkpoint.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        policy: WeightsPolicy | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model to load and save.
            save_dir: folder of its checkpoints.
            policy: which weights to accept. By default, weights must fit completely or fill a
                backbone, and the model takes its classes from the file.
            checkpointables: see DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._policy = policy or WeightsPolicy.of_predictor(
            getattr(self.model, "datasets", None), num_classes_of(self.model)
        )
        if self._policy.class_names and not self._policy.keeps_classes:
            name_classes(self.model, self._policy.class_names)
        self._source, self._query, self._resuming = "", "", False

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves the model, all checkpointables and ``kwargs`` as ``{name}.pth``.

        Raises:
            ConfigError: if the disk is full or not writable (older checkpoints stay untouched), or
                if the folder is an address instead of a local path.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: each.state_dict() for key, each in self.checkpointables.items()}
        states = _without_numpy_scalars({**states, **kwargs})
        self._write(f"{name}.pth", {"model": self.model.state_dict(), **states})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Saves only the model and ``kwargs``; a run cannot resume from this file."""
        if self.save_dir and self.save_to_disk:
            self._write(f"{name}.pth", {"model": self.model.state_dict(), **kwargs})

    def _write(self, basename: str, data: dict[str, Any]) -> None:
        if "://" in self.save_dir:
            raise ConfigError(
                f"{self.save_dir} is not a local folder: write checkpoints to a local folder and "
                "copy them afterwards"
            )
        path = Path(self.save_dir) / basename
        logger.info("saving checkpoint %s", path)
        names = class_names_of(self.model)
        if names:
            data = {"class_names": names, **data}
        write_checkpoint(path, data)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = Path(self.save_dir) / LAST_CHECKPOINT
        write_run_file(path, last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Returns whether there is a checkpoint to resume from, intact or not."""
        return bool(checkpoint_files(Path(self.save_dir)))

    def get_checkpoint_file(self) -> str:
        """Returns the newest intact checkpoint that the main process finds.

        Raises:
            ConfigError: if checkpoints exist but none is intact; names each with its damage.
        """
        newest, told = "", ""
        if comm.is_main_process():
            try:
                newest = str(newest_intact(Path(self.save_dir)))
            except ConfigError as error:
                told = str(error)
        newest, told = comm.all_gather((newest, told))[0]
        if told:
            raise ConfigError(told)
        return newest

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads weights and checkpointables. By default, loads all of them, which resumes a run.

        Raises:
            ConfigError: if the file cannot be downloaded or used, or does not fit the model.
        """
        self._resuming = checkpointables is None and bool(self.checkpointables)
        self._query = urlparse(path).query
        address, mark, query = path.partition("?")
        try:
            file = local_copy(address, path_manager=self.path_manager)
            return super().load(file + mark + query, checkpointables)
        finally:
            self._parsed_url_during_load = None  # otherwise a failed load makes the next one fail

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._source = filename
        checkpoint = read_checkpoint(Path(filename))
        query = parse_qs(self._query)
        if query.pop("matching_heuristics", None) == ["True"]:
            checkpoint["matching_heuristics"] = True
        if query:
            raise ConfigError(
                f"MODEL.WEIGHTS {filename}: unknown option {', '.join(query)} after the '?'; "
                "only matching_heuristics=True is supported"
            )
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._convert_ndarray_to_tensor(checkpoint["model"])
        weights = without_prefix(checkpoint["model"])
        named = file_classes(checkpoint, self._source)
        resuming = self._resuming
        arguments = (self.model, named, self._policy, self._source)
        names = match_classes(weights, *arguments, resuming=resuming)
        by_ends = checkpoint.pop("matching_heuristics", False)
        author = checkpoint.get("__author__", "")
        warn_of_colours(self._policy.input_format, author, self._source)
        if by_ends:
            weights = matched_by_ends(weights, self.model, author, self._source)
        shapes = {name: weight.shape for name, weight in weights.items()}
        checkpoint["model"] = weights
        incompatible = super()._load_model(checkpoint)
        own_shapes = {name: weight.shape for name, weight in self.model.state_dict().items()}
        refuse_or_tell(
            compare(shapes, own_shapes, incompatible.missing_keys, by_ends=by_ends),
            self._policy,
            self._source,
            resuming=resuming,
            class_layers=class_tensors(self.model),
            named=named,
        )
        name_classes(self.model, names)
        return None  # everything is already logged


def _without_numpy_scalars(value: Any) -> Any:
    """Converts NumPy's numbers in a state to Python's, because loading would refuse them."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_without_numpy_scalars(item) for item in value)
    if type(value) is dict:
        return {_without_numpy_scalars(key): _without_numpy_scalars(x) for key, x in value.items()}
    return value


def write_checkpoint(path: Path, data: dict[str, Any]) -> None:
    """Writes a torch file and its checksum; the file gets its name only when it is complete.

    Raises:
        ConfigError: if it cannot be written. A previous file of that name is left untouched.
    """
    checksum = path.with_name(f"{path.name}.sha256")
    digests: list[str] = []

    def save(file: IO[bytes]) -> None:
        hashing = _HashingFile(file)
        try:
            torch.save(data, cast(IO[bytes], hashing))
        except RuntimeError as error:  # torch's error hides the cause
            raise hashing.error or error from error
        digests.append(hashing.digest.hexdigest())

    # Between the two renames, the checksum is missing; an outdated one would look like damage.
    write_run_file(path, save, before_rename=lambda: checksum.unlink(missing_ok=True))
    write_run_file(checksum, f"{digests[0]}  {path.name}\n")


class _HashingFile:
    """A file that hashes everything written to it and keeps the error of a failed write."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_run_file(
    path: Path,
    content: str | Callable[[IO[bytes]], object],
    before_rename: Callable[[], object] = lambda: None,
) -> None:
    """Calls write_durably; turns an OSError into a ConfigError that explains how to continue."""
    try:
        write_durably(path, content, before_rename)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise ConfigError(
            f"{path} was not written: {error.strerror or error} ({free / 1e6:.0f} MB are free). "
            "Older checkpoints are untouched: make room, then continue with --resume"
        ) from error


def export_safetensors(
    checkpoint: Path,
    output: Path,
    *,
    half: bool = False,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the weights and class names of a checkpoint as ``.safetensors``.

    Args:
        checkpoint: any file that read_checkpoint reads.
        output: the file to write; its folder is created if missing.
        half: store matrices and convolution kernels as float16, which halves the file size. Vectors
            (biases, normalisation statistics) keep their type, because float16 has a small range.
        class_names: names in the order of the model's rows, if the checkpoint has none.

    Raises:
        ConfigError: if the file is not a checkpoint, if a weight does not fit into float16, or if
            the names contradict those in the checkpoint or its number of classes.
        OSError: if the output cannot be written.
    """
    content = read_checkpoint(checkpoint)
    named = file_classes(content, str(checkpoint))
    if named and class_names and named != list(class_names):
        raise ConfigError(
            f"{checkpoint} already names its classes ({listed(named)}); export it without "
            "specifying other names"
        )
    if content.get("matching_heuristics"):
        raise ConfigError(
            f"{checkpoint} has another project's parameter names; first load it as MODEL.WEIGHTS"
        )
    weights = without_prefix(content["model"])
    tensors = {name: torch.as_tensor(weight).contiguous() for name, weight in weights.items()}
    names = list(named or class_names or ())
    for name in filter(_CLASSIFIER.search, tensors if names else ()):
        if len(tensors[name]) != len(names) + 1:  # one more for background
            raise ConfigError(
                f"{checkpoint}: {name} has rows for {len(tensors[name]) - 1} classes, but "
                f"the number of class names is {len(names)}"
            )
    if half:
        tensors = {name: _half(checkpoint, name, weight) for name, weight in tensors.items()}
    exported = save(tensors, {"class_names": json.dumps(names)} if names else None)
    write_durably(output, lambda file: file.write(exported))


def _half(checkpoint: Path, name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() < 2 or not weight.is_floating_point():
        return weight
    if not torch.isfinite(weight.half()).all():
        raise ConfigError(f"{checkpoint}: {name} does not fit into float16; export it in float32")
    return weight.half()
