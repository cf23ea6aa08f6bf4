"""Weights that fit are loaded; others raise an error that says what to do."""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from safetensors import safe_open
from torch import nn

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint import (
    MaskHeadCheckpointer,
    WeightsPolicy,
    class_names,
    export_safetensors,
)
from mask_head_plugin.checkpoint.class_rows import class_tensors
from mask_head_plugin.checkpoint.weight_fit import compare, grouped

BASES = {
    "FPN": "Base-MaskRCNN-FPN.yaml",
    "C4": "Base-MaskRCNN-C4.yaml",
    "DC5": "Base-MaskRCNN-DC5.yaml",
}
LENIENT = WeightsPolicy(strict=False)
WHOLE = WeightsPolicy(whole=True)


SMALL_HEADS = [
    *("MODEL.ROI_MASK_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.SCORING.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.SCORING.FC_DIM", "16"),
]


@functools.cache
def built(name, *opts) -> nn.Module:
    return build_model(small_config(BASES.get(name, name), *SMALL_HEADS, *opts))


def model_of(name="FPN", *opts) -> nn.Module:
    return copy.deepcopy(built(name, *opts))


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns weights of the model's shapes with values that differ from any initialisation."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(x.shape, generator=generator) + 1 if x.is_floating_point() else x + 7
        for name, x in model.state_dict().items()
    }


def load(network, path, policy=None, *, resume=False, **content):
    """Loads a file into the network. If ``content`` is given, saves it to the file first."""
    if content:
        torch.save(content, path)
    progress = {"progress": nn.Linear(1, 1)} if resume else {}
    return MaskHeadCheckpointer(network, policy=policy, **progress).load(str(path))


def differing(model, expected) -> list[str]:
    state = model.state_dict()
    return [name for name, x in expected.items() if not torch.equal(state[name], x)]


def caffe2_name(name: str) -> str:
    """Returns Caffe2's name for a tensor of detectron2's ResNet."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    for own, other in (("shortcut", "branch1"), ("conv1", "branch2a"), ("conv2", "branch2b")):
        name = re.sub(rf"^(res\d\.\d+)\.{own}", rf"\1.{other}", name)
    name = re.sub(r"^(res\d\.\d+)\.conv3", r"\1.branch2c", name).replace(".norm", "_bn")
    parts = {"_bn.weight": "_bn_gamma", "_bn.bias": "_bn_beta", ".weight": "_w"}
    for own, other in parts.items():
        name = name.replace(own, other)
    return name.replace(".", "_")


def trunk_of(model) -> dict[str, torch.Tensor]:
    """Returns made-up weights for the layers that ImageNet weights cover, by name in the model."""
    trunk = re.compile(r"backbone\.(bottom_up\.)?(stem|res\d)\.|roi_heads\.res5\.")
    found = {n: x for n, x in filled(model).items() if trunk.match(n)}
    assert len(found) > 200
    return {n: x for n, x in found.items() if not n.endswith("num_batches_tracked")}


def short(name: str) -> str:
    return re.sub(r"^(backbone\.(bottom_up\.)?|roi_heads\.)", "", name)


def imagenet_caffe2(model, path):
    arrays = {caffe2_name(short(name)): x.numpy() for name, x in trunk_of(model).items()}
    assert "res2_0_branch2a_bn_running_mean" in arrays and "conv1_w" in arrays
    extra = {"fc1000_w": np.ones((10, 4), np.float32), "conv1_b": np.ones(8, np.float32)}
    path.write_bytes(pickle.dumps({**arrays, **extra, "conv1_w_momentum": arrays["conv1_w"]}, 2))


def imagenet_torchvision(model, path):
    arrays = {short(name): x.numpy() for name, x in trunk_of(model).items()}
    arrays.update({"stem.fc.weight": np.ones((10, 4)), "stem.fc.bias": np.ones(10)})
    zoo = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(zoo))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("write", [imagenet_caffe2, imagenet_torchvision])
@pytest.mark.parametrize("name", BASES)
def test_pretrained_backbones_load_and_the_log_lists_untrained_parts(
    tmp_path, caplog, name, write, norm
):
    model = model_of(name, "MODEL.RESNETS.NORM", norm)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    write(model, tmp_path / "R-50.pkl")
    with caplog.at_level(logging.INFO):
        load(model, tmp_path / "R-50.pkl")
    trunk = trunk_of(model)
    assert differing(model, trunk) == []
    rest = {n: x for n, x in before.items() if n not in trunk}
    assert differing(model, rest) == []
    told = [r.getMessage() for r in caplog.records if r.name.startswith("mask_head_plugin")]
    assert len(told) == 1
    assert "R-50.pkl fills" in told[0] and "missing, so untrained: " in told[0]
    untrained = told[0].partition("so untrained")[2]
    assert "proposal_generator" in untrained and "roi_heads" in untrained
    assert "bottom_up" not in untrained
    assert "fc" in told[0].partition("not used")[2]


def test_old_backbones_without_statistics_load_into_frozen_batch_norm(tmp_path):
    """detectron2's FrozenBN supplies the missing statistics."""
    model = model_of("FPN", "MODEL.RESNETS.NORM", "FrozenBN")
    weights = {n: x for n, x in trunk_of(model).items() if ".running_" not in n}
    load(model, tmp_path / "old.pth", model=weights)
    assert differing(model, weights) == []


