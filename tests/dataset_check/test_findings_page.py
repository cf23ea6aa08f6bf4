"""docs/findings.md is generated from the catalogue of the data set check.

``python tests/dataset_check/test_findings_page.py`` writes it.
"""

from __future__ import annotations

from pathlib import Path

from mask_head_plugin.dataset_check.findings import KINDS, SEVERITIES

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
TITLE = """# Findings of the data set check

You ran `tools/check_dataset.py`, or training stopped at your data. Each line of the check ends in a
word in brackets: look it up here. Do not edit this page:
`python tests/dataset_check/test_findings_page.py` writes it.

The last column says what `--fix` does for you; [your own data](your_data.md) explains corrected
copies.
"""
MEANINGS = {
    "error": "Training stops until they are gone, unless `DATASETS.CHECK` is `warn`.",
    "warning": "Training continues. detectron2 copes with it, or does something you may not want.",
    "hint": "Worth knowing; you need not do anything.",
}


def page() -> str:
    text = TITLE
    for severity in SEVERITIES:
        text += f"\n## {severity.capitalize()}s\n\n{MEANINGS[severity]}\n\n"
        text += "| finding | what to do | `--fix` |\n|---|---|---|\n"
        for name, kind in KINDS.items():
            if kind.severity == severity:
                does = kind.by_fix.removeprefix("--fix ").replace("does", "does it", 1)
                text += f"| `{name}` | {kind.fix} | {does} |\n"
    return text


def test_the_page_lists_the_catalogue():
    message = f"run python {Path(__file__).relative_to(PAGE.parents[1])}"
    assert PAGE.read_text(encoding="utf-8") == page(), message


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
