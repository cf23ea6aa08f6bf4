#!/usr/bin/env python3
"""Installs detectron2 from the sources in another project's wheel.

detectron2 is not on PyPI, but the wheel ``labgym==3.1.2`` is. It contains detectron2's Python
sources in ``LabGym/detectron2/``. Without the import prefix ``LabGym.``, every file equals upstream
commit e9f7e2ba15abd7badcb05ef6f5076f06b36a9c5b. This script downloads that wheel, checks its hash,
repacks the folder as a separate wheel under detectron2's licence, and installs the new wheel.

The compiled module ``detectron2._C`` is not included. Only rotated boxes and deformable convolution
need it; mask_head_plugin uses neither.

If ``import detectron2`` already works, the script does nothing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pinned_wheel import FetchError, PinnedWheel, run_pip

SOURCE = PinnedWheel(
    "labgym", "3.1.2", "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
)
SOURCE_PREFIX = "LabGym/"
UPSTREAM_COMMIT = "e9f7e2ba15abd7badcb05ef6f5076f06b36a9c5b"
VERSION = f"0.6+{UPSTREAM_COMMIT[:7]}"
LICENSE_FILE = Path(__file__).resolve().parents[1] / "LICENSE"

# The requirements in upstream's setup.py at that commit.
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore<0.1.6,>=0.1.5",
    "iopath<0.1.10,>=0.1.7",
    "omegaconf<2.4,>=2.1",
    "hydra-core>=1.1",
    "black",
    "packaging",
    # model_zoo imports pkg_resources, which setuptools 82 removed.
    "setuptools<81",
)

NOTICE = f"""\
detectron2, Copyright (c) Facebook, Inc. and its affiliates. Licensed under the Apache License,
Version 2.0 (see LICENSE).

These are the Python sources of https://github.com/facebookresearch/detectron2 at commit
{UPSTREAM_COMMIT},
taken from the folder LabGym/detectron2 of the wheel {SOURCE.project} {SOURCE.version}.
The only change: the import prefix "LabGym." that the wheel had added was removed. No other file of
that wheel is included.
"""


def describe_installed() -> str | None:
    """Returns a line about the installed detectron2, or None if there is none.

    The import runs in a child process, because a broken installation could crash this script, and
    only a new process sees a package that was just installed.
    """
    probe = (
        "import importlib.util, detectron2\n"
        "compiled = importlib.util.find_spec('detectron2._C') is not None\n"
        "print('detectron2', detectron2.__version__, 'in', detectron2.__path__[0],\n"
        "      'with' if compiled else 'without', 'the compiled module detectron2._C, which',\n"
        "      'mask_head_plugin does not need')"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if result.returncode == 0:
        return result.stdout.strip()
    missing = re.search(r"No module named '(?!detectron2)(\w+)'", result.stderr)
    if missing:
        raise FetchError(
            f"detectron2 is installed, but it needs {missing[1]!r}, which is not installed. Run "
            f"{sys.executable} -m pip install -r requirements.txt"
        )
    if importlib.util.find_spec("detectron2") is not None:
        raise FetchError(
            "detectron2 is installed but cannot be imported:\n"
            f"{result.stderr.strip()}\n"
            "Fix or remove it (pip uninstall detectron2), then run this script again."
        )
    return None


def repack(source_wheel: Path, folder: Path) -> Path:
    """Writes the wheel ``detectron2-<VERSION>`` into ``folder`` and returns its path.

    The same input results in the same bytes, because entries are sorted and have a fixed date.
    """
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(source_wheel) as source:
        for name in source.namelist():
            if name.startswith(SOURCE_PREFIX + "detectron2/") and not name.endswith("/"):
                content = source.read(name)
                if name.endswith(".py"):
                    content = re.sub(rb"\bLabGym\.(?=detectron2\b)", b"", content)
                files[name.removeprefix(SOURCE_PREFIX)] = content
    info = f"detectron2-{VERSION}.dist-info"
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n"
        "Summary: Detectron2, repacked Python sources\nLicense: Apache-2.0\n"
        f"Home-page: https://github.com/facebookresearch/detectron2\n{requires}"
    ).encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/licenses/LICENSE"] = LICENSE_FILE.read_bytes()
    files[f"{info}/licenses/NOTICE"] = NOTICE.encode()
    files[f"{info}/RECORD"] = record(files, f"{info}/RECORD").encode()

    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in sorted(files):
            wheel.writestr(zipfile.ZipInfo(name, date_time=(2016, 1, 1, 0, 0, 0)), files[name])
    return path


def record(files: dict[str, bytes], record_name: str) -> str:
    """Returns the text of a wheel's RECORD: one line per file, with its name, hash and size."""
    lines = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{record_name},,\n"])


def install(source_wheel: Path | None) -> None:
    """Repacks ``source_wheel``, or else the downloaded wheel, and installs the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source_wheel is None:
            wheel_name = f"{SOURCE.project} {SOURCE.version}"
            print(
                f"downloading detectron2's sources (2 MB, from the wheel of {wheel_name})",
                flush=True,
            )
            instead = (
                ", or install detectron2 yourself from "
                "https://github.com/facebookresearch/detectron2"
            )
            source_wheel = SOURCE.download(folder, instead)
        SOURCE.check(source_wheel)
        wheel = repack(source_wheel, folder)
        print(f"installing {wheel.name}", flush=True)
        run_pip("install", str(wheel))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only print which detectron2 is in use and whether it has the compiled _C; "
        "exit code 1 if there is none",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"use this downloaded {SOURCE.project}-{SOURCE.version} wheel, e.g. without network",
    )
    args = parser.parse_args(argv)
    try:
        installed = describe_installed()
        if args.check:
            print(installed or "detectron2 is not installed")
            return 0 if installed else 1
        if installed:
            print(f"nothing to do: {installed}")
            return 0
        install(args.wheel)
        installed = describe_installed()
        if installed is None:
            raise FetchError("pip reported success, but detectron2 cannot be imported")
        print(installed)
    except FetchError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