def test_a_query_enables_matching_by_name_endings(tmp_path):
    model = model_of()
    weights = {short(name): x for name, x in trunk_of(model).items()}
    torch.save(weights, tmp_path / "timm.pth")
    with pytest.raises(ConfigError, match=r"nothing in it fits .*\?matching_heuristics=True"):
        load(model, tmp_path / "timm.pth")
    load(model, f"{tmp_path / 'timm.pth'}?matching_heuristics=True")
    assert differing(model, trunk_of(model)) == []
    with pytest.raises(ConfigError, match=r"timm\.pth: unknown option revision.* after the '\?'"):
        load(model, f"{tmp_path / 'timm.pth'}?revision=2")


@pytest.mark.parametrize("by_ends", [True, False])
def test_a_partly_filled_module_is_an_error_unless_lenient(tmp_path, caplog, by_ends):
    model = model_of()
    weights = trunk_of(model)
    gone = [name for name in weights if ".res3.1." in name]
    kept = {n: x for n, x in weights.items() if n not in gone}
    content = {"model": {short(n): x for n, x in kept.items()} if by_ends else kept}
    content["matching_heuristics"] = by_ends
    with pytest.raises(ConfigError) as caught:
        load(model, tmp_path / "half.pth", **content)
    told = str(caught.value)
    assert "half.pth does not fit" in told
    assert "15 parameters of its backbone are missing: backbone.bottom_up.res3.1." in told
    assert "MODEL.WEIGHTS_STRICT False" in told and "\n" not in told and len(told) < 800
    fresh = model_of()
    load(fresh, tmp_path / "half.pth", LENIENT)
    assert differing(fresh, kept) == []
    assert "res3.1" in caplog.text and "only what fits is loaded" in caplog.text


