"""Trials of an ablation: planning, running, failures, interruptions and resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS
from detectron2.config import CfgNode
from quick_processes import run_script

from mask_head_plugin import ConfigError
from mask_head_plugin.ablation import (
    Cluster,
    describe,
    estimate_seconds,
    load_ablation,
    plan,
    run,
    run_trial,
    runner,
    write_description,
)
from mask_head_plugin.ablation.cluster import _stderr_to
from mask_head_plugin.ablation.trial_folder import folder_name, write_record
from mask_head_plugin.config import flatten
from mask_head_plugin.data import shapes
from mask_head_plugin.durable_files import lock_holder, locked, sole_writer

DICE = {"MODEL": {"ROI_MASK_HEAD": {"LOSSES": [["dice", 1.0]]}}}
DEBUG = Cluster("debug")


@pytest.fixture(scope="module")
def six_images(tmp_path_factory):
    """Returns overrides that shorten a run of the shapes config to a few seconds."""
    folder = tmp_path_factory.mktemp("six")
    for split in ("train", "val"):
        shapes.write_split(folder, split, 6)
    files = [
        [f"ablated_{s}", str(folder / "annotations" / f"{s}.json"), str(folder / s)]
        for s in ("train", "val")
    ]
    datasets = {"COCO_FILES": files, "TRAIN": ["ablated_train"], "TEST": ["ablated_val"]}
    solver = {"MAX_ITER": 3, "WARMUP_ITERS": 1}
    return {"DATASETS": datasets, "SOLVER": solver, "MODEL": {"DEVICE": "cpu"}}


@pytest.fixture
def ablation(tmp_path, six_images):
    """Writes an ablation file with a baseline and a variant whose name is not a valid path."""
    content = {
        "TITLE": "Losses",
        "METRIC": "segm/AP",
        "SEEDS": [1, 2],
        "SIZES": {
            "shapes": {
                "CONFIG": str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"),
                "OVERRIDES": six_images,
            }
        },
        "BASELINE": "bce",
        "VARIANTS": {"bce": {}, "dice / alone": DICE},
        "PAPER": {"bce": {"segm/AP": 30.3}},
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces training; returns the fake and the (loss, seed) pairs that it was called with."""
    asked = []

    def train(cfg):
        loss = cfg.MODEL.ROI_MASK_HEAD.LOSSES[0][0]
        asked.append((loss, cfg.SEED))
        if (loss, cfg.SEED) in train.broken:
            raise RuntimeError("simulated failure")
        if (loss, cfg.SEED) in train.interrupted:
            raise KeyboardInterrupt
        folder = Path(cfg.OUTPUT_DIR)
        (folder / "inference").mkdir(exist_ok=True)
        (folder / "num_parameters.txt").write_text("12")
        (folder / "num_iterations.txt").write_text(train.num_iterations)
        rows = [{"iteration": k, "time": 0.5 + k, "total_loss": 1.0} for k in range(3)]
        (folder / "metrics.json").write_text("\n".join(json.dumps(x) for x in rows))
        found = {"dataset": "x", "segm": {"AP": 40.0 + cfg.SEED, "by_class": {}}}
        (folder / "inference" / "metrics.json").write_text(json.dumps(found))

    train.broken, train.interrupted, train.num_iterations = set(), set(), "3"
    monkeypatch.setattr(run_trial, "_train", train)
    return train, asked


def trials_of(ablation, tmp_path, **kwargs):
    return plan(load_ablation(ablation, "shapes", **kwargs), tmp_path / "out")


