"""Registers the user's own COCO files, listed in DATASETS.COCO_FILES, as data sets.

detectron2's ``load_coco_json`` numbers the classes of each file separately, so a validation file
that lacks a category shifts the numbers of all later classes. Here, all data sets of a config use
the list of categories of the first training set. The categories of other files are matched with
this list by id and name.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..config import ConfigError
from ..dataset_check.check import read_content
from ..dataset_check.config_datasets import files_of
from ..dataset_check.findings import Findings, errors_of
from ..dataset_check.records import check_categories, check_sections
from ..durable_files import write_durably
from ..messages import listed, nearest_name

logger = logging.getLogger(__name__)

Categories = dict[int, str]
"""Class name by COCO category id, sorted by id. The class indices have the same order."""


@dataclass(frozen=True)
class CocoFile:
    """Facts about a COCO instances file that a config needs before training."""

    json_file: str
    image_root: str
    categories: Categories
    used: frozenset[int]
    """Ids of the categories that have annotations."""
    has_rle: bool
    """Whether any non-crowd object has a run-length mask."""
    has_images: bool
    """Whether the file lists any images."""


def register_coco_files(cfg: CfgNode) -> None:
    """Registers the data sets in DATASETS.COCO_FILES and adapts the config to them.

    Class names and numbers come from the files. If the files contain run-length masks of single
    objects, INPUT.MASK_FORMAT becomes ``bitmask``, which is logged. Nothing is written yet. If the
    categories of a file differ from the model's, a copy is written to OUTPUT_DIR when an evaluator
    first reads the annotations (``CocoFileMetadata``).

    Args:
        cfg: a config that is not frozen. INPUT.MASK_FORMAT may change.

    Raises:
        ConfigError: if an entry is malformed, a file or folder is missing, or the categories of two
            data sets in the config disagree.
    """
    files = _read_files(cfg)
    reference = _reference_categories(cfg, files)
    for name, file in files.items():
        _check_categories(name, file, reference)
        _register(name, file, reference[1], Path(cfg.OUTPUT_DIR))
    # Masks are not loaded at test time.
    with_rle = [
        files[name].json_file
        for name in cfg.DATASETS.TRAIN
        if name in files and files[name].has_rle
    ]
    if with_rle and cfg.INPUT.MASK_FORMAT != "bitmask":
        cfg.INPUT.MASK_FORMAT = "bitmask"
        logger.info("INPUT.MASK_FORMAT is now bitmask: run-length masks in %s", ", ".join(with_rle))


def register_found_coco_files(cfg: CfgNode, names: Sequence[str]) -> None:
    """Registers the given data sets of DATASETS.COCO_FILES whose files are on this machine.

    This is for tools that can work without the data. A warning lists the missing files.

    Args:
        cfg: the model's config; not changed.
        names: names of the required data sets. Other files, which may be large, are not read.

    Raises:
        ConfigError: as in register_coco_files, except for missing files and folders.
    """
    here, missing = [], []
    for entry in (x for x in _entries(cfg.DATASETS) if x[0] in names):
        json_file, image_root = (find_in_datasets(x) for x in entry[1:])
        if not Path(json_file).is_file():
            missing.append(json_file)
        elif not Path(image_root).is_dir():
            missing.append(image_root)
        else:
            here.append(list(entry))
    if missing:
        logger.warning("DATASETS.COCO_FILES: not on this machine: %s", listed(missing))
    found = cfg.clone()
    found.defrost()
    found.DATASETS.COCO_FILES = here
    register_coco_files(found)


def coco_classes(cfg: CfgNode) -> dict[str, list[str]]:
    """Returns the class names of each data set in DATASETS.COCO_FILES, registered or not.

    Raises:
        ConfigError: if an entry is malformed or a file cannot be read.
    """
    files = _read_files(cfg)
    classes = list(_reference_categories(cfg, files)[1].values())
    return {name: [*classes] for name in files}


def _read_files(cfg: CfgNode) -> dict[str, CocoFile]:
    return {
        name: read_coco_file(find_in_datasets(json_file), find_in_datasets(image_root))
        for name, json_file, image_root in _entries(cfg.DATASETS)
    }


def check_registered_datasets(cfg: CfgNode, *, train: bool = True) -> None:
    """Checks that the data sets of a config exist and have as many classes as the model.

    Args:
        cfg: a config whose COCO_FILES are registered.
        train: whether the model will be trained; if not, DATASETS.TRAIN may be missing.

    Raises:
        ConfigError: if a data set is not registered, is not on this machine or has no images,
            needs a package that is missing, or has a different number of classes than
            NUM_CLASSES. The message helps with the nearest name, the path, the extra to install, or
            both numbers.
    """
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            nearest = nearest_name(name, DatasetCatalog.list())
            raise ConfigError(
                f"data set {name!r} is not registered"
                + (f"; did you mean {nearest!r}? " if nearest else ". ")
                + "Your own files go into DATASETS.COCO_FILES"
            )
        metadata = MetadataCatalog.get(name)
        _require_package(name, metadata.get("evaluator_type", ""))
        json_file, _ = files_of(name)
        if (
            json_file
            and "://" not in json_file
            and not metadata.get("made_on_first_use", False)
            and not Path(json_file).is_file()
        ):
            raise ConfigError(
                f"data set {name!r} is not on this machine: {json_file} does not exist. Put it "
                "there, or set $DETECTRON2_DATASETS to the folder of your data sets"
            )
        if metadata.get("from_coco_files") and not _own_file(metadata).has_images:
            raise ConfigError(
                f"data set {name!r}: {metadata.source_json_file} lists no images; list them, or "
                "name another file in DATASETS.COCO_FILES"
            )
        classes = metadata.get("thing_classes")
        if classes is not None and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ConfigError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but data set "
                f"{name!r} has {len(classes)} classes ({json_file or 'built in'}); "
                f"set it to {len(classes)}"
            )


def _own_file(metadata: Metadata) -> CocoFile:
    return read_coco_file(metadata.source_json_file, metadata.image_root)


def datasets_root() -> Path:
    """Returns the folder in which detectron2 looks for data sets."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def find_in_datasets(path: str) -> str:
    """Returns ``path`` itself, or the path below ``$DETECTRON2_DATASETS`` if only that exists."""
    given = Path(path).expanduser()
    below_root = datasets_root() / given
    return str(below_root if not given.exists() and below_root.exists() else given)