@pytest.mark.parametrize("by_ends", [True, False])
def test_a_backbone_of_another_shape_is_an_error_unless_lenient(tmp_path, by_ends):
    wide = model_of("FPN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "12")
    weights = trunk_of(wide)
    content = {"model": {short(n): x for n, x in weights.items()} if by_ends else weights}
    content["matching_heuristics"] = by_ends
    shape = r"\(\d+, \d+, \d, \d\)"
    place = rf"backbone\.bottom_up\.\S+\.weight is {shape} in the file and {shape} in the model"
    with pytest.raises(ConfigError, match=rf"wide\.pth does not fit .*of another shape: .*{place}"):
        load(model_of(), tmp_path / "wide.pth", **content)
    model = model_of()
    load(model, tmp_path / "wide.pth", LENIENT)
    fitting = {n: x for n, x in weights.items() if x.shape == model.state_dict()[n].shape}
    assert differing(model, fitting) == []


@pytest.mark.parametrize("name", BASES)
def test_detectors_in_all_formats_load_completely(tmp_path, caplog, name):
    model = model_of(name)
    weights = filled(model)
    old = {
        "pixel_mean": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
    }
    arrays = {n: x.numpy() for n, x in {**weights, **old}.items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    torch.save({"model": {f"module.{n}": x for n, x in weights.items()}}, tmp_path / "ddp.pth")
    torch.save({**weights, **old}, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    untracked = {n: x for n, x in weights.items() if not n.endswith("num_batches_tracked")}
    torch.save({"model": untracked, "ema_state": weights}, tmp_path / "untracked.pth")
    export_safetensors(tmp_path / "ddp.pth", tmp_path / "a.safetensors")
    for file in ("zoo.pkl", "ddp.pth", "bare.pth", "untracked.pth", "a.safetensors"):
        fresh = model_of(name)
        load(fresh, tmp_path / file, WHOLE)
        assert differing(fresh, untracked) == [], file
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def broken(weights, fault):
    weights = dict(weights)
    name = "roi_heads.mask_head.mask_fcn1.weight"
    match fault:
        case "missing":
            del weights[name]
        case "not in the model":
            weights["roi_heads.keypoint_head.conv.weight"] = torch.ones(2)
        case "of another shape":
            weights[name] = weights[name][:3]
    return weights


@pytest.mark.parametrize("fault", ["missing", "not in the model", "of another shape"])
@pytest.mark.parametrize("policy", [WeightsPolicy(), WHOLE], ids=["train", "evaluate"])
def test_a_detector_that_does_not_fit_is_an_error_unless_lenient(tmp_path, caplog, fault, policy):
    model = model_of()
    weights = filled(model)
    content = {"model": broken(weights, fault)}
    with pytest.raises(ConfigError) as caught:
        load(model, tmp_path / "other.pth", policy, **content)
    told = str(caught.value)
    assert "other.pth does not fit the model" in told and f"1 {fault}: roi_heads." in told
    assert "use weights trained with this config, or set MODEL.WEIGHTS_STRICT False" in told
    fresh = model_of()
    load(fresh, tmp_path / "other.pth", LENIENT)
    same = {n: x for n, x in weights.items() if "mask_fcn1.weight" not in n}
    assert differing(fresh, same) == []
    assert fault in caplog.text


def test_long_lists_of_names_are_grouped_by_module(tmp_path):
    weights = filled(model_of())
    fewer = {n: x for n, x in weights.items() if not n.startswith(("roi_heads", "backbone.fpn"))}
    with pytest.raises(ConfigError) as caught:
        load(model_of(), tmp_path / "fewer.pth", model=fewer)
    told = str(caught.value)
    assert "backbone.fpn_lateral2 (2)" in told and "roi_heads.mask_head (12)" in told
    assert len(told) < 600 and "\n" not in told
    names = [f"a.{i}.b.{j}" for i in range(3) for j in range(50)]
    assert grouped(names) == "a.0.b (50), a.1.b (50), a.2.b (50)"
    assert grouped([f"a.{i}.b" for i in range(19)]) == "a (19)"
    assert grouped([f"x{i}" for i in range(18)]).endswith(" and 6 more")


def test_evaluation_refuses_backbone_weights(tmp_path):
    model = model_of()
    imagenet_caffe2(model, tmp_path / "R-50.pkl")
    with pytest.raises(ConfigError, match=r"R-50\.pkl does not fit .*missing: .*roi_heads"):
        load(model, tmp_path / "R-50.pkl", WHOLE)


@pytest.mark.parametrize("fault", ["missing", "not in the model", "of another shape"])
def test_a_run_is_never_resumed_with_weights_that_do_not_fit(tmp_path, fault):
    content = {"model": broken(filled(model_of()), fault), "progress": nn.Linear(1, 1).state_dict()}
    with pytest.raises(ConfigError, match="resume with the config of that run, or start a new run"):
        load(model_of(), tmp_path / "last.pth", LENIENT, resume=True, **content)


def test_a_failed_load_does_not_affect_the_next(tmp_path):
    model = model_of()
    weights = filled(model)
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "bad.pth")
    torch.save({"model": weights}, tmp_path / "good.pth")
    checkpointer = MaskHeadCheckpointer(model)
    with pytest.raises(ConfigError, match="nothing in it fits"):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))
    assert differing(model, weights) == []


def test_compare_reports_each_kind_of_mismatch():
    own = {"a.w": torch.Size([2]), "a.b": torch.Size([2]), "c": torch.Size([1])}
    found = {"a.w": torch.Size([2]), "a.b": torch.Size([3]), "x": torch.Size([1])}
    fit = compare(found, own, ["a.b", "c"])
    assert fit.fitting == ["a.w"] and fit.missing == ["c"] and fit.unexpected == ["x"]
    assert fit.wrong_shape == {"a.b": ((3,), (2,))}
    ends = compare({"w": torch.Size([9])}, own, ["a.w"], by_ends=True)
    assert list(ends.wrong_shape) == ["a.w"] and not ends.unexpected