def test_each_trial_has_its_folder_seed_and_config(ablation, tmp_path):
    trials = trials_of(ablation, tmp_path)
    assert [(t.variant, t.seed, t.cfg.SEED) for t in trials] == [
        ("bce", 1, 1),
        ("dice / alone", 1, 1),
        ("bce", 2, 2),
        ("dice / alone", 2, 2),
    ]
    assert len({t.folder for t in trials}) == 4
    assert all(t.folder.parent.parent == tmp_path / "out" for t in trials)
    assert trials[1].cfg.MODEL.ROI_MASK_HEAD.LOSSES == [["dice", 1.0]]
    assert folder_name("a b") != folder_name("a/b")


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("segm/APx", r"did you mean 'segm/AP'"),
        ("AP", r"trials have bbox/AP, bbox/AP50"),
        ("segm/AP-ring", r"did you mean 'segm/AP'"),
        ("validation/loss_mask", r"trials have bbox/AP"),
    ],
)
def test_a_metric_that_trials_do_not_have_is_refused_before_training(
    ablation, tmp_path, metric, hint
):
    content = yaml.safe_load(ablation.read_text())
    for given in ("segm/AR", "boundary/APs", metric):
        ablation.write_text(yaml.safe_dump({**content, "METRIC": given}))
        if given != metric:
            assert trials_of(ablation, tmp_path)
    with pytest.raises(ConfigError, match=f"'bce': METRIC '{metric}' is not measured.*{hint}"):
        trials_of(ablation, tmp_path)


def test_a_metric_for_objects_that_the_test_set_lacks_is_refused_before_training(
    ablation, tmp_path
):
    content = yaml.safe_load(ablation.read_text())
    ablation.write_text(yaml.safe_dump({**content, "METRIC": "segm/APl"}))
    told = "'bce': METRIC 'segm/APl' is not a number in any evaluation, because ablated_val"
    with pytest.raises(ConfigError, match=told):
        trials_of(ablation, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_broken_test_set_is_reported_before_training(ablation, tmp_path):
    content = yaml.safe_load(ablation.read_text())
    files = content["SIZES"]["shapes"]["OVERRIDES"]["DATASETS"]["COCO_FILES"]
    broken = json.loads(Path(files[1][1]).read_text())
    broken["annotations"][0]["image_id"] = 99
    (tmp_path / "val.json").write_text(json.dumps(broken))
    files[1] = ["broken_val", str(tmp_path / "val.json"), str(tmp_path)]
    content["SIZES"]["shapes"]["OVERRIDES"]["DATASETS"]["TEST"] = ["broken_val"]
    ablation.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"'bce': .*val\.json: .* image 99"):
        trials_of(ablation, tmp_path)


def test_variants_seeds_and_options_can_be_chosen(ablation, tmp_path):
    opts = ["SOLVER.MAX_ITER", "7"]
    trials = trials_of(ablation, tmp_path, variants=["bce"], seeds=[5], opts=opts)
    assert [(t.variant, t.seed, t.cfg.SOLVER.MAX_ITER) for t in trials] == [("bce", 5, 7)]
    with pytest.raises(ConfigError, match="--variant names 'dise', which is not a variant"):
        trials_of(ablation, tmp_path, variants=["bce", "dise"])
    with pytest.raises(ConfigError, match="leaves out the baseline: add --variant 'bce'"):
        trials_of(ablation, tmp_path, variants=["dice / alone"])
    with pytest.raises(ConfigError, match=r"--seed \[1, 1\]: seeds must be distinct"):
        trials_of(ablation, tmp_path, seeds=[1, 1])


def test_ineffective_keys_are_reported_if_set_by_the_user_but_not_if_set_by_a_base(
    ablation, tmp_path, monkeypatch
):
    content = yaml.safe_load(ablation.read_text())
    content["SIZES"]["shapes"]["OVERRIDES"]["MODEL"]["BACKBONE"] = {"FREEZE_AT": 1}
    timm = {"BACKBONE": {"NAME": "build_timm_fpn_backbone"}, "TIMM": {"NAME": "resnet10t"}}
    content["VARIANTS"]["timm"] = {"MODEL": timm}
    ablation.write_text(yaml.safe_dump(content))
    asked = []
    monkeypatch.setattr(runner, "check_and_register", lambda cfg, train, own: asked.append(own))
    trials_of(ablation, tmp_path, opts=["INPUT.CROP.TYPE", "relative"])
    plain, dice, timm = asked
    assert {"INPUT.CROP.TYPE", "SOLVER.WARMUP_ITERS", "MODEL.BACKBONE.FREEZE_AT"} <= plain
    assert dice - plain == {"MODEL.ROI_MASK_HEAD.LOSSES"}
    assert timm - plain == {"MODEL.BACKBONE.NAME", "MODEL.TIMM.NAME"}
    assert plain - timm == {"MODEL.BACKBONE.FREEZE_AT"}, "belongs to the backbone that was replaced"
    of_base = yaml.safe_load((CONFIGS / "Base-Small.yaml").read_text())
    assert set(flatten(CfgNode(of_base))) - plain


