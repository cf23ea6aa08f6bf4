"""Reads ablation files, which define a base config and what each variant changes in it.

An example:

TITLE: RoI pooling (Mask R-CNN Table 2c)
METRIC: segm/AP                 # as in metrics.json
SEEDS: [1, 2, 3]
SIZES:                          # the same ablation on different data
  shapes:
    CONFIG: ../shapes/mask_rcnn_shapes.yaml     # relative to the ablation file's folder
    OVERRIDES: {SOLVER: {MAX_ITER: 1000}}       # for every variant; optional
BASELINE: ROIAlign              # the variant that the others are compared with
VARIANTS:                       # name: config overrides
  ROIPool: {MODEL: {ROI_BOX_HEAD: {POOLER_TYPE: ROIPool}}}
  ROIAlign: {}
IMPORTS: [my_losses.py]         # your Python files to run first, see config.py; optional
PAPER:                          # published results of variants, in percent; optional
  ROIPool: {segm/AP: 26.9}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..config import (
    ConfigError,
    flatten,
    merge_opts,
    merge_overrides,
    read_config,
)
from ..config_check.unread_keys import own_keys
from ..config_imports import resolve_imports, split_imports
from ..messages import nearest_name, one_line

REQUIRED = {
    "TITLE": str,
    "METRIC": str,
    "SEEDS": list,
    "SIZES": dict,
    "BASELINE": str,
    "VARIANTS": dict,
}
OPTIONAL = ("PAPER", "IMPORTS")
OF_TRIALS = {"SEED": "SEEDS or --seed", "OUTPUT_DIR": "--output"}
"""Keys that differ between trials, and where their values come from."""


@dataclass(frozen=True)
class Ablation:
    """An ablation in one of its sizes.

    Attributes:
        title: what the ablation compares.
        metric: main result, such as ``segm/AP``.
        seeds: seeds of the trials of each variant.
        baseline: name of the variant that the others are compared with.
        configs: complete config of each variant, in the order of the file.
        own_keys: for each variant, the keys that are set explicitly: in the variant, the size, the
            CONFIG or the options.
        paper: published results by variant and metric, in percent.
    """

    title: str
    metric: str
    seeds: tuple[int, ...]
    baseline: str
    configs: dict[str, CfgNode]
    own_keys: dict[str, set[str]]
    paper: dict[str, dict[str, float]]


def load_ablation(
    path: str | Path,
    size: str,
    opts: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Ablation:
    """Reads an ablation file and builds the config of every variant.

    Args:
        path: a YAML file in the format shown at the top of this module.
        size: one of the file's SIZES.
        opts: "KEY VALUE" pairs in one flat list, applied to all variants before their own changes.
        variants: names of the variants to use, including the baseline; empty to use all variants.
        seeds: seeds to use instead of the file's SEEDS; empty to use SEEDS.

    Raises:
        ConfigError: if the file has the wrong format, a name in it does not exist, or a variant
            does not fit its base config. The message names the file, the variant and the key.
    """
    path = Path(path)
    content = _read(path)
    if seeds:
        _check_seeds("--seed", list(seeds))
    content["SEEDS"] = list(seeds) or content["SEEDS"]
    content["VARIANTS"] = _chosen(content, list(variants), str(path))
    content["PAPER"] = {k: v for k, v in content["PAPER"].items() if k in content["VARIANTS"]}
    sizes, all_overrides = content["SIZES"], content["VARIANTS"]
    if size not in sizes:
        raise ConfigError(f"{path} has no size {size!r}; choose from {list(sizes)}")
    imports, opts = split_imports(opts)
    imports = [*resolve_imports(content["IMPORTS"], str(path), path.parent), *imports]
    named = ["IMPORTS", json.dumps(imports)]
    config_file = str(path.parent / sizes[size]["CONFIG"])
    base = read_config(config_file, named, is_named=False)
    of_size = sizes[size].get("OVERRIDES") or {}
    merge_overrides(base, of_size, f"{path}: size {size!r}")
    _refuse_keys_of_trials(of_size, f"{path}: size {size!r}")
    merge_opts(base, opts)
    _refuse_keys_of_trials(opts[::2], "options")
    configs, own = {}, {}
    for name, overrides in all_overrides.items():
        configs[name] = base.clone()
        merge_overrides(configs[name], overrides, f"{path}: variant {name!r}")
        _refuse_keys_of_trials(overrides or {}, f"{path}: variant {name!r}")
        of_variant = flatten(CfgNode(overrides or {}))
        own[name] = own_keys(config_file, flatten(CfgNode(of_size)), opts[::2], of_variant)
    return Ablation(
        content["TITLE"],
        content["METRIC"],
        tuple(content["SEEDS"]),
        content["BASELINE"],
        configs,
        own,
        content["PAPER"],
    )


def _chosen(content: dict[str, Any], names: list[str], path: str) -> dict[str, Any]:
    """Returns the requested variants in the order of the file."""
    variants = content["VARIANTS"]
    for key, found in (
        *(("BASELINE", [content["BASELINE"]]), ("PAPER", content["PAPER"])),
        ("--variant", names),
    ):
        for name in found:
            if name not in variants:
                hint = nearest_name(str(name), [str(v) for v in variants])
                raise ConfigError(
                    f"{path}: {key} names {name!r}, which is not a variant"
                    + (f"; did you mean {hint!r}?" if hint else "")
                )
    if names and content["BASELINE"] not in names:
        raise ConfigError(
            f"--variant leaves out the baseline: add --variant {content['BASELINE']!r}"
        )
    return {name: x for name, x in variants.items() if not names or name in names}


def _refuse_keys_of_trials(keys: Collection[str], source: str) -> None:
    """Raises ConfigError for keys that would be overwritten for each trial."""
    for key, origin in OF_TRIALS.items():
        if key in keys:
            raise ConfigError(f"{source}: {key} has no effect, since trials take it from {origin}")


def _check_seeds(where: str, seeds: list[Any]) -> None:
    if not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where} {seeds}: seeds must be distinct whole numbers, 0 or larger")


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses repeated keys; YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} appears twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"ablation file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not plain YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no 'KEY: value' lines")
    unknown = [key for key in content if key not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise ConfigError(
            f"{path}: unknown keys {unknown}; an ablation file has {[*REQUIRED, *OPTIONAL]}"
        )
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind) or not content[key]:
            raise ConfigError(f"{path}: {key} must be a non-empty {kind.__name__}")
    _check_seeds(f"{path}: SEEDS", content["SEEDS"])
    for name, size in content["SIZES"].items():
        known = isinstance(size, dict) and not set(size) - {"CONFIG", "OVERRIDES"}
        if not known or not isinstance(size.get("CONFIG"), str):
            raise ConfigError(f"{path}: size {name!r} needs a CONFIG; OVERRIDES are optional")
    content["IMPORTS"] = content.get("IMPORTS") or []
    content["PAPER"] = content.get("PAPER") or {}
    if not isinstance(content["PAPER"], dict):
        raise ConfigError(f"{path}: PAPER must be a dict of variants and their published results")
    for name, figures in content["PAPER"].items():
        if not isinstance(figures, dict) or not all(
            isinstance(figure, int | float) for figure in figures.values()
        ):
            raise ConfigError(
                f"{path}: PAPER of {name!r} must be a dict of metrics and numbers, not {figures!r}"
            )
    return content
