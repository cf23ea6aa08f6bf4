"""Checks a config's data sets before the first iteration (DATASETS.CHECK).

Results are cached in ``$XDG_CACHE_HOME/mask_head_plugin`` (or ``~/.cache``). A second run with the
same annotations and image files then checks only that these files have not changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from .. import image_files
from ..config import ConfigError
from ..durable_files import write_durably
from ..messages import counted
from .check import CheckOptions, check_content, read_content
from .findings import (
    ERROR,
    HINT,
    KINDS,
    Finding,
    Findings,
    count_by_severity,
    errors_of,
    quote,
    quote_path,
    summary_table,
)
from .records_and_files import listed_images
from .train_test_overlap import shared_images

logger = logging.getLogger(__name__)

MODES = ("error", "warn", "off")
SHOWN = 10
REPORT = "dataset_check.json"


@dataclass(frozen=True)
class CocoSource:
    """A registered data set with an annotation file in COCO or LVIS format.

    Attributes:
        name: name in the catalog.
        json_file: the annotation file.
        image_root: the image folder.
        lvis: whether the file is in LVIS format.
        matched: whether the data set is in DATASETS.COCO_FILES, so that its categories are matched
            with those of the other files there.
    """

    name: str
    json_file: str
    image_root: str
    lvis: bool
    matched: bool


@dataclass(frozen=True)
class CheckedFile:
    """The result of a check, in the form in which it is cached.

    Attributes:
        findings: all findings.
        categories: category names by id.
        rle_example: a list with the id of one non-crowd annotation that has run lengths; an empty
            list if there is none.
        files: paths of the images.
        objects: number of non-crowd objects by image id, for images that have any.
    """

    findings: list[Finding]
    categories: dict[int, str]
    rle_example: list[Any]
    files: list[str]
    objects: list[tuple[Any, int]]


def check_dataset_files(
    cfg: CfgNode, *, train: bool = True, leave_out: bool = False
) -> list[Finding]:
    """Checks the files of DATASETS.TRAIN and DATASETS.TEST according to DATASETS.CHECK.

    Writes all findings to ``OUTPUT_DIR/dataset_check.json``. The embedded data set, and data sets
    that are not COCO files, are not checked.

    Args:
        cfg: a config whose data sets are registered.
        train: whether the model will be trained; if not, only DATASETS.TEST is checked.
        leave_out: whether the caller leaves out records of DATASETS.COCO_FILES that training cannot
            use, so that they are no reason to stop if CHECK is ``warn``.

    Returns:
        The errors because of which training cannot use a record: empty unless CHECK is ``warn`` and
        ``leave_out`` is set.

    Raises:
        ConfigError: if CHECK is ``error`` and there are errors, if CHECK is ``warn`` and there are
            errors on which the run would fail, or if CHECK has an unknown value.
    """
    mode = cfg.DATASETS.CHECK
    if mode not in MODES:
        raise ConfigError(f"DATASETS.CHECK {mode!r} is not one of {MODES}")
    names = (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)
    sources = sources_of(names) if mode != "off" else []
    if not sources:
        return []
    found = find_faults(cfg, sources)
    report = Path(cfg.OUTPUT_DIR) / REPORT
    if comm.is_main_process():
        write_report(found, report)
    errors = errors_of(found)
    if any(finding.severity != HINT for finding in found):
        logger.warning("findings in the data sets (all in %s):\n%s", report, summary_table(found))
    for finding in found:
        if finding.severity != ERROR and finding.index < 0:  # the table omits messages
            level = logging.INFO if finding.severity == HINT else logging.WARNING
            logger.log(level, "%s", finding)
    if errors and mode == "error":
        raise ConfigError(
            f"{describe_errors(errors, sources)}\n{report} lists all of them. With "
            "DATASETS.CHECK warn, the run continues despite errors, without the records that it "
            "cannot use; with off, nothing is checked."
        )
    unusable = [finding for finding in errors if finding.is_unusable]
    own = {source.json_file for source in sources if source.matched and leave_out}
    fatal = [x for x in unusable if x.index < 0 or x.section == "categories" or x.file not in own]
    if fatal:
        raise ConfigError(
            f"{describe_errors(fatal, sources)}\nThe run would fail on them, so DATASETS.CHECK "
            f"warn does not help. {report} lists all findings."
        )
    return unusable


def find_faults(cfg: CfgNode, sources: Sequence[CocoSource]) -> list[Finding]:
    """Returns the faults in each data set, and faults that result from the config or other data.

    Args:
        cfg: a config whose data sets are registered.
        sources: the data sets to check.
    """
    checked = {
        source: check_with_cache(source, _num_classes(cfg, source), masks=cfg.MODEL.MASK_ON)
        for source in sources
    }
    found = [
        finding
        for source, result in checked.items()
        for finding in result.findings
        if finding.kind != "image-without-objects" or _leave_training(cfg, source)
    ]
    found += _disagreements(cfg, checked) + _wrong_mask_format(cfg, checked)
    return found + _in_both_splits(cfg, checked) + _more_objects_than_detections(cfg, checked)


def write_report(found: Sequence[Finding], path: Path) -> None:
    """Writes findings and their counts as JSON."""
    content = {**count_by_severity(found), "findings": [finding.as_dict() for finding in found]}
    write_durably(path, json.dumps(content, indent=1) + "\n")


def sources_of(names: Iterable[str]) -> list[CocoSource]:
    """Returns the data sets that are local files; each pair of file and folder occurs once."""
    sources: dict[tuple[str, str], CocoSource] = {}
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("made_on_first_use", False):
            continue
        json_file, image_root = files_of(name)
        kind = metadata.get("evaluator_type", "")
        remote = any("://" in path for path in (json_file, image_root))
        if not (json_file and image_root) or remote or kind not in ("coco", "lvis"):
            logger.info("data set %s is not checked: it has no COCO file on this machine", name)
            continue
        matched = metadata.get("from_coco_files", False)
        source = CocoSource(name, json_file, image_root, kind == "lvis", matched)
        sources.setdefault((json_file, image_root), source)
    return list(sources.values())


def files_of(name: str) -> tuple[str, str]:
    """Returns the annotation file and the image folder of a data set; "" if it has none.

    For a data set in COCO_FILES, this is the user's file, not the copy for evaluators.
    """
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("source_json_file") or metadata.get("json_file", "")
    return json_file, metadata.get("image_root", "")


def _num_classes(cfg: CfgNode, source: CocoSource) -> int | None:
    # A file in COCO_FILES may lack categories that other files there have.
    return None if source.matched else cfg.MODEL.ROI_HEADS.NUM_CLASSES


def _disagreements(cfg: CfgNode, checked: dict[CocoSource, CheckedFile]) -> list[Finding]:
    """Finds files whose categories differ from those of the first training set.

    All files must list the same categories, because detectron2 numbers each file's classes
    separately.
    """
    by_name = {source.name: result for source, result in checked.items()}
    reference = next((name for name in cfg.DATASETS.TRAIN if name in by_name), None)
    found: list[Finding] = []
    if reference is None:
        return found
    expected = by_name[reference].categories
    for source, result in checked.items():
        differing = set(expected.items()) ^ set(result.categories.items())
        if differing and not source.matched:
            i, name = min(differing)
            where = "second" if (i, name) in expected.items() else "first"
            message = (
                f"category {i} is {quote(name)} only in the {where} of the data sets "
                f"{source.name!r} and {reference!r}"
            )
            found.append(Finding("categories-disagree", source.json_file, message))
    return found


def _leave_training(cfg: CfgNode, source: CocoSource) -> bool:
    """Returns whether training skips a data set's images without objects."""
    return source.name in cfg.DATASETS.TRAIN and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def _in_both_splits(cfg: CfgNode, checked: dict[CocoSource, CheckedFile]) -> list[Finding]:
    """Finds training images in the data sets of DATASETS.TEST."""
    found: list[Finding] = []
    # A data set in both TRAIN and TEST was checked once, under its name in TRAIN.
    of_name = {
        name: next((x for x in checked if files_of(name) == (x.json_file, x.image_root)), None)
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    }
    trained = [x for name in cfg.DATASETS.TRAIN if (x := of_name[name])]
    train = [(x.image_root, path) for x in trained for path in checked[x].files]
    for name in cfg.DATASETS.TEST:
        source = of_name[name]
        if source is None or not train:
            continue
        test = [(source.image_root, path) for path in checked[source].files]
        for how, pairs in shared_images(train, test):
            share = f"{len(pairs)} of {len(test)} ({len(pairs) / len(test):.1%}) images"
            example = " and ".join(map(quote_path, pairs[0]))
            message = f"{share} of {name!r} are also in the training data ({how}): {example}"
            found.append(Finding("image-in-both-splits", source.json_file, message))
    return found


