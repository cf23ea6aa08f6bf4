#!/usr/bin/env python3
"""Checks a COCO instances file and its images, and writes a corrected copy on request."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

DETAILS_PER_KIND = 5

EXAMPLES = """
Examples:
  What is wrong with a data set, for people; all of it, for programs:
    python tools/check_dataset.py --json train.json --images images/ --output report.json
  Decode every pixel, too, which finds damage in the middle of files (takes longer):
    python tools/check_dataset.py --json train.json --images images/ --decode
  A corrected copy; what it changed and left out, with reasons, is in fixed.json.changes.json:
    python tools/check_dataset.py --json train.json --images images/ --fix fixed.json

An error stops training, which runs the same check (DATASETS.CHECK). A warning does not: detectron2
handles it rightly. Each line names the file, the ids, the fault and the fix.

--fix repairs what has one right answer: polygons are cut at the image's edge, boxes taken around
their masks, ids numbered anew, records of one file merged. What has none is left out, images with
their annotations. The input is never written to.

Exit code: 0 without errors (with --fix: the copy is written); 1 with errors; 2 if the arguments are
wrong or the file cannot be mended.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="COCO instances file")
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="the folder that file_name starts from"
    )
    parser.add_argument("--num-classes", type=int, metavar="K", help="MODEL.ROI_HEADS.NUM_CLASSES")
    parser.add_argument("--lvis", action="store_true", help="the file is in LVIS's format")
    parser.add_argument("--decode", action="store_true", help="decode all images")
    parser.add_argument("--fix", type=Path, metavar="FILE", help="write a corrected copy")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all findings as JSON")
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    from mask_head_plugin import ConfigError
    from mask_head_plugin.data import CheckOptions, check_coco_file, fix_coco_file
    from mask_head_plugin.data.check_run import write_report
    from mask_head_plugin.data.dataset_fix import changes_path
    from mask_head_plugin.data.findings import by_kind, count_by_severity, errors_of, summary_table

    if not Path(args.json).is_file():
        raise ConfigError(f"--json {args.json}: there is no such file")
    if args.output and args.output.resolve() in (
        Path(args.json).resolve(),
        *([args.fix.resolve()] if args.fix else []),
    ):
        raise ConfigError(f"--output {args.output} is the file of --json or --fix; name another")
    if not Path(args.images).is_dir():
        raise ConfigError(f"--images {args.images}: there is no such folder")
    options = CheckOptions(args.num_classes, args.lvis, decode=args.decode)
    found = check_coco_file(args.json, args.images, options)
    errors = errors_of(found)
    if found:
        print(summary_table(found), end="\n\n")
    for group in by_kind(found).values():
        for finding in group[:DETAILS_PER_KIND]:
            print(f"{finding.severity}: {finding}")
        if len(group) > DETAILS_PER_KIND:
            print(f"  and {len(group) - DETAILS_PER_KIND} more of {group[0].kind}")
    counts = count_by_severity(found)
    print(f"{args.json}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if args.output:
        write_report(found, args.output)
        print(f"all findings are in {args.output}")
    if args.fix is None:
        return 1 if errors else 0
    changes = fix_coco_file(args.json, args.images, args.fix, options)
    left_out = sum(change.action == "left out" for change in changes)
    print(f"{args.fix}: {len(changes) - left_out} changes, {left_out} records left out")
    print(f"they are listed in {changes_path(args.fix)}")
    return 0


def main() -> int:
    args = parse_args()
    # Imported once the flags are read: --help needs no PyTorch, which takes seconds.
    from mask_head_plugin import ConfigError

    logging.basicConfig(level=logging.INFO, format="check_dataset.py: %(message)s")
    try:
        return run(args)
    except (ConfigError, OSError) as error:
        print(f"check_dataset.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
