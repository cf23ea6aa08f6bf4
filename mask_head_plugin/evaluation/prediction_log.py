"""Writes the predictions of an evaluation to disk image by image.

Each image is one line of JSON. A crash therefore loses only the image that is being written, and a
restarted evaluation can skip the images that are already in the file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

Results = list[dict[str, Any]]
"""The detections of an image in COCO's result format."""


class PredictionLog:
    """Writes one file per process, ``predictions_<data set>.<fingerprint>.rank<n>.jsonl``.

    Attributes:
        finished: ids of the images that interrupted evaluations predicted. They are the same in all
            processes that share the folder.
    """

    def __init__(self, folder: Path | None, dataset_name: str, fingerprint: str, rank: int) -> None:
        """
        Args:
            folder: folder of the files; None keeps predictions only in memory.
            dataset_name: name of the data set; may be any text.
            fingerprint: identifies everything that predictions depend on. Predictions with another
                fingerprint are removed. If empty, no earlier predictions are used.
            rank: rank of this process.
        """
        self._name = "predictions_" + re.sub(r"[^\w-]", "_", dataset_name)
        self._folder, self._fingerprint, self._rank = folder, fingerprint, rank
        self._earlier: dict[Any, str] = {}
        self._lines: list[str] = []
        self._file: TextIO | None = None
        if folder is not None and fingerprint:
            for path in self._paths(fingerprint):
                self._earlier.update((_image_id(line), line) for line in _complete_lines(path))

    @property
    def finished(self) -> set[Any]:
        return set(self._earlier)

    def start(self) -> None:
        """Forgets the predictions of this process, opens its file, and deletes outdated files.

        Files are outdated if they have another fingerprint.
        """
        self.close()
        self._lines = []
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        own = f"{self._name}.{self._fingerprint or 'new'}."
        for path in self._paths("*") if self._rank == 0 else ():
            # The other files may already be open in other processes.
            if not path.name.startswith(own):
                path.unlink(missing_ok=True)
        path = self._folder / f"{own}rank{self._rank}.jsonl"
        # If a crash has cut off the last line, the next one must start on a new line.
        broken = bool(self._fingerprint) and path.is_file() and not _ends_with_newline(path)
        self._file = path.open("a" if self._fingerprint else "w")
        if broken:
            self._file.write("\n")

    def append(self, image_id: Any, results: Results) -> None:
        line = json.dumps({"image_id": image_id, "results": results})
        self._lines.append(line)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def lines(self) -> list[str]:
        """Returns this process's lines. In the first process, adds the lines read from disk."""
        return [*(self._earlier.values() if self._rank == 0 else ()), *self._lines]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Deletes the files of all processes. Call it after their predictions were evaluated."""
        self.close()
        self._earlier = {}
        for path in self._paths("*") if self._folder else ():
            path.unlink(missing_ok=True)

    def _paths(self, fingerprint: str) -> list[Path]:
        assert self._folder is not None
        return sorted(self._folder.glob(f"{self._name}.{fingerprint}.rank*.jsonl"))


def merge_lines(lines: Iterable[str]) -> Results:
    """Returns the results of all images. If an image occurs several times, its last line counts."""
    predictions = (json.loads(line) for line in lines)
    by_image = {x["image_id"]: x["results"] for x in predictions}
    return list(itertools.chain.from_iterable(by_image.values()))


def _image_id(line: str) -> Any:
    return json.loads(line)["image_id"]


def _complete_lines(path: Path) -> list[str]:
    """Returns the lines of a file without those that a crash cut off."""
    complete = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        complete.append(line)
    return complete


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return True
        file.seek(-1, 2)
        return file.read() == b"\n"
