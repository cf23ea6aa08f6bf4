"""docs/config_keys.md explains every key with its comment in config.py and lists what reads it.

``python tests/test_config_keys.py`` writes the page.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import tempfile
import textwrap
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, ROOT, SMALL_RESNET
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup

from mask_head_plugin import add_mask_head_config, load_config
from mask_head_plugin.config import flatten
from mask_head_plugin.config_check import dry_build
from mask_head_plugin.data import register_coco_files
from mask_head_plugin.dataset_check import check_dataset_files
from mask_head_plugin.engine import Trainer
from mask_head_plugin.shared_names import PACKAGE

TABLE = ROOT / "docs" / "config_keys.md"
TITLE = """# All config keys

Look up what a key does and who reads it. Do not edit this page: `python tests/test_config_keys.py`
writes it, from the comments in `mask_head_plugin/config.py` and from what is read while models are
built and a run trains.

*model*: when the model is built, by any trainer. *loader*, *solver*, *DefaultTrainer*: those of
detectron2. *Trainer*: this package's Trainer, checkpointer or evaluation. *call*:
`register_coco_files(cfg)` or `check_dataset_files(cfg)`. *tools*: `train_net.py` and the tools.

## Keys of this package

| key | default | read by | meaning |
|---|---|---|---|
"""
STOCK_TITLE = """
## Keys of detectron2

Keys that a config or a page here mentions. They keep detectron2's meaning and defaults.

| key | read by |
|---|---|
"""
PARTS = {
    f"{PACKAGE}.modeling": "model",
    "detectron2.modeling": "model",
    "detectron2.layers": "model",
    f"{PACKAGE}.data.train_loader": "Trainer",
    f"{PACKAGE}.data.copy_paste": "Trainer",
    f"{PACKAGE}.data": "call",
    PACKAGE: "Trainer",
    "detectron2.data": "loader",
    "detectron2.solver": "solver",
    "detectron2.engine": "DefaultTrainer",
    "detectron2.evaluation": "Trainer",
}
NO_READERS = ("yacs.", "fvcore.", "detectron2.config", "copy", "contextlib", __name__, "__main__")
OWN_NO_READERS = {f"{PACKAGE}.config", f"{PACKAGE}.config_check.dry_build"}
NOBODY = {"VERSION": "file format", "IMPORTS": "tools", "DATASETS.CHECK": "call"}
"""Keys that are read before the recording can start, with what reads them."""

HEAD = "MODEL.ROI_MASK_HEAD."
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t"]
FAMILIES = [
    ("Base-MaskRCNN-FPN.yaml", [HEAD + "NAME", "MLPMaskHead", HEAD + "SCORING.ENABLED", "True"]),
    ("Base-MaskRCNN-C4.yaml", ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"]),
    ("Base-MaskRCNN-DC5.yaml", ["INPUT.CROP.ENABLED", "True"]),
    ("lvis/v1_mask_rcnn_R_50_FPN_1x.yaml", []),
    ("misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", ["SOLVER.CLIP_GRADIENTS.ENABLED", "True"]),
    ("panoptic/panoptic_fpn_R_50_1x.yaml", []),
    ("Base-Small.yaml", []),
    ("Base-Small.yaml", TIMM),
]


class Noting(dry_build._Recording):
    """Records which module reads a key."""

    readers: dict[str, set[str]] = defaultdict(set)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        frame = sys._getframe(1)
        while frame and _is_no_reader(frame.f_globals["__name__"]):
            if frame.f_code.co_name == "dump":  # reads every key, to write a file or a log
                return value
            frame = frame.f_back
        if frame and not isinstance(value, CfgNode):
            module = frame.f_globals["__name__"]
            if frame.f_code.co_name == "prediction_fingerprint":  # compares whole configs
                return value
            part = next((x for start, x in PARTS.items() if module.startswith(start)), None)
            if part:
                self.readers[vars(self)["prefix"] + key].add(part)
        return value


def _is_no_reader(module: str) -> bool:
    return module.startswith(NO_READERS) or module in OWN_NO_READERS


def known_keys() -> dict[str, Any]:
    cfg = get_cfg()
    add_mask_head_config(cfg)
    return flatten(cfg)


def plugin_keys() -> set[str]:
    return set(known_keys()) - set(flatten(get_cfg()))


def named_keys() -> set[str]:
    """Returns the plugin's keys and the keys of detectron2 that configs or pages mention."""
    named = plugin_keys()
    for path in CONFIGS.rglob("*.yaml"):
        named |= set(_dotted(yaml.safe_load(path.read_text())))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if path != TABLE:
            named |= set(re.findall(r"[A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)+", path.read_text()))
    return named & set(known_keys())


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a YAML file, including those in variants of an ablation."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield prefix + str(key)
        yield from _dotted(value, f"{prefix}{key}." if str(key).isupper() else "")


