"""tools/ablate.py with fake Slurm commands, the threads of a trial, and the plan of an ablation."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import sys

import pytest
import torch
import yaml
from conftest import CONFIGS, ROOT, load_script
from submitit.slurm.slurm import SlurmJob

from mask_head_plugin.ablation import Cluster, run_trial, runner

COMMANDS = {
    "sbatch": 'cp "$1" "$0.script"; echo "Submitted batch job 77"',
    "srun": "exit 1",
    "sacct": r'printf "JobID|State|NodeList\n77|FAILED|n1\n"',
    "scancel": "exit 0",
}


@pytest.fixture
def tool(capsys, tmp_path):
    """Returns a function that runs tools/ablate.py.

    The function returns the exit code, stdout, and the lines of stderr.
    """
    spec = importlib.util.spec_from_file_location("ablate_tool", ROOT / "tools" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content = {
        "TITLE": "One",
        "METRIC": "segm/AP",
        "SEEDS": [1],
        "SIZES": {"shapes": {"CONFIG": str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")}},
        "BASELINE": "bce",
        "VARIANTS": {"bce": {}},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    fixed = ["--config-file", str(tmp_path / "one.yaml"), "--output", str(tmp_path / "out")]

    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ablate.py", *fixed, *args])
            code = module.main()
        out, err = capsys.readouterr()
        return code, out, err.strip().splitlines()

    return run


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Simulates a login node without a GPU; yields the folder of its commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    yield folder
    SlurmJob.watcher.clear()


def test_slurm_trials_train_on_the_reserved_gpus(tool, slurm, tmp_path):
    flags = ["--num-gpus", "8", "--partition", "long", "--account", "lab", "--qos", "high"]
    code, _, err = tool("--cluster", "slurm", "--time", "77", *flags)
    script = (slurm / "sbatch.script").read_text()
    wanted = ("gpus-per-node=8", "partition=long", "account=lab", "qos=high", "time=77")
    assert all(f"#SBATCH --{text}\n" in script for text in wanted)
    (path,) = tmp_path.rglob("77_submitted.pkl")
    job = pickle.loads(path.read_bytes()).function
    assert (job.trial.cfg.MODEL.DEVICE, job.num_gpus) == ("cuda", 8)
    assert code == 1 and "bce, seed 1 failed" in err[-1], "sacct reports FAILED"


def test_without_flags_slurms_own_defaults_apply(tool, slurm):
    tool("--cluster", "slurm")
    script = (slurm / "sbatch.script").read_text()
    assert not any(f"--{name}" in script for name in ("partition", "account", "qos", "gpus"))


def test_a_job_refused_by_slurm_is_reported_in_one_line(tool, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'Invalid account' >&2; exit 1\n")
    code, _, err = tool("--cluster", "slurm", "--account", "nobody")
    assert code == 2 and err[-1] == "ablate.py: sbatch refused a job: Invalid account"


def test_a_missing_slurm_is_reported_in_one_line_and_a_dry_run_still_works(
    tool, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = tool("--cluster", "slurm", "--num-gpus", "8")
    assert code == 2 and err[-1].startswith("ablate.py: --cluster slurm: sbatch and srun not found")
    code, out, _ = tool("--cluster", "slurm", "--num-gpus", "8", "--dry-run")
    assert code == 0 and "1 trial, of unknown length until one has run on these GPUs" in out
    assert "no practical number of seeds shows a difference of 1" in out
    assert not (tmp_path / "out").exists()


def test_a_difference_without_a_dry_run_is_refused(tool, capsys, tmp_path):
    for value in ("3", "1"):
        with pytest.raises(SystemExit, match="2"):
            tool("--difference", value)
        assert "--difference has no effect without --dry-run: add it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_one_line_even_before_trials_start(tool, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    for place in ("plan", "run"):
        monkeypatch.setattr(f"mask_head_plugin.ablation.{place}", interrupt)
        code, _, err = tool()
        assert code == 130
        assert err[-1] == "ablate.py: stopped; the same command continues from here"
        assert err[0].startswith("ablate.py: checking ")
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["ablate", "demo", "show_training_images"])
def test_flags_after_key_value_pairs_are_explained(name, monkeypatch, capsys):
    arguments = [f"{name}.py", "SOLVER.MAX_ITER", "300", "--config-file", "x.yaml"]
    monkeypatch.setattr(sys, "argv", arguments)
    module = load_script(f"tools/{name}.py")
    with pytest.raises(SystemExit):
        getattr(module, "parse_args", module.main)()
    assert "--config-file must come before the KEY VALUE options" in capsys.readouterr().err


def test_trials_share_the_cores_unless_the_user_sets_the_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [Cluster(jobs=jobs).threads for jobs in (1, 5, 99)] == [12, 2, 1]
    assert Cluster("slurm").threads == 0, "the nodes may have more or fewer cores"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [Cluster(jobs=jobs).threads for jobs in (1, 5)] == [0, 0]


def test_a_trial_uses_its_number_of_threads(monkeypatch):
    monkeypatch.setattr(run_trial, "run_trial", lambda *_: None)
    before = torch.get_num_threads()
    try:
        run_trial.TrialJob(None, 0, 5)()
        assert torch.get_num_threads() == 5
        run_trial.TrialJob(None, 0, 0)()
        assert torch.get_num_threads() == 5, "0 must not change PyTorch's setting"
    finally:
        torch.set_num_threads(before)


def test_a_plan_has_a_line_for_each_variant(tool, tmp_path):
    """The table shows the metrics of finished trials. Errors of failed trials are below it."""
    content = yaml.safe_load((tmp_path / "one.yaml").read_text())
    content |= {"SEEDS": [1, 2, 3], "VARIANTS": {"bce": {}, "again": {"SOLVER": {"GAMMA": 0.5}}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    finished = {"status": "finished", "results": {"segm": {"AP": 51.234}}}
    for name, record in {
        "bce/seed_1": finished,
        "again/seed_3": {"status": "failed", "error": "out of memory"},
    }.items():
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "trial.json").write_text(json.dumps(record))
    code, out, _ = tool("--dry-run", "--cluster", "slurm", "--num-gpus", "99")
    rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert code == 0 and rows[0] == ["variant", "seed 1", "seed 2", "seed 3"]
    assert ["bce", "segm/AP 51.23", "to do", "to do"] in rows
    assert ["again", "to do", "to do", "failed"] in rows
    assert ["again, seed 3 failed: out of memory"] in rows
    assert f"such as {tmp_path / 'out' / 'again' / 'seed_1'}" in out
