"""The report shows the results of the trials, even if some trials are missing."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from made_ablation import DATASET, NUM_ITERATIONS, write_ablation, write_dataset

from mask_head_plugin import ConfigError
from mask_head_plugin.ablation.report import pages, pictures
from mask_head_plugin.ablation.report.pictures import side_by_side
from mask_head_plugin.ablation.report.study import read_study
from mask_head_plugin.ablation.report.tables import build_table, findings
from mask_head_plugin.evaluation.bootstrap import compare_all
from mask_head_plugin.evaluation.image_counts import ImageCounts, most_disputed
from mask_head_plugin.evaluation.matching import Matches
from mask_head_plugin.pages import paper_plots, plots
from mask_head_plugin.pages import render as page_render
from mask_head_plugin.pages.tables import MINUS, NOTHING, escape_markdown, number

pytest.importorskip("plotly", reason="report.html needs the extra 'report'")

from mask_head_plugin.ablation.report.figures import figures

NUM_DRAWS = 40
QUALITIES = {"baseline": 0.9, "a|b <script>alert(1)</script> & **c**": 0.5, "about the same": 0.9}
STRANGE = list(QUALITIES)[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, annotations):
    """Returns the folder of an ablation with a report, and the records of its trials.

    Tests must not change the folder.
    """
    folder = tmp_path_factory.mktemp("ablation")
    paper = {"baseline": {"segm/AP": 30.3}, STRANGE: {"segm/AP": 24.8, "bbox/AP": 28.2}}
    records = write_ablation(folder, annotations, QUALITIES, paper=paper)
    pages.write_report(folder, NUM_DRAWS)
    return folder, records


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    """Returns a copy of the ablation, without its report, that tests may change.

    Plots for papers are disabled.
    """
    for module, name in ((paper_plots, "save_figures"), (plots, "save_for_papers")):
        monkeypatch.setattr(module, name, lambda *_: None)
    folder = tmp_path / "ablation"
    shutil.copytree(made[0], folder)
    for name in ("report.md", "report.html"):
        (folder / name).unlink()
    return folder


def render(folder: Path) -> tuple[str, str]:
    pages.write_report(folder, NUM_DRAWS)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def table_cells(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the text of each cell of the report's table, by variant and column."""
    table = build_table(read_study(folder, NUM_DRAWS))
    keys = [column.key for column in table.columns]
    return {row[0].text: {k: c.text for k, c in zip(keys, row, strict=True)} for row in table.rows}


def without_library(page: str) -> str:
    """Returns the page without plotly.js, which contains web addresses that it never fetches."""
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def markdown_rows(text: str, heading: str) -> list[list[str]]:
    table = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_report_shows_the_figures_of_the_trials(made):
    folder, records = made
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    header, _, *rows = markdown_rows(text, "Variants")
    assert len(rows) == len(QUALITIES)
    for row, (variant, trials) in zip(rows, records.items(), strict=True):
        cells = dict(zip(header, row, strict=True))
        values = [record["results"]["segm"]["AP"] for record in trials.values()]
        shown = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert cells["AP"] == shown and cells["variant"] == escape_markdown(variant)
        assert f"{shown.split()[0]}<span" in page
        for task, name, label in (("segm", "AP50", "AP50"), ("boundary", "AP", "boundary AP")):
            found = [record["results"][task][name] for record in trials.values()]
            assert cells[label] == f"{statistics.mean(found):.2f}"
        assert cells["peak MB"] == "1,002" and cells["s/it"] == "0.115"
        assert cells["params"] == "1.23 M" and cells["seeds"] == "2/2"


