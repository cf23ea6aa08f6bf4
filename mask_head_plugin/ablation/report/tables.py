"""Makes the tables and the findings that report.md and report.html show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from textwrap import shorten

from ...evaluation.coco_ap import METRICS
from ...evaluation.difference import PairedDifference
from ...messages import counted
from ...pages.differences import BETTER, MARKS, NOISE, ONE_SEED, WORSE, verdict, with_interval
from ...pages.tables import NOTHING, Cell, Column, Table, number
from .study import Study, Variant, mean

BASELINE = "baseline"
SPEED = (
    "Seconds per training iteration, mean over seeds; comparable only if the machine was equally "
    "busy."
)
LEARNED = 1.0
"""AP in percent below which a variant has not learned anything."""
MOST_OF_ERROR = 300
"""Length at which the text of an error is cut off; trial.json has the complete text."""


def build_table(study: Study) -> Table:
    """Returns the table of all variants in the order of the ablation file."""
    makers = _columns(study)
    rows = [[make(variant) for _, make in makers] for variant in study.variants]
    kept = [
        k
        for k, (column, _) in enumerate(makers)
        if not column.is_optional or any(row[k].text not in ("", NOTHING) for row in rows)
    ]
    return Table([makers[k][0] for k in kept], [[row[k] for k in kept] for row in rows])


def _columns(study: Study) -> list[tuple[Column, Callable[[Variant], Cell]]]:
    """Returns the columns, each with a function that makes a variant's cell."""
    main, task, baseline = study.metric, study.task, study.baseline
    name = main.partition("/")[2]
    others = [f"{task}/{metric}" for metric in METRICS if f"{task}/{metric}" != main]
    early = study.stopped_early
    return [
        (Column("variant", "variant", "", True), lambda v: Cell(v.name, v.name)),
        (
            Column(
                "differs", "what differs", f"Config keys that differ from {baseline.name}'s.", True
            ),
            lambda v: _text_cell("; ".join(changed_keys(v))),
        ),
        (
            Column("seeds", "seeds", "Number of finished trials / number of planned trials."),
            lambda v: Cell(f"{len(v.finished)}/{len(v.trials)}", len(v.finished)),
        ),
        (
            Column(name, name, f"{main}: mean over seeds ± their standard deviation."),
            lambda v: Cell(with_spread(v, main), v.mean(main)),
        ),
        (
            Column(
                "difference", "difference", "Difference from the baseline, with its 95% interval."
            ),
            lambda v: _difference_cell(study, v),
        ),
        (
            Column("finding", "finding", "Whether the interval excludes 0.", True),
            lambda v: _text_cell(finding(study, v)),
        ),
        (
            Column("detectable", "detectable", DETECTABLE, is_optional=True),
            lambda v: _number_cell(_detectable(study.comparison(v))),
        ),
        *((_metric_column(key), _metric_cell(key)) for key in others),
        *(
            (Column(key, "boundary AP", f"{key}: mean over seeds.", False, True), _metric_cell(key))
            for key in ("boundary/AP",)
            if task != "boundary"
        ),
        (
            Column(
                "paper",
                "paper",
                f"{main} in the paper, for the paper's model and data.",
                False,
                True,
            ),
            lambda v: _number_cell(v.paper.get(main, math.nan), ".1f"),
        ),
        (
            Column(
                "paper-difference",
                "paper's diff.",
                "Difference from the baseline in the paper.",
                is_optional=True,
            ),
            lambda v: _number_cell(_paper_difference(study, v, main), "+.1f"),
        ),
        (
            Column(
                "time",
                "s/it",
                SPEED,
            ),
            lambda v: _number_cell(mean(v.costs("seconds_per_iteration")), ".3f"),
        ),
        (
            Column("memory", "peak MB", "Peak memory in training, largest over all seeds."),
            lambda v: _number_cell(max(v.costs("peak_memory_mb"), default=math.nan), ",.0f"),
        ),
        (
            Column("parameters", "params", "Parameters of the whole model, in millions."),
            lambda v: _number_cell(mean(v.costs("num_parameters")) / 1e6, ".2f", " M"),
        ),
        (
            Column(
                "iterations",
                "iterations",
                "Training iterations, mean over seeds; some trials stopped early.",
                is_optional=True,
            ),
            lambda v: _number_cell(mean(v.costs("iterations")) if early else math.nan, ",.0f"),
        ),
    ]


DETECTABLE = "Smallest true difference that is found in four of five such studies."


