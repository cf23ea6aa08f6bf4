"""Starts processes without importing PyTorch and detectron2 again, which takes seconds.

The processes are forks of one clean Python process that has imported both and done nothing else.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("mask_head_plugin.engine.run", "torch.utils.tensorboard")
"""Modules that the clean process imports."""


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """Returns the context that creates the forks. Its server starts at the first call."""
    import pytest  # the forks import this module but do not need pytest

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("OMP_NUM_THREADS", raising=False)  # a fork may set it
        forkserver.ensure_running()
    return context


def run_script(
    script: str, *args: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script like ``subprocess.run([sys.executable, script, *args], ...)``.

    Args:
        script: path of the script, relative to ``cwd``.
        args: arguments of the script.
        cwd: folder in which the script runs.
        env: environment of the script; None for that of this process. Variables that the package
            reads when it is imported keep the values that they had at the first call.

    Returns:
        The exit code and the captured output.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        process = fork_server().Process(
            target=_run, args=(script, args, str(cwd), environment, outputs)
        )
        process.start()
        process.join()
        stdout, stderr = (Path(path).read_text() for path in outputs)
    return subprocess.CompletedProcess([script, *args], process.exitcode, stdout, stderr)


def _run(
    script: str, args: tuple[str, ...], cwd: str, environment: dict[str, str], outputs: list[str]
) -> None:
    import torch

    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # PyTorch reads it only when imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")
