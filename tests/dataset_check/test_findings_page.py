"""docs/findings.md is generated from the catalogue of the data set check.

``python tests/dataset_check/test_findings_page.py`` writes the page.
"""

from __future__ import annotations

from pathlib import Path

from mask_head_plugin.dataset_check.findings import KINDS, SEVERITIES

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
TITLE = """<!-- Generated: python tests/dataset_check/test_findings_page.py writes this page. -->

# Findings of the data set check

`tools/check_dataset.py`, or the same check at the start of training, found something in your data.
Each line that the check prints ends in a word in brackets, such as `[box-outside]`. Look up that
word here.

The last column says what `--fix` does in [a corrected copy](your_data.md#a-corrected-copy).
"""
NOTHING = {"error": "cannot repair this", "warning": "does nothing", "hint": "does nothing"}
BY_NAME = {"git-lfs-pointer": "leaves an image out; cannot repair an annotation file"}
MEANINGS = {
    "error": "Training stops until you correct these errors, unless `DATASETS.CHECK` is `warn`.",
    "warning": "Training continues. detectron2 handles these cases, but perhaps not as you intend.",
    "hint": "Hints need no action.",
}


def page() -> str:
    text = TITLE
    for severity in SEVERITIES:
        text += f"\n## {severity.capitalize()}s\n\n{MEANINGS[severity]}\n\n"
        text += "| finding | what to do | `--fix` |\n|---|---|---|\n"
        for name, kind in KINDS.items():
            if kind.severity == severity:
                does = BY_NAME.get(name) or kind.by_fix.removeprefix("--fix ") or NOTHING[severity]
                text += f"| `{name}` | {kind.fix} | {does} |\n"
    return text


def test_the_page_lists_the_catalogue():
    message = f"run python {Path(__file__).relative_to(PAGE.parents[1])}"
    assert PAGE.read_text(encoding="utf-8") == page(), message


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