def table_for_programs(study: Study) -> Table:
    """Returns the table with standard deviations and ends of intervals in their own columns."""
    table, main = build_table(study), study.metric
    name = main.partition("/")[2]
    added: dict[str, dict[str, Callable[[Variant], float]]] = {
        name: {f"standard deviation of {name}": lambda v: v.std(main)},
        "difference": {
            "lower end of interval": lambda v: c.low if (c := study.comparison(v)) else math.nan,
            "upper end of interval": lambda v: c.high if (c := study.comparison(v)) else math.nan,
        },
    }
    columns: list[Column] = []
    rows: list[list[Cell]] = [[] for _ in table.rows]
    for k, column in enumerate(table.columns):
        extra = added.get(column.key, {})
        labels = [column.label, *extra]  # also as keys, so that the CSV has the report's headings
        columns += [Column(label, label, "") for label in labels]
        for variant, row, whole in zip(study.variants, rows, table.rows, strict=True):
            row += [whole[k], *(_number_cell(value(variant)) for value in extra.values())]
    return Table(columns, rows)


def _metric_column(key: str) -> Column:
    name = key.partition("/")[2]
    return Column(name, name, f"{key}: mean over seeds.")


def _metric_cell(key: str) -> Callable[[Variant], Cell]:
    return lambda variant: _number_cell(variant.mean(key))


def _text_cell(text: str) -> Cell:
    return Cell(text, text)


def _number_cell(value: float, form: str = ".2f", unit: str = "") -> Cell:
    return Cell(number(value, form) + (unit if math.isfinite(value) else ""), value)


def _difference_cell(study: Study, variant: Variant) -> Cell:
    comparison = study.comparison(variant)
    if variant is study.baseline:
        return Cell("", 0.0)
    if comparison is None:
        value = variant.mean(study.metric) - study.baseline.mean(study.metric)
        return Cell(number(value, "+.2f"), value)
    return Cell(with_interval(comparison), comparison.difference)


def _detectable(comparison: PairedDifference | None) -> float:
    return math.nan if comparison is None else comparison.detectable


def _paper_difference(study: Study, variant: Variant, key: str) -> float:
    if variant is study.baseline or not {key} <= variant.paper.keys() & study.baseline.paper.keys():
        return math.nan
    return variant.paper[key] - study.baseline.paper[key]


def finding(study: Study, variant: Variant) -> str:
    """Returns a variant's verdict with its mark, or ``baseline``; empty without a comparison."""
    if variant is study.baseline:
        return BASELINE
    comparison = study.comparison(variant)
    found = verdict(comparison) if comparison else ""
    return MARKS.get(found, "") + found


def changed_keys(variant: Variant) -> list[str]:
    """Returns ``KEY: value`` for each difference from the baseline, with the value as JSON."""
    return [f"{key}: {json.dumps(value)}" for key, value in variant.differs.items()]


def with_spread(variant: Variant, key: str) -> str:
    """Returns a mean over seeds, with the standard deviation if there are several seeds."""
    spread = variant.std(key)
    return number(variant.mean(key)) + (f" ± {spread:.2f}" if math.isfinite(spread) else "")


def paper_table(study: Study) -> Table:
    """Returns the paper's results next to ours; the table is empty if PAPER is empty."""
    columns = [
        Column("variant", "variant", "", True),
        Column("metric", "metric", "", True),
        Column("paper", "paper", ""),
        Column("ours", "ours", ""),
        Column("paper-difference", "paper's difference", ""),
        Column("difference", "our difference", ""),
    ]
    rows = []
    for variant in study.variants:
        for key, value in variant.paper.items():
            comparison = study.comparison(variant, key)
            ours = variant.mean(key) - study.baseline.mean(key)
            if variant is study.baseline:
                shown = ""
            else:
                shown = with_interval(comparison) if comparison else number(ours, "+.2f")
            row = [
                *(_text_cell(variant.name), _text_cell(key), _number_cell(value, ".1f")),
                Cell(with_spread(variant, key), variant.mean(key)),
                _number_cell(_paper_difference(study, variant, key), "+.1f"),
                Cell(shown, ours),
            ]
            if variant is study.baseline:
                row[4] = _text_cell("")
            rows.append(row)
    return Table(columns, rows)


