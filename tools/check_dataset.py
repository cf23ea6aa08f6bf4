#!/usr/bin/env python3
"""Checks a COCO instances file and its images, and writes a corrected copy on request."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import flags  # noqa: F401  # imports the package of this checkout, not an installed one

if TYPE_CHECKING:
    from mask_head_plugin.dataset_check import Finding

DETAILS_PER_KIND = 5

EXAMPLES = """
Examples:
  Show what is wrong with a data set; also write all findings as JSON for programs:
    python tools/check_dataset.py --json all.json --images images/ --output report.json
  Decode every pixel, which also finds damage in the middle of a file but takes longer:
    python tools/check_dataset.py --json all.json --images images/ --decode
  Write a corrected copy; fixed.json.changes.json lists what was changed or left out, and why:
    python tools/check_dataset.py --json all.json --images images/ --fix fixed.json
  Take cats and dogs from two folders and split them into parts.train.json and parts.val.json:
    python tools/check_dataset.py --json all.json --images day/ night/ --categories cat dog \\
        --split 0.2 --write parts.json

An error stops training, which runs the same check (DATASETS.CHECK). A warning does not: detectron2
may handle the data correctly, or train or evaluate on something that you did not intend. A hint
needs no action. Each line names the file and the ids, and says what is wrong and what to do.
docs/your_data.md has the details.

--fix repairs faults that have exactly one correct repair; records with other errors are left out.
If that would leave out or clip most images or annotations, the export itself is wrong, and nothing
is written. The input is never changed.

Exit code: 0 if no errors were found or, with --fix or --write, if the files were written; 1 if
there are errors; 2 if the arguments are wrong or no corrected copy can be made.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="COCO instances file")
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="folder that file_name is relative to; with several folders, each image is taken from "
        "the one that contains it",
    )
    parser.add_argument("--num-classes", type=int, metavar="K", help="MODEL.ROI_HEADS.NUM_CLASSES")
    parser.add_argument("--lvis", action="store_true", help="the file is in LVIS's format")
    parser.add_argument("--decode", action="store_true", help="decode all images")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all findings as JSON")
    fix = parser.add_argument_group("a corrected copy")
    fix.add_argument("--fix", type=Path, metavar="FILE", help="write the copy to FILE")
    fix.add_argument(
        "--accept",
        nargs="+",
        action="extend",
        default=[],
        metavar="KIND",
        help="write the copy even if findings of these kinds remove most images or annotations",
    )
    fix.add_argument(
        "--crowds-are-objects",
        action="store_true",
        help="set iscrowd to 0; CVAT, datumaro and supervision set it to 1 for all run lengths",
    )
    parts = parser.add_argument_group(
        "parts of the copy (with --fix) or of the file, which must then have no errors"
    )
    parts.add_argument("--write", type=Path, metavar="FILE", help="the file to write")
    parts.add_argument(
        "--categories",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="keep only these categories",
    )
    parts.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="write .train.json and .val.json files; the latter has this share of the images; "
        "all tiles, versions and copies of a photograph are in the same file",
    )
    parts.add_argument("--seed", type=int, default=0, help="seed of --split (default: 0)")
    args = parser.parse_args()
    if (args.write is None) != (args.categories is None and args.split is None):
        parser.error("--write needs --categories or --split, and either of them needs --write")
    if args.fix is None and (args.accept or args.crowds_are_objects):
        parser.error("--accept and --crowds-are-objects need --fix")
    if args.lvis and (len(args.images) > 1 or args.split is not None):
        parser.error(
            "LVIS files name images by URL: --lvis works only with one folder and without --split"
        )
    return args