def record(folder: Path) -> dict[str, set[str]]:
    """Records what reads each key while models are built, a run trains and data sets are set up."""
    Noting.readers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_build, "_Recording", Noting)
        for name, opts in FAMILIES:
            parts = dry_build.build_parts(load_config(str(CONFIGS / name), opts), train=True)
            assert [part.error for part in parts if part.error] == []
    metadata = MetadataCatalog.get("shapes_val")
    DatasetCatalog.get("shapes_val")
    content = json.loads(Path(metadata.json_file).read_text())
    content["images"] = content["images"][:2]
    kept = [x["id"] for x in content["images"]]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    (folder / "x.json").write_text(json.dumps(content))
    own = ["test_keys", str(folder / "x.json"), metadata.image_root]
    opts = [
        *("DATASETS.COCO_FILES", f"[{own}]", "DATASETS.TRAIN", "('test_keys',)"),
        *("DATASETS.TEST", "('test_keys',)", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1"),
        *("SOLVER.CHECKPOINT_BEST_METRIC", "segm/AP", "SOLVER.CHECKPOINT_KEEP_LAST", "1"),
        *("OUTPUT_DIR", str(folder), "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)"),
        *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "1"),
        *("TEST.DETECTIONS_PER_IMAGE", "2", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001", "TEST.EVAL_LOSS", "True"),
        *("SOLVER.EARLY_STOPPING.METRIC", "validation/total_loss"),
        *("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", "96"),
        *("INPUT.COPY_PASTE.PROBABILITY", "0.5"),
    ]
    cfg = Noting.of(
        load_config(str(CONFIGS / "Base-Small.yaml"), [*SMALL_RESNET, *opts]),
        "",
        dry_build._Keys(),
    )
    try:
        register_coco_files(cfg)
        check_dataset_files(cfg)
        default_setup(cfg, Namespace(config_file="", eval_only=False))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    finally:
        DatasetCatalog.pop("test_keys", None)
        MetadataCatalog.pop("test_keys", None)
    for key, part in NOBODY.items():
        Noting.readers[key].add(part)
    return Noting.readers


def meanings() -> dict[str, str]:
    """Returns the explanation of each of the plugin's keys in ``add_mask_head_config``.

    A comment at the end of a statement explains the keys of the statement. A comment above a
    statement explains all statements up to the next empty line. Keys without a comment get the
    comment of their section.
    """
    source = textwrap.dedent(inspect.getsource(add_mask_head_config))
    lines = source.splitlines()
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    sections, found, above, last_line = {"cfg": ""}, dict[str, str](), "", 0
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            last_line = statement.end_lineno or 0
            continue
        *aliases, target = sorted(map(ast.unparse, statement.targets), key=lambda x: "." in x)
        comments = lines[last_line : statement.lineno - 1]
        if "" in comments or any(x.lstrip().startswith("#") for x in comments):
            above = " ".join(x.strip(" #") for x in comments if x.strip())
        last_line = statement.end_lineno or 0
        start, _, rest = target.partition(".")
        if start not in sections:
            continue
        name = sections[start] + rest
        sections |= dict.fromkeys(aliases, f"{name}.")
        _, _, own = lines[last_line - 1].partition("  # ")
        for key in plugin_keys():
            if key == name or key.startswith(f"{name}."):
                found[key] = f"{own[:1].upper()}{own[1:]}." if own else above
    return found


def table(readers: dict[str, set[str]]) -> str:
    told, values = meanings(), known_keys()
    page = TITLE
    for key in sorted(plugin_keys()):
        meaning = told[key].replace("``", "`").replace("|", "\\|")
        page += f"| `{key}` | `{values[key]!r}` | {_parts(readers[key])} | {meaning} |\n"
    page += STOCK_TITLE
    for key in sorted(named_keys() - plugin_keys()):
        page += f"| `{key}` | {_parts(readers[key])} |\n"
    return page


def _parts(readers: set[str]) -> str:
    return ", ".join(sorted(readers))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"))


def test_every_named_key_has_a_reader(readers):
    assert [key for key in named_keys() if not readers[key]] == []


def test_the_page_shows_who_reads_each_key(readers):
    written, expected = TABLE.read_text().splitlines(), table(readers).splitlines()
    missing = [line for line in expected if line not in written]
    assert missing == [], "run python tests/test_config_keys.py"


def test_every_key_of_the_plugin_is_explained_in_a_sentence():
    told = meanings()
    assert [key for key in plugin_keys() if len(told.get(key, "")) < 15] == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        TABLE.write_text(table(record(Path(folder))))
