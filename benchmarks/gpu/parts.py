"""The parts of gpu_campaign.py: the script and flags of each, and its time limit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """One part of the campaign, which runs in a separate process.

    Attributes:
        name: the value for --part; the results are ``NAME.json`` in the output folder.
        what: a description of what is measured.
        script: path of the script in benchmarks/.
        seconds: time reserved for the part.
        quick_seconds: time reserved for the part with --quick.
        flags: flags of the script.
        quick_flags: additional flags with --quick.
        tiny_flags: additional flags on the CPU.
    """

    name: str
    what: str
    script: str
    seconds: int
    quick_seconds: int
    flags: tuple[str, ...] = ()
    quick_flags: tuple[str, ...] = ()
    tiny_flags: tuple[str, ...] = ()

    def command(self, folder: Path, device: str, *, quick: bool) -> list[str]:
        """Returns the command line. On the CPU, sizes are tiny."""
        more = self.tiny_flags if device == "cpu" else self.quick_flags if quick else ()
        output = ["--output", str(self.results(folder)), "--device", device]
        return [sys.executable, str(BENCHMARKS / self.script), *output, *self.flags, *more]

    def results(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


TINY = ("--tiny", "--threads", "1", "--repeats", "1")
ONE_FILE = ("--files", "tests/ops/test_mask_rle.py")
STEPS = ("--only", "training, K = 1203", "targets", "step", "inference, K = 80")

PARTS = (
    Part("environment", "GPU, driver, versions, commit", "gpu/environment.py", 30, 20),
    Part(
        "correctness",
        "RoI pooling against torchvision, in all types, layouts, output sizes and ratios",
        "gpu/correctness.py",
        150,
        40,
        tiny_flags=("--tiny",),
    ),
    Part(
        "cuda_tests", "the tests that need a GPU", "gpu/cuda_tests.py", 210, 60, tiny_flags=ONE_FILE
    ),
    Part(
        "synchronisations",
        "where training and inference wait for the GPU, by file",
        "gpu/synchronisations.py",
        90,
        30,
        tiny_flags=("--tiny",),
    ),
    Part(
        "parity",
        "the repository's checkpoint in detectron2 and in the plugin, in full float32",
        "gpu/parity.py",
        120,
        40,
        quick_flags=("--num-images", "60"),
        tiny_flags=("--num-images", "2"),
    ),
    Part(
        "pooler",
        "RoI pooling: time and memory, 2 and 16 images",
        "roi_pooling.py",
        120,
        20,
        ("--threads", "1", "--images", "2", "16", "--repeats", "30"),
        ("--ratios", "0", "--repeats", "10"),
        ("--images", "2", *TINY),
    ),
    Part(
        "mask_branch",
        "mask head, targets, training step and inference in float32: time and memory",
        "mask_branch.py",
        150,
        50,
        ("--repeats", "30"),
        ("--repeats", "10", *STEPS),
        (*STEPS, *TINY),
    ),
    Part(
        "mask_branch_amp",
        "mask head, targets, training step and inference in mixed precision",
        "mask_branch.py",
        150,
        40,
        ("--amp", "--repeats", "30"),
        ("--repeats", "10", "--only", "step, K = 80", "large"),
        ("--only", "step, K = 80", *TINY),
    ),
    Part(
        "mask_output",
        "masks to run lengths: time and memory",
        "mask_output.py",
        80,
        25,
        ("--images", "0", "--limit-gb", "2", "--repeats", "5"),
        ("--limit-gb", "0.5", "--repeats", "3"),
        TINY,
    ),
    Part(
        "guards",
        "the cost of the guards and seeds of a step",
        "guards.py",
        50,
        20,
        ("--repeats", "20"),
        ("--repeats", "10"),
        TINY,
    ),
    Part(
        "step_profile",
        "the longest kernels of a training step, and traces",
        "gpu/step_profile.py",
        90,
        60,
        tiny_flags=("--tiny",),
    ),
    Part(
        "kernel_variants",
        "the RoI pooling kernel with other blocks, warps, tiles and layouts",
        "gpu/kernel_variants.py",
        240,
        50,
        ("--seconds", "200"),
        ("--seconds", "10", "--types", "fp32"),
        ("--tiny", "--types", "fp32"),
    ),
)
