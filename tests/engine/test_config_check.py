"""check_config: values that no model answers to are refused with the key and what it could be."""

from __future__ import annotations

import pytest
from conftest import CONFIG_FILES, CONFIGS

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.engine import check_config

SOFTMAX = ("MODEL.ROI_MASK_HEAD.LOSSES", "[['softmax_cross_entropy', 1.0]]")
SCORING = ("MODEL.ROI_MASK_HEAD.SCORING.ENABLED", "True")
DICE = ("MODEL.ROI_MASK_HEAD.LOSSES", "[['dice', 1.0]]")
MAX_OF_MASK_HEAD = ("MODEL.ROI_MASK_HEAD.POOLER_REDUCTION", "max")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "GeneralisedRCNN"], "did you mean 'GeneralizedRCNN'"),
        (["MODEL.BACKBONE.NAME", "zzz"], "MODEL.BACKBONE.NAME 'zzz' is not registered; choose"),
        (["MODEL.ROI_HEADS.NAME", "PerClassMaskRoIHeads"], "did you mean 'PerClassMaskROIHeads'"),
        (["MODEL.ROI_MASK_HEAD.NAME", "FCNMaskHed"], "did you mean 'FCNMaskHead'"),
        (
            ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "RoIAlign"],
            r"ROI_MASK_HEAD.POOLER_TYPE 'RoIAlign' is",
        ),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "max"], r"ROI_BOX_HEAD.POOLER_TYPE 'max' is none of"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", ""], r"ROI_BOX_HEAD.POOLER_TYPE '' is none of"),
        (["MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""], r"ROI_MASK_HEAD.POOLER_TYPE '' is none of"),
        (
            ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignRotated", *MAX_OF_MASK_HEAD],
            "ROIAlignRotated is detectron2's and has no POOLER_REDUCTION",
        ),
        (
            ["MODEL.ROI_BOX_HEAD.POOLER_REDUCTION", "median"],
            r"ROI_BOX_HEAD: unknown POOLER_REDUCTION 'median'; choose from \('mean', 'max'\)",
        ),
        (
            [*("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "PrROIPool"), *MAX_OF_MASK_HEAD],
            "ROI_MASK_HEAD: PrROIPool integrates",
        ),
        (
            [*("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), *MAX_OF_MASK_HEAD],
            "ROIAlignV2 with max needs .*PerClassMaskROIHeads.*StandardROIHeads has",
        ),
        (
            [*("MODEL.ROI_HEADS.NAME", "PerClassMaskRes5ROIHeads"), *MAX_OF_MASK_HEAD],
            "ROIAlignV2 with max has no effect.*set it in MODEL.ROI_BOX_HEAD",
        ),
        (["MODEL.ROI_MASK_HEAD.LOSSES", "[['dise', 1.0]]"], "LOSSES.*no loss 'dise'"),
        (["MODEL.ROI_MASK_HEAD.LOSSES", "[5]"], r"LOSSES.*5 is not \[name, weight\]"),
        (["MODEL.ROI_MASK_HEAD.LOSS_PARAMS.DICE.EPS", "0.0"], "LOSS_PARAMS.DICE: eps is 0.0; it"),
        (
            [*SOFTMAX, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"],
            "LOSSES: 'softmax_cross_entropy' lets classes compete.*CLS_AGNOSTIC_MASK",
        ),
        (
            [*("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"), *DICE],
            "LOSSES has no effect with .* MaskRCNNConvUpsampleHead; it needs FCNMaskHead",
        ),
        (
            [*("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"), *SCORING],
            "SCORING.ENABLED has no effect",
        ),
        (["MODEL.MASK_OUTPUT", "polygon"], "MODEL.MASK_OUTPUT 'polygon' is none of"),
        (
            ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
            "MASK_OUTPUT rle needs .* MaskRCNN; with GeneralizedRCNN it must be bitmask",
        ),
        (["MODEL.ROI_MASK_HEAD.NUM_FC", "0"], "NUM_FC is 0; it must be at least 1"),
        (["MODEL.ROI_MASK_HEAD.SCORING.FC_DIM", "-3"], "SCORING.FC_DIM is -3; it must be"),
        (["MODEL.ROI_MASK_HEAD.LOSS_WEIGHT", "1e999"], "LOSS_WEIGHT is inf; it must be"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "0"], "NUM_CLASSES is 0; it must be at least 1"),
        (["SOLVER.MAX_ITER", "-5"], "SOLVER.MAX_ITER is -5"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "0"], "POOLER_RESOLUTION is 0"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "(3,)"], r"DATASETS.TEST \(3,\) is not a list of names"),
        (["INPUT.MASK_FORMAT", "rle"], "MASK_FORMAT 'rle' is not polygon or bitmask"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE 'gpu' is not a device"),
        (["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True"], "AMP.ENABLED needs a CUDA device"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: file nowhere.pth does not exist"),
        (["OUTPUT_DIR", "/dev/null/x"], "OUTPUT_DIR '/dev/null/x' cannot be written"),
    ],
)
def test_impossible_values_are_refused(opts, message, tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), *opts]
    cfg = load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts)
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, train=True)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_every_config_passes(path, tmp_path):
    cfg = load_config(str(path), ["OUTPUT_DIR", str(tmp_path)])
    check_config(cfg, train=bool(cfg.DATASETS.TRAIN))


def test_weights_with_options_behind_them_are_found(tmp_path):
    (tmp_path / "x.pth").touch()
    weights = f"{tmp_path / 'x.pth'}?matching_heuristics=True"
    opts = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", weights]
    check_config(load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts), train=True)


def test_evaluation_needs_no_training_set(tmp_path):
    opts = ["DATASETS.TRAIN", "()", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts)
    check_config(cfg, train=False)