def test_intervals_come_from_the_bootstrap_and_decide_the_verdict(made):
    folder, records = made
    matches = {
        name: [
            Matches.load(folder / f"variant_{k}" / f"seed_{seed}/inference/matches_segm.npz")
            for seed in records[name]
        ]
        for k, name in enumerate(QUALITIES)
    }
    compared = compare_all(matches, "baseline", ("AP",), NUM_DRAWS)
    cells = table_cells(folder)
    verdicts = set()
    for name in list(QUALITIES)[1:]:
        c = compared[name]["AP"]
        low, high = number(c.low, "+.2f"), number(c.high, "+.2f")
        assert cells[name]["difference"] == f"{number(c.difference, '+.2f')} ({low} to {high})"
        verdict = "better" if c.low > 0 else "worse" if c.high < 0 else "within noise"
        assert verdict in cells[name]["finding"]
        assert cells[name]["detectable"] == f"{c.detectable:.2f}"
        verdicts.add(verdict)
    assert verdicts == {"worse", "within noise"}
    text = (folder / "report.md").read_text()
    assert "Worse than baseline: a\\|b" in text and "Within noise of baseline: about" in text


def test_the_papers_figures_appear_next_to_ours(made):
    folder, _ = made
    cells = table_cells(folder)
    assert (cells[STRANGE]["paper"], cells[STRANGE]["paper-difference"]) == ("24.8", f"{MINUS}5.5")
    assert cells["about the same"]["paper"] == NOTHING
    rows = markdown_rows((folder / "report.md").read_text(), "The paper's results next to ours")
    box = next(row for row in rows if row[1] == "bbox/AP")
    assert box[2] == "28.2" and box[4] == NOTHING and " to " in box[5]


def test_empty_columns_are_left_out(copied):
    edit(copied / "ablation.json", paper={})
    cells = table_cells(copied)["baseline"]
    assert "paper" not in cells and "paper-difference" not in cells and "APl" in cells


def test_the_page_loads_nothing_from_other_sites(made):
    page = without_library((made[0] / "report.html").read_text())
    assert not re.search(r"https?:|@import|url\(", page)
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert (made[0] / "report.html").stat().st_size < 8e6


def test_names_are_escaped_everywhere(made):
    page = without_library((made[0] / "report.html").read_text())
    assert "<script>alert(1)" not in page and html.escape(STRANGE, quote=False) in page
    # In figures, plotly renders names as HTML, and a name with `</script>` would end the script.
    assert "a|b \\u0026lt;script\\u0026gt;" in page or "a|b &lt;script&gt;" in page
    text = (made[0] / "report.md").read_text()
    assert "<script>" not in text and "\\*\\*c\\*\\*" in text


def test_nan_is_shown_as_a_dash(made, copied):
    for path in copied.glob("variant_0/seed_*/trial.json"):
        record = json.loads(path.read_text())
        record["results"]["segm"]["APs"] = None
        edit(path, results=record["results"], peak_memory_mb=None)
    cells = table_cells(copied)["baseline"]
    assert (cells["APs"], cells["memory"]) == (NOTHING, NOTHING)
    text, page = render(copied)
    assert f">{NOTHING}</td>" in page
    shown = re.sub(r'<script.*?</script>|data-value="nan"', "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", text + shown, re.IGNORECASE)


def test_commits_are_short_and_mark_uncommitted_changes(copied):
    study = read_study(copied, 2)
    for commit, shown in (("ab" * 20, "ab" * 6), ("ab" * 20 + "+", "ab" * 6 + "+"), ("c+", "c+")):
        for trial in study.finished:
            trial.record()["commit"] = commit
        assert dict(pages.facts(study))["commit"] == shown


def test_failed_and_missing_trials_are_listed_and_the_others_reported(copied):
    failed = copied / "variant_1" / "seed_1" / "trial.json"
    edit(failed, status="failed", error="FloatingPointError: Loss became <inf>\nat iteration 83")
    (copied / "variant_2" / "seed_2" / "trial.json").write_text('{"status": "fin')
    shutil.rmtree(copied / "variant_0" / "seed_2")
    text, page = render(copied)
    _, _, *rows = markdown_rows(text, "Trials that have not finished")
    assert [row[2] for row in rows] == [
        *("not run", "failed", f"unfinished, {NUM_ITERATIONS} iterations logged")
    ]
    assert rows[1][3] == "FloatingPointError: Loss became &lt;inf&gt; at iteration 83"
    assert "Loss became &lt;inf&gt;" in page and "2 of 6 trials have not finished" in text
    assert "1 of 6 trials failed; the errors are below." in text
    assert [cells["seeds"] for cells in table_cells(copied).values()] == ["1/2"] * 3
    assert "With one seed, an interval covers only the choice of images" in text
    assert table_cells(copied)[STRANGE]["finding"] == "? one seed: unknown"
    assert "±" not in text.split("## Variants")[1].split("\n- ")[0]