def findings(study: Study) -> list[str]:
    """Returns sentences that say what was found, what is noise and what is missing."""
    sentences = []
    grouped: dict[str, list[Variant]] = {}
    for variant in study.variants:
        comparison = study.comparison(variant)
        if comparison is not None:
            grouped.setdefault(verdict(comparison), []).append(variant)
    phrases = {
        BETTER: "Better than",
        WORSE: "Worse than",
        NOISE: "Within noise of",
        ONE_SEED: "With one seed, possibly within training noise of",
    }
    for kind, phrase in phrases.items():
        if kind in grouped:
            listed = "; ".join(_with_difference(study, v) for v in grouped[kind])
            sentences.append(f"{phrase} {study.baseline.name}: {listed}.")
    if grouped:
        sentences += [_detectable_range(study), *_what_intervals_hold(study)]
    return [*sentences, *_not_learned(study), *_missing(study)]


def _not_learned(study: Study) -> list[str]:
    """Returns a warning for each variant whose main metric shows that it learned nothing."""
    if not study.metric.partition("/")[2].startswith("AP"):
        return []
    return [
        f"{variant.name}: {study.metric.partition('/')[2]} below {LEARNED:g}: this variant did not "
        f"learn in {mean(variant.costs('iterations')):.0f} iterations; its difference says nothing "
        "about longer schedules."
        for variant in study.variants
        if variant.mean(study.metric) < LEARNED
    ]


def _with_difference(study: Study, variant: Variant) -> str:
    comparison = study.comparison(variant)
    assert comparison is not None
    return f"{variant.name} {with_interval(comparison)}"


def _detectable_range(study: Study) -> str:
    limits = [c.detectable for v in study.variants if (c := study.comparison(v))]
    limits = [x for x in limits if math.isfinite(x)] or [math.nan]
    if max(limits) == 0:
        return "Nothing can be compared: every draw of images gives the same result."
    low, high = number(min(limits), ".1f"), number(max(limits), ".1f")
    extent = f"{low} AP" if low == high else f"{low} to {high} AP, depending on the variant"
    return (
        f"To be found in four of five such studies, a difference must be at least {extent}. "
        "“Within noise” does not mean equal."
    )


def _what_intervals_hold(study: Study) -> list[str]:
    compared = [c for v in study.variants if (c := study.comparison(v)) is not None]
    sentences = []
    if any(c.has_training for c in compared):
        together = "both" if len(compared) == 2 else f"all {len(compared)}"
        at_once = f", for {together} comparisons together (Bonferroni)"
        sentences.append(
            "The 95% intervals cover the noise of training (seeds) and of the validation images"
            f"{at_once if len(compared) > 1 else ''}."
        )
    if any(c.is_cut for of_variant in study.comparisons.values() for c in of_variant.values()):
        sentences.append("Intervals are cut where an AP would fall below 0 or exceed 100.")
    if any(not c.has_training for c in compared):
        sentences.append(
            "With one seed, an interval covers only the choice of images. To measure the noise of "
            "training, run more seeds (--seed 1 --seed 2 --seed 3)."
        )
    spreads = {v.name: x for v in study.variants if math.isfinite(x := v.std(study.metric))}
    if spreads:
        name = max(spreads, key=lambda n: spreads[n])
        sentences.append(
            f"The standard deviation over seeds is at most {spreads[name]:.2f} ({name})."
        )
    return sentences


def _missing(study: Study) -> list[str]:
    sentences = []
    if not study.baseline.finished:
        sentences.append(
            f"The baseline {study.baseline.name} has no finished trial: nothing can be compared."
        )
    failed = sum(trial.has_failed for trial in study.trials)
    if failed:
        sentences.append(
            f"{failed} of {counted(len(study.trials), 'trial')} failed; the errors are below."
        )
    unfinished = len(study.trials) - len(study.finished) - failed
    if unfinished:
        have = "has" if unfinished == 1 else "have"
        sentences.append(
            f"{unfinished} of {counted(len(study.trials), 'trial')} {have} not finished; all "
            "numbers come from the finished ones."
        )
    early = study.stopped_early
    if early:
        sentences.append(
            f"{len(early)} of {counted(len(study.finished), 'finished trial')} stopped early "
            "(SOLVER.EARLY_STOPPING), so not all trials trained for the same number of iterations."
        )
    return sentences


def unfinished_table(study: Study) -> Table:
    """Returns the unfinished trials with their last error."""
    columns = [
        Column("variant", "variant", "", True),
        Column("seed", "seed", ""),
        Column("state", "state", "", True),
        Column("error", "last error", "", True),
    ]
    rows: list[list[Cell]] = [
        [
            *(_text_cell(trial.variant), Cell(str(trial.seed), float(trial.seed))),
            *(_text_cell(trial.state), _text_cell(shorten(trial.error, MOST_OF_ERROR))),
        ]
        for trial in study.trials
        if not trial.is_finished
    ]
    return Table(columns, rows)
