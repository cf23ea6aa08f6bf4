"""The project's promises about GPUs, and functions that judge the results of gpu_campaign.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Results = dict[str, Any]
Judgement = tuple[str, bool]
"""The measured value, and whether it keeps the promise."""

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"


@dataclass(frozen=True)
class Promise:
    """A promise and how to judge it.

    Attributes:
        what: the promise, in words.
        part: name of the part that measures it.
        judge: function that judges the results of the part; it returns None if the measured value
            is missing.
    """

    what: str
    part: str
    judge: Callable[[Results], Judgement | None]

    def verdict(self, results: dict[str, Results]) -> dict[str, str]:
        """Returns a row of the page, from the results of all parts that have results."""
        found, figure, verdict = results.get(self.part), f"no results of {self.part}", NOT_MEASURED
        if found is not None and found.get("gpu") is None:
            figure = "no GPU"
        elif found is not None:
            try:
                judged = self.judge(found)
            except (KeyError, TypeError, ValueError) as error:  # the part was cut off
                judged, figure = None, f"{type(error).__name__}: {error}"
            else:
                figure = f"{self.part} was cut off before this measurement"
            if judged is not None:
                figure, verdict = judged[0], MET if judged[1] else NOT_MET
        return {"promise": self.what, "verdict": verdict, "figure": figure, "part": self.part}


def rows_of(results: Results, **values: Any) -> list[Results]:
    """Returns the rows that have all these values."""
    return [x for x in results["rows"] if all(x.get(k) == v for k, v in values.items())]


def pooler_is_faster(results: Results, *, images: int) -> Judgement | None:
    rows = rows_of(results, what="pooler", images=images)
    if not rows:
        return None
    rows.sort(key=lambda x: x["forward_backward_ratio"])
    least, most = rows[0], rows[-1]
    case = "P = {output_size}, ratio {sampling_ratio}, {layout}".format(**least)
    figure = f"{least['forward_backward_ratio']}x ({case}) to {most['forward_backward_ratio']}x"
    return figure, least["forward_backward_ratio"] >= 1.5


def is_faster(
    results: Results, *, what: str, classes: int | None, times: float
) -> Judgement | None:
    """Judges the rows of a subject by their smallest time ratio."""
    values = {"what": what} if classes is None else {"what": what, "classes": classes}
    ratios = [x["time_ratio"] for x in rows_of(results, **values) if "time_ratio" in x]
    return (f"{min(ratios)}x", min(ratios) >= times) if ratios else None


def needs_less_memory(
    results: Results, *, what: str, classes: int, share: float
) -> Judgement | None:
    rows = rows_of(results, what=what, classes=classes)
    return (f"{rows[0]['memory_share']}x", rows[0]["memory_share"] <= share) if rows else None


def classes_cost_little(results: Results) -> Judgement | None:
    few, many = (rows_of(results, what="training step", classes=k) for k in (80, 1203))
    if not (few and many):
        return None
    ratio = many[0]["ours_ms"] / few[0]["ours_ms"]
    stock = many[0]["detectron2_ms"] / few[0]["detectron2_ms"]
    return f"{ratio:.2f} times (detectron2: {stock:.2f} times)", ratio <= 1.1


def channels_last_is_as_fast(results: Results) -> Judgement | None:
    """Judges whether channels-last models are as fast as contiguous ones.

    Trainer.build_model assumes this on CUDA.
    """
    whats = STEP, LARGE_STEP
    rows = [row for what in whats for row in rows_of(results, what=what, classes=80)]
    ratios = [x["ours_ms"] / x["contiguous_ms"] for x in rows if "contiguous_ms" in x]
    if not ratios:
        return None
    return ", ".join(f"contiguous: {x:.2f}x" for x in ratios), max(ratios) <= 1.05


def guard_costs_little(results: Results) -> Judgement | None:
    shares = {x["model"]: x["percent_of_step"] for x in results["rows"]}
    large = [value for name, value in shares.items() if "FPN" in name]
    told = ", ".join(f"{value}% of {name}" for name, value in shares.items())
    return (told, large[0] <= 1) if large else None


def all_agree(results: Results) -> Judgement | None:
    """Judges all cases. Cases that are missing because the part was cut off do not agree."""
    agreeing = sum(x["agrees"] for x in results["rows"])
    return f"{agreeing} of {results['cases']} cases", agreeing == results["cases"]


def tests_pass(results: Results) -> Judgement | None:
    counts = results["counts"]
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return told, counts["failed"] == 0 and counts["passed"] > 0


def is_equal(results: Results) -> Judgement | None:
    return results["verdict"], results["verdict"] == "equal"


def pooler_does_not_wait(results: Results) -> Judgement | None:
    rows = [x for x in results["totals"] if x["what"].startswith("RoI pooling")]
    if not rows:
        return None
    return f"{rows[0]['ours']} waits (detectron2: {rows[0]['detectron2']})", rows[0]["ours"] == 0


def waits_are_fewer(results: Results) -> Judgement | None:
    rows = [x for x in results["totals"] if not x["what"].startswith("RoI pooling")]
    told = "; ".join(f"{x['what']}: {x['ours']} against {x['detectron2']}" for x in rows)
    return (told, all(x["ours"] <= x["detectron2"] for x in rows)) if rows else None


def no_variant_is_faster(results: Results) -> Judgement | None:
    """Compares the kernel with its variants by the time of both passes; 5% counts as noise."""
    best: tuple[float, str] | None = None
    for mine in rows_of(results, variant="unchanged"):
        for other in rows_of(results, type=mine["type"], P=mine["P"]):
            if "error" in mine or "error" in other:
                continue
            ratio = sum(mine[x] for x in PASSES) / sum(other[x] for x in PASSES)
            told = "{variant}, {type}, P = {P}".format(**other)
            best = max(best or (ratio, told), (ratio, told))
    return (f"{best[1]}: {best[0]:.2f}x", best[0] <= 1.05) if best else None


PASSES = ("forward ms", "backward ms")
POOLER, HEAD, STEP = "RoI pooling forward and backward", "head, training", "training step"
LARGE_STEP = "training step, four large images"  # of mask_branch, which imports detectron2


PROMISES = (
    Promise("the kernel's values and gradients equal torchvision's", "correctness", all_agree),
    Promise("the tests that need a GPU pass", "cuda_tests", tests_pass),
    Promise("a trained model returns the same detections as in detectron2", "parity", is_equal),
    Promise(f"{POOLER}, 2 images: at least 1.5x", "pooler", partial(pooler_is_faster, images=2)),
    Promise(f"{POOLER}, 16 images: at least 1.5x", "pooler", partial(pooler_is_faster, images=16)),
    Promise(
        "mask head with 1203 classes, training: at least 1.5x",
        "mask_branch",
        partial(is_faster, what=HEAD, classes=1203, times=1.5),
    ),
    Promise(
        "mask head with 1203 classes, training: at most 0.35x the memory",
        "mask_branch",
        partial(needs_less_memory, what=HEAD, classes=1203, share=0.35),
    ),
    Promise(
        "training step, R50-FPN, float32: at least 1.15x",
        "mask_branch",
        partial(is_faster, what=STEP, classes=80, times=1.15),
    ),
    Promise(
        "training step, R50-FPN, mixed precision: at least 1.15x",
        "mask_branch_amp",
        partial(is_faster, what=STEP, classes=80, times=1.15),
    ),
    Promise(
        "training step with four images of 800 px, float32: at least 1.15x",
        "mask_branch",
        partial(is_faster, what=LARGE_STEP, classes=80, times=1.15),
    ),
    Promise(
        "training step with four images of 800 px, mixed precision: at least 1.15x",
        "mask_branch_amp",
        partial(is_faster, what=LARGE_STEP, classes=80, times=1.15),
    ),
    Promise(
        "a training step in float32 is at most 5% faster with a contiguous model",
        "mask_branch",
        channels_last_is_as_fast,
    ),
    Promise(
        "a training step in mixed precision is at most 5% faster with a contiguous model",
        "mask_branch_amp",
        channels_last_is_as_fast,
    ),
    Promise(
        "training step: no more memory than detectron2",
        "mask_branch",
        partial(needs_less_memory, what=STEP, classes=80, share=1.0),
    ),
    Promise(
        "training step with 1203 classes: at most 1.1 times as long as with 80 classes",
        "mask_branch",
        classes_cost_little,
    ),
    Promise(
        "inference with mask output, R50-FPN: not slower than detectron2",
        "mask_branch",
        partial(is_faster, what="inference", classes=80, times=1.0),
    ),
    Promise(
        "inference with mask output: no more memory than detectron2",
        "mask_branch",
        partial(needs_less_memory, what="inference", classes=80, share=1.0),
    ),
    Promise(
        "mask targets from bit masks: not slower than detectron2",
        "mask_branch",
        partial(is_faster, what="bit-mask targets", classes=None, times=1.0),
    ),
    Promise(
        "masks to run lengths: faster than detectron2 at every size",
        "mask_output",
        partial(is_faster, what="output", classes=None, times=1.0),
    ),
    Promise("RoI pooling never waits for the GPU", "synchronisations", pooler_does_not_wait),
    Promise(
        "training and inference wait for the GPU no more often than in detectron2",
        "synchronisations",
        waits_are_fewer,
    ),
    Promise("guard and seeds take at most 1% of a step of R50-FPN", "guards", guard_costs_little),
    Promise(
        "no variant (block, warps, tile, layout) is more than 5% faster than the kernel",
        "kernel_variants",
        no_variant_is_faster,
    ),
)