def run(args: argparse.Namespace) -> int:
    from mask_head_plugin.dataset_check import CheckOptions, check_coco_file, fix_coco_file
    from mask_head_plugin.dataset_check.config_datasets import write_report
    from mask_head_plugin.dataset_check.corrected_copy import changes_path
    from mask_head_plugin.dataset_check.findings import errors_of
    from mask_head_plugin.messages import counted

    refuse_wrong_paths(args)
    options = CheckOptions(args.num_classes, args.lvis, decode=args.decode)
    found = check_coco_file(args.json, args.images, options)
    print_findings(args.json, found)
    if args.output:
        write_report(found, args.output)
        print(f"wrote all findings to {args.output}")
    if args.fix is not None:
        changes = fix_coco_file(
            args.json,
            args.images,
            args.fix,
            options,
            accepted=args.accept,
            crowds_are_objects=args.crowds_are_objects,
        )
        left_out = Counter(change.section for change in changes if change.action == "left out")
        total = left_out.total()
        sections = ", ".join(f"{section}: {count}" for section, count in left_out.items())
        told = f"{counted(total, 'record')} left out" + (f" ({sections})" if total else "")
        print(f"{args.fix}: {counted(len(changes) - total, 'change')}, {told}")
        print(f"{changes_path(args.fix)} lists them")
    elif errors_of(found):
        if args.write:
            print(f"{args.write} was not written: correct the errors first, or add --fix FILE")
        return 1
    if args.write:
        write_parts(args)
    return 0


def refuse_wrong_paths(args: argparse.Namespace) -> None:
    from mask_head_plugin import ConfigError
    from mask_head_plugin.dataset_check.findings import KINDS
    from mask_head_plugin.dataset_check.new_files import refuse_existing

    if not Path(args.json).is_file():
        raise ConfigError(f"--json {args.json}: the file does not exist")
    for folder in args.images:
        if not Path(folder).is_dir():
            kind = (
                "this is a file; name its folder"
                if Path(folder).is_file()
                else "the folder does not exist"
            )
            raise ConfigError(f"--images {folder}: {kind}")
    outputs = [path for path in (args.fix, *parts_paths(args)) if path]
    if args.output and args.output.resolve() in {
        path.resolve() for path in (Path(args.json), *outputs)
    }:
        raise ConfigError(
            f"--output {args.output} is the same file as --json, --fix or --write; choose another"
        )
    refuse_existing(outputs, "--fix or --write")
    for kind in args.accept:
        if kind not in KINDS:
            raise ConfigError(f"--accept {kind}: unknown kind; docs/findings.md lists all kinds")


def print_findings(json_file: str, found: list[Finding]) -> None:
    from mask_head_plugin.dataset_check.findings import by_kind, count_by_severity, summary_table
    from mask_head_plugin.messages import counted

    if found:
        print(summary_table(found), end="\n\n")
    for group in by_kind(found).values():
        for finding in group[:DETAILS_PER_KIND]:
            print(f"{finding.severity}: {finding}")
        if len(group) > DETAILS_PER_KIND:
            print(f"  and {len(group) - DETAILS_PER_KIND} more of {group[0].kind}")
    counts = count_by_severity(found)
    told = ", ".join(counted(number, name.removesuffix("s")) for name, number in counts.items())
    print(f"{json_file}: {told}")


def parts_paths(args: argparse.Namespace) -> list[Path]:
    """Returns the paths of the files that --write creates."""
    if args.write is None or args.split is None:
        return [args.write] if args.write else []
    return [args.write.with_suffix(f".{part}.json") for part in ("train", "val")]


def write_parts(args: argparse.Namespace) -> None:
    from mask_head_plugin.dataset_check.image_folders import join_folders
    from mask_head_plugin.dataset_check.new_files import write_new_files
    from mask_head_plugin.dataset_check.split import keep_categories, split
    from mask_head_plugin.messages import counted

    content = json.loads((args.fix or Path(args.json)).read_text(encoding="utf-8"))
    # File names in the corrected copy are relative to the folder that contains all image folders.
    root = join_folders({} if args.fix else content, args.images)
    if args.categories:
        content = keep_categories(content, args.categories)
    parts = [content] if args.split is None else split(content, root, args.split, args.seed)
    files = dict(zip(parts_paths(args), parts, strict=True))
    write_new_files({path: json.dumps(part) for path, part in files.items()}, "--write")
    for path, part in files.items():
        counts = ", ".join(counted(len(part[f"{x}s"]), x) for x in ("image", "annotation"))
        print(f"{path}: {counts}, image folder {root}")


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError

    logging.basicConfig(level=logging.INFO, format="check_dataset.py: %(message)s")
    try:
        return run(args)
    except (ConfigError, OSError) as error:
        print(f"check_dataset.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