CLASSES = ["ant", "bee", "cat", "dog", "eel"]
CASCADE = "misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
HEADS = {
    "FPN": ("FPN",),
    "C4": ("C4",),
    "one box": ("FPN", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    "one mask": ("FPN", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
    "mlp": ("FPN", "MODEL.ROI_MASK_HEAD.NAME", "MLPMaskHead"),
    "scoring": ("FPN", "MODEL.ROI_MASK_HEAD.SCORING.ENABLED", "True"),
    "cascade": (CASCADE,),
}


def with_classes(head, names):
    name, *opts = HEADS[head]
    return model_of(name, *opts, "MODEL.ROI_HEADS.NUM_CLASSES", str(len(names)))


def rows(state, tensors, names):
    """Returns the rows of each class and of the background, by tensor and class name."""
    found = {}
    for tensor, num_background in tensors.items():
        weight = state[tensor]
        by_class = weight[: len(weight) - num_background].unflatten(0, (len(names), -1))
        found.update({(tensor, name): by_class[i] for i, name in enumerate(names)})
        if num_background:
            found[tensor, "background"] = weight[-1:]
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "names",
    [
        ["eel", "ant", "bee", "dog", "cat"],
        ["bee", "fox", "ant"],
        ["fox", *CLASSES, "gnu"],
        ["cat"],
        ["fox"],
    ],
    ids=["order", "some new", "more", "one", "another one"],
)
def test_rows_are_assigned_to_the_class_with_the_same_name(tmp_path, caplog, head, names):
    source = with_classes(head, CLASSES)
    weights = filled(source)
    model = with_classes(head, names)
    start = {n: x.clone() for n, x in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load(model, tmp_path / "a.pth", WeightsPolicy(names), model=weights, class_names=CLASSES)
    tensors = class_tensors(source)
    agnostic = {"one box": "bbox_pred", "one mask": "mask_head"}.get(head, "nothing")
    assert not any(agnostic in tensor for tensor in tensors)
    assert len(tensors) == {"FPN": 6, "C4": 6, "mlp": 6, "scoring": 8, "cascade": 8}.get(head, 4)
    assert set(tensors) <= set(class_tensors(model))
    found, expected, fresh = (
        rows(state, tensors, own)
        for state, own in ((model.state_dict(), names), (weights, CLASSES), (start, names))
    )
    for key, values in found.items():
        assert torch.equal(values, expected.get(key, fresh.get(key))), key
    rest = {n: x for n, x in weights.items() if n not in tensors}
    assert differing(model, rest) == []
    told = caplog.text
    for name in names:
        part = "found: " if name in CLASSES else "new: "
        assert name in told.partition(part)[2]
    assert ("moved" in told) == (names != ["fox"])
    assert ("another order" in told) == (sorted(names) == CLASSES)


def test_classes_in_the_same_order_are_not_moved(tmp_path, caplog):
    model, policy = model_of(), WeightsPolicy(CLASSES)
    weights = filled(model)
    with caplog.at_level(logging.INFO):
        load(model, tmp_path / "a.pth", policy, model=weights, class_names=CLASSES)
    assert differing(model, weights) == [] and "matched by name" not in caplog.text


@pytest.mark.parametrize("named", ["neither", "file", "data"])
def test_another_number_of_classes_without_names_is_an_error_with_advice(tmp_path, named):
    content = {"model": filled(with_classes("FPN", CLASSES))}
    if named == "file":
        content["class_names"] = CLASSES
    policy = WeightsPolicy(["cat", "dog"] if named == "data" else None)
    with pytest.raises(ConfigError) as caught:
        load(with_classes("FPN", ["cat", "dog"]), tmp_path / "five.pth", policy, **content)
    told = str(caught.value)
    assert "five.pth does not fit" in told
    assert (
        "roi_heads.box_predictor.cls_score.weight is (6, 32) in the file and (3, 32) in the model"
        in told
    )
    assert "MODEL.WEIGHTS_STRICT False" in told
    missing = "data set does not name" if named == "file" else "file does not name its classes"
    assert missing in told
    model = with_classes("FPN", ["cat", "dog"])
    load(model, tmp_path / "five.pth", LENIENT)
    tensors = class_tensors(model)
    rest = {n: x for n, x in content["model"].items() if n not in tensors}
    assert differing(model, rest) == []


def test_a_resumed_run_cannot_change_its_classes(tmp_path):
    content = {"model": filled(model_of()), "class_names": CLASSES, "progress": {}}
    for names in (CLASSES[::-1], [*CLASSES[:4], "fox"]):
        with pytest.raises(ConfigError, match="cannot be resumed with other classes"):
            load(model_of(), tmp_path / "last.pth", WeightsPolicy(names), resume=True, **content)


def test_evaluation_accepts_another_class_order_but_no_untrained_class(tmp_path):
    content = {"model": filled(model_of()), "class_names": CLASSES}
    load(model_of(), tmp_path / "a.pth", WeightsPolicy(CLASSES[::-1], whole=True), **content)
    policy = WeightsPolicy([*CLASSES[:4], "fox"], whole=True)
    with pytest.raises(ConfigError, match=r"a\.pth was not trained on all classes .*new: fox"):
        load(model_of(), tmp_path / "a.pth", policy)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "a", "b", "c", "d"], "has 'a' twice"),
        (["a", "b"], r"names 2 classes, but .*cls_score.* has 6 rows, not 3"),
        ("abcde", "is not a list of names"),
        ([1, 2], "is not a list of names"),
    ],
)
def test_invalid_class_names_are_an_error(tmp_path, names, told):
    with pytest.raises(ConfigError, match=rf"a\.pth.* {told}"):
        content = {"model": filled(model_of()), "class_names": names}
        load(model_of(), tmp_path / "a.pth", WeightsPolicy(CLASSES), **content)


