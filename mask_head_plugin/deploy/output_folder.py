"""Writes the folder of an exported model: by one export at a time, and only complete models."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..durable_files import locked_folder, make_output_folder, write_durably
from ..messages import ConfigError
from .model_folder import DESCRIPTION, EXTERNAL_DATA, MODEL_FILES, ModelDescription


@contextlib.contextmanager
def sole_export(output: Path) -> Iterator[None]:
    """Creates the folder if necessary, and locks it against other exports.

    Afterwards, removes a folder that it created if the folder is still empty.

    Raises:
        ConfigError: if the folder cannot be written to, or another export is writing to it.
    """
    is_new = not output.exists()
    with contextlib.ExitStack() as stack:
        make_output_folder(output)
        try:
            stack.enter_context(locked_folder(output))
        except BlockingIOError as error:
            raise ConfigError(
                f"another export is writing to --output {output}; wait until it ends, or use "
                "another folder"
            ) from error
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    output.rmdir()


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises a ConfigError if the folder contains a model that must not be overwritten."""
    taken = [name for name in (DESCRIPTION, *MODEL_FILES.values()) if (output / name).exists()]
    if taken and not overwrite:
        raise ConfigError(
            f"--output {output} already contains {taken[0]}; use another folder, or add --overwrite"
        )


def write_model(output: Path, folder: Path, description: ModelDescription) -> None:
    """Copies the files of a model. Old files are removed only after the new ones are complete.

    Args:
        output: the target folder.
        folder: the source folder.
        description: the model's description, which is written to model.json.

    Raises:
        OSError: if a file cannot be written. The target folder then stays unchanged.
    """
    described, files = output / DESCRIPTION, [description.model.file, *description.model.data]

    def write(rest: list[str]) -> None:
        if not rest:  # all files are complete; the old description no longer applies
            described.unlink(missing_ok=True)
            return
        with (folder / rest[0]).open("rb") as source:
            write_durably(
                output / rest[0],
                lambda file: shutil.copyfileobj(source, file),
                before_rename=lambda: write(rest[1:]),
            )

    write_durably(described, description.to_json(), before_rename=lambda: write(files))
    for name in {*MODEL_FILES.values(), EXTERNAL_DATA}.difference(files):
        (output / name).unlink(missing_ok=True)
