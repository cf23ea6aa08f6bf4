"""The user's project takes precedence for registered names, in any order of registration."""

from __future__ import annotations

import logging

import pytest
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.utils.registry import Registry

from mask_head_plugin import modeling
from mask_head_plugin.shared_names import register_dataset, register_in, registered_name


def made(name: str, module: str) -> type:
    return type(name, (), {"__module__": module})


@pytest.mark.parametrize("own_first", [True, False])
def test_the_users_registration_takes_precedence_in_either_order(own_first, caplog):
    registry = Registry("META_ARCH")
    own = made("MaskRCNN", "mask_head_plugin.modeling.rcnn")
    theirs = made("MaskRCNN", "their_project.models")
    if own_first:
        register_in(registry)(own)
        registry.register(theirs)
    else:
        registry.register()(theirs)
        register_in(registry)(own)
    assert registry.get("MaskRCNN") is theirs
    assert registry.get("mask_head_plugin.MaskRCNN") is own
    assert registered_name(registry, own) == "mask_head_plugin.MaskRCNN"
    (text,) = caplog.messages
    assert text == (
        "the name MaskRCNN is used by their_project.models, so this package's object is registered "
        "as 'mask_head_plugin.MaskRCNN' in the META_ARCH registry"
    )


def test_two_user_objects_with_the_same_name_are_refused():
    registry = Registry("META_ARCH")
    register_in(registry)(made("MaskRCNN", "mask_head_plugin.modeling.rcnn"))
    registry.register(made("MaskRCNN", "their_project.models"))
    with pytest.raises(AssertionError, match="'MaskRCNN' was already registered in 'META_ARCH'"):
        registry.register(made("MaskRCNN", "their_project.others"))


@pytest.mark.parametrize(
    ("registry", "own"),
    [
        (META_ARCH_REGISTRY, modeling.MaskRCNN),
        (ROI_MASK_HEAD_REGISTRY, modeling.FCNMaskHead),
        (BACKBONE_REGISTRY, modeling.build_small_resnet_fpn_backbone),
    ],
)
def test_the_packages_names_yield_in_detectron2s_registries(registry, own, monkeypatch):
    monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    theirs = made(own.__name__, "their_project")
    registry.register(theirs)
    assert registry.get(own.__name__) is theirs


@pytest.fixture
def shapes():
    """Yields the name of a data set that this package has registered."""
    name = "test_their_shapes"
    register_dataset(name, lambda: [{"ours": 1}], evaluator_type="coco", thing_classes=["ring"])
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_a_data_set_of_the_user_replaces_the_packages(shapes, caplog):
    DatasetCatalog.register(shapes, lambda: [{"theirs": 1}])
    assert DatasetCatalog.get(shapes) == [{"theirs": 1}]
    MetadataCatalog.get(shapes).set(thing_classes=["cell"], json_file="x.json")
    assert MetadataCatalog.get(shapes).as_dict() == {
        "name": shapes,
        "thing_classes": ["cell"],
        "json_file": "x.json",
    }
    assert f"data set {shapes} of this package is no longer registered" in caplog.text
    with pytest.raises(AssertionError, match="already registered"):
        DatasetCatalog.register(shapes, list)


def test_the_user_may_set_metadata_before_registering_the_data_set(shapes):
    metadata = MetadataCatalog.get(shapes)
    metadata.set(evaluator_type="coco", thing_classes=["cell"])
    DatasetCatalog.register(shapes, list)
    assert type(metadata) is Metadata and metadata is MetadataCatalog.get(shapes)
    assert metadata.as_dict() == {
        "name": shapes,
        "evaluator_type": "coco",
        "thing_classes": ["cell"],
    }
    metadata.stuff_classes = ["sky"]
    with pytest.raises(AssertionError, match="cannot be set"):
        metadata.thing_classes = ["tree"]


def test_coco_instances_of_the_user_replace_the_packages_data_set(shapes):
    register_coco_instances(shapes, {"thing_classes": ["cell"]}, "cells.json", "cells/")
    assert MetadataCatalog.get(shapes).json_file == "cells.json"


def test_metadata_set_by_detectron2_does_not_replace_the_data_set(shapes):
    MetadataCatalog.get(shapes).thing_classes = ["ring"]
    MetadataCatalog.get(shapes).thing_colors = [(1, 2, 3)]
    assert DatasetCatalog.get(shapes) == [{"ours": 1}]
    assert MetadataCatalog.get(shapes).evaluator_type == "coco"


def test_the_package_does_not_replace_an_existing_name(caplog):
    DatasetCatalog.register("test_taken", list)
    try:
        register_dataset("test_taken", lambda: [{}], evaluator_type="coco")
        assert DatasetCatalog.get("test_taken") == []
        assert "test_taken" not in MetadataCatalog
        assert "already exists and is kept" in caplog.text
    finally:
        DatasetCatalog.remove("test_taken")


def test_the_embedded_data_set_yields_to_the_users():
    assert type(MetadataCatalog.get("shapes_train")).__name__ == "_YieldingMetadata"
    assert logging.getLogger("mask_head_plugin").parent is logging.getLogger("detectron2")