def test_trials_that_stopped_early_are_reported_with_their_iterations(made, copied):
    text = (made[0] / "report.md").read_text()
    assert f"iterations: {NUM_ITERATIONS}\n" in text and "stopped early" not in text
    assert "iterations" not in table_cells(made[0])["baseline"]
    edit(copied / "variant_0" / "seed_2" / "trial.json", iterations=250, stopped_early=True)
    text, page = render(copied)
    assert f"iterations: 250 to {NUM_ITERATIONS}\n" in text
    assert "1 of 6 finished trials stopped early (SOLVER.EARLY" in html.unescape(page)
    rows = table_cells(copied)
    assert rows["baseline"]["iterations"] == f"{(250 + NUM_ITERATIONS) / 2:.0f}"
    assert rows["about the same"]["iterations"] == f"{NUM_ITERATIONS}"


def test_a_variant_that_did_not_learn_is_named(copied):
    for path in copied.glob("variant_2/seed_*/trial.json"):
        results = json.loads(path.read_text())["results"]
        edit(path, results={**results, "segm": {**results["segm"], "AP": 0.4}})
    found = [x for x in findings(read_study(copied, NUM_DRAWS)) if "did not learn" in x]
    expected = f"about the same: AP below 1: this variant did not learn in {NUM_ITERATIONS} iter"
    assert [x.startswith(expected) for x in found] == [True]


def test_what_an_ap_makes_impossible_is_cut_and_said(copied):
    study = read_study(copied, NUM_DRAWS)
    study.comparisons[STRANGE]["segm/AP"] = replace(
        study.comparison(study.variants[1]), baseline=5.0, detectable=30.0, is_cut=True
    )
    bars = next(x.figure for x in figures(study) if x.name == "differences").data[0]
    assert (bars.base[0], bars.base[0] + bars.x[0]) == (-5, 30)
    assert "Intervals are cut where an AP would fall below 0 or exceed 100." in findings(study)


def test_the_title_names_the_data_set(copied):
    assert render(copied)[0].startswith(f"# Synthetic variants, on {DATASET}\n")
    edit(copied / "ablation.json", dataset="shapes_val")
    title = render(copied)[0].splitlines()[0]
    assert title == "# Synthetic variants, on the embedded data set"


def test_a_variant_without_finished_trials_has_a_row_of_dashes(copied):
    shutil.rmtree(copied / "variant_1")
    text, page = render(copied)
    cells = table_cells(copied)[STRANGE]
    assert (cells["AP"], cells["difference"], cells["finding"]) == (NOTHING, NOTHING, "")
    assert "Within noise of baseline" in text and "figure-differences" in page


def test_without_the_baseline_nothing_is_compared(copied):
    shutil.rmtree(copied / "variant_0")
    text, page = render(copied)
    assert "nothing can be compared" in text and "figure-differences" not in page
    assert "figure-precision-recall" in page and table_cells(copied)[STRANGE]["AP"] != NOTHING


def test_a_run_without_masks_is_reported_by_its_boxes(copied):
    edit(copied / "ablation.json", metric="bbox/AP", paper={})
    for path in copied.glob("*/*/trial.json"):
        edit(path, results={"bbox": json.loads(path.read_text())["results"]["bbox"]})
    for path in [*copied.glob("*/*/inference/matches_[sb][eo][gu]*.npz")]:
        path.unlink()
    text, page = render(copied)
    assert "No finished trial has evaluated masks" in page and "Within noise of baseline: a" in text
    assert "boundary AP" not in text.split("## Variants")[1]


