"""A Mask R-CNN that returns masks as run lengths."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances

from ..ops import encode_masks
from ..shared_names import register_in
from ..structures import RLEMasks
from .graph_capture import copy_sharing_tensors, is_captured, stand_in

MASK_OUTPUTS = ("rle", "bitmask")


@register_in(META_ARCH_REGISTRY)
class MaskRCNN(GeneralizedRCNN):
    """GeneralizedRCNN that lets you choose the form of ``pred_masks`` after inference.

    ``rle`` returns an RLEMasks and never allocates image-sized masks. ``bitmask`` returns
    detectron2's (N, H, W) tensor. Training is the same as in detectron2, and so is inference
    without postprocessing, which test-time augmentation uses. Traces, scripts and exports are also
    the same, because they can contain only tensors.
    """

    @configurable
    def __init__(
        self, *, mask_output: str = "rle", datasets: CfgNode | None = None, **arguments: Any
    ) -> None:
        """
        Args:
            mask_output: "rle" or "bitmask".
            datasets: the config's DATASETS section. The checkpointer reads the order of the classes
                from it.
            arguments: arguments of GeneralizedRCNN.

        Raises:
            ValueError: if ``mask_output`` has another value.
        """
        super().__init__(**arguments)
        if mask_output not in MASK_OUTPUTS:
            raise ValueError(f"mask_output {mask_output!r} is not one of {MASK_OUTPUTS}")
        self.mask_output = mask_output
        self.datasets = datasets

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        own = {"mask_output": cfg.MODEL.MASK_OUTPUT, "datasets": cfg.DATASETS.clone()}
        return {**super().from_config(cfg), **own}

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[Any]:
        """See GeneralizedRCNN.inference."""
        if self.mask_output == "bitmask" or not do_postprocess or is_captured():
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        # Not done by overriding _postprocess, because GeneralizedRCNN.inference calls its own
        # static method instead of the subclass's.
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        outputs = []
        for x, found in zip(batched_inputs, results, strict=True):
            output_hw = x.get("height", found.image_size[0]), x.get("width", found.image_size[1])
            outputs.append({"instances": rle_postprocess(found, *output_hw)})
        return outputs

    def __prepare_scriptable__(self) -> GeneralizedRCNN:
        """Returns the module to script in place of this one; it does no postprocessing."""
        return stand_in(copy_sharing_tensors(self), GeneralizedRCNN)


def rle_postprocess(instances: Instances, output_height: int, output_width: int) -> Instances:
    """Does what detectron2's detector_postprocess does, but returns ``pred_masks`` as RLEMasks.

    Args:
        instances: detections at the size of the model's input, with or without ``pred_masks``
            (N, 1, M, M); changed in place, as in detectron2.
        output_height: in pixels.
        output_width: in pixels.

    Returns:
        The detections at the output size, without those whose box is empty at this size.
    """
    if not instances.has("pred_masks"):
        return detector_postprocess(instances, output_height, output_width)
    # detector_postprocess would paste pred_masks into the image. Under another name, it only
    # selects the probabilities of the remaining detections.
    instances.set("mask_probs", instances.pred_masks[:, 0])
    instances.remove("pred_masks")
    result = detector_postprocess(instances, output_height, output_width)
    image_hw = (output_height, output_width)
    rles = encode_masks(result.mask_probs, result.pred_boxes.tensor, image_hw)
    result.remove("mask_probs")
    result.pred_masks = RLEMasks(rles, image_hw, result.pred_boxes.device)
    return result
