"""Launching processes with detectron2's flags and with torchrun; errors if a process fails.

Shape alphabet: S steps, L loss terms.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import shlex
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT
from made_run import NUM_STEPS, fail, losses_of_step, make_model, step_down, train
from quick_processes import fork_server, run_script

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import launch
from mask_head_plugin.engine.launch import RankError


def reference(timm_name: str = "") -> torch.Tensor:
    """Returns the (S, L) mean losses when one process trains on both halves of each batch."""
    model = make_model(timm_name)
    means = []
    for step in range(NUM_STEPS):
        halves = torch.stack([losses_of_step(model, step, rank) for rank in range(2)])
        means.append(halves.detach().mean(0))
        halves.mean(0).sum().backward()
        step_down(model)
    return torch.stack(means)


def check(folder: Path, timm_name: str = "") -> dict:
    facts = torch.load(folder / "facts.pth")
    torch.testing.assert_close(facts["losses"], reference(timm_name), rtol=1e-5, atol=0)
    assert facts["unread"] is None
    assert not facts["searches"], "unused parameters must be searched only in the first step"
    assert facts["shared"] == [3, 3], "all processes must evaluate the weights of the first"
    assert (facts["world_size"], facts["local_size"], facts["backend"]) == (2, 2, "gloo")
    return facts


def start_by(method: str, monkeypatch) -> None:
    """Starts processes quickly; with ``spawn``, each would spend seconds on imports."""
    plain = launch._launch_config

    def config(*args):
        return dataclasses.replace(plain(*args), start_method=method)

    monkeypatch.setattr(launch, "_launch_config", config)


def test_two_processes_started_by_flags_train_as_one_process_on_both_halves(tmp_path, monkeypatch):
    start_by(fork_server().get_start_method(), monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    name, place = "mobilenetv3_small_050", (2, 1, 0, "tcp://127.0.0.1:1")
    launch.launch(train, *place, (str(tmp_path), False, name), device="cpu")
    facts = check(tmp_path, name)
    assert not facts["restarted"]
    assert facts["threads"] == max(len(os.sched_getaffinity(0)) // 2, 1)


def test_two_processes_started_by_torchrun_also_train_after_a_restart(tmp_path):
    made_run = str(ROOT / "tests" / "engine" / "made_run.py")
    at_once = ["--run-path", "--start-method", fork_server().get_start_method()]
    flags = ["--nproc-per-node", "2", "--max-restarts", "1", *at_once]
    result = run_script(torch.distributed.run.__file__, *flags, made_run, str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert check(tmp_path)["restarted"]


def test_train_net_trains_the_users_code_in_two_processes_and_scales_the_batch(tmp_path):
    """Runs the command of docs/your_own_code.md, with its loss, backbone and data set."""
    page = (ROOT / "docs" / "your_own_code.md").read_text()
    code, text = (re.findall(rf"```{x}\n(.*?)```", page, re.DOTALL)[0] for x in ("python", "bash"))
    (tmp_path / "my_code.py").write_text(code)
    (ROOT / "datasets").mkdir(exist_ok=True)
    for name in ("train_net.py", "configs", "datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    _, script, *rest = shlex.split(text.replace("\\\n", " "))
    opts = [
        *("MODEL.DEVICE", "cpu", "DATASETS.TEST", "()", "SOLVER.REFERENCE_WORLD_SIZE", "1"),
        *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "4"),
    ]
    result = run_script(script, "--num-gpus", "2", *rest, *opts, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    output = tmp_path / "output" / "mine"
    ran = f"imported your code (IMPORTS): {tmp_path}/my_code.py"
    for text in (
        *("batch_size=2, learning_rate=0.06, max_iter=2", "running on cpu, processes: 2", ran),
    ):
        assert result.stdout.count(text) == 1  # one process writes to the console
        assert text in (output / "log.txt.rank1").read_text()
    assert (output / "model_final.pth").is_file()
    assert f"IMPORTS:\n- {tmp_path}/my_code.py\n" in (output / "config.yaml").read_text()


def test_a_single_process_is_not_launched_separately():
    pids = []
    launch.launch(lambda pids: pids.append(os.getpid()), 1, args=(pids,))
    assert pids == [os.getpid()]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0,), "--num-gpus 0: it must be at least 1"),
        ((1, 2, 2, "tcp://a:1"), "--machine-rank 2: it must be 0 to 1 with --num-machines 2"),
        (
            (1, 2, 0, "auto"),
            r"--dist-url auto: --num-machines 2 needs tcp://host:port of machine 0",
        ),
        ((1, 2, 0, "file:///x:1"), "--dist-url file:///x:1: .* needs tcp://host:port"),
        ((1, 2, 0, "tcp://a"), "--dist-url tcp://a: .* needs tcp://host:port"),
    ],
)
def test_invalid_numbers_are_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        launch.launch(print, *numbers, device="cpu")


def test_more_processes_than_gpus_or_cores_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"--num-gpus 3: this machine has 2 GPUs; lower the"):
        launch.launch(print, 3)
    with pytest.raises(ConfigError, match=r"MODEL.DEVICE cuda:1 is a single GPU; set it to cuda"):
        launch.launch(print, 2, device="cuda:1")
    assert launch.process_count(2, 3, "cuda") == 6
    assert launch.process_count(2, 1, "cpu") == 2
    with pytest.raises(
        ConfigError, match=r"--num-gpus 9999: without GPUs, .* core; this machine can"
    ):
        launch.launch(print, 9999, device="cpu")


@pytest.fixture
def of_torchrun(monkeypatch):
    """Sets torchrun's environment variables; returns a function to change them."""

    def change(**values: str) -> None:
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    change(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    change(MASTER_ADDR="localhost", MASTER_PORT="1", TORCHELASTIC_RUN_ID="none")
    return change


def test_unsupported_torchrun_settings_are_refused(of_torchrun):
    assert launch.process_rank() == 1
    with pytest.raises(
        ConfigError, match="--num-gpus is 3, but torchrun has started 2 processes on this"
    ):
        launch.launch(print, 3, device="cpu")
    of_torchrun(WORLD_SIZE="3")
    with pytest.raises(ConfigError, match=r"2 of 3 processes .* the same --nproc-per-node"):
        launch.launch(print, 1, device="cpu")
    of_torchrun(WORLD_SIZE="4", TORCHELASTIC_MAX_RESTARTS="3", TORCHELASTIC_USE_AGENT_STORE="True")
    with pytest.raises(ConfigError, match=r"--max-restarts 3 .* c10d .*SHARE_RDZV_TCP_STORE=1"):
        launch.launch(print, 1, device="cpu")


def test_a_restart_is_recognised_by_its_count_or_the_id_of_the_run(of_torchrun, tmp_path):
    output = str(tmp_path)
    assert not launch.restarted(output)
    of_torchrun(TORCHELASTIC_RESTART_COUNT="1")
    assert launch.restarted(output)
    of_torchrun(TORCHELASTIC_RESTART_COUNT="0")
    assert not launch.restarted(output)  # a run without an id stores none
    of_torchrun(TORCHELASTIC_RUN_ID="a")
    assert not launch.restarted(output)
    assert launch.restarted(output)
    of_torchrun(TORCHELASTIC_RUN_ID="b")
    assert not launch.restarted(output)


def test_the_first_process_of_a_machine_runs_before_the_others(of_torchrun, monkeypatch):
    order = []
    store = torch.distributed.HashStore()
    monkeypatch.setattr(launch, "_store", lambda: store)

    def go() -> None:
        with launch.first_on_machine():
            order.append("second")

    second = threading.Thread(target=go)
    second.start()
    time.sleep(0.2)
    assert order == []
    of_torchrun(LOCAL_RANK="0", RANK="0")
    with launch.first_on_machine():
        order.append("first")
    second.join(5)
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("config", ConfigError, r"^rank 1: x.json is broken; fix it$"),
        ("error", RankError, r"(?s)^rank 1 failed\n.*in fail\n.*RuntimeError: simulated failure$"),
        ("exit", RankError, "^rank 1 ended with exit code 7$"),
        (
            "SIGKILL",
            RankError,
            r"^rank 1 was killed by SIGKILL \(out of memory\?\); continue with --",
        ),
        ("SIGSEGV", RankError, r"^rank 1 was killed by SIGSEGV; continue with --resume$"),
    ],
)
def test_one_failing_process_ends_all_with_its_error(how, kind, message, monkeypatch):
    start_by("fork", monkeypatch)  # unsafe with threads, but fast
    start = time.monotonic()
    with pytest.raises(kind, match=message):
        launch.launch(fail, 2, args=(how,), device="cpu")
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()