def read_coco_file(json_file: str, image_root: str) -> CocoFile:
    """Reads the facts about a file. ``check_dataset_files`` checks its images and annotations.

    Raises:
        ConfigError: if the file or folder is missing, the file is not JSON, or its categories
            cannot be used.
    """
    for what, path, found in (
        ("annotation file", json_file, Path(json_file).is_file()),
        ("image folder", image_root, Path(image_root).is_dir()),
    ):
        _require_file(what, path, found)
    # Cached until the file changes, because reading COCO's own file takes seconds.
    return _read_coco_file(json_file, image_root, Path(json_file).stat().st_mtime_ns)


def _require_file(what: str, path: str, found: bool) -> None:
    if not found:
        raise ConfigError(
            f"DATASETS.COCO_FILES: {what} {path} does not exist, neither relative to {Path.cwd()} "
            f"nor in $DETECTRON2_DATASETS ({datasets_root()})"
        )


@functools.cache
def _read_coco_file(json_file: str, image_root: str, mtime_ns: int) -> CocoFile:
    del mtime_ns  # only part of the cache's key
    found = Findings(json_file)
    content = read_content(json_file, found)
    names: dict[Any, str] = {}
    if not found and check_sections(content, found):
        names = check_categories(content["categories"], found)
    if errors := errors_of(found):
        raise ConfigError(str(errors[0]))
    has_rle = any(
        isinstance(x, dict) and isinstance(x.get("segmentation"), dict) and not x.get("iscrowd")
        for x in content["annotations"]
    )
    ids = (x.get("category_id") for x in content["annotations"] if isinstance(x, dict))
    used = frozenset(i for i in ids if type(i) is int)
    categories = dict(sorted(names.items()))
    return CocoFile(json_file, image_root, categories, used, has_rle, bool(content["images"]))