def test_an_invalid_variant_is_named_before_anything_runs(ablation, tmp_path):
    content = yaml.safe_load(ablation.read_text())
    content["VARIANTS"]["dice / alone"] = {"MODEL": {"ROI_MASK_HEAD": {"LOSSES": [["dise", 1]]}}}
    ablation.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"variant .dice / alone.: .*no loss .dise."):
        trials_of(ablation, tmp_path)
    assert not list((tmp_path / "out").glob("*/seed_*"))


def test_a_folder_with_other_settings_is_refused(ablation, tmp_path, fake_training):
    run(trials_of(ablation, tmp_path), DEBUG)
    with pytest.raises(ConfigError, match="the config of bce, seed 1 has changed"):
        trials_of(ablation, tmp_path, opts=["SOLVER.BASE_LR", "0.1"])


def test_an_interrupted_trial_is_not_resumed_with_other_settings(ablation, tmp_path, fake_training):
    train, _ = fake_training
    train.interrupted = {("binary_cross_entropy", 1)}
    with pytest.raises(KeyboardInterrupt):
        run(trials_of(ablation, tmp_path), DEBUG)
    with pytest.raises(ConfigError, match="the config of bce, seed 1 has changed"):
        trials_of(ablation, tmp_path, opts=["SOLVER.BASE_LR", "0.1"])


def test_a_new_seed_is_not_added_with_other_settings(ablation, tmp_path, fake_training):
    run(trials_of(ablation, tmp_path, seeds=[1]), DEBUG)
    assert trials_of(ablation, tmp_path, seeds=[3])
    with pytest.raises(ConfigError, match="the config of bce, seed 1 has changed"):
        trials_of(ablation, tmp_path, seeds=[3], opts=["SOLVER.BASE_LR", "0.1"])