def test_without_matches_values_are_shown_without_intervals(copied):
    for path in copied.glob("*/*/inference/matches_segm.npz"):
        path.write_bytes(b"PK half an archive")
    cells = table_cells(copied)["about the same"]
    assert re.fullmatch(rf"[+{MINUS}]\d+\.\d\d", cells["difference"]) and cells["finding"] == ""
    render(copied)


def test_a_metric_without_an_interval_is_reported(copied):
    edit(copied / "ablation.json", metric="segm/AR", paper={})
    cells = table_cells(copied)
    assert re.fullmatch(rf"[+{MINUS}]\d+\.\d\d", cells[STRANGE]["difference"])
    assert "figure-other-metrics" in render(copied)[1]


def test_without_images_only_the_pictures_are_left_out(copied, annotations, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(annotations.parent, moved)
    for path in copied.glob("*/*/config.yaml"):
        path.write_text(path.read_text().replace(str(annotations.parent), str(moved)))
    shutil.rmtree(moved / "images")
    (moved / "images").mkdir()
    page = render(copied)[1]
    assert f"The images of {DATASET} cannot be shown:" in page and "<img" not in page


def test_a_folder_without_a_usable_ablation_is_an_error(copied, tmp_path):
    with pytest.raises(ConfigError, match=r"ablation\.json"):
        pages.write_report(tmp_path)
    with pytest.raises(ConfigError, match="1 draws"):
        pages.write_report(copied, 1)
    for variant in copied.glob("variant_*"):
        shutil.rmtree(variant)
    with pytest.raises(ConfigError, match="no finished trial"):
        pages.write_report(copied)
    (copied / "ablation.json").write_text('{"title": "x"}')
    with pytest.raises(ConfigError, match="baseline"):
        pages.write_report(copied)


@pytest.mark.parametrize(("key", "value"), [("dataset", None), ("seeds", 5), ("paper", 5)])
def test_an_entry_of_the_wrong_type_is_an_error(copied, key, value):
    path = copied / "ablation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=r"does not describe an ablation: .*(5|None)"):
        read_study(copied, 2)


def test_values_of_a_damaged_trial_are_left_out(copied):
    study = read_study(copied, 2)
    before, *_ = study.finished
    known = before.result("segm/AP")
    for trial in study.finished:
        trial.record().update(iterations="x", versions=[1], results={"segm": "x"})
    assert not {"iterations", "versions"} & set(dict(pages.facts(study)))
    assert math.isfinite(known) and math.isnan(before.result("segm/AP"))
    before.record()["results"] = "x"
    assert math.isnan(before.result("segm/AP"))


def test_trials_evaluated_on_other_images_are_an_error(copied):
    path = copied / "variant_1" / "seed_1" / "inference" / "matches_segm.npz"
    matches = Matches.load(path)
    matches.image_ids[0] = "x"
    matches.save(path)
    with pytest.raises(ConfigError, match="image_ids"):
        pages.write_report(copied, NUM_DRAWS)


def test_without_the_report_extra_markdown_is_written_and_html_is_an_error(copied, monkeypatch):
    monkeypatch.setattr(page_render, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"jinja2 and plotly.*\[report\]"):
        pages.write_report(copied, NUM_DRAWS)
    assert (copied / "report.md").is_file() and not (copied / "report.html").exists()


def test_losses_are_shown_unless_ap_was_measured_during_training(copied):
    page = render(copied)[1]
    assert '"total_loss"' in page and '"loss_mask"' in page
    for path in copied.glob("*/*/metrics.json"):
        rows = [{"iteration": i, "segm/AP": i / 10} for i in (99, 199)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render(copied)[1]
    assert '"total_loss"' not in page


def test_the_images_with_the_largest_spread_come_first():
    objects = np.full(4, 4)
    same = ImageCounts(np.array([4, 4, 4, 4]), np.array([4, 4, 4, 4]), objects)
    other = ImageCounts(np.array([4, 0, 3, 2]), np.array([4, 4, 4, 4]), objects)
    assert same.f1.tolist() == [1] * 4
    assert most_disputed([same, other]) == [1, 3, 2]
    nothing = np.zeros(4, int)
    assert ImageCounts(nothing, nothing, nothing).f1.tolist() == [1] * 4


def test_pictures_show_ground_truth_first_then_each_variant(made):
    gallery = side_by_side(read_study(made[0], NUM_DRAWS))
    assert 0 < len(gallery.rows) <= 8 and gallery.problem == ""
    for _, shown in gallery.rows:
        assert [p.title for p in shown] == ["ground truth", *(f"{v}, seed 1" for v in QUALITIES)]
        assert all(p.uri.startswith("data:image/jpeg;base64,/9j/") for p in shown)
        assert all(re.match(r"\d+ of \d+ found, \d+ false, F1", p.note) for p in shown[1:])
    assert {name for name, _ in gallery.classes} <= {"class 0", "class 1"}


def test_one_object_is_counted_in_the_singular(made, monkeypatch):
    true_masks = pictures._true_masks
    for count, told in ((1, "1 object"), (2, "2 objects")):
        monkeypatch.setattr(pictures, "_true_masks", lambda x, count=count: true_masks(x)[:count])
        gallery = side_by_side(read_study(made[0], NUM_DRAWS))
        assert {shown[0].note for _, shown in gallery.rows} == {told}


def test_a_marker_at_the_edge_of_a_panel_is_shown_as_a_whole(made):
    """If all differences have the same sign, the panel ends at 0, where a marker may be."""
    shown = {x.name: x.figure for x in figures(read_study(made[0], NUM_DRAWS))}
    markers = [
        x
        for name in ("differences", "other-metrics")
        for x in shown[name].data
        if x.type == "scatter"
    ]
    assert markers and all(x.mode == "markers" and x.cliponaxis is False for x in markers)


def test_pictures_are_left_out_if_the_categories_have_changed(made, annotations):
    before = annotations.read_text()
    content = json.loads(before)
    names = [x["name"] for x in content["categories"]]
    for category, name in zip(content["categories"], reversed(names), strict=True):
        category["name"] = name
    try:
        annotations.write_text(json.dumps(content))
        gallery = side_by_side(read_study(made[0], NUM_DRAWS))
    finally:
        annotations.write_text(before)
    assert gallery.rows == [] and "its categories have changed" in gallery.problem


def test_numbers_use_a_true_minus_and_never_show_nan():
    assert (number(-1.234), number(math.nan), number(0.5, "+.1f")) == (
        f"{MINUS}1.23",
        NOTHING,
        "+0.5",
    )


def test_existing_analyses_are_linked_and_missing_ones_get_a_command(copied):
    inference = copied / "variant_1" / "seed_1" / "inference"
    baseline = copied / "variant_0" / "seed_1" / "inference"
    text, page = render(copied)
    command = f"python tools/analyze.py {inference} --compare {baseline}"
    assert f"`{command}`" in text and f"<code>{command}</code>" in page
    (inference / "analysis.html").write_text("a page")
    text, page = render(copied)
    assert "](variant_1/seed_1/inference/analysis.html)" in text and command not in text
    assert '<a href="variant_1/seed_1/inference/analysis.html">a|b &lt;script&gt;' in page


def run_tool(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    return runpy.run_path(str(ROOT / "tools" / "report.py"))["main"]()


def test_the_tool_writes_the_report(copied, monkeypatch):
    assert run_tool(monkeypatch, str(copied), "--draws", "20") == 0
    assert (copied / "report.html").is_file()
    assert "20 draws" in (copied / "report.md").read_text()


def test_the_table_and_the_plots_are_also_written_for_papers(made):
    folder = made[0]
    study = read_study(folder, NUM_DRAWS)
    rows = list(csv.DictReader((folder / "report.csv").open()))
    header = markdown_rows((folder / "report.md").read_text(), "Variants")[0]
    assert set(header) <= set(rows[0]), "the headings are those of the report"
    for row, variant in zip(rows, study.variants, strict=True):
        assert row["seeds"] == "2"
        assert float(row["standard deviation of AP"]) == variant.std("segm/AP")
        comparison = study.comparison(variant)
        ends = ("", "") if comparison is None else (str(comparison.low), str(comparison.high))
        assert (row["lower end of interval"], row["upper end of interval"]) == ends
    assert (folder / "report.tex").read_text().count("\\\\\n") == len(QUALITIES) + 1
    plotted = {x.name for x in folder.iterdir() if x.suffix in (".svg", ".pdf")}
    names = ("intervals", "other-metrics", "learning", "classes", "precision-recall")
    assert plotted == {f"{name}{suffix}" for name in names for suffix in (".svg", ".pdf")}


def test_curves_show_the_spread_over_seeds(made):
    study = read_study(made[0], NUM_DRAWS)
    (learning,) = [x.figure for x in figures(study) if x.name == "learning"]
    trial_curves = [[row["total_loss"] for row in trial.log()] for trial in study.baseline.finished]
    band, line = learning.data[:2]
    assert band.fill == "toself" and line.line.color == "#1a1a1a"
    half = len(band.x) // 2
    assert list(band.x[:half]) == list(line.x) == list(band.x[half:][::-1])
    assert len(trial_curves) > 1
    middle = np.array(line.y)
    assert (np.array(band.y[:half]) >= middle).all() and (
        np.array(band.y[half:][::-1]) <= middle
    ).all()
    assert np.ptp(np.array(band.y[:half]) - np.array(band.y[half:][::-1])) > 0


def test_the_tool_has_help_and_reports_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "--help")
    taught = capsys.readouterr().out
    assert "--draws" in taught and "report.html" in taught
    assert run_tool(monkeypatch, str(tmp_path)) == 2
    assert "ablation.json" in capsys.readouterr().err


def browse(page: Path, fragment: str, profile: Path) -> tuple[list[str], str]:
    """Opens the page in a browser; returns the variants in the displayed order, and any errors."""
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", "--enable-logging=stderr"),
        *(f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom"),
        f"{page.as_uri()}{fragment}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 'class="main-svg"' in done.stdout  # plotly has drawn
    table = done.stdout.split('class="sortable"')[1].split("</table>")[0]
    names = re.findall(r'<th scope="row"[^>]*>(.*?)<span', table, re.DOTALL)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [html.unescape(name).strip() for name in names], "\n".join(complaints)


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_browser_sorts_the_table_without_errors(made, tmp_path):
    folder, records = made
    page = (folder / "report.html").read_text()
    names = list(QUALITIES)
    ap = {
        name: statistics.mean(r["results"]["segm"]["AP"] for r in records[name].values())
        for name in names
    }
    rising, falling = sorted(names, key=ap.__getitem__), sorted(names, key=lambda n: -ap[n])
    assert rising != names != falling
    click = "<script>document.querySelector('[data-key=\"AP\"] button').click()</script></body>"
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.replace("</body>", click))
    assert browse(clicked, "", tmp_path / "1") == (falling, "")
    # The fragment of the address sets the order. If a page tries to fetch something, the browser
    # reports it.
    wrong = tmp_path / "wrong.html"
    wrong.write_text(page.replace("</body>", '<img src="https://example.org/x.png"></body>'))
    order, complaints = browse(wrong, "#sort=AP", tmp_path / "2")
    assert order == rising and "Content Security Policy" in complaints


def test_the_report_shows_the_interval_picture_only_with_intervals(made, copied):
    assert "![Differences from the baseline with their intervals](intervals.png)" in (
        (made[0] / "report.md").read_text()
    )
    picture = cv2.imread(str(made[0] / "intervals.png"))
    assert picture.shape[1] == 8 * 120 and picture.std() > 10
    for path in copied.rglob("matches_*.npz"):
        path.unlink()
    (copied / "intervals.png").unlink()
    pages.write_report(copied, NUM_DRAWS)
    assert "intervals.png" not in (copied / "report.md").read_text()
    assert not (copied / "intervals.png").exists()