def test_checkpoints_and_exported_weights_contain_their_class_names(tmp_path):
    cfg = small_config(BASES["FPN"])
    policy = WeightsPolicy.from_config(cfg, train=True)
    names = MetadataCatalog.get("shapes_train").thing_classes
    assert class_names(cfg) == names == list(policy.class_names)
    model = model_of()
    checkpointer = MaskHeadCheckpointer(model, str(tmp_path), policy=policy)
    checkpointer.save("model_final")
    checkpointer.save_weights("model_best")
    for name in ("model_final", "model_best"):
        export_safetensors(tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors")
        for suffix in ("pth", "safetensors"):
            fresh = model_of()
            reverse = WeightsPolicy(names[::-1])
            load(fresh, tmp_path / f"{name}.{suffix}", reverse)
            tensors = class_tensors(model)
            found = rows(fresh.state_dict(), tensors, names[::-1])
            for key, values in rows(model.state_dict(), tensors, names).items():
                assert torch.equal(found[key], values)


def test_export_can_add_missing_class_names(tmp_path, monkeypatch, capsys):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pth")
    output = tmp_path / "a.safetensors"

    def export(dataset):
        arguments = [str(tmp_path / "a.pth"), str(output), "--classes-of", dataset]
        monkeypatch.setattr(sys, "argv", ["export_weights.py", *arguments])
        runpy.run_path(str(ROOT / "tools" / "export_weights.py"), run_name="__main__")

    export("coco_2017_train")
    with safe_open(output, "pt") as file:
        assert '"toothbrush"' in file.metadata()["class_names"]
    with pytest.raises(ConfigError, match=r"a\.safetensors already names its classes \(person"):
        export_safetensors(output, tmp_path / "b.safetensors", class_names=["cat"])
    with pytest.raises(SystemExit) as ended:
        export("coco_2071")
    assert ended.value.code == 2, "must be the exit code of train_net.py and the other tools"
    assert "--classes-of coco_2071" in capsys.readouterr().err
    # The data set has not been loaded yet, so its metadata has no classes.
    categories = [{"id": 7, "name": "fox"}, {"id": 2, "name": "owl"}]
    annotations = tmp_path / "own.json"
    content = {"images": [], "annotations": [], "categories": categories}
    annotations.write_text(json.dumps(content))
    register_coco_instances("own_classes", {}, str(annotations), "")
    try:
        export("own_classes")
    finally:
        DatasetCatalog.remove("own_classes")
        MetadataCatalog.remove("own_classes")
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["owl", "fox"]


def test_class_names_are_used_only_if_they_match_the_model():
    cfg = small_config(BASES["FPN"])
    assert class_names(cfg, "TEST") == list(MetadataCatalog.get("shapes_val").thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    assert class_names(cfg) is None
    for datasets in ((), ("not_registered",)):
        cfg.DATASETS.TRAIN = datasets
        assert class_names(cfg) is None
