"""The GPU campaign, run on the CPU with tiny sizes, and its handling of failures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script

MADE_TESTS = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("x", [1, 2, 3])
def test_made(x):
    if x == 2:
        pytest.skip("two")
    assert x == 1, "three is not one"
"""


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("benchmarks/gpu_campaign.py")


def in_this_process(command, variables, log, seconds):
    """Replaces run_command, whose processes would each spend seconds importing PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:])
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as stop:
            log.write_text(str(stop))
            return 1
    return 0


def test_every_part_runs_without_a_gpu(campaign, interpreted_operator, tmp_path, monkeypatch):
    tests = tmp_path / "test_made.py"
    tests.write_text(MADE_TESTS)
    parts = {x.name: x for x in campaign.PARTS}
    parts["cuda_tests"] = dataclasses.replace(
        parts["cuda_tests"], tiny_flags=("--files", str(tests))
    )
    monkeypatch.setattr(campaign, "PARTS", tuple(parts.values()))
    monkeypatch.setattr(campaign, "run_command", in_this_process)
    folder = tmp_path / "out"
    code = campaign.main(["--device", "cpu", "--output", str(folder)])
    content = json.loads((folder / "campaign.json").read_text())
    ended = {name: (x["status"], x["told"]) for name, x in content["parts"].items()}
    assert ended == dict.fromkeys(parts, ("done", "")) and code == 0
    results = {name: x["results"] for name, x in content["parts"].items()}
    assert results["cuda_tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert "three is not one" in results["cuda_tests"]["rows"][0]["told"]
    correctness = results["correctness"]["rows"]
    assert len(correctness) == 12 and all(x["agrees"] for x in correctness)
    assert results["parity"]["verdict"] == "not enough detections"
    assert len(results["kernel_variants"]["rows"]) == 13
    assert not any("error" in x for x in results["kernel_variants"]["rows"])
    assert {x["file"] for x in results["synchronisations"]["rows"]} == {"not measured: no CUDA"}
    assert all((folder / x["trace"]).is_file() for x in results["step_profile"]["steps"])
    assert {x["verdict"] for x in content["verdicts"]} == {"not measured"}
    page = (folder / "campaign.md").read_text()
    assert all(f"## {name}" in page for name in parts) and "| not measured" in page


def part_of(campaign, tmp_path, name, code, seconds=10):
    script = tmp_path / f"{name}.py"
    script.write_text(f"import sys, pathlib\nresults = pathlib.Path(sys.argv[2])\n{code}\n")
    part = sys.modules["gpu.parts"].Part
    return part(name, "made", str(script), seconds, seconds)


def test_parts_that_fail_hang_or_write_nothing_do_not_affect_the_others(
    campaign, tmp_path, monkeypatch
):
    good = 'results.write_text(\'{"rows": [{"a": 1}]}\')'
    hang = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"{good}\npathlib.Path(sys.argv[2] + '.pid').write_text(str(child.pid))\n"
        "print('hanging')\ntime.sleep(60)"
    )
    parts = (
        part_of(
            campaign, tmp_path, "crash", "import os; print('CUDA error', flush=True); os.abort()", 1
        ),
        part_of(campaign, tmp_path, "hang", hang, seconds=1),
        part_of(campaign, tmp_path, "nothing", ""),
        part_of(campaign, tmp_path, "half", "results.write_text('{')\nsys.exit('no more')"),
        part_of(campaign, tmp_path, "good", good),
    )
    monkeypatch.setattr(campaign, "PARTS", parts)
    monkeypatch.setattr(sys.modules["gpu.page"], "PARTS", parts)
    folder = tmp_path / "out"
    assert campaign.main(["--device", "cpu", "--output", str(folder)]) == 1
    found = json.loads((folder / "campaign.json").read_text())["parts"]
    assert found["crash"]["status"] == "failed" and "CUDA error" in found["crash"]["told"]
    assert found["hang"]["status"] == "cut off" and "hanging" in found["hang"]["told"]
    assert found["hang"]["results"] == {"rows": [{"a": 1}]}, (
        "results written before the process is killed must be kept"
    )
    child = Path("/proc", (folder / "hang.json.pid").read_text(), "status")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        assert "State:\tZ" in child.read_text(), "its child process must be killed"
    assert found["nothing"]["status"] == "failed" and "no results" in found["nothing"]["told"]
    assert found["half"]["told"] == "exit code 1: no more" and found["half"]["results"] is None
    assert found["good"] | {"seconds": 0} == {
        "status": "done",
        "seconds": 0,
        "told": "",
        "results": {"rows": [{"a": 1}]},
    }
    page = (folder / "campaign.md").read_text()
    assert "cut off" in page and "CUDA error" in page
    # Running a single part again keeps the results of the others.
    (tmp_path / "crash.py").write_text(
        f"import sys, pathlib\n{good}".replace("results", "pathlib.Path(sys.argv[2])", 1)
    )
    assert campaign.main(["--device", "cpu", "--output", str(folder), "--part", "crash"]) == 0
    again = json.loads((folder / "campaign.json").read_text())["parts"]
    assert again["crash"]["status"] == "done" and again["hang"] == found["hang"]


def test_without_a_gpu_the_real_campaign_is_refused(campaign, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert campaign.main(["--output", str(tmp_path / "out")]) == 2
    assert "--device cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("quick", [False, True])
def test_scripts_accept_the_flags_used_on_a_gpu(campaign, quick, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, *arguments):
        raise ParsedError(parse(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for part in campaign.PARTS:
        command = part.command(tmp_path, "cuda", quick=quick)
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(ParsedError) as parsed:
            runpy.run_path(command[1], run_name="__main__")
        args = parsed.value.args[0]
        assert args.device == "cuda" and args.output == tmp_path / f"{part.name}.json"


def test_all_parts_take_at_most_25_minutes_and_8_with_quick(campaign):
    assert sum(x.seconds for x in campaign.PARTS) <= 25 * 60
    assert sum(x.quick_seconds for x in campaign.PARTS) <= 8 * 60


def test_help_names_every_part(campaign, capsys):
    with pytest.raises(SystemExit):
        campaign.main(["--help"])
    text = capsys.readouterr().out
    assert all(part.name in text for part in campaign.PARTS) and "--device cpu" in text


def verdicts(campaign, part, results):
    promises = sys.modules["gpu.promises"].PROMISES
    return {
        x.what: x.verdict({part: {"gpu": "H100", **results}}) for x in promises if x.part == part
    }


def test_promises_are_judged_by_the_worst_case(campaign):
    case = {"what": "pooler", "output_size": 7, "sampling_ratio": 0, "layout": "contiguous"}
    rows = [
        {**case, "images": images, "forward_backward_ratio": ratio}
        for images, ratio in ((2, 1.5), (2, 3.0), (16, 1.49), (16, 9.0))
    ]
    two, sixteen = verdicts(campaign, "pooler", {"rows": rows}).values()
    assert (two["verdict"], sixteen["verdict"]) == ("met", "not met")
    assert sixteen["figure"] == "1.49x (P = 7, ratio 0, contiguous) to 9.0x"
    only_two = verdicts(campaign, "pooler", {"rows": rows[:2]})
    assert [x["verdict"] for x in only_two.values()] == ["met", "not measured"]
    head = {"what": "head, training", "classes": 1203, "time_ratio": 1.6, "memory_share": 0.36}
    found = verdicts(campaign, "mask_branch", {"rows": [head]})
    assert [x["verdict"] for x in found.values()][:2] == ["met", "not met"]
    assert {x["verdict"] for x in list(found.values())[2:]} == {"not measured"}
    step = {"what": "training step", "classes": 80, "time_ratio": 1.2, "memory_share": 1.0}
    times = {"detectron2_ms": 120, "ours_ms": 100, "contiguous_ms": 90}
    many = {**step, "classes": 1203, "detectron2_ms": 200, "ours_ms": 120}
    found = verdicts(campaign, "mask_branch", {"rows": [{**step, **times}, many]})
    met = {name: x["verdict"] for name, x in found.items() if x["verdict"] != "not measured"}
    assert list(met.values()) == ["met", "not met", "met", "not met"], met
    assert "1.20 times (detectron2: 1.67 times)" in [x["figure"] for x in found.values()]


def test_the_kernel_must_agree_in_all_cases(campaign):
    def judge(*agrees):
        results = {"cases": 2, "rows": [{"agrees": x} for x in agrees]}
        (found,) = verdicts(campaign, "correctness", results).values()
        return found["verdict"], found["figure"]

    assert judge(True, True) == ("met", "2 of 2 cases")
    assert judge(True, False) == ("not met", "1 of 2 cases")
    assert judge(True) == ("not met", "1 of 2 cases"), (
        "an incomplete part must not meet the promise"
    )
    largest_error = load_script("benchmarks/gpu/correctness.py").largest_error
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert largest_error([one, one], [one, one]) == 0
    assert math.isnan(largest_error([one, nan], [one, one]))
    assert math.isnan(largest_error([nan, one], [one, one]))


def test_synchronisations_and_kernel_variants_are_judged(campaign):
    totals = [
        {"what": "training step, polygons", "detectron2": 96, "ours": 83},
        {"what": "inference", "detectron2": 39, "ours": 40},
        {"what": "RoI pooling, forward and backward", "detectron2": 4, "ours": 0},
    ]
    found = verdicts(campaign, "synchronisations", {"totals": totals, "rows": []})
    assert [x["verdict"] for x in found.values()] == ["met", "not met"]
    rows = [
        {"type": "fp32", "P": 7, "variant": name, "forward ms": ahead, "backward ms": back}
        for name, ahead, back in (("unchanged", 0.2, 0.4), ("2 warps", 0.1, 0.5), ("4", 0.1, 0.4))
    ]
    (found,) = verdicts(campaign, "kernel_variants", {"rows": rows}).values()
    assert (found["verdict"], found["figure"]) == ("not met", "4, fp32, P = 7: 1.20x")
    rows[2] = {"type": "fp32", "P": 7, "variant": "4", "error": "out of shared memory"}
    (found,) = verdicts(campaign, "kernel_variants", {"rows": rows}).values()
    assert found["verdict"] == "met"


def test_the_output_of_a_program_is_distinguished_from_its_failure(campaign):
    output_of = load_script("benchmarks/gpu/environment.py").output_of
    assert output_of(sys.executable, "-c", "print(' 5 W ')") == "5 W"
    assert output_of(sys.executable, "-c", "") == "none"
    fail = "import sys; print('no driver'); sys.exit(9)"
    assert output_of(sys.executable, "-c", fail) == "unknown: exit code 9: no driver"
    assert output_of("no-such-program").startswith("unknown: ")


def test_a_synchronisation_is_attributed_to_the_innermost_file_of_the_packages(campaign):
    module = load_script("benchmarks/gpu/synchronisations.py")

    def run(file, code, **names):
        exec(compile(code, file, "exec"), {"warnings": warnings, **names})

    warn = "warnings.warn('called a synchronizing CUDA operation (Triggered internally)')"
    with module.counted_waits("cpu") as counts:
        run("/x/torch/_tensor.py", warn)
        run("/x/detectron2/modeling/rcnn.py", "f()", f=lambda: run("/x/torch/nn/a.py", warn))
        run(
            "/x/detectron2/layers/a.py",
            "f()",
            f=lambda: run("/x/mask_head_plugin/ops/b.py", f"{warn}\n{warn}"),
        )
        run("/x/torch/autograd/graph.py", warn)
        warnings.warn("something else", stacklevel=1)
    assert counts == {
        "elsewhere": 1,
        "detectron2/modeling/rcnn.py": 1,
        "mask_head_plugin/ops/b.py": 2,
        "backward pass": 1,
    }
