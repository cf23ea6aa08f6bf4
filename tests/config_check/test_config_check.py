"""check_config refuses invalid values; the error names the key and the possible values."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from conftest import CONFIG_FILES, CONFIGS

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check import check_config
from mask_head_plugin.config_check.timm_keys import has_timm_backbone
from mask_head_plugin.config_check.unread_keys import unread_keys

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
        (
            ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "max"],
            r"ROI_BOX_HEAD.POOLER_TYPE 'max' is not one of",
        ),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", ""], r"ROI_BOX_HEAD.POOLER_TYPE '' is not one of"),
        (["MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""], r"ROI_MASK_HEAD.POOLER_TYPE '' is not one of"),
        (
            ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignRotated", *MAX_OF_MASK_HEAD],
            "ROIAlignRotated comes from detectron2 and has no POOLER_REDUCTION",
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
            "ROIAlignV2 with max needs .*PerClassMaskROIHeads.*StandardROIHeads uses",
        ),
        (
            [*("MODEL.ROI_HEADS.NAME", "PerClassMaskRes5ROIHeads"), *MAX_OF_MASK_HEAD],
            "ROIAlignV2 with max has no effect.*set it in MODEL.ROI_BOX_HEAD",
        ),
        (["MODEL.ROI_MASK_HEAD.LOSSES", "[['dise', 1.0]]"], "LOSSES.*no loss 'dise'"),
        (["MODEL.ROI_MASK_HEAD.LOSSES", "[5]"], r"LOSSES.*5 must have the form \[name, weight\]"),
        (["MODEL.ROI_MASK_HEAD.LOSS_PARAMS.DICE.EPS", "0.0"], "LOSS_PARAMS.DICE: eps is 0.0; it"),
        (
            [*SOFTMAX, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"],
            "LOSSES: 'softmax_cross_entropy' lets classes compete.*CLS_AGNOSTIC_MASK",
        ),
        (
            [*("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"), *DICE],
            "LOSSES has no effect with .* MaskRCNNConvUpsampleHead; use FCNMaskHead",
        ),
        (
            [*("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"), *SCORING],
            "SCORING.ENABLED has no effect",
        ),
        (["MODEL.MASK_OUTPUT", "polygon"], "MODEL.MASK_OUTPUT 'polygon' is not one of"),
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
        (["INPUT.MASK_FORMAT", "rle"], "MASK_FORMAT 'rle' is not one of .*'bitmask'"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE 'gpu' is not a device"),
        (["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True"], "AMP.ENABLED True needs a CUDA"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: file nowhere.pth does not exist"),
        (["OUTPUT_DIR", "/dev/null/x"], "OUTPUT_DIR '/dev/null/x' cannot be used"),
        (
            ["OUTPUT_DIR", "s3://bucket/run"],
            "'s3://bucket/run' cannot be used: it is an address",
        ),
    ],
)
def test_invalid_values_are_refused(opts, message, tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), *opts]
    cfg = load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts)
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, train=True)


FPN, C4 = "Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml"
FIVE = re.escape("['p2', 'p3', 'p4', 'p5', 'p6']")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # values of single keys
        ("SOLVER.BASE_LR", "0.0", "is 0.0; it must be above 0"),
        ("SOLVER.BASE_LR", "1e999", "is inf; it must be above 0"),
        ("SOLVER.GAMMA", "-0.1", "is -0.1; it must be above 0"),
        ("SOLVER.WEIGHT_DECAY", "-1.0", "is -1.0; it must be at least 0"),
        ("SOLVER.MOMENTUM", "1.5", "is 1.5; it must be between 0 and 1"),
        ("SOLVER.WARMUP_ITERS", "-1", "is -1; it must be at least 0"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0", "is 0.0; it must be above 0"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x", "'x' is not one of .*'full_model'"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "'Cosine' is not one of .*'WarmupCosineLR'"),
        ("SOLVER.WARMUP_METHOD", "exp", "'exp' is not one of .*'linear'"),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.5", "is 1.5; it must be between 0 and 1"),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", "-0.5", "is -0.5; it must be between 0 and 1"),
        ("MODEL.RPN.NMS_THRESH", "70.0", "is 70.0; it must be between 0 and 1"),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.0", "is 0.0; it must be above 0"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "0", "is 0; it must be at least 1"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "0", "is 0; it must be at least 1"),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", "0", "is 0; it must be at least 1"),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", "-1", "is -1; it must be at least 1"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", "-1", "is -1; it must be at least 0"),
        ("MODEL.ROI_MASK_HEAD.CONV_DIM", "0", "is 0; it must be at least 1"),
        ("MODEL.ROI_MASK_HEAD.NORM", "BM", "'BM' is not one of .*'GN'"),
        ("MODEL.RESNETS.NORM", "BM", "'BM' is not one of .*'FrozenBN'"),
        ("MODEL.RESNETS.DEPTH", "51", "51 is not one of .*50, 101"),
        ("MODEL.FPN.FUSE_TYPE", "max", "'max' is not one of .*'avg'"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1", "'l1' is not one of .*'giou'"),
        ("INPUT.FORMAT", "XYZ", "'XYZ' is not one of .*'BGR'"),
        ("INPUT.RANDOM_FLIP", "both", "'both' is not one of .*'none'"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "all", "'all' is not one of .*'range'"),
        # names in registries
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "'RPM' is not registered; did you mean 'RPN'"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Default", "'Default' is not registered; .*'DefaultAnch"),
        ("MODEL.RPN.HEAD_NAME", "Head", "'Head' is not registered; .*'StandardRPNHead'"),
        ("MODEL.ROI_BOX_HEAD.NAME", "x", "'x' is not registered; .*'FastRCNNConvFCHead'"),
        # schedule, images, evaluation
        ("SOLVER.STEPS", "(80000, 60000)", r"\(80000, 60000\) must be numbers above 0 in asc"),
        ("INPUT.MIN_SIZE_TRAIN", "()", r"is empty; \(0,\) keeps the"),
        ("INPUT.MIN_SIZE_TRAIN", "(2000,)", "2000 is above INPUT.MAX_SIZE_TRAIN 1333.*raise INPUT"),
        ("INPUT.MIN_SIZE_TRAIN", "(-5,)", "-5 is not a number of pixels"),
        ("INPUT.MIN_SIZE_TEST", "2000", "2000 is above INPUT.MAX_SIZE_TEST 1333"),
        ("MODEL.PIXEL_MEAN", "[1.0]", r"\[1.0\] must .* of INPUT.FORMAT BGR \(channels: 3\)"),
        ("MODEL.FPN.OUT_CHANNELS", "0", "is 0; it must be at least 1"),
        ("MODEL.ROI_BOX_HEAD.CONV_DIM", "0", "is 0; it must be at least 1"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", "0", "is 0; it must be at least 1"),
        ("MODEL.RPN.LOSS_WEIGHT", "-1.0", "is -1.0; it must be at least 0"),
        ("SOLVER.BASE_LR_END", "-1.0", "is -1.0; it must be at least 0"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(0.0, 1.0, 1.0, 1.0)", "must be four.*above 0"),
        ("OUTPUT_DIR", "a\0b", "cannot be used"),
        ("MODEL.PIXEL_STD", "[-1.0, 1.0, 1.0]", "must be above 0, because"),
        ("MODEL.PIXEL_STD", "['a', 1.0, 1.0]", r"one finite .* BGR \(channels: 3\)"),
        ("DATALOADER.NUM_WORKERS", "100000", "is 100000; it must be at most 1024"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "pixels are divided by it"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "is 0, which keeps no detections; -1 keeps all"),
        # maps, anchors, matchers
        ("MODEL.RPN.IN_FEATURES", "['p2', 'p9']", f"the backbone has the maps {FIVE}, not 'p9'"),
        (
            "MODEL.ROI_HEADS.IN_FEATURES",
            "['res4']",
            f"the backbone has the maps {FIVE}, not 'res4'",
        ),
        ("MODEL.ROI_HEADS.IN_FEATURES", "[]", f"is empty; the backbone has the maps {FIVE}"),
        (
            "MODEL.ROI_HEADS.IN_FEATURES",
            "['p2', 'p4']",
            r"have strides \[4, 16\]; each stride must",
        ),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]", "has 2 lists, but .* has length 5; use"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[]", r"\[\] must be lists of numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, -8]]", "must be lists of numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.0]]", "must be lists of numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", "1.5", r"is 1.5; it must be in \[0, 1\)"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]", r"two increasing .*, e.g. \[0.3, 0.7\]"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[1.5]", r"one number .*, e.g. \[0.5\]"),
        ("MODEL.RPN.IOU_LABELS", "[0, 1]", "must have 3 entries"),
        (
            "MODEL.ROI_HEADS.IOU_LABELS",
            "[0, 5]",
            "must have 2 entries, each 0",
        ),
        (
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
            "(1.0, 1.0)",
            "must be four numbers above 0, for x, y",
        ),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0)", "must be four numbers above 0, for x, y"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(key, value, message, tmp_path):
    cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path), key, value])
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}.*{message}"):
        check_config(cfg, train=True)


PROPOSALS = ["MODEL.LOAD_PROPOSALS", "True"]
PRECOMPUTED = ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
NO_FILE = ["DATASETS.PROPOSAL_FILES_TRAIN", "('nowhere.pkl',)"]
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True"]
CROP = ["INPUT.CROP.ENABLED", "True"]
AUGMENTED = ["TEST.AUG.ENABLED", "True"]
FIXED_STEP = ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"]
REPEATS = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            FPN,
            PROPOSALS,
            "LOAD_PROPOSALS True and .* PrecomputedProposals must be set together.*RPN",
        ),
        (FPN, PRECOMPUTED, "must be set together, but they are False and PrecomputedProposals"),
        (
            FPN,
            [*PROPOSALS, *PRECOMPUTED],
            "length of DATASETS.PROPOSAL_FILES_TRAIN is 0, and .* is 1",
        ),
        (FPN, [*PROPOSALS, *PRECOMPUTED, *NO_FILE], "_TRAIN: file nowhere.pkl does not exist"),
        (FPN, KEYPOINTS, "ON is True, but data set 'coco_2017_train' .*no keypoints; set "),
        (C4, KEYPOINTS, "KEYPOINT_ON: PerClassMaskRes5ROIHeads predicts no keypoints; use"),
        (
            FPN,
            [*CROP, "INPUT.CROP.SIZE", "[2.0, 2.0]"],
            r"relative_range needs .* as fractions.*0.9",
        ),
        (FPN, [*CROP, "INPUT.CROP.TYPE", "absolute"], r"TYPE absolute needs .* in pixels.*384"),
        (FPN, [*AUGMENTED, "TEST.AUG.MIN_SIZES", "()"], "AUG.ENABLED needs TEST.AUG.MIN_SIZES"),
        (FPN, [*AUGMENTED, "TEST.AUG.MAX_SIZE", "900"], "1000 is above TEST.AUG.MAX_SIZE 900"),
        (FPN, [*FIXED_STEP, "SOLVER.NUM_DECAYS", "0"], "SOLVER.NUM_DECAYS is 0; it must be"),
        (FPN, REPEATS, "repeats no images with DATALOADER.REPEAT_THRESHOLD 0.0; set it to"),
        (FPN, ["SOLVER.REFERENCE_WORLD_SIZE", "3"], "16 is not divisible by .*SIZE 3.*or set the"),
        (
            FPN,
            ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "9"],
            "EVAL_PERIOD is 9, but DATASETS.TEST is empty: name .* or set TEST.EVAL_PERIOD to 0",
        ),
        (
            FPN,
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(640,)"],
            r"MIN_SIZE_TRAIN \(640,\) must be \(smallest, largest\) with .*range",
        ),
        (FPN, ["INPUT.FORMAT", "L"], r"PIXEL_MEAN .* INPUT.FORMAT L \(channels: 1\)"),
        (FPN, ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "needs .*CLS_AGNOSTIC_BBOX_REG True"),
        (FPN, ["MODEL.ROI_BOX_HEAD.NUM_FC", "0"], "has no layers: set its NUM_FC or NUM_CONV to"),
        (
            FPN,
            ["MODEL.ROI_HEADS.NAME", "PerClassMaskRes5ROIHeads"],
            "such as that of a ResNet-C4, .* lists 4; with an FPN, use PerClassMaskROIHeads",
        ),
        (C4, ["MODEL.ROI_HEADS.NAME", "PerClassMaskROIHeads"], "BOX_HEAD.NAME '' is not regis"),
        (FPN, ["MODEL.FPN.IN_FEATURES", "['res9']"], "NAME .* cannot be built from .*FPN: .*res9"),
        (C4, ["MODEL.RESNETS.DEPTH", "18"], "cannot be built from .*RES2_OUT_CHANNELS = 64"),
        (FPN, ["MODEL.MASK_ON", "False", *DICE], "LOSSES has no effect with MODEL.MASK_ON False"),
        (FPN, ["MODEL.MASK_ON", "False", *SCORING], "SCORING.ENABLED has no effect .*MASK_ON Fa"),
    ],
)
def test_incompatible_keys_are_refused(config, opts, message, tmp_path):
    cfg = load_config(str(CONFIGS / config), ["OUTPUT_DIR", str(tmp_path), *opts])
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, train=True)


RGB = ["INPUT.FORMAT", "RGB"]
RGB_MEAN = ["MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"]
SMALL = "Base-Small.yaml"


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            FPN,
            RGB,
            r"FORMAT is RGB, .*PIXEL_MEAN .* in BGR order; reverse it to \[123.675, 116",
        ),
        (
            FPN,
            RGB_MEAN,
            r"FORMAT is BGR, .*PIXEL_MEAN .* in RGB order; reverse it to \[103.53, 116.2",
        ),
        (SMALL, ["MODEL.PIXEL_MEAN", "[102.98, 115.947, 122.772]"], "FORMAT is RGB, .* BGR"),
        (SMALL, ["MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"], "FORMAT is RGB, .*PIXEL_STD .*BGR"),
        (SMALL, ["MODEL.PIXEL_MEAN", "[0.485, 0.456, 0.406]"], r"for pixels in \[0, 1\].*by 255"),
        (FPN, [*RGB, *RGB_MEAN], "RGB, but MODEL.WEIGHTS .*MSRA/R-50.pkl was trained on BGR; set"),
        (
            FPN,
            ["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"],
            "BGR, but MODEL.WEIGHTS .* was trained on RGB; set INPUT.FORMAT to RGB",
        ),
    ],
)
def test_wrong_colour_order_is_refused_in_training_and_reported_in_evaluation(
    config, opts, message, tmp_path, caplog
):
    shapes = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    cfg = load_config(str(CONFIGS / config), ["OUTPUT_DIR", str(tmp_path), *shapes, *opts])
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, train=True)
    check_config(cfg, train=False)
    assert "ignore this if the weights were trained that way" in caplog.text


def test_the_correct_colour_order_passes(tmp_path):
    weights = ["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"]
    opts = ["OUTPUT_DIR", str(tmp_path), *RGB, *RGB_MEAN, *weights]
    check_config(load_config(str(CONFIGS / FPN), opts), train=True)


BEST, STOPPING = "SOLVER.CHECKPOINT_BEST_METRIC", "SOLVER.EARLY_STOPPING.METRIC"
LOSS = ["TEST.EVAL_LOSS", "True"]
OFTEN = ["TEST.EVAL_PERIOD", "500"]
TWO = [*OFTEN, "DATASETS.TEST", "('coco_2017_val', 'shapes_val')"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            [BEST, "segm/AP"],
            r"needs several evaluations, .*EVAL_PERIOD 0 leads to only one.*e.g. 9000, or",
        ),
        ([BEST, "segm/AP", "TEST.EVAL_PERIOD", "90000"], "EVAL_PERIOD 90000 leads to only one"),
        (
            [*OFTEN, BEST, "segm/AP", "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0"],
            "TEST is empty",
        ),
        ([*OFTEN, BEST, "sgm/AP"], "not a metric of coco_2017_val; did you mean 'segm/AP'"),
        ([*OFTEN, BEST, "segm/ap75"], "not a metric of coco_2017_val; did you mean 'segm/AP75'"),
        ([*OFTEN, BEST, "segm/AP-persn"], "did you mean 'segm/AP-person'"),
        (
            [*OFTEN, BEST, "total_loss"],
            r"did you mean 'validation/total_loss' \(with TEST.EVAL_LOSS True\)",
        ),
        (
            [*TWO, *LOSS, BEST, "shapes_val/loss_mask"],
            r"a training loss; did you mean 'shapes_val/validation/loss_mask'\?",
        ),
        ([*OFTEN, BEST, "AP"], "not a metric of coco_2017_val; choose from bbox/AP, bbox/AP50,"),
        ([*OFTEN, BEST, "segm/AP", "MODEL.MASK_ON", "False"], "choose from bbox/AP, bbox/AP50"),
        ([*OFTEN, BEST, "semantic/mIoU"], "needs TEST.SEMANTIC_THRESHOLD above 0"),
        ([*TWO, BEST, "segm/AP"], "start with the name of one of them, e.g. coco_2017_val/segm/AP"),
        (
            [*TWO, BEST, "shape_val/segm/AP"],
            "start with the name of one of them, e.g. shapes_val/segm/AP",
        ),
        ([*OFTEN, BEST, "validation/total_loss"], "is a loss.* only with TEST.EVAL_LOSS True"),
        ([*OFTEN, *LOSS, BEST, "validation/totl_loss"], "did you mean 'validation/total_loss'"),
        (
            [*TWO, BEST, "shapes_val/segm/AP-rnig"],
            "not a metric of shapes_val; did you mean .*ring'",
        ),
    ],
)
def test_a_best_metric_that_is_never_measured_is_refused(opts, message, tmp_path):
    for key in (BEST, STOPPING):
        own = [key if text == BEST else text for text in opts]
        cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path), *own])
        with pytest.raises(ConfigError, match=f"^{key}.*{message}"):
            check_config(cfg, train=True)
        check_config(cfg, train=False) if cfg.DATASETS.TEST else None


@pytest.mark.parametrize(
    ("patience", "message"),
    [
        (0, "PATIENCE is 0; it must be at least 1"),
        (
            179,
            r"end this run: .*PATIENCE 179 and .*PERIOD 500, .* iteration 90000, .*ITER 90000",
        ),
    ],
)
def test_a_patience_that_can_never_stop_a_run_is_refused(patience, message, tmp_path):
    opts = [*OFTEN, STOPPING, "segm/AP", "SOLVER.EARLY_STOPPING.PATIENCE", str(patience)]
    cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path), *opts])
    with pytest.raises(ConfigError, match=message):
        check_config(cfg, train=True)
    cfg.SOLVER.EARLY_STOPPING.PATIENCE = 178
    check_config(cfg, train=True)


@pytest.mark.parametrize(
    "opts",
    [
        [*OFTEN, BEST, "segm/AP-traffic light"],
        [*OFTEN, BEST, "boundary/APs"],
        [*OFTEN, BEST, "semantic/mIoU", "TEST.SEMANTIC_THRESHOLD", "0.5"],
        [*OFTEN, BEST, "anything", "DATASETS.TEST", "('voc_2007_val',)"],
        [*OFTEN, *LOSS, BEST, "validation/total_loss"],
        [*OFTEN, *LOSS, BEST, "validation/loss_box_reg"],
        [*TWO, *LOSS, BEST, "shapes_val/validation/loss_mask"],
        [*OFTEN, BEST, "segm/APr", "DATASETS.TEST", "('lvis_v1_val',)"],
        [*TWO, BEST, "shapes_val/segm/AP-ring"],
    ],
)
def test_a_best_metric_that_evaluations_measure_passes(opts, tmp_path):
    check_config(load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path), *opts]), train=True)


def test_a_best_metric_may_name_a_class_of_the_users_files(tmp_path):
    image = {"id": 1, "file_name": "x.png", "height": 9, "width": 9}
    categories = [{"id": 7, "name": "cell"}]
    content = {"images": [image], "annotations": [], "categories": categories}
    (tmp_path / "x.json").write_text(json.dumps(content))
    own = ["DATASETS.COCO_FILES", f"[['own', '{tmp_path}/x.json', '{tmp_path}']]"]
    own += ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)"]
    own += ["OUTPUT_DIR", str(tmp_path), *OFTEN]
    check_config(load_config(str(CONFIGS / FPN), [*own, BEST, "segm/AP-cell"]), train=True)
    with pytest.raises(ConfigError, match="did you mean 'segm/AP-cell'"):
        check_config(load_config(str(CONFIGS / FPN), [*own, BEST, "segm/AP-cel"]), train=True)


def test_a_batch_that_processes_cannot_share_is_refused_unless_it_is_scaled(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.IMS_PER_BATCH", "16"]
    cfg = load_config(str(CONFIGS / FPN), opts)
    check_config(cfg, train=True, num_processes=8)
    with pytest.raises(
        ConfigError, match=r"IMS_PER_BATCH 16, .* divisible by .* \(3\); set it to 15"
    ):
        check_config(cfg, train=True, num_processes=3)
    check_config(cfg, train=False, num_processes=3)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    check_config(cfg, train=True, num_processes=3)


def test_a_data_set_that_would_be_evaluated_twice_is_refused(tmp_path):
    """The second result would overwrite the first, including the losses of TEST.EVAL_LOSS."""
    cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path)])
    cfg.DATASETS.TEST = ("shapes_val", "coco_2017_val", "shapes_val")
    for train in (True, False):
        with pytest.raises(ConfigError, match=r"DATASETS.TEST lists 'shapes_val' twice"):
            check_config(cfg, train=train)


def test_evaluation_requires_a_data_set(tmp_path):
    cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "()"])
    check_config(cfg, train=True)
    with pytest.raises(ConfigError, match=r"DATASETS.TEST is empty: name a data set"):
        check_config(cfg, train=False)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_every_complete_config_passes(path, tmp_path, caplog):
    cfg = load_config(str(path), ["OUTPUT_DIR", str(tmp_path)])
    if path.name == "Base-MaskRCNN.yaml":  # has neither backbone nor heads
        pytest.skip("only a base for other configs")
    if not cfg.DATASETS.TRAIN:
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_train",)
    cfg.MODEL.TIMM.CHECKPOINT = ""  # the file must be fetched before a real run
    check_config(cfg, train=True)
    unread = list(unread_keys(cfg, train=True))
    if has_timm_backbone(cfg):  # its _BASE_ also sets keys of a ResNet
        unread = [key for key in unread if not key.startswith("MODEL.RESNETS.")]
    assert unread == [] and "is not one of" not in caplog.text


@pytest.mark.parametrize("there", [".", "not/yet/there"])
def test_the_check_creates_no_file_or_folder(there, tmp_path):
    for opts in ([], ["MODEL.RESNETS.NORM", "BM"]):
        cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path / there), *opts])
        with pytest.raises(ConfigError) if opts else contextlib.nullcontext():
            check_config(cfg, train=True)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_text(""), "x is not a folder"),
        (lambda path: path.symlink_to("nothing"), "x is not a folder"),
        (lambda path: path.mkdir(), "you do not have permission to write to .*x"),
    ],
    ids=["a file", "a link to nothing", "a read-only folder"],
)
def test_an_output_folder_that_cannot_be_created_is_refused(make, told, tmp_path, monkeypatch):
    make(tmp_path / "x")
    # Imitates missing permission, because the user root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path / "x")
    cfg = load_config(str(CONFIGS / FPN), ["OUTPUT_DIR", str(tmp_path / "x" / "y")])
    with pytest.raises(ConfigError, match=rf"^OUTPUT_DIR '.*x/y' cannot be used: .*{told}"):
        check_config(cfg, train=True)


@pytest.mark.parametrize("name", ["x" * 300, "y/" + "x" * 300, "x/" * 3000, "\ud800"], ids=len)
def test_an_output_folder_with_an_impossible_name_is_refused(name, tmp_path):
    cfg = load_config(str(CONFIGS / FPN))
    cfg.OUTPUT_DIR = f"{tmp_path}/{name}"
    with pytest.raises(ConfigError, match=r"^OUTPUT_DIR '.*' cannot be used: ") as caught:
        check_config(cfg, train=True)
    assert "\n" not in str(caught.value)


def test_weights_with_a_query_are_found(tmp_path):
    (tmp_path / "x.pth").touch()
    weights = f"{tmp_path / 'x.pth'}?matching_heuristics=True"
    opts = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", weights]
    check_config(load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts), train=True)


def test_evaluation_does_not_need_a_training_set(tmp_path):
    opts = ["DATASETS.TRAIN", "()", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts)
    check_config(cfg, train=False)


def test_frozen_random_weights_are_reported(tmp_path, caplog):
    opts = ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", ""]
    check_config(load_config(str(CONFIGS / FPN), opts), train=True)
    assert "FREEZE_AT 2 keeps the first stages at random values; set FREEZE_AT to 0" in caplog.text
    caplog.clear()
    opts += ["MODEL.BACKBONE.FREEZE_AT", "0"]
    check_config(load_config(str(CONFIGS / FPN), opts), train=True)
    assert "FREEZE_AT" not in caplog.text