def _more_objects_than_detections(
    cfg: CfgNode, checked: dict[CocoSource, CheckedFile]
) -> list[Finding]:
    """Finds images of DATASETS.TEST with more objects than a model of this config can detect."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    tested = [files_of(name) for name in cfg.DATASETS.TEST]
    found: list[Finding] = []
    for source, result in checked.items():
        above = {image: number for image, number in result.objects if number > limit >= 0}
        if above and (source.json_file, source.image_root) in tested:
            most = max(above, key=lambda image: above[image])
            share = f"{len(above)} of {len(result.files)} images"
            message = (
                f"{share} have more than {limit} objects, the limit set by "
                f"TEST.DETECTIONS_PER_IMAGE; image {quote(most)} has {above[most]}"
            )
            found.append(Finding("image-over-detections", source.json_file, message))
    return found


def _wrong_mask_format(cfg: CfgNode, checked: dict[CocoSource, CheckedFile]) -> list[Finding]:
    """Reports training data with run lengths, which PolygonMasks cannot represent.

    Crowds are ignored, because training does not use them.
    """
    if not cfg.MODEL.MASK_ON or cfg.INPUT.MASK_FORMAT != "polygon":
        return []
    message = "the mask is given as run lengths, but INPUT.MASK_FORMAT is polygon"
    return [
        Finding("rle-needs-bitmask", source.json_file, message, None, *result.rle_example)
        for source, result in checked.items()
        if source.name in cfg.DATASETS.TRAIN and result.rle_example
    ]


def describe_errors(errors: Sequence[Finding], sources: Iterable[CocoSource]) -> str:
    """Returns text that lists the first errors, and the commands that write corrected copies."""
    lines = [f"the data sets have {counted(len(errors), 'error')}:"]
    lines += [f"  {finding}" for finding in errors[:SHOWN]]
    if len(errors) > SHOWN:
        lines.append(f"  and {len(errors) - SHOWN} more")
    mendable = {finding.file for finding in errors if KINDS[finding.kind].by_fix}
    commands = [f"  {_fix_command(source)}" for source in sources if source.json_file in mendable]
    if commands:
        lines += ["To write a corrected copy, run", *commands]
    return "\n".join(lines)


def _fix_command(source: CocoSource) -> str:
    output = Path(source.json_file).with_suffix(".fixed.json")
    flags = ["--json", source.json_file, "--images", source.image_root, "--fix", str(output)]
    flags += ["--lvis"] if source.lvis else []
    return shlex.join(["python", "tools/check_dataset.py", *flags])


def check_with_cache(
    source: CocoSource, num_classes: int | None = None, *, masks: bool = True
) -> CheckedFile:
    """Checks a data set, or returns the result of an earlier check of the same files.

    Args:
        source: the data set.
        num_classes: number of classes that the file must have; None for any number.
        masks: whether objects need masks.
    """
    path = _cache_path(source, num_classes, masks)
    kept = _read_cache(path) if path else None
    if kept is not None:
        logger.info("%s and its images have already been checked", source.json_file)
        return kept
    logger.info("checking %s and its images (DATASETS.CHECK)", source.json_file)
    found = Findings(source.json_file)
    content = read_content(source.json_file, found)
    if found:
        return CheckedFile(found, {}, [], [], [])
    files = []
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        listed = listed_images(content["images"], source.image_root, lvis=source.lvis)
        files = [image.path for image in listed]
    before = _fingerprint(files)
    options = CheckOptions(num_classes=num_classes, lvis=source.lvis, masks=masks)
    facts = check_content(content, source.image_root, found, options)
    example = facts.formats.examples.get("run lengths")
    examples = [] if example is None else [example]
    result = CheckedFile(found, facts.categories, examples, files, _objects_by_image(content))
    # A result with missing files is not cached: they may later appear in a folder that the
    # fingerprint does not cover.
    if path and not any(x.kind in ("image-file-missing", "image-file-elsewhere") for x in found):
        _write_cache(path, result, before)
    return result


def _objects_by_image(content: Any) -> list[tuple[Any, int]]:
    annotations = content.get("annotations") if isinstance(content, dict) else None
    found = [x for x in annotations if isinstance(x, dict)] if isinstance(annotations, list) else []
    ids = (x.get("image_id") for x in found if not x.get("iscrowd"))
    return list(Counter(i for i in ids if isinstance(i, int | str)).items())


def _cache_path(source: CocoSource, num_classes: int | None, masks: bool) -> Path | None:
    """Returns the path for the cached result of a check with this content, arguments and code."""
    digest = hashlib.sha256()
    # Includes the current folder, because paths may be relative to it.
    arguments = [
        source.json_file,
        source.image_root,
        source.lvis,
        num_classes,
        masks,
        str(Path.cwd()),
    ]
    digest.update(json.dumps(arguments).encode())
    try:
        # Findings also depend on the code of the image reader.
        for code in (*sorted(Path(__file__).parent.glob("*.py")), Path(image_files.__file__)):
            digest.update(code.read_bytes())
        with Path(source.json_file).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        root = os.getenv("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except (OSError, RuntimeError):  # no such file (the check reports it), or no home folder
        return None
    return Path(root) / "mask_head_plugin" / "dataset_checks" / f"{digest.hexdigest()}.json"


def _fingerprint(files: Iterable[str]) -> str:
    """Returns a digest of the names, sizes and times of files; for missing ones, of the names."""
    digest = hashlib.sha256()
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116  # faster than Path for many files
            # st_ctime also changes with permissions.
            times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
            digest.update(f"{path}\0{status.st_size}\0{times}\n".encode())
        except (OSError, ValueError):
            digest.update(f"{path}\n".encode())
    return digest.hexdigest()


def _write_cache(path: Path, result: CheckedFile, fingerprint: str) -> None:
    content = {
        "findings": [astuple(finding) for finding in result.findings],
        "categories": list(result.categories.items()),
        "rle_example": result.rle_example,
        "files": result.files,
        "objects": result.objects,
        "fingerprint": fingerprint,
    }
    try:
        write_durably(path, json.dumps(content))
    except OSError as error:
        logger.info("the result of the check cannot be cached: %s", error)


def _read_cache(path: Path) -> CheckedFile | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] != _fingerprint(content["files"]):
            return None
        findings = [Finding(*values) for values in content["findings"]]
        categories = dict(content["categories"])
        objects = [(image, number) for image, number in content["objects"]]
        return CheckedFile(findings, categories, content["rle_example"], content["files"], objects)
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None