@pytest.fixture
def own_code(ablation, tmp_path, monkeypatch):
    """Adds a file to IMPORTS, and returns the file."""
    for name in ("ablated_code", "ablated_code_2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "ablated_code.py"
    file.write_text("VERSION = 1\n")
    content = yaml.safe_load(ablation.read_text())
    ablation.write_text(yaml.safe_dump({**content, "IMPORTS": [file.name]}))
    return file


def test_versions_of_a_users_code_are_not_mixed(ablation, tmp_path, own_code, fake_training):
    run(trials_of(ablation, tmp_path, seeds=[1]), DEBUG)
    planned = trials_of(ablation, tmp_path, seeds=[2])
    own_code.write_text("VERSION = 2\n")
    copy = tmp_path / "out" / "bce" / "seed_1" / "code" / own_code.name
    assert copy.read_text() == "VERSION = 1\n"
    changed = f"{own_code} has changed since bce, seed 1 was run.*restore the file from {copy}"
    with pytest.raises(ConfigError, match=changed):
        trials_of(ablation, tmp_path, seeds=[2])
    run(planned, DEBUG)
    assert re.search(changed, planned[0].error), "the file may change while the study runs"
    shutil.copy(copy, own_code)
    run(trials_of(ablation, tmp_path, seeds=[2]), DEBUG)
    assert all(trial.is_finished for trial in planned)


def test_new_code_may_be_added_in_a_new_file(ablation, tmp_path, own_code, fake_training):
    run(trials_of(ablation, tmp_path), DEBUG)
    (tmp_path / "ablated_code_2.py").write_text("")
    content = yaml.safe_load(ablation.read_text())
    content["IMPORTS"].append("ablated_code_2.py")
    ablation.write_text(yaml.safe_dump(content))
    assert all(trial.is_finished for trial in trials_of(ablation, tmp_path))


def test_code_may_be_corrected_after_a_failure(ablation, tmp_path, own_code, fake_training):
    train, _ = fake_training
    train.broken = {("binary_cross_entropy", 1), ("dice", 1)}
    run(trials_of(ablation, tmp_path, seeds=[1]), DEBUG)
    own_code.write_text("VERSION = 2\n")
    train.broken = set()
    trials = trials_of(ablation, tmp_path, seeds=[1])
    run(trials, DEBUG)
    assert all(trial.is_finished for trial in trials)
    assert (trials[0].folder / "code" / own_code.name).read_text() == "VERSION = 2\n"


def test_trials_without_a_record_of_their_code_are_reported_once(
    ablation, tmp_path, own_code, fake_training, caplog
):
    trials = trials_of(ablation, tmp_path)
    run(trials, DEBUG)
    for trial in trials:
        shutil.rmtree(trial.folder / "code")
    caplog.clear()
    trials_of(ablation, tmp_path)
    (told,) = [x.getMessage() for x in caplog.records if "do not record the code" in x.getMessage()]
    assert told.startswith("4 trials, such as bce, seed 1, ") and str(own_code) in told


def test_only_one_command_may_run_in_a_folder(tmp_path):
    first, second, third = (sole_writer(tmp_path / "new") for _ in range(3))
    with first, pytest.raises(ConfigError, match="another run is"):
        second.__enter__()
    with third:
        pass


def test_descriptions_of_the_same_ablation_are_merged_and_others_refused(ablation, tmp_path):
    def described(**kwargs):
        chosen = load_ablation(ablation, "shapes", **kwargs)
        return describe(chosen, file="f", size="shapes", command="c")

    write_description(tmp_path, described(variants=["bce"], seeds=[3]))
    write_description(tmp_path, described(seeds=[1]))
    merged = json.loads((tmp_path / "ablation.json").read_text())
    assert [x["name"] for x in merged["variants"]] == ["bce", "dice / alone"]
    assert merged["seeds"] == [1, 3]
    with pytest.raises(ConfigError, match="belongs to the file 'f', not 'g': choose another"):
        write_description(tmp_path, {**described(), "file": "g"})


@pytest.mark.parametrize("text", ["[1]", "{", '{"status": "failed"}', "\udcff"])
def test_trials_with_damaged_records_run_again(text, ablation, tmp_path):
    trial = trials_of(ablation, tmp_path)[0]
    trial.folder.mkdir(parents=True)
    for name in ("trial.json", "metrics.json"):
        (trial.folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert not trial.is_finished and trial.iteration() == 0


def test_the_description_lists_how_each_variant_differs(ablation):
    description = describe(load_ablation(ablation, "shapes"), file="f", size="shapes", command="c")
    assert [x["differs"] for x in description["variants"]] == [
        {},
        {"MODEL.ROI_MASK_HEAD.LOSSES": [["dice", 1.0]]},
    ]
    assert description["dataset"] == "ablated_val" and description["seeds"] == [1, 2]
    assert json.loads(json.dumps(description)) == description


def test_a_trial_records_its_result_and_its_cost(ablation, tmp_path, fake_training):
    trials = trials_of(ablation, tmp_path)
    run(trials, DEBUG)
    record = trials[2].record()
    assert (record["variant"], record["seed"], record["status"]) == ("bce", 2, "finished")
    assert record["results"] == {"segm": {"AP": 42.0}}
    assert (record["iterations"], record["seconds_per_iteration"]) == (3, 1.5)
    assert record["num_parameters"] == 12 and record["peak_memory_mb"] > 10
    assert record["stopped_early"] is False


def test_a_trial_that_stopped_early_records_the_iterations_that_it_trained(
    ablation, tmp_path, fake_training
):
    fake_training[0].num_iterations = "2"
    trial = trials_of(ablation, tmp_path)[0]
    run([trial], DEBUG)
    record = trial.record()
    assert (record["iterations"], record["stopped_early"]) == (2, True)


def test_training_writes_the_iteration_at_which_it_ended(ablation, tmp_path, monkeypatch):
    """A trainer that stops early lowers its max_iter, see engine/early_stopping.py."""

    class StoppingTrainer:
        model = torch.nn.Linear(2, 3)

        def __init__(self, cfg):
            self.max_iter = cfg.SOLVER.MAX_ITER

        def resume_or_load(self, resume):
            pass

        def train(self):
            self.max_iter = 2

    monkeypatch.setattr(run_trial, "Trainer", StoppingTrainer)
    trial = trials_of(ablation, tmp_path)[0]
    run_trial._train(trial.cfg)
    assert (trial.folder / "num_iterations.txt").read_text() == "2"
    assert (trial.folder / "num_parameters.txt").read_text() == "9"


def test_a_failed_trial_does_not_stop_the_others_and_runs_again(ablation, tmp_path, fake_training):
    train, asked = fake_training
    train.broken = {("dice", 1)}
    ended = []
    trials = trials_of(ablation, tmp_path)
    run(trials, DEBUG, ended.append)
    assert ended == trials
    assert [t.is_finished for t in trials] == [True, False, True, True]
    assert trials[1].record()["error"] == "RuntimeError: simulated failure"
    train.broken = set()
    asked.clear()
    run(trials_of(ablation, tmp_path), DEBUG)
    assert asked == [("dice", 1)], "only the failed trial must run again"
    assert all(t.is_finished for t in trials)


def test_after_an_interruption_finished_trials_are_kept(ablation, tmp_path, fake_training):
    train, asked = fake_training
    train.interrupted = {("binary_cross_entropy", 2)}
    with pytest.raises(KeyboardInterrupt):
        run(trials_of(ablation, tmp_path), DEBUG)
    train.interrupted = set()
    asked.clear()
    run(trials_of(ablation, tmp_path), DEBUG)
    assert asked == [("binary_cross_entropy", 2), ("dice", 2)]


def test_a_trial_running_in_another_process_is_waited_for(ablation, tmp_path, fake_training):
    _, asked = fake_training
    trial = trials_of(ablation, tmp_path)[0]
    trial.folder.mkdir(parents=True)
    with locked(trial.folder / "lock"):
        thread = threading.Thread(target=run_trial.run_trial, args=(trial,))
        thread.start()
        time.sleep(0.3)
        assert asked == []
        write_record(trial, {"status": "finished"})
    thread.join()
    assert asked == [], "a trial that the other process has finished must not run again"


def test_a_trial_left_by_a_killed_command_is_named(ablation, tmp_path, fake_training, capsys):
    trial = trials_of(ablation, tmp_path)[0]
    trial.folder.mkdir(parents=True)
    path = trial.folder / "lock"
    with locked(path):
        assert lock_holder(path) == os.getpid()
        runner._tell_if_running(trial)
    assert f"bce, seed 1 is still running in process {os.getpid()}" in capsys.readouterr().out
    assert lock_holder(path) is None


def test_errors_of_controllers_go_to_a_file(tmp_path, capfd):
    with _stderr_to(tmp_path / "new" / "controller.txt"):
        subprocess.run([sys.executable, "-c", "import sys; sys.exit('traceback')"], check=False)
    sys.stderr.write("shown\n")
    assert (tmp_path / "new" / "controller.txt").read_text() == "traceback\n"
    assert capfd.readouterr().err == "shown\n"


def test_the_estimate_uses_the_measured_speed_of_the_trials(ablation, tmp_path, fake_training):
    trials = trials_of(ablation, tmp_path)
    run(trials[:2], DEBUG)
    assert estimate_seconds(trials, Cluster(jobs=2)) == pytest.approx(2 * 3 * 1.5 / 2)


def test_without_a_measured_speed_a_few_iterations_are_timed_without_output(
    ablation, tmp_path, capfd
):
    """Otherwise, detectron2 would print the whole model above the plan."""
    trials = trials_of(ablation, tmp_path)
    assert 0 < estimate_seconds(trials, Cluster()) < 300
    assert capfd.readouterr() == ("", "")
    assert estimate_seconds(trials, Cluster("slurm", num_gpus=99)) is None, (
        "without the requested GPUs, no estimate is possible"
    )


def test_a_preempted_job_restarts_the_same_trial(ablation, tmp_path):
    trial = trials_of(ablation, tmp_path)[0]
    assert run_trial.TrialJob(trial, 2, 0).checkpoint().function.trial is trial


def test_a_trial_fails_on_a_machine_without_the_requested_gpus(
    ablation, tmp_path, fake_training, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    trial = trials_of(ablation, tmp_path)[0]
    run_trial.run_trial(trial, num_gpus=2)
    assert re.search("--num-gpus 2: PyTorch finds only 1 on ", trial.record()["error"])
    assert fake_training[1] == []


def test_the_device_depends_on_the_gpus_requested_for_a_trial(ablation, tmp_path, monkeypatch):
    """The GPUs of the machine on which the plan is made do not matter."""
    content = yaml.safe_load(ablation.read_text())
    del content["SIZES"]["shapes"]["OVERRIDES"]["MODEL"]
    ablation.write_text(yaml.safe_dump(content))
    for here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        for num_gpus, device in ((0, "cpu"), (8, "cuda")):
            trials = plan(load_ablation(ablation, "shapes"), tmp_path / "out", num_gpus)
            assert {t.cfg.MODEL.DEVICE for t in trials} == {device}
    cpu = load_ablation(ablation, "shapes", opts=["MODEL.DEVICE", "cpu"])
    with pytest.raises(
        ConfigError, match=r"'bce': MODEL.DEVICE cpu does not use the GPUs of --num"
    ):
        plan(cpu, tmp_path / "out", 8)


def test_parallel_trials_train_and_a_failed_one_is_reported(ablation, tmp_path):
    """Runs the tool with real training: one variant uses a user's loss, and one diverges."""
    content = yaml.safe_load(ablation.read_text())
    content["SEEDS"] = [1]
    files = content["SIZES"]["shapes"]["OVERRIDES"]["DATASETS"]["COCO_FILES"]
    (tmp_path / "own_loss.py").write_text(
        "from mask_head_plugin.modeling import MASK_LOSS_REGISTRY\n\n\n"
        "@MASK_LOSS_REGISTRY.register()\n"
        "def absolute_error(mask_logits, gt_masks, weights=None):\n"
        "    errors = (mask_logits.sigmoid() - gt_masks).abs()\n"
        "    return errors.sum() / max(errors.numel(), 1)\n"
    )
    content["IMPORTS"] = ["own_loss.py"]
    own = {"MODEL": {"ROI_MASK_HEAD": {"LOSSES": [["absolute_error", 1.0]]}}}
    content["VARIANTS"] = {"bce": own, "dice / alone": {"SOLVER": {"BASE_LR": 1e30}}}
    ablation.write_text(yaml.safe_dump(content))
    assert all(Path(f[1]).is_file() for f in files)
    output = tmp_path / "out"
    flags = ["--jobs", "2", "--output", str(output), "--draws", "20"]
    result = run_script("tools/ablate.py", "--config-file", str(ablation), *flags)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "dice / alone, seed 1 failed: " in result.stderr
    done = output / "bce" / "seed_1"
    names = {path.name for path in done.iterdir()}
    assert {"config.yaml", "environment.txt", "log.txt", "metrics.json", "inference"} <= names
    assert f"IMPORTS runs your code: {tmp_path}/own_loss.py" in (done / "log.txt").read_text()
    assert {"matches_segm.npz"} <= {path.name for path in (done / "inference").iterdir()}
    assert (output / "report.html").is_file() and (output / "report.md").is_file()