def dataset_categories(datasets: CfgNode, name: str) -> Categories | None:
    """Returns the categories of a data set in the order of its classes, or None if unknown.

    They come from detectron2's catalog or from the annotation file. Data sets in COCO_FILES do not
    have to be registered, and those of ``register_coco_instances`` do not have to be loaded.

    Args:
        datasets: the DATASETS section of a config.
        name: name of the data set.

    Raises:
        ConfigError: if COCO_FILES is malformed, or the data set's annotation file is missing or
            has no categories.
    """
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else Metadata()
    json_file = next((x[1] for x in _entries(datasets) if x[0] == name), None)
    if json_file is not None:
        json_file = find_in_datasets(json_file)
        _require_file("annotation file", json_file, Path(json_file).is_file())
    names = metadata.get("thing_classes")
    if names is not None and json_file in (None, metadata.get("source_json_file", json_file)):
        id_of = {k: i for i, k in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        ids = [id_of.get(k, -1) for k in range(len(names))]
        # If any id is unknown, all classes are numbered from 1, as in COCO.
        return dict(zip(ids if -1 not in ids else range(1, len(names) + 1), names, strict=True))
    json_file = json_file or files_of(name)[0]
    if not json_file or not Path(json_file).is_file():
        return None
    return _read_coco_file(json_file, "", Path(json_file).stat().st_mtime_ns).categories


def _entries(datasets: CfgNode) -> list[tuple[str, str, str]]:
    entries = []
    for entry in datasets.get("COCO_FILES", ()):
        triple = isinstance(entry, list | tuple) and len(entry) == 3
        if not triple or not all(isinstance(x, str) for x in entry):
            raise ConfigError(
                f"DATASETS.COCO_FILES: {entry!r} is not [name, annotations.json, image folder]; if "
                f"the images are in several folders, tools/check_dataset.py --images FOLDER FOLDER "
                f"--fix FILE writes annotations for one folder"
            )
        entries.append((entry[0], entry[1], entry[2]))
    names = [name for name, _, _ in entries]
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or ".." in name:
            raise ConfigError(
                f"DATASETS.COCO_FILES: {name!r} is not a valid name; use only letters, digits and "
                "_ . + -"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"DATASETS.COCO_FILES: a name appears twice in {names}")
    return entries


def _reference_categories(cfg: CfgNode, files: dict[str, CocoFile]) -> tuple[str, Categories]:
    """Returns the name of the data set that defines the class numbers, and its categories."""
    for name in (*cfg.DATASETS.TRAIN, *files):
        if name in files:
            return name, files[name].categories
        if name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
            if ids is not None:
                return name, {i: metadata.thing_classes[index] for i, index in ids.items()}
    return "", {}


def _check_categories(name: str, file: CocoFile, reference: tuple[str, Categories]) -> None:
    """Raises ConfigError unless the reference contains each used category with its id and name."""
    reference_name, known = reference
    ids_by_name = {category: i for i, category in known.items()}
    for i, category in file.categories.items():
        if known.get(i) == category or i not in file.used:
            continue
        if i in known:
            fault = f"id {i} is {category!r} in the first but {known[i]!r} in the second"
        elif category in ids_by_name:
            fault = (
                f"{category!r} has id {i} in the first but {ids_by_name[category]} in the second"
            )
        else:
            fault = f"{category!r} (id {i}) does not exist in the second"
        raise ConfigError(
            f"categories of data set {name!r} ({file.json_file}) disagree with those of "
            f"{reference_name!r}: {fault}; make ids and names the same in both files, or set "
            "DATASETS.TRAIN '()' to evaluate only"
        )


class CocoFileMetadata(Metadata):
    """The metadata of a data set in COCO_FILES.

    ``json_file`` is read by evaluators, which fail if the file lists fewer classes than the model
    has. If the file lacks categories or lists additional, unused ones, a copy with the model's list
    of categories is therefore written when ``json_file`` is first read.
    """

    @functools.cached_property
    def json_file(self) -> str:
        """Path of the annotations for evaluation. If a copy is needed, it is written first."""
        source = Path(self.source_json_file)
        ids = self.thing_dataset_id_to_contiguous_id
        wanted = [{"id": i, "name": self.thing_classes[index]} for i, index in ids.items()]
        if self.source_categories == {x["id"]: x["name"] for x in wanted}:
            return str(source)
        content = json.loads(source.read_text(encoding="utf-8"))
        path = Path(self.output_dir) / "coco_files" / f"{self.name}.json"
        write_durably(path, json.dumps({**content, "categories": wanted}))
        logger.info(
            "the categories of %s differ from the model's; wrote a copy with the model's "
            "categories to %s",
            source,
            path,
        )
        return str(path)

    def as_dict(self) -> dict[str, Any]:
        """Returns all entries including ``json_file``, as in detectron2."""
        return {**super().as_dict(), "json_file": self.json_file}


def _register(name: str, file: CocoFile, categories: Categories, output_dir: Path) -> None:
    """Adds a file to detectron2's catalogs, replacing the entry of an earlier config."""
    if name in DatasetCatalog.list():
        if not MetadataCatalog.get(name).get("from_coco_files", False):
            raise ConfigError(f"DATASETS.COCO_FILES: {name!r} is already registered; rename yours")
        DatasetCatalog.remove(name)
    class_indices = {i: index for index, i in enumerate(categories)}
    DatasetCatalog.register(name, _loader(file, class_indices))
    MetadataCatalog[name] = CocoFileMetadata(
        name=name,
        source_json_file=file.json_file,
        source_categories=file.categories,
        output_dir=str(output_dir),
        image_root=file.image_root,
        evaluator_type="coco",
        thing_classes=list(categories.values()),
        thing_dataset_id_to_contiguous_id=class_indices,
        from_coco_files=True,
    )


def _loader(file: CocoFile, class_indices: dict[int, int]) -> Callable[[], list[dict[str, Any]]]:
    def load() -> list[dict[str, Any]]:
        if read_coco_file(file.json_file, file.image_root).categories != file.categories:
            raise ConfigError(
                f"the categories of {file.json_file} have changed since it was registered; call "
                "register_coco_files again"
            )
        # Without a data set name, load_coco_json does not change the category ids.
        records = load_coco_json(file.json_file, file.image_root)
        for record in records:
            for annotation in record["annotations"]:
                i = annotation["category_id"]
                if i not in class_indices:
                    raise ConfigError(
                        f"{file.json_file}: image {record['image_id']}: an annotation has category "
                        f"{i!r}, which is not listed; tools/check_dataset.py --fix leaves it out"
                    )
                annotation["category_id"] = class_indices[i]
        return records

    return load


EXTRAS: dict[str, tuple[str, str]] = {
    "lvis": ("lvis", "lvis"),
    "cityscapes_instance": ("cityscapesscripts", "cityscapes"),
    "cityscapes_sem_seg": ("cityscapesscripts", "cityscapes"),
}
"""Package that each evaluator_type needs, and the extra in setup.cfg that installs it."""


def _require_package(dataset_name: str, evaluator_type: str) -> None:
    package, extra = EXTRAS.get(evaluator_type, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"data set {dataset_name!r} needs the package {package!r}, which is not installed: "
            f"pip install -e '.[{extra}]' in the folder of mask_head_plugin"
        )
