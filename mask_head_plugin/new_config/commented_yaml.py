"""Writes a config as YAML, with comments that explain the values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """A key of a config with its value and a comment.

    Attributes:
        key: the full key, such as ``MODEL.MASK_ON``.
        value: a number, a string, or a list of these.
        why: the comment above the key; empty for no comment.
    """

    key: str
    value: Any
    why: str = ""


def render(header: str, base: str, settings: Iterable[Setting]) -> str:
    """Returns the text of a config file.

    Args:
        header: text of the comment at the top of the file; each line becomes a paragraph.
        base: value of ``_BASE_``.
        settings: the settings; sections appear in the order of their first keys.
    """
    sections: dict[str, Any] = {}
    for setting in settings:
        *parents, name = setting.key.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = setting
    lines = [line for part in header.split("\n") for line in _comment(part, "")]
    return "\n".join([*lines, f"_BASE_: {_flow(base)}", *_section_lines(sections, "")]) + "\n"


def _section_lines(section: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, content in section.items():
        if isinstance(content, Setting):
            lines += _comment(content.why, indent)
            lines += _value_lines(f"{indent}{name}:", content.value, indent)
        else:
            lines += [f"{indent}{name}:", *_section_lines(content, indent + "  ")]
    return lines


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _value_lines(start: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, list) and any(
        isinstance(entry, list) and str in map(type, entry) for entry in value
    ):
        return [start, *(f"{indent}  - {_flow(entry)}" for entry in value)]
    return [f"{start} {_flow(value)}"]


def _flow(value: Any) -> str:
    """Returns a value as YAML on a single line."""
    # Dumped inside a list, because PyYAML ends a plain value with a document marker.
    text: str = yaml.safe_dump(
        [value], default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.strip()[1:-1]
